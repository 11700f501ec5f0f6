"""A corpus as Arrow tables: a folder of files, a glob, or a manifest that names them.

Nothing here opens a video. What cannot be an input (a link out of the corpus, a device, a bad row, a folder that may not
be listed) stays a row with its class and reason, so that the books account for every entry.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError, TransientIO
from pipeline.manifest import ROWS, read_manifest
from pipeline.manifest_formats import FORMATS
from pipeline.patterns import pattern_part, translate
from pipeline.storage import Entry, Store

_CHUNK_ROWS = 2**16
_LEAVES = r"^/|^[A-Za-z]:[\\/]|^[A-Za-z][A-Za-z0-9+.-]*://|(^|/)\.\.(/|$)"
_LEAVES_ON_THE_WEB = r"(?i)(^|/|\\|%2f|%5c)(\.|%2e){2}(/|\\|%2f|%5c|[?#;]|$)"
_ODD_PARTS = r"(^|/)\.?(/|$)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """What a corpus names. `tables` (schema `ROWS`, any order) can be read once; a good row's `path` is below `store`.

    A manifest's paths are taken at their word: `examine` looks at the files themselves.
    """

    store: Store
    tables: Iterator[pa.Table]


def open_corpus(corpus: str | Path, *, root: str | None = None, include: str = "*", spans: bool = False) -> Corpus:
    """The corpus that a folder, a glob or a manifest names; it is listed only when its tables are read.

    Args:
        corpus: a folder or a manifest (.txt, .csv, .jsonl, .parquet; see `read_manifest`), on a disk or a URL; or a glob
            such as `videos/**/*.mp4` or `s3://bucket/x/*.mp4`, whose root is its longest part without a pattern.
        root: folder or URL that a manifest's paths are relative to; None: the manifest's own folder.
        include: glob that the relative path of a file must match from its right, for folders. Hidden files never match.
        spans: rows are spans of videos, and need `start_s` and `end_s`.

    Raises:
        ConfigError: there is no such corpus, or it does not fit the other arguments; from the tables, the manifest
            cannot be read or names spans where none are asked for, or the folder itself may not be listed.
        TransientIO: from the tables, the disk fails while a folder is listed.
    """
    base, query = _split_query(str(corpus))
    pattern = "" if _is_there(base) else pattern_part(base)
    is_manifest = not pattern and PurePosixPath(base).suffix.lower() in FORMATS and not Path(base).is_dir()
    if (
        "://" not in base
        and not pattern
        and not (Path(base).is_file() if is_manifest else base and Path(base).is_dir())
    ):
        raise ConfigError(
            f"corpus {corpus}: no such folder or manifest; give a folder of videos, a glob such as 'videos/**/*.mp4', or a "
            "manifest (.txt, .csv, .jsonl, .parquet) with a column 'video'"
        )
    if is_manifest:
        folder, name = _split_name(base)
        store = _store(root or folder + query)
        tables = _located(read_manifest(_store(folder + query), name), store, root or folder)
        return Corpus(store=store, tables=_check_spans(tables, f"manifest {corpus}", spans))
    if root or spans:
        given = "--root is for manifests" if root else "clips.mode = manifest needs a manifest with start_s and end_s"
        raise ConfigError(f"corpus {corpus} is no manifest (.txt, .csv, .jsonl, .parquet); {given}")
    store = _store((base.removesuffix(pattern).rstrip("/") or ("/" if base.startswith("/") else ".")) + query)
    expressions = [f"^(?s:.*/)?{translate(include)}$", *([f"^{translate(pattern)}$"] if pattern else [])]
    return Corpus(store=store, tables=_listed(store, expressions))


Examine = Callable[[str], Entry | tuple[str, str]]
"""From a path to its size and time, or the class and reason of its reject."""


def make_examine(root: Path) -> Examine:
    """What examines the files below the resolved folder `root`.

    One `lstat` a file, and a look for links once a folder: what a folder leads to is remembered for the latest 131,072.
    """

    base = str(root).rstrip("/") + "/"

    @lru_cache(maxsize=2**17)
    def resolve(folder: str) -> str:
        return os.path.realpath(base + folder)

    def examine(path: str) -> Entry | tuple[str, str]:
        try:
            folder, _, name = path.rpartition("/")
            place = f"{resolve(folder)}/{name}"
            status = os.lstat(place)
            is_link = stat.S_ISLNK(status.st_mode)
            if is_link:
                place = os.path.realpath(place)
            if not f"{place}/".startswith(base):
                return "outside-corpus", f"leads to a place outside of {root.name}/"
            if is_link:
                status = os.lstat(place)
        except (OSError, ValueError) as error:
            return "unreadable", f"cannot be examined: {getattr(error, 'strerror', None) or error}"
        if not stat.S_ISREG(status.st_mode):
            return "unreadable", "not a regular file"
        return Entry(name=path, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)

    return examine


def _is_there(place: str) -> bool:
    return "://" not in place and os.path.lexists(place)


def _split_query(corpus: str) -> tuple[str, str]:
    """An object store's options stand behind a `?`, which is no pattern in a URL."""
    base, mark, query = corpus.partition("?") if "://" in corpus else (corpus, "", "")
    return (base.rstrip("/") or base[:1]), mark + query


def _split_name(base: str) -> tuple[str, str]:
    if "://" in base:
        folder, _, name = base.rpartition("/")
        return folder, name
    path = Path(base).resolve()
    return str(path.parent), path.name


def _store(place: str) -> Store:
    return Store.at(place if "://" in place else Path(place).resolve())


def _listed(store: Store, expressions: list[str]) -> Iterator[pa.Table]:
    closed: list[tuple[str, str]] = []
    names = _walk(store.path(), closed) if store.is_local else ((entry.name, entry) for entry in store.walk())
    while chunk := list(islice(names, _CHUNK_ROWS)):
        yield _match(chunk, expressions)
    if closed:  # whatever the expressions: any file may lie in there
        rows = [
            {"row": 0, "path": _text(path), "reject_class": "unreadable", "reason": reason} for path, reason in closed
        ]
        yield pa.Table.from_pylist(rows, schema=ROWS)


def _match(chunk: list[tuple[str, Entry | None]], expressions: list[str]) -> pa.Table:
    paths = [_text(name) for name, _ in chunk]
    strange = [path != name for path, (name, _) in zip(paths, chunk, strict=True)]
    columns = {
        "row": [0] * len(chunk),
        "path": paths,
        "size_bytes": [entry and entry.size_bytes for _, entry in chunk],
        "mtime_ns": [entry and entry.mtime_ns for _, entry in chunk],
        "reject_class": ["unreadable" if one else None for one in strange],
        "reason": ["its name is not UTF-8; rename it" if one else None for one in strange],
    }
    table = pa.table([pa.array(columns.get(f.name, [None] * len(chunk)), f.type) for f in ROWS], schema=ROWS)
    for expression in (*expressions, r"^[^.]([^/]|/[^.])*$"):  # the last one: no part is hidden
        table = table.filter(pc.match_substring_regex(table["path"], expression))
    return table


def _text(name: str) -> str:
    """A file's name with what is not UTF-8 in it spelled out."""
    return name.encode(errors="backslashreplace").decode()


def _walk(root: Path, closed: list[tuple[str, str]]) -> Iterator[tuple[str, None]]:
    """Names of files and of links to folders; folders below the root that may not be listed go to `closed`, with why."""

    def note(error: OSError) -> None:
        why = f"cannot be listed: {error.strerror}"
        if not isinstance(error, PermissionError):  # it may pass, and a part of the corpus would be missing unseen
            raise TransientIO(f"folder {error.filename} {why}") from error
        if Path(error.filename) == root:
            raise ConfigError(f"corpus {root} {why}")
        closed.append((Path(error.filename).relative_to(root).as_posix(), f"a folder that {why}"))

    for folder, folders, files in os.walk(root, onerror=note):  # links to folders are listed below, never followed
        relative = Path(folder).relative_to(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in [*files, *links]:
            yield (relative / name).as_posix(), None


def _located(tables: Iterable[pa.Table], store: Store, given: str) -> Iterator[pa.Table]:
    """The tables with paths relative to `store`; rows that lead out of it are rejected."""
    prefixes = {f"{_split_query(place)[0].rstrip('/')}/" for place in (store.url, given)}
    if store.is_local:
        prefixes = {f"{Path(prefix).absolute()}/".replace("//", "/") for prefix in prefixes}
        prefixes |= {f"file://{prefix}" for prefix in prefixes}
    for table in tables:
        path = table["path"].combine_chunks()
        for prefix in prefixes:
            below = pc.starts_with(path, prefix)
            if pc.any(below).as_py():
                path = pc.if_else(below, pc.utf8_slice_codeunits(path, len(prefix)), path)
        outside = pc.match_substring_regex(path, _LEAVES)
        if store.url.startswith("http"):
            outside = pc.or_(outside, pc.match_substring_regex(path, _LEAVES_ON_THE_WEB))
        odd = pc.and_not(pc.match_substring_regex(path, _ODD_PARTS), outside)
        if pc.any(odd).as_py():
            texts = [
                PurePosixPath(text).as_posix()
                if is_odd and text and (store.is_local or text.startswith("./"))
                else text
                for text, is_odd in zip(path.to_pylist(), odd.to_pylist(), strict=True)
            ]
            path = pa.array(texts, pa.string())
        table = table.set_column(table.schema.get_field_index("path"), "path", path)
        table = reject(table, outside, "outside-corpus", f"leads to a place outside of {store.name}/")
        odd = pc.match_substring_regex(path, r"^\.?$" if store.is_local else _ODD_PARTS)
        yield reject(table, odd, "bad-row", "names a path with an empty part or '.'")


def reject(table: pa.Table, bad: pa.Array, reject_class: str | pa.Array, reason: str | pa.Array) -> pa.Table:
    """`table` with the rows where `bad` holds rejected, but those that are already."""
    bad = pc.and_(pc.fill_null(bad, False), pc.is_null(table["reject_class"]))
    for name, value in (("reject_class", reject_class), ("reason", reason)):
        column = pc.if_else(bad, value, table[name])
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def _check_spans(tables: Iterable[pa.Table], shown: str, spans: bool) -> Iterator[pa.Table]:
    for table in tables:
        missing = pc.or_(pc.is_null(table["start_s"]), pc.is_null(table["end_s"]))
        named = pc.or_(pc.is_valid(table["start_s"]), pc.is_valid(table["end_s"]))
        if not spans and pc.any(named).as_py():
            row = table["row"].filter(named)[0].as_py()
            raise ConfigError(
                f"{shown}, row {row}: names start_s or end_s; use --clips.mode manifest to cut these spans, or drop the columns"
            )
        why = pc.binary_join_element_wise(
            "row", table["row"].cast(pa.string()), "needs start_s and end_s for clips.mode = manifest", " "
        )
        yield reject(table, missing, "bad-row", why) if spans else table

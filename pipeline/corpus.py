"""A corpus as `VideoRef`s: a folder of files, or a manifest that names them.

Nothing here opens a video. What cannot be an input (a link out of the corpus, a device) becomes a reject, so that the
books account for every entry.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from pipeline.errors import ConfigError
from pipeline.schema import Reject, VideoRef

_MANIFEST_COLUMNS = {"video", "caption", "label", "split"}
_MANIFEST_READERS: dict[str, Callable[[Path], pa.Table]] = {
    # Everything is text: a label "007" or a video "0001" is not the number that a guess would make of it.
    ".csv": lambda path: pa.csv.read_csv(
        path,
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(_MANIFEST_COLUMNS, pa.string())),
    ),
    ".jsonl": pa.json.read_json,
    ".parquet": pa.parquet.read_table,
}


def list_corpus(corpus: Path, include: str) -> tuple[Path, list[VideoRef], list[Reject]]:
    """The inputs of a corpus in the order of their paths, and the entries that cannot be one.

    Args:
        corpus: a folder, or a manifest (.csv, .jsonl, .parquet) with a column `video` (a path relative to the
            manifest's folder) and optionally `caption`, `label`, `split`.
        include: glob that a file's relative path must match, for folders. Hidden files never match.

    Returns:
        (root folder that paths are relative to, refs, rejects)

    Raises:
        ConfigError: the corpus does not exist, is empty, or the manifest lacks a column.
    """
    if corpus.is_dir():
        root = corpus.resolve()
        entries: dict[str, dict[str, Any]] = {path: {} for path in _walk(root, include)}
    elif corpus.suffix in _MANIFEST_READERS and corpus.is_file():
        root = corpus.resolve().parent
        entries = _read_manifest(corpus)
    else:
        raise ConfigError(
            f"corpus {corpus}: no such folder or manifest; give a folder of videos, or a .csv, .jsonl or .parquet file "
            "with a column 'video'"
        )
    refs: list[VideoRef] = []
    rejects: list[Reject] = []
    for path in sorted(entries):
        outcome = _examine(root, path, entries[path])
        if isinstance(outcome, VideoRef):
            refs.append(outcome)
        else:
            rejects.append(outcome)
    if not entries:
        raise ConfigError(f"corpus {corpus}: no file in it matches {include!r}; check the folder or --include")
    return root, refs, rejects


def split_duplicates(root: Path, refs: list[VideoRef]) -> tuple[list[VideoRef], list[Reject]]:
    """Keep the first of every set of files with equal bytes; the others become rejects of class `duplicate`.

    Only files that share their size with another one are read, so a corpus without duplicates costs nothing.
    """
    by_size: dict[int, list[VideoRef]] = defaultdict(list)
    for ref in refs:
        by_size[ref.size_bytes].append(ref)
    rejects = []
    dropped = set()
    for size, group in by_size.items():
        if len(group) == 1 or size == 0:  # empty files are rejected as empty, which says more than duplicate
            continue
        first: dict[str, str] = {}
        for ref in group:
            try:
                digest = hash_file(root / ref.path)
            except OSError:
                continue  # the shard stage will reject it as unreadable
            if digest in first:
                reason = f"the same {size} bytes as {first[digest]}"
                rejects.append(Reject(path=ref.path, stage="plan", reject_class="duplicate", reason=reason))
                dropped.add(ref.path)
            else:
                first[digest] = ref.path
    return [ref for ref in refs if ref.path not in dropped], sorted(rejects, key=lambda reject: reject.path)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _walk(root: Path, include: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root):  # links to folders are listed below, never followed
        relative = Path(folder).relative_to(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in [*files, *links]:
            path = (relative / name).as_posix()
            if not name.startswith(".") and PurePosixPath(path).match(include):
                yield path


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        table = _MANIFEST_READERS[path.suffix](path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"manifest {path} cannot be read: {error}") from error
    if "video" not in table.column_names:
        raise ConfigError(f"manifest {path} has columns {table.column_names}; a column 'video' is needed")
    entries: dict[str, dict[str, Any]] = {}
    for row in table.select([c for c in table.column_names if c in _MANIFEST_COLUMNS]).to_pylist():
        video = str(row.pop("video"))
        if video in entries:
            raise ConfigError(f"manifest {path} names {video!r} twice")
        if row.get("split") not in (None, "", "train", "val"):
            raise ConfigError(f"manifest {path}: split {row['split']!r} of {video!r}; allowed: train, val")
        entries[video] = {name: str(value) for name, value in row.items() if value not in (None, "")}
    return entries


def _examine(root: Path, path: str, columns: dict[str, Any]) -> VideoRef | Reject:
    reject = Reject(path=_printable(path), stage="plan", reject_class="unreadable", reason="")
    try:
        path.encode()
    except UnicodeEncodeError:
        return replace(reject, reason="its name is not UTF-8; rename it")
    try:
        resolved = (root / path).resolve()
        if not resolved.is_relative_to(root):
            return replace(reject, reject_class="outside-corpus", reason=f"leads to a place outside of {root.name}/")
        status = resolved.stat()
    except (OSError, ValueError, RuntimeError) as error:
        return replace(reject, reason=f"cannot be examined: {getattr(error, 'strerror', None) or error}")
    if not stat.S_ISREG(status.st_mode):
        return replace(reject, reason="not a regular file")
    return VideoRef(path=path, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, **columns)


def _printable(path: str) -> str:
    return path.encode(errors="backslashreplace").decode()

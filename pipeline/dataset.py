"""A dataset in a folder: `dataset.json`, tar shards, lists of them, a Parquet index and rejects. What one shard is stands in `shards`."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, DatasetError
from pipeline.ledger import Ledger
from pipeline.plan_file import PLAN_NAME
from pipeline.schema import READABLE_VERSIONS, REJECT_SCHEMA, SCHEMA_VERSION, SPLITS, Reject
from pipeline.shards import (
    COUNTED,
    INDEX_SCHEMAS,
    ShardInfo,
    index_name,
    parse_index_name,
    read_shard_columns,
    read_shard_info,
    tar_name,
)
from pipeline.storage import Store
from pipeline.untrusted import (
    MAX_JSON_BYTES,
    MAX_SHARDS,
    MAX_TABLE_BYTES,
    check_num_rows,
    list_members,
    parse_object,
    read_member,
    require_counts,
    require_fields,
)

_META = "dataset.json"
PLAN_REJECTS = "rejects/plan.parquet"
_PARTS = ("shards", "index", "rejects")
_PARENTS = {"tokens": "clips", "embeddings": "tokens"}
"""Kind of the dataset that one is made from; `extra` has its place under that name."""
_WRITERS = {
    "clips": ("shard", "CORPUS OUT"),
    "tokens": ("tokenize", "CLIPS OUT"),
    "embeddings": ("embed", "TOKENS RUN OUT"),
}
"""Kind of a dataset to the job that makes it, and what that is called with."""
_TOTALS = {
    "planned": int, "committed": int, "filtered": dict, "rejected": dict, "content": str, "videos": int, "frames": int,
    "payload_bytes": int, "tar_bytes": int, "hours": float,
}  # fmt: skip
_READ_THREADS = 16
Place = Store | Path | str


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetMeta:
    """What `dataset.json` holds.

    decoder: `ffmpeg.identity` of the machines that made it; "" where none is needed, and in format 3, which did not say it.
    totals: None until the job that writes the dataset has finished.
    """

    kind: str
    fingerprint: str
    config: dict[str, Any]
    parent_fingerprint: str
    inputs_digest: str
    num_shards: int
    extra: dict[str, Any]
    decoder: str = ""
    totals: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def content(self) -> str:
        """Digest over all samples of a finished dataset: another one after rejects were retried with success."""
        return str((self.totals or {}).get("content", ""))


def create_or_resume(
    place: Place,
    meta: DatasetMeta,
    *,
    plan: Path | None = None,
    plan_rejects: Path | None = None,
    name_changes: Callable[[Path, Path], list[str]] | None = None,
) -> DatasetMeta:
    """Open `place` for the job that `meta` describes; a new folder is created, a finished or broken-off one resumed.

    Args:
        plan: a local file with the inputs, kept as `plan.parquet`, so that a resume can name what changed.
        plan_rejects: a local file with the inputs that the plan refused, kept as `rejects/plan.parquet`.
        name_changes: names the differences between two plans, for the error.

    Raises:
        ConfigError: the folder holds a dataset of other inputs or settings (they are named), or foreign files.
    """
    store = Store.at(place)
    if store.exists(_META):
        existing = read_meta(store)
        require_writable(store, existing)
        if (existing.fingerprint, existing.num_shards) != (meta.fingerprint, meta.num_shards):
            changes = _differences(store, existing, meta, plan, name_changes)
            raise ConfigError(
                f"{store} holds a dataset made with other {changes}; nothing is mixed in. "
                "Choose another output folder, or delete this one to start again"
            )
        meta = existing
    else:
        require_unused(store)
        write_meta(store, meta)
    # A killed job may have come this far and no further, so each step is one that can be done again.
    if store.is_local:
        for part in _PARTS:
            if part != "shards" or meta.kind != "embeddings":  # theirs are in the index
                store.path(part).mkdir(exist_ok=True)
        _remove_leftovers(store, ("", *_PARTS, "tokenizer"))
    for source, name in ((plan_rejects, PLAN_REJECTS), (plan, PLAN_NAME)):
        if source is not None and not store.exists(name):
            scratch = store.scratch(name)
            shutil.copyfile(source, scratch)  # not through memory: a plan has as many rows as the corpus
            store.put(scratch, name)
    return meta


def require_unused(place: Place) -> None:
    """Make the folder, or raise `ConfigError` where it holds more than hidden files."""
    store = Store.at(place)
    if store.is_local:
        store.path().mkdir(parents=True, exist_ok=True)
        found = [path.name for path in store.path().iterdir() if not path.name.startswith(".")]
    else:
        found = [entry.name for entry in itertools.islice(store.walk(), 3)]
    if found:
        raise ConfigError(f"{store} holds other files ({', '.join(sorted(found)[:3])}); choose another output folder")


def read_meta(place: Place, *, kind: str | None = None, complete: bool = False) -> DatasetMeta:
    """`dataset.json` of a dataset.

    Raises:
        ConfigError: no dataset there, another kind than asked for, an unfinished one where a complete one is needed,
            or one of another schema version.
    """
    store = Store.at(place)
    try:
        data = parse_object(read_member(store, _META, MAX_JSON_BYTES), store.where(_META))
    except (FileNotFoundError, NotADirectoryError):
        if store.is_local and not store.path().exists():
            raise ConfigError(
                f"{store} is not a dataset: there is no such folder; give the OUT of the command that made it"
            ) from None
        raise ConfigError(f"{store} is not a dataset: it has no {_META}") from None
    _check_meta(data, store.where(_META))
    meta = DatasetMeta(**data)
    if meta.schema_version not in READABLE_VERSIONS:
        raise ConfigError(
            f"{store.where(_META)} has schema version {meta.schema_version}; this tokenreel reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}"
        )
    if kind is not None and meta.kind != kind:
        raise ConfigError(f"{store} holds {meta.kind}; {kind} were expected")
    if complete and meta.totals is None:
        raise ConfigError(f"{store} is unfinished; run the command that writes it again, it resumes where it stopped")
    return meta


def _check_meta(data: dict[str, Any], where: str) -> None:
    """Raise `DatasetError` naming the field that is not what `DatasetMeta` says."""
    required = {
        "kind": tuple(INDEX_SCHEMAS),
        "fingerprint": str,
        "config": dict,
        "parent_fingerprint": str,
        "inputs_digest": str,
    }
    require_fields(data, {**required, "num_shards": int, "extra": dict, "schema_version": int}, where)
    if unknown := sorted(set(data) - {one.name for one in fields(DatasetMeta)}):
        raise DatasetError(f"{where} cannot be read: unknown field {unknown[0]!r:.80}")
    if data["num_shards"] > MAX_SHARDS:
        raise DatasetError(f"{where} cannot be read: num_shards = {data['num_shards']}: must be at most {MAX_SHARDS}")
    if "decoder" in data:
        require_fields(data, {"decoder": str}, where)
    if data["kind"] == "tokens":
        require_fields(data["extra"], {"tokenizer": dict}, where, "extra.")
        tokenizer = data["extra"]["tokenizer"]
        require_fields(tokenizer, {"fingerprint": str, "codebook_size": int}, where, "extra.tokenizer.")
        if not 0 < tokenizer["codebook_size"] <= 2**16:
            raise DatasetError(
                f"{where} cannot be read: extra.tokenizer.codebook_size = {tokenizer['codebook_size']}: must be in [1, {2**16}]"
            )
    if (totals := data.get("totals")) is not None:
        require_fields(data, {"totals": dict}, where)
        require_fields(totals, _TOTALS, where, "totals.")
        for name in ("filtered", "rejected"):
            require_counts(totals[name], where, f"totals.{name}.")
        for name in COUNTED:
            require_counts(totals.get(f"samples_by_{name}", {}), where, f"totals.samples_by_{name}.")
        tars = totals.get("tars", {})
        if not isinstance(tars, dict) or not all(
            isinstance(numbers, list) and all(type(one) is int and 0 <= one < data["num_shards"] for one in numbers)
            for numbers in tars.values()
        ):
            raise DatasetError(f"{where} cannot be read: totals.tars: must be an object of lists of shards")


def require_writable(store: Store, meta: DatasetMeta) -> None:
    """Raise `ConfigError` where the dataset is of a format that is read, but not written any more."""
    if meta.schema_version == SCHEMA_VERSION:
        return
    job, words = _WRITERS[meta.kind]
    raise ConfigError(
        f"{store} has schema version {meta.schema_version}, which this tokenreel reads and does not write: no shard of it can be "
        f"added or made again. Make the dataset anew in another folder, with the settings that it keeps: tokenreel {job} {words} "
        f"--config {store.where('config.json')}"
    )


def find_parent(store: Store, meta: DatasetMeta, given: Place | None = None) -> Store | None:
    """The clip dataset that the token dataset in `store` was made from, or the token dataset of embeddings, where it is at hand.

    A dataset may come from anybody, so what it says of its parent's place is followed only within its own storage: from a local
    folder by a relative path, from an object store to the same bucket. Everywhere else lies what the user names.

    Args:
        given: where the user says that it lies.

    Raises:
        ConfigError: it is not at the place that was given.
    """
    kind = _PARENTS.get(meta.kind, "")
    if given is None:
        parent = _parent_nearby(store, meta.extra.get(kind))
        try:
            found = None if parent is None else read_meta(parent, kind=kind).fingerprint
        except (ConfigError, DatasetError):
            return None
        return parent if found == meta.parent_fingerprint else None
    if not kind:
        raise ConfigError(f"{store} holds {meta.kind}, which are made from no other dataset")
    parent = Store.at(given)
    if (found := read_meta(parent, kind=kind).fingerprint) != meta.parent_fingerprint:
        raise ConfigError(f"{parent} is dataset {found}; {store} was made from {meta.parent_fingerprint}")
    return parent


def _parent_nearby(store: Store, place: Any) -> Store | None:
    """The place that `dataset.json` names, where it may be followed there."""
    if not isinstance(place, str) or not place or "\0" in place:
        return None
    if store.is_local:
        return None if "://" in place or Path(place).is_absolute() else Store.at(str(store.path() / place))
    ours, theirs = urlsplit(store.url), urlsplit(place)
    same = (ours.scheme, ours.netloc, ours.query) == (theirs.scheme, theirs.netloc, theirs.query)
    return Store.at(place) if same and "://" in place else None


def codebook_size(meta: DatasetMeta) -> int:
    """How many codes the tokenizer of a token dataset has."""
    return int(meta.extra["tokenizer"]["codebook_size"])


def note_parent(meta: DatasetMeta, out: Store, parent: Store) -> None:
    """Have `meta` say where its parent lies: seen from `out` where both are local, so that they can be moved together."""
    both_local = parent.is_local and out.is_local
    place = os.path.relpath(parent.path().resolve(), out.path().resolve()) if both_local else parent.url
    meta.extra[_PARENTS[meta.kind]] = place


def write_meta(place: Place, meta: DatasetMeta) -> None:
    Store.at(place).write(_META, (json.dumps(asdict(meta), indent=2, sort_keys=True) + "\n").encode())


def listed_shards(place: Place) -> list[int]:
    """Numbers of the shards that have an index, in order."""
    numbers = (parse_index_name(entry.name) for entry in list_members(Store.at(place), "index"))
    return sorted(number for number in numbers if number is not None)


def committed_shards(place: Place, fingerprint: str, without: Collection[int] = ()) -> dict[int, ShardInfo]:
    """The shards that count, with what their indexes say of them; but for those in `without`, which are to be made again.

    Raises:
        DatasetError: an index file belongs to another dataset, or is none.
    """
    store = Store.at(place)
    numbers = [shard for shard in listed_shards(store) if shard not in without]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        infos = pool.map(lambda shard: read_shard_info(store, shard), numbers)
        found = {shard: info for shard, info in zip(numbers, infos, strict=True) if info is not None}
    for shard, info in found.items():
        if info.fingerprint != fingerprint:
            raise DatasetError(
                f"{store.where(index_name(shard))} belongs to dataset {info.fingerprint}, not to {fingerprint}; remove it"
            )
    return found


def finish(place: Place, meta: DatasetMeta, plan_books: Ledger) -> tuple[DatasetMeta, Ledger]:
    """Sum and check the books of a dataset whose shards are all committed, and write the totals.

    Args:
        plan_books: of the inputs that the plan refused.

    Raises:
        DatasetError: shards are missing or the books do not balance.
    """
    store = Store.at(place)
    shards = committed_shards(store, meta.fingerprint)
    if sorted(shards) != list(range(meta.num_shards)):
        missing = sorted(set(range(meta.num_shards)) - set(shards))
        raise DatasetError(f"{store}: shards {missing[:10]} of {meta.num_shards} are missing; run the command again")
    ledger = sum((info.ledger for info in shards.values()), plan_books)
    ledger.check()
    finished = replace(meta, totals={**ledger.to_json(), **_sum_totals([shards[number] for number in sorted(shards)])})
    if meta.kind != "embeddings":
        _write_splits(store, finished)
    _remove_leftovers(store, (*_PARTS, "splits"))  # of workers that were killed, and whose shards others made
    if finished != meta:
        write_meta(store, finished)
    return finished, ledger


def split_name(split: str) -> str:
    """The file that lists the tars of a split, relative to the dataset, one a line."""
    return f"splits/{split}.txt"


def list_split(meta: DatasetMeta, split: str) -> str:
    """What that file holds for a finished dataset; "" where the split does not occur, and there is no file."""
    return "".join(f"{tar_name(shard, split)}\n" for shard in (meta.totals or {}).get("tars", {}).get(split, ()))


def _write_splits(store: Store, meta: DatasetMeta) -> None:
    for split in SPLITS:
        wanted = list_split(meta, split).encode()
        if not wanted:
            store.remove(split_name(split))
        elif (
            (entry := store.stat(split_name(split))) is None
            or entry.size_bytes != len(wanted)
            or read_member(store, split_name(split), len(wanted)) != wanted
        ):
            store.write(split_name(split), wanted)


def _remove_leftovers(store: Store, parts: Iterable[str]) -> None:
    """Delete what was being written in these folders when its writer was killed; nobody may be writing there now."""
    if store.is_local:
        for part in parts:
            for leftover in store.path(part).glob(".*.tmp"):
                leftover.unlink(missing_ok=True)


def digest_contents(contents: Iterable[str]) -> str:
    """`DatasetMeta.content`, from the `content` of every shard in order."""
    return hashlib.sha256("".join(contents).encode()).hexdigest()[:32]


def _sum_totals(shards: list[ShardInfo]) -> dict[str, Any]:
    totals: dict[str, Any] = {
        "tar_bytes": sum(info.tar_bytes for info in shards),
        "content": digest_contents(info.content for info in shards),
    }
    tars = {split: [info.shard for info in shards if split in info.tars] for split in SPLITS}
    totals["tars"] = {split: numbers for split, numbers in tars.items() if numbers}
    for name in ("videos", "frames", "payload_bytes"):
        totals[name] = sum(info.totals[name] for info in shards)
    totals["hours"] = round(sum(info.totals["seconds"] for info in shards) / 3600, 6)
    for name in COUNTED:
        counts = sum((Counter(info.totals.get(name, {})) for info in shards), Counter[str]())
        if counts:
            totals[f"samples_by_{name}"] = dict(sorted(counts.items()))
    return totals


def read_index(place: Place, columns: list[str] | None = None) -> pa.Table:
    """All index rows in the order of shards and keys: `columns` (all by default), `shard` (int32) and, but for embeddings, `tar`,
    the file that holds the sample (a dictionary of strings)."""
    store = Store.at(place)
    numbers = listed_shards(store)
    if not numbers:
        kind = read_meta(store).kind
        schema = INDEX_SCHEMAS[kind]
        added = {
            "shard": pa.int32(),
            **({} if kind == "embeddings" else {"tar": pa.dictionary(pa.int32(), pa.string())}),
        }
        fields = [schema.field(name) for name in (columns or schema.names)]
        return pa.schema([*fields, *added.items()]).empty_table()
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return pa.concat_tables(pool.map(lambda shard: read_shard_columns(store, shard, columns)[1], numbers))


def read_rejects(place: Place) -> Iterator[Reject]:
    """Every input that is in no shard, in the order of shards; those that the plan refused come last."""
    store = Store.at(place)
    for entry in list_members(store, "rejects"):
        yield from read_rejects_file(store, entry.name)


def read_rejects_file(store: Store, name: str) -> list[Reject]:
    """The rejects of one file.

    Raises:
        FileNotFoundError: there is none.
        DatasetError: it is damaged, or of other columns.
    """
    where, data = store.where(name), read_member(store, name, MAX_TABLE_BYTES)
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            check_num_rows(file.metadata.num_rows, len(data), where)
            table = file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{where} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if table.schema.remove_metadata() != REJECT_SCHEMA:
        raise DatasetError(
            f"{where} cannot be read: its columns are {table.schema.names}; must be {REJECT_SCHEMA.names}"
        )
    return [Reject(**row) for row in table.to_pylist()]


def _differences(
    store: Store,
    existing: DatasetMeta,
    wanted: DatasetMeta,
    plan: Path | None,
    name_changes: Callable[[Path, Path], list[str]] | None,
) -> str:
    parts = [
        f"setting {name} = {old!r} (now {new!r})"
        for name, old, new in config_differences(existing.config, wanted.config)
    ]
    if existing.decoder != wanted.decoder:
        parts.append(f"decoder = {existing.decoder} (now {wanted.decoder})")
    if existing.parent_fingerprint != wanted.parent_fingerprint:
        parts.append(f"parent dataset {existing.parent_fingerprint} (now {wanted.parent_fingerprint})")
    if existing.inputs_digest != wanted.inputs_digest:
        changes = []
        if plan is not None and name_changes is not None and store.exists(PLAN_NAME):
            with store.open(PLAN_NAME) as old:
                changes = name_changes(Path(f"/dev/fd/{old.fileno()}"), plan)
        parts.append(f"input files ({', '.join(changes) or 'unknown which'})")
    return "; ".join(parts) or f"kind or version ({existing.kind}, now {wanted.kind})"


def config_differences(old: Any, new: Any, name: str = "") -> Iterable[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every setting that differs between two configs as plain JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from config_differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new

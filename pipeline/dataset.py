"""A dataset on disk: `dataset.json`, tar shards, a Parquet index and rejects.

A shard counts only when its index file exists. The tar and the rejects are written under temporary names, flushed to
the disk and renamed; the index comes last. So no reader sees half a shard, whatever dies when, and a resumed job
repeats only the shards that have no index.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, DatasetError
from pipeline.files import sync_path, write_atomic
from pipeline.ledger import Ledger
from pipeline.schema import CLIP_SCHEMA, REJECT_SCHEMA, SCHEMA_VERSION, TOKEN_SCHEMA, Reject

_META = "dataset.json"
_INPUTS = "inputs.parquet"
_LEDGER_KEY = b"tokenreel.shard"
INDEX_SCHEMAS = {"clips": CLIP_SCHEMA, "tokens": TOKEN_SCHEMA}
PLAN_REJECTS = "plan"
_PLACE = {"offset", "size", "sha256", "json_offset", "json_size"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetMeta:
    """What `dataset.json` holds. `totals` is None until the job that writes the dataset has finished."""

    kind: str
    fingerprint: str
    config: dict[str, Any]
    parent_fingerprint: str
    inputs_digest: str
    num_shards: int
    extra: dict[str, Any]
    totals: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION


def create_or_resume(folder: Path, meta: DatasetMeta, inputs: pa.Table | None = None) -> DatasetMeta:
    """Open `folder` for the job that `meta` describes; a new folder is created, a finished or broken-off one resumed.

    Args:
        inputs: the input files (INPUT_SCHEMA), kept as `inputs.parquet` so that a changed one can be named.

    Raises:
        ConfigError: the folder holds a dataset of other inputs or settings (they are named), or foreign files.
    """
    if (folder / _META).exists():
        existing = read_meta(folder)
        if existing.fingerprint != meta.fingerprint:
            raise ConfigError(
                f"{folder} holds a dataset made with other {_differences(folder, existing, meta, inputs)}; nothing is mixed in. "
                "Choose another output folder, or delete this one to start again"
            )
        meta = existing
    else:
        require_unused(folder)
        write_meta(folder, meta)
    # A killed job may have come this far and no further, so each step is one that can be done again.
    for part in (folder, *(folder / name for name in ("shards", "index", "rejects"))):
        part.mkdir(exist_ok=True)
        for leftover in part.glob(".*.tmp"):
            leftover.unlink()
    if inputs is not None and not (folder / _INPUTS).exists():
        buffer = io.BytesIO()
        pq.write_table(inputs, buffer)
        write_atomic(folder / _INPUTS, buffer.getvalue())
    return meta


def require_unused(folder: Path) -> None:
    """Make `folder`, or raise `ConfigError` where it holds more than hidden files."""
    folder.mkdir(parents=True, exist_ok=True)
    if found := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
        raise ConfigError(f"{folder} holds other files ({', '.join(sorted(found)[:3])}); choose another output folder")


def read_meta(folder: Path, *, kind: str | None = None, complete: bool = False) -> DatasetMeta:
    """`dataset.json` of `folder`.

    Raises:
        ConfigError: no dataset there, another kind than asked for, an unfinished one where a complete one is needed,
            or one of another schema version.
    """
    path = folder / _META
    try:
        data = json.loads(path.read_text())
        meta = DatasetMeta(**data)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} is not a dataset: it has no {_META}") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    if meta.schema_version != SCHEMA_VERSION:
        raise ConfigError(f"{path} has schema version {meta.schema_version}; this tokenreel reads {SCHEMA_VERSION}")
    if kind is not None and meta.kind != kind:
        raise ConfigError(f"{folder} holds {meta.kind}; {kind} were expected")
    if complete and meta.totals is None:
        raise ConfigError(f"{folder} is unfinished; run the command that writes it again, it resumes where it stopped")
    return meta


def write_meta(folder: Path, meta: DatasetMeta) -> None:
    write_atomic(folder / _META, (json.dumps(asdict(meta), indent=2, sort_keys=True) + "\n").encode())


class ShardWriter:
    """Writes one shard: `add` samples, then `commit`. Until then nothing is visible under a final name.

    The tar is byte-reproducible: ustar headers, mtime 0, no owner, members in the order they were added.
    """

    def __init__(self, folder: Path, meta: DatasetMeta, shard: int) -> None:
        self._folder, self._meta, self._name = folder, meta, f"{shard:06d}"
        self._tar_path = folder / "shards" / f"{self._name}.tar"
        self._temporary = self._tar_path.with_name(f".{self._name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any], ext: str, member: bytes, payload_start: int = 0) -> None:
        """Append a sample: `KEY.ext` with `member`, and `KEY.json` with what `row` says of it.

        Args:
            row: the index row without offsets, sizes and hash.
            payload_start: bytes of `member` before the payload that the index points at (a .npy header).
        """
        payload = member[payload_start:]
        offset = self._add_member(f"{row['key']}.{ext}", member) + payload_start
        info = json.dumps(sample_info(row), sort_keys=True).encode()
        self._rows.append(
            {
                **row,
                "offset": offset,
                "size": len(payload),
                "sha256": hashlib.sha256(payload).hexdigest(),
                "json_offset": self._add_member(f"{row['key']}.json", info),
                "json_size": len(info),
            }
        )

    def commit(self, planned: int, rejects: Sequence[Reject]) -> Ledger:
        """Make the shard count, and return its books.

        Raises:
            DatasetError: the books of the shard do not balance; nothing was committed.
        """
        ledger = Ledger(planned=planned, committed=len(self._rows))
        ledger.add_rejects(rejects)
        ledger.check()
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self._tar_path)
        sync_path(self._tar_path.parent)
        write_rejects(self._folder, self._name, rejects)
        shard_info = json.dumps(
            {"fingerprint": self._meta.fingerprint, "tar_bytes": self._tar_path.stat().st_size, **ledger.to_json()}
        )
        schema = INDEX_SCHEMAS[self._meta.kind].with_metadata({_LEDGER_KEY: shard_info.encode()})
        index = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._rows, schema=schema), index)
        write_atomic(self._folder / "index" / f"{self._name}.parquet", index.getvalue())
        return ledger

    def abort(self) -> None:
        """Drop everything; harmless after `commit`."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _add_member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self._tar.addfile(info, io.BytesIO(data))
        return self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def write_rejects(folder: Path, name: str, rejects: Sequence[Reject]) -> None:
    """Replace `rejects/NAME.parquet`; no rejects, no file."""
    path = folder / "rejects" / f"{name}.parquet"
    if not rejects:
        path.unlink(missing_ok=True)
        return
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(r) for r in rejects], schema=REJECT_SCHEMA), buffer)
    write_atomic(path, buffer.getvalue())


def read_rejects(folder: Path) -> list[Reject]:
    """Every input that is in no shard, in the order of shards."""
    return [
        Reject(**row)
        for path in sorted((folder / "rejects").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def committed_shards(folder: Path, fingerprint: str) -> dict[int, Ledger]:
    """The shards that count, with their books.

    Raises:
        DatasetError: an index file belongs to another dataset.
    """
    shards = {}
    for path in sorted((folder / "index").glob("[0-9]*.parquet")):
        info = shard_info(path)
        if info["fingerprint"] != fingerprint:
            raise DatasetError(f"{path} belongs to dataset {info['fingerprint']}, not to {fingerprint}; remove it")
        shards[int(path.stem)] = Ledger.from_json(info)
    return shards


def shard_info(index_path: Path) -> dict[str, Any]:
    """The books, fingerprint and tar size that an index file carries in its Parquet metadata."""
    try:
        metadata = pq.read_schema(index_path).metadata or {}
        info: dict[str, Any] = json.loads(metadata[_LEDGER_KEY])
        return info
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise DatasetError(f"{index_path} is no tokenreel index: {error}; delete it and run the job again") from error


def finish(folder: Path, meta: DatasetMeta, plan_rejects: Sequence[Reject]) -> tuple[DatasetMeta, Ledger]:
    """Sum and check the books of a dataset whose shards are all committed, and write the totals.

    Raises:
        DatasetError: shards are missing or the books do not balance.
    """
    shards = committed_shards(folder, meta.fingerprint)
    if sorted(shards) != list(range(meta.num_shards)):
        missing = sorted(set(range(meta.num_shards)) - set(shards))
        raise DatasetError(f"{folder}: shards {missing[:10]} of {meta.num_shards} are missing; run the command again")
    write_rejects(folder, PLAN_REJECTS, plan_rejects)
    ledger = sum(shards.values(), Ledger(planned=len(plan_rejects)))
    ledger.add_rejects(plan_rejects)
    ledger.check()
    index = read_index(folder)
    totals = {
        **ledger.to_json(),
        "videos": len(index["video_id"].unique()),
        "hours": round(sum(e - s for s, e in _spans(index)) / 3600, 6),
        "frames": int(sum(index["num_frames"].to_pylist())),
        "payload_bytes": int(sum(index["size"].to_pylist())),
        "tar_bytes": sum((folder / "shards" / f"{s:06d}.tar").stat().st_size for s in shards),
    }
    finished = DatasetMeta(**{**asdict(meta), "totals": totals})
    if finished != meta:
        write_meta(folder, finished)
    return finished, ledger


def read_index(folder: Path, columns: list[str] | None = None) -> pa.Table:
    """All index rows in shard order, with a column `shard` (int32) added."""
    kind = read_meta(folder).kind
    tables = []
    for path in sorted((folder / "index").glob("[0-9]*.parquet")):
        table = pq.read_table(path, columns=columns).replace_schema_metadata(None)
        tables.append(table.append_column("shard", pa.array([int(path.stem)] * len(table), pa.int32())))
    if not tables:
        schema = INDEX_SCHEMAS[kind].append(pa.field("shard", pa.int32()))
        return schema.empty_table().select([*columns, "shard"] if columns else schema.names)
    return pa.concat_tables(tables)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard:06d}.tar"


def read_payload(folder: Path, row: dict[str, Any]) -> bytes:
    """The payload of one index row.

    Raises:
        DatasetError: the shard is shorter than the index says, or its bytes are not the indexed ones.
    """
    path = shard_path(folder, row["shard"])
    with path.open("rb") as file:
        data = os.pread(file.fileno(), row["size"], row["offset"])
    if len(data) != row["size"]:
        raise DatasetError(f"{path}: sample {row['key']} ends after {len(data)} of {row['size']} bytes")
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise DatasetError(f"{path}: the bytes of sample {row['key']} are not the ones that were committed")
    return data


def _differences(folder: Path, existing: DatasetMeta, wanted: DatasetMeta, inputs: pa.Table | None) -> str:
    parts = [
        f"setting {name} = {old!r} (now {new!r})"
        for name, old, new in config_differences(existing.config, wanted.config)
    ]
    if existing.parent_fingerprint != wanted.parent_fingerprint:
        parts.append(f"parent dataset {existing.parent_fingerprint} (now {wanted.parent_fingerprint})")
    if existing.inputs_digest != wanted.inputs_digest:
        parts.append(f"input files ({_changed_inputs(folder, inputs)})")
    return "; ".join(parts) or f"kind or version ({existing.kind}, now {wanted.kind})"


def _changed_inputs(folder: Path, inputs: pa.Table | None) -> str:
    if inputs is None or not (folder / _INPUTS).exists():
        return "unknown which"
    old, new = ({row["path"]: row for row in table.to_pylist()} for table in (pq.read_table(folder / _INPUTS), inputs))
    words = {(False, True): "added", (True, False): "removed", (True, True): "changed"}
    changes = [
        f"{words[path in old, path in new]}: {path}"
        for path in sorted(old.keys() | new)
        if old.get(path) != new.get(path)
    ]
    more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
    return ", ".join(changes[:5]) + more


def config_differences(old: Any, new: Any, name: str = "") -> Iterable[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every setting that differs between two configs as plain JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from config_differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def _spans(index: pa.Table) -> Iterable[tuple[float, float]]:
    return zip(index["start_s"].to_pylist(), index["end_s"].to_pylist(), strict=True)


def sample_info(row: dict[str, Any]) -> dict[str, Any]:
    """What KEY.json says of a sample: its index row without its place in the shard."""
    return {name: value for name, value in row.items() if value is not None and name not in _PLACE}

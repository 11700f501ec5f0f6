"""One shard: a tar for each split in it, its rejects and, last, the index that makes it count.

The tars and the rejects are written whole under their names before the index is, so no reader sees half a shard,
whatever dies when, and a resumed job repeats only the shards that have no index.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DatasetError, OutputError
from pipeline.internal import INTERNAL
from pipeline.ledger import Ledger
from pipeline.schema import CLIP_SCHEMA, EMBEDDING_SCHEMA, REJECT_SCHEMA, SPLITS, TOKEN_SCHEMA, Reject
from pipeline.storage import Store
from pipeline.tar_writer import TarWriter
from pipeline.untrusted import (
    MAX_TABLE_BYTES,
    check_columns,
    check_num_rows,
    check_places,
    open_member,
    parse_object,
    require_counts,
    require_fields,
)

log = logging.getLogger(__name__)

INDEX_SCHEMAS = {"clips": CLIP_SCHEMA, "tokens": TOKEN_SCHEMA, "embeddings": EMBEDDING_SCHEMA}
_OWN_COLUMN = {"clips": "ext", "embeddings": "sample_key", "tokens": "clip_key"}
_INFO_KEY = b"tokenreel.shard"
PLACE = {"offset", "size", "sha256", "json_offset", "json_size"}
"""Index columns that `ShardWriter` fills in."""
ADDED = {"shard", "tar"}
"""What reading adds to a row: the number of its shard, and the file in the dataset that holds the sample."""
COUNTED = ("codec", "ext", "source_codec", "source_container")
"""Index columns of clips whose values are counted in the totals."""
Describe = Callable[[str], dict[str, Any]]
"""SHA-256 of a payload (hex) to the index row of its sample, without place and hash."""


def tar_name(shard: int, split: str) -> str:
    """Of the samples of one split in a shard; "" is the split of a tar of format 3, which holds those of all."""
    return f"shards/{split}-{shard:06d}.tar" if split else f"shards/{shard:06d}.tar"


def index_name(shard: int) -> str:
    return f"index/{shard:06d}.parquet"


def parse_index_name(name: str) -> int | None:
    """The shard that `index_name` gives `name` to; None where it gives it to none."""
    match = re.fullmatch(r"index/([0-9]{6,9})\.parquet", name)
    return int(match[1]) if match and index_name(int(match[1])) == name else None


def rejects_name(shard: int) -> str:
    return f"rejects/{shard:06d}.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """What an index file says of its shard, in its Parquet metadata.

    shard: its number; -1 in format 3, which did not say it.
    tars: bytes of the tar of each split that occurs.
    content: digest of keys and payload hashes; it changes with any sample.
    parent_content: `content` of the clip shard that a token shard was made from; "" for clips.
    totals: videos, seconds, frames, payload_bytes, and for clips the counts of COUNTED.
    """

    fingerprint: str
    shard: int
    tars: dict[str, int]
    content: str
    ledger: Ledger
    parent_content: str = ""
    totals: dict[str, Any] = field(default_factory=dict)

    @property
    def tar_bytes(self) -> int:
        return sum(self.tars.values())

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "ledger": self.ledger.to_json()})

    @classmethod
    def from_json(cls, text: str | bytes) -> ShardInfo:
        data = parse_object(text, _INFO_KEY.decode())
        if "tar_bytes" in data:  # format 3
            data |= {"shard": -1, "tars": {"": data.pop("tar_bytes")}}
        _check_info(data)
        return cls(**{**data, "ledger": Ledger.from_json(data["ledger"])})


class Written(NamedTuple):
    """A committed shard, how many bytes of input it took, and what a person should hear of how it went."""

    info: ShardInfo
    read_bytes: int
    warnings: tuple[str, ...] = ()


class ShardWriter:
    """Writes one shard: `add` samples, then `commit`. Until then nothing is visible under a final name.

    Each split that occurs has a tar of its own, so that whoever reads one cannot read another. Tars are byte-reproducible, their
    members in the order they were added. Memory does not grow with payloads: they stream through a buffer.
    """

    def __init__(self, store: Store, kind: str, fingerprint: str, shard: int) -> None:
        self._store, self._kind, self._fingerprint, self._shard = store, kind, fingerprint, shard
        self._tars: dict[str, TarWriter] = {}
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any], ext: str, member: bytes, payload_start: int = 0) -> None:
        """Append a sample: `KEY.ext` with `member`, and `KEY.json` with what `row` says of it.

        Args:
            row: the index row without offsets, sizes and hash; its `split` says which tar it goes to.
            payload_start: bytes of `member` before the payload that the index points at (a .npy header).
        """
        digest = hashlib.sha256(memoryview(member)[payload_start:]).hexdigest()
        with self._or_nothing():
            offset = self._tar(row["split"]).add(f"{row['key']}.{ext}", member) + payload_start
            self._add_row(row, offset, len(member) - payload_start, digest)

    def add_file(
        self,
        payload: IO[bytes],
        ext: str,
        describe: Describe,
        offset: int = 0,
        size: int | None = None,
        split: str = "train",
    ) -> str:
        """Append a sample whose payload is `size` bytes of an open file from `offset` on (all of it by default).

        The bytes are read once: hashed on their way into the tar, where the name that may depend on that hash is put
        before them afterwards. So may the sample's split.

        Args:
            split: the likely one. A sample of another split is copied to that one's tar.

        Returns:
            the payload's SHA-256, in hex.

        Raises:
            TransientIO: the file cannot be read, or ended early; as after any error but an `OutputError`, nothing of the
                sample is left in the shard, and more can be added.
        """
        size = os.fstat(payload.fileno()).st_size - offset if size is None else size
        with self._or_nothing():
            tar = self._tar(split)
            start = tar.tell()
            place = tar.begin()
            digest = tar.copy(payload, offset, size)
            row = describe(digest)
            if row["split"] != split:
                likely, tar = tar, self._tar(row["split"])
                place = tar.take(likely, place, size)
                likely.rewind(start)
            tar.name_last(f"{row['key']}.{ext}", size)
            self._add_row(row, place, size, digest)
        return digest

    def mark(self) -> tuple[dict[str, int], int]:
        """The place that `rewind` goes back to."""
        return {split: tar.tell() for split, tar in self._tars.items()}, len(self._rows)

    def rewind(self, mark: tuple[dict[str, int], int]) -> None:
        """Drop the samples that were added since `mark`."""
        positions, num_rows = mark
        for split, tar in self._tars.items():
            tar.rewind(positions.get(split, 0))
        del self._rows[num_rows:]

    def commit(self, planned: int, rejects: Sequence[Reject], *, parent_content: str = "") -> ShardInfo:
        """Make the shard count, and return what its index says of it.

        Raises:
            DatasetError: the books of the shard do not balance, or a key stands twice; nothing was committed.
        """
        ledger = Ledger(planned=planned, committed=len(self._rows))
        ledger.add_rejects(rejects)
        ledger.check()
        rows = sorted(self._rows, key=lambda row: str(row["key"]))
        if twice := [a["key"] for a, b in itertools.pairwise(rows) if a["key"] == b["key"]]:
            raise DatasetError(f"{self._store}: shard {self._shard:06d} has two samples {twice[0]}")
        tars: dict[str, int] = {
            split: self._tars[split].end() for split in SPLITS if split in {row["split"] for row in rows}
        }
        info = ShardInfo(
            fingerprint=self._fingerprint,
            shard=self._shard,
            tars=tars,
            content=digest_rows(rows),
            parent_content=parent_content,
            ledger=ledger,
            totals=_totals(rows),
        )
        self._require_no_loss(info, rejects)
        # A shard that is made again stops counting before its bytes change.
        self._store.remove(index_name(self._shard))
        for split in SPLITS:
            if split in tars:
                self._store.put(self._tars[split].scratch, tar_name(self._shard, split))
            else:
                self._store.remove(tar_name(self._shard, split))
        write_rejects(self._store, rejects_name(self._shard), rejects)
        table = pa.Table.from_pylist(rows, schema=index_schema(self._kind, info))
        self._store.write(index_name(self._shard), to_parquet(table))
        return info

    def _require_no_loss(self, info: ShardInfo, rejects: Sequence[Reject]) -> None:
        """Raise `DatasetError` where the shard that is there was made of the same inputs, and more of them became samples: a disk
        that is away for a moment must not cost any."""
        try:
            old = read_shard_info(self._store, self._shard)
        except DatasetError:
            return
        same = ("fingerprint", "shard", "parent_content")
        if old is None or any(getattr(old, name) != getattr(info, name) for name in same):
            return
        if info.ledger.committed < old.ledger.committed:
            why = "; ".join(f"{one.path}: {one.reject_class}: {one.reason}" for one in rejects[:3])
            raise DatasetError(
                f"{self._store}: shard {self._shard:06d} was made again with {info.ledger.committed} samples; the one that is there "
                f"counts {old.ledger.committed}, and stays. What became of the others: {why or 'nothing was rejected'}"
            )

    def abort(self) -> None:
        """Drop everything; harmless after `commit`."""
        for tar in self._tars.values():
            tar.abort()

    def _tar(self, split: str) -> TarWriter:
        if split not in self._tars:
            if split not in SPLITS:
                raise DatasetError(f"{self._store}: a sample of split {split!r}; allowed: {', '.join(SPLITS)}")
            self._tars[split] = TarWriter(self._store.scratch(tar_name(self._shard, split)))
        return self._tars[split]

    @contextlib.contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """Leaves nothing of a sample that the body fails to add."""
        mark = self.mark()
        try:
            yield
        except OutputError:  # the tar is in no state to go on with
            raise
        except BaseException:
            self.rewind(mark)
            raise

    def _add_row(self, row: dict[str, Any], offset: int, size: int, digest: str) -> None:
        info = json.dumps(sample_info(row), sort_keys=True).encode()
        json_offset = self._tar(row["split"]).add(f"{row['key']}.json", info)
        place = {"offset": offset, "size": size, "sha256": digest, "json_offset": json_offset, "json_size": len(info)}
        row = {**row, **place}
        check_row(row, INDEX_SCHEMAS[self._kind])
        self._rows.append(row)


def index_schema(kind: str, info: ShardInfo) -> pa.Schema:
    """The schema of a shard's index file, which holds `info`."""
    return INDEX_SCHEMAS[kind].with_metadata({_INFO_KEY: info.to_json().encode()})


def read_shard_info(store: Store, shard: int) -> ShardInfo | None:
    """What the index of a shard says of it; None where there is no index, so that the shard does not count.

    Raises:
        DatasetError: the file there is no index of ours.
    """
    try:
        source = open_member(store, index_name(shard), MAX_TABLE_BYTES)
    except FileNotFoundError:
        return None
    try:
        with source:
            return _parse_info(pq.read_schema(source))
    except (pa.ArrowException, DatasetError, OSError, KeyError, TypeError, ValueError) as error:
        raise _no_index(store, shard, error) from error


def read_shard_columns(store: Store, shard: int, columns: Sequence[str] | None = None) -> tuple[ShardInfo, pa.Table]:
    """What the index of a shard says of it, and its rows in the order of their keys: some columns (all of its kind by default),
    null where its version of the format lacks them, and those of `ADDED`. In a local dataset only these are read.

    Raises:
        FileNotFoundError: the shard has no index.
        DatasetError: the file there is no index of ours.
    """
    name = index_name(shard)
    where = store.where(name)
    # Not by its path, which Arrow cannot say in every locale.
    with open_member(store, name, MAX_TABLE_BYTES) as source:
        try:
            file = pq.ParquetFile(source)
            check_num_rows(file.metadata.num_rows, os.fstat(source.fileno()).st_size, where)
            info, there = _parse_info(file.schema_arrow), file.schema_arrow.names
            schema = INDEX_SCHEMAS[next(kind for kind, own in _OWN_COLUMN.items() if own in there)]
        except (pa.ArrowException, DatasetError, OSError, KeyError, StopIteration, TypeError, ValueError) as error:
            raise _no_index(store, shard, error) from error
        wanted = list(columns or (*schema.names, *(one for one in there if one not in schema.names)))
        try:
            table = file.read([one for one in there if one in (*wanted, "split")], use_threads=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DatasetError(
                f"{where} cannot be read: {_one_line(error)}; run `tokenreel verify --repair`"
            ) from error
    check_columns(table, schema, where)
    if "offset" in there:
        check_places(table, info.tars, where)
    for one in wanted:
        if one not in table.column_names:
            table = table.append_column(one, pa.nulls(len(table), schema.field(one).type))
    added = {"shard": pa.repeat(pa.scalar(shard, pa.int32()), len(table))}
    if "offset" in there:
        added["tar"] = _tars_of(shard, info, table["split"])
    table = table.select(wanted).replace_schema_metadata(None)
    for one, values in added.items():
        table = table.append_column(one, values)
    return info, table


def _tars_of(shard: int, info: ShardInfo, splits: pa.ChunkedArray) -> pa.DictionaryArray:
    """The file of each sample, a dictionary: the names are few."""
    if "" in info.tars:
        return pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), len(splits)), [tar_name(shard, "")])
    encoded = splits.combine_chunks().dictionary_encode()
    return pa.DictionaryArray.from_arrays(
        encoded.indices, pa.array([tar_name(shard, one) for one in encoded.dictionary.to_pylist()], pa.string())
    )


def read_shard_rows(store: Store, shard: int) -> list[dict[str, Any]]:
    """Index rows of one shard in the order of their keys, with the columns of `ADDED`.

    Raises:
        FileNotFoundError: the shard has no index.
        DatasetError: the index is damaged.
    """
    rows: list[dict[str, Any]] = read_shard_columns(store, shard)[1].to_pylist()
    return rows


def read_payload(store: Store, row: dict[str, Any]) -> bytes:
    """The payload of one index row (with its `tar`).

    Raises:
        DatasetError: the tar is shorter than the index says, or its bytes are not the indexed ones.
    """
    where = store.where(row["tar"])
    if store.is_local:
        with open_member(store, row["tar"]) as tar:
            tar.seek(row["offset"])
            data = tar.read(min(row["size"], os.fstat(tar.fileno()).st_size))
    else:
        data = store.read_range(row["tar"], row["offset"], row["size"])
    if len(data) != row["size"]:
        raise DatasetError(f"{where}: sample {row['key']} ends after {len(data)} of {row['size']} bytes")
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise DatasetError(f"{where}: the bytes of sample {row['key']} are not the ones that were committed")
    return data


def write_rejects(store: Store, name: str, rejects: Sequence[Reject]) -> None:
    """Replace the rejects file `name`; no rejects, no file. Defects of ours are logged too, each with its input."""
    rows = [{name: _storable(value) for name, value in asdict(one).items()} for one in rejects]
    for row in rows:
        if row["reject_class"] == INTERNAL:
            shown = f"{row['path']} ({row['key']})" if row["key"] else row["path"]
            log.error(f"{shown}: {row['reason']}; {store.where(name)} has the traceback")
    if rows:
        store.write(name, to_parquet(pa.Table.from_pylist(rows, schema=REJECT_SCHEMA)))
    else:
        store.remove(name)


def check_row(row: Mapping[str, Any], schema: pa.Schema) -> None:
    """Raise `ValueError`, `TypeError` or `OverflowError` where the index cannot hold a value of `row`, or a time or a rate in it
    is none: found here it costs one sample, and at the shard's end it would cost them all."""
    pa.RecordBatch.from_pylist([row], schema=schema)
    for name in ("start_s", "end_s", "fps"):
        if not math.isfinite(row[name]):
            raise ValueError(f"{name} = {row[name]} is no finite number")


def _storable(value: Any) -> Any:
    """A text with what is not UTF-8 in it spelled out: an error may quote the name of any file."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def sample_info(row: dict[str, Any]) -> dict[str, Any]:
    """What KEY.json says of a sample: its index row without its place in the shard."""
    info = {name: value for name, value in row.items() if value is not None and name not in PLACE}
    if "extra" in info:
        info["extra"] = json.loads(info["extra"])
    return info


def _parse_info(schema: pa.Schema) -> ShardInfo:
    return ShardInfo.from_json((schema.metadata or {})[_INFO_KEY])


def _check_info(data: dict[str, Any]) -> None:
    where = _INFO_KEY.decode()
    require_fields(data, {"fingerprint": str, "tars": dict, "content": str, "ledger": dict, "totals": dict}, where)
    require_fields({"parent_content": "", **data}, {"parent_content": str}, where)
    require_counts(data["tars"], where, "tars.")
    require_fields(
        data["ledger"], {"planned": int, "committed": int, "filtered": dict, "rejected": dict}, where, "ledger."
    )
    for name in ("filtered", "rejected"):
        require_counts(data["ledger"][name], where, f"ledger.{name}.")
    if type(data.get("shard")) is not int or not {*data["tars"]} <= {"", *SPLITS}:
        raise DatasetError(f"{where} cannot be read: shard or tars: must be a number, and sizes by split")


def _no_index(store: Store, shard: int, error: BaseException) -> DatasetError:
    return DatasetError(
        f"{store.where(index_name(shard))} is no tokenreel index: {_one_line(error)}; delete it and run the job again"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def to_parquet(table: pa.Table) -> bytes:
    """A Parquet file of `table`; the same bytes for the same table."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def digest_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """The `content` of a shard with these samples: their keys and the SHA-256 of their payloads."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row['key']} {row['sha256']}\n".encode())
    return digest.hexdigest()[:32]


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    totals: dict[str, Any] = {
        "videos": len({row["video_id"] for row in rows}),
        "seconds": round(sum(row["end_s"] - row["start_s"] for row in rows), 3),
        "frames": sum(row["num_frames"] for row in rows),
        "payload_bytes": sum(row["size"] for row in rows),
    }
    for name in COUNTED:
        if counts := Counter(row[name] for row in rows if row.get(name)):
            totals[name] = dict(sorted(counts.items()))
    return totals

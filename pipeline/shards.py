"""One shard: its tar, its rejects and, last, the index that makes it count.

The tar and the rejects are written whole under their names before the index is, so no reader sees half a shard,
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
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DatasetError, OutputError, TransientIO
from pipeline.internal import INTERNAL
from pipeline.ledger import Ledger
from pipeline.parquet import parse_parquet
from pipeline.schema import CLIP_SCHEMA, EMBEDDING_SCHEMA, REJECT_SCHEMA, TOKEN_SCHEMA, Reject
from pipeline.storage import Store

log = logging.getLogger(__name__)

INDEX_SCHEMAS = {"clips": CLIP_SCHEMA, "tokens": TOKEN_SCHEMA, "embeddings": EMBEDDING_SCHEMA}
_TYPES = {field.name: field.type for schema in INDEX_SCHEMAS.values() for field in schema}
_OWN_COLUMN = {"clips": "ext", "embeddings": "sample_key", "tokens": "clip_key"}
_INFO_KEY = b"tokenreel.shard"
PLACE = {"offset", "size", "sha256", "json_offset", "json_size"}
"""Index columns that `ShardWriter` fills in."""
COUNTED = ("codec", "ext", "source_codec", "source_container")
"""Index columns of clips whose values are counted in the totals."""
_COPY_BYTES = 2**20
"""Read, hashed and written at a time: it stays in the CPU's cache on the way."""
_WRITEBACK_BYTES = 2**25
_USTAR_MAX_BYTES = 0o77777777777
Describe = Callable[[str], dict[str, Any]]
"""SHA-256 of a payload (hex) to the index row of its sample, without place and hash."""


def shard_name(shard: int) -> str:
    return f"shards/{shard:06d}.tar"


def index_name(shard: int) -> str:
    return f"index/{shard:06d}.parquet"


def rejects_name(shard: int) -> str:
    return f"rejects/{shard:06d}.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """What an index file says of its shard, in its Parquet metadata.

    content: digest of keys and payload hashes; it changes with any sample.
    parent_content: `content` of the clip shard that a token shard was made from; "" for clips.
    totals: videos, seconds, frames, payload_bytes, and for clips the counts of COUNTED.
    """

    fingerprint: str
    tar_bytes: int
    content: str
    ledger: Ledger
    parent_content: str = ""
    totals: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "ledger": self.ledger.to_json()})

    @classmethod
    def from_json(cls, text: str | bytes) -> ShardInfo:
        data = json.loads(text)
        return cls(**{**data, "ledger": Ledger.from_json(data["ledger"])})


class Written(NamedTuple):
    """A committed shard, how many bytes of input it took, and what a person should hear of how it went."""

    info: ShardInfo
    read_bytes: int
    warnings: tuple[str, ...] = ()


class ShardWriter:
    """Writes one shard: `add` samples, then `commit`. Until then nothing is visible under a final name.

    The tar is byte-reproducible: ustar headers, mtime 0, no owner, members in the order they were added. Memory does
    not grow with payloads: they stream through a buffer.
    """

    def __init__(self, store: Store, kind: str, fingerprint: str, shard: int) -> None:
        self._store, self._kind, self._fingerprint, self._shard = store, kind, fingerprint, shard
        self._scratch = store.scratch(shard_name(shard))
        self._file = self._scratch.open("wb+")
        self._rows: list[dict[str, Any]] = []
        self._given_to_disk = 0

    def add(self, row: dict[str, Any], ext: str, member: bytes, payload_start: int = 0) -> None:
        """Append a sample: `KEY.ext` with `member`, and `KEY.json` with what `row` says of it.

        Args:
            row: the index row without offsets, sizes and hash.
            payload_start: bytes of `member` before the payload that the index points at (a .npy header).
        """
        digest = hashlib.sha256(memoryview(member)[payload_start:]).hexdigest()
        with self._or_nothing():
            offset = self._begin_member() + payload_start
            self._write(member)
            self._end_member(f"{row['key']}.{ext}", len(member))
            self._add_row(row, offset, len(member) - payload_start, digest)

    def add_file(
        self, payload: IO[bytes], ext: str, describe: Describe, offset: int = 0, size: int | None = None
    ) -> str:
        """Append a sample whose payload is `size` bytes of an open file from `offset` on (all of it by default).

        The bytes are read once: hashed on their way into the tar, where the name that may depend on that hash is put
        before them afterwards.

        Returns:
            the payload's SHA-256, in hex.

        Raises:
            TransientIO: the file cannot be read, or ended early; as after any error but an `OutputError`, nothing of the
                sample is left in the shard, and more can be added.
        """
        size = os.fstat(payload.fileno()).st_size - offset if size is None else size
        with self._or_nothing():
            place = self._begin_member()
            digest = self._copy(payload, offset, size)
            row = describe(digest)
            self._end_member(f"{row['key']}.{ext}", size)
            self._add_row(row, place, size, digest)
        return digest

    def mark(self) -> tuple[int, int]:
        """The place that `rewind` goes back to."""
        return self._file.tell(), len(self._rows)

    def rewind(self, mark: tuple[int, int]) -> None:
        """Drop the samples that were added since `mark`."""
        position, num_rows = mark
        with self._output():
            self._file.seek(position)
            self._file.truncate()
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
        tar_bytes = self._end_tar()
        info = ShardInfo(
            fingerprint=self._fingerprint,
            tar_bytes=tar_bytes,
            content=digest_rows(rows),
            parent_content=parent_content,
            ledger=ledger,
            totals=_totals(rows),
        )
        # A shard that is made again stops counting before its bytes change.
        self._store.remove(index_name(self._shard))
        self._store.put(self._scratch, shard_name(self._shard))
        write_rejects(self._store, rejects_name(self._shard), rejects)
        table = pa.Table.from_pylist(rows, schema=index_schema(self._kind, info))
        self._store.write(index_name(self._shard), to_parquet(table))
        return info

    def abort(self) -> None:
        """Drop everything; harmless after `commit`, and never an error of its own: a full disk has said enough."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._scratch.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """Leaves nothing of a sample that the body fails to add."""
        mark = self.mark()
        try:
            yield
        except OutputError:  # the file is in no state to go on with
            raise
        except BaseException:
            self.rewind(mark)
            raise

    @contextlib.contextmanager
    def _output(self) -> Iterator[None]:
        """Tells errors of the shard's own file from those of an input."""
        try:
            yield
        except OSError as error:
            raise OutputError(error.errno, error.strerror, str(self._scratch)) from error

    def _write(self, data: bytes | memoryview) -> None:
        with self._output():
            self._file.write(data)

    def _begin_member(self) -> int:
        self._write(bytes(tarfile.BLOCKSIZE))  # the header's place
        return self._file.tell()

    def _end_member(self, name: str, size: int) -> None:
        header = tar_header(name, size)
        end = self._file.tell()
        with self._output():
            self._file.seek(end - size - tarfile.BLOCKSIZE)
            self._file.write(header)
            self._file.seek(end)
            self._file.write(bytes(-size % tarfile.BLOCKSIZE))

    def _add_row(self, row: dict[str, Any], offset: int, size: int, digest: str) -> None:
        info = json.dumps(sample_info(row), sort_keys=True).encode()
        json_offset = self._begin_member()
        self._write(info)
        self._end_member(f"{row['key']}.json", len(info))
        place = {"offset": offset, "size": size, "sha256": digest, "json_offset": json_offset, "json_size": len(info)}
        row = {**row, **place}
        check_row(row, INDEX_SCHEMAS[self._kind])
        self._rows.append(row)

    def _copy(self, payload: IO[bytes], offset: int, size: int) -> str:
        hasher = hashlib.sha256()
        buffer = memoryview(bytearray(min(_COPY_BYTES, max(1, size))))
        done = 0
        while done < size:
            try:
                count = os.preadv(payload.fileno(), [buffer[: size - done]], offset + done)
            except OSError as error:
                raise TransientIO(f"cannot be read from byte {offset + done} on: {error.strerror}") from error
            if not count:
                raise TransientIO(f"ended after {done} of {size} bytes; it changed while it was read")
            hasher.update(buffer[:count])
            self._write(buffer[:count])
            done += count
            self._start_writeback()
        return hasher.hexdigest()

    def _start_writeback(self) -> None:
        """Have the disk write what is there already, so that the flush at the end of the shard waits for little."""
        position = self._file.tell()
        if position - self._given_to_disk >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            span = (self._given_to_disk, position - self._given_to_disk)
            os.posix_fadvise(self._file.fileno(), *span, os.POSIX_FADV_DONTNEED)
            self._given_to_disk = position

    def _end_tar(self) -> int:
        self._file.write(bytes(tar_end_bytes(self._file.tell())))
        size = self._file.tell()
        self._file.close()
        return size


def index_schema(kind: str, info: ShardInfo) -> pa.Schema:
    """The schema of a shard's index file, which holds `info`."""
    return INDEX_SCHEMAS[kind].with_metadata({_INFO_KEY: info.to_json().encode()})


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member: mode 0644, nobody's, from 1970."""
    header = tarfile.TarInfo(name)
    header.size = size
    header.mode = 0o644
    # ustar has no word for 8 GiB and more; every reader knows GNU's.
    return header.tobuf(tarfile.USTAR_FORMAT if size <= _USTAR_MAX_BYTES else tarfile.GNU_FORMAT)


def tar_end_bytes(position: int) -> int:
    """How many zeros end a tar whose last member ends at `position`: two blocks, and as many as fill a record."""
    end = position + 2 * tarfile.BLOCKSIZE
    return 2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE


def read_shard_info(store: Store, shard: int) -> ShardInfo | None:
    """What the index of a shard says of it; None where there is no index, so that the shard does not count.

    Raises:
        DatasetError: the file there is no index of ours.
    """
    try:
        data = store.read(index_name(shard))
    except FileNotFoundError:
        return None
    try:
        return _parse_info(pq.read_schema(pa.BufferReader(data)))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise _no_index(store, shard, error) from error


def read_shard_columns(store: Store, shard: int, columns: Sequence[str]) -> tuple[ShardInfo, pa.Table]:
    """What the index of a shard says of it, and some columns of its rows; in a local dataset only these are read.

    Raises:
        FileNotFoundError: the shard has no index.
        DatasetError: the file there is no index of ours.
    """
    name = index_name(shard)
    source = store.path(name) if store.is_local else pa.BufferReader(store.read(name))
    try:
        with pq.ParquetFile(source) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            table = add_new_columns(file.read(there, use_threads=False), columns)
            return _parse_info(file.schema_arrow), table.select(list(columns))
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise _no_index(store, shard, error) from error


def read_shard_rows(store: Store, shard: int) -> list[dict[str, Any]]:
    """Index rows of one shard in the order of their keys, with the column `shard` added.

    Raises:
        DatasetError: the index is damaged.
    """
    data = store.read(index_name(shard))
    try:
        return [{**row, "shard": shard} for row in add_new_columns(parse_parquet(data)).to_pylist()]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(
            f"{store.where(index_name(shard))} cannot be read: {_one_line(error)}; run `tokenreel verify --repair`"
        ) from error


def add_new_columns(table: pa.Table, names: Sequence[str] | None = None) -> pa.Table:
    """`table` with those of the columns `names` (all of its kind by default) that its version of the format did not have, null."""
    if names is None:
        names = INDEX_SCHEMAS[next(kind for kind, own in _OWN_COLUMN.items() if own in table.column_names)].names
    for name in names:
        if name not in table.column_names and name in _TYPES:
            table = table.append_column(name, pa.nulls(len(table), _TYPES[name]))
    return table


def read_payload(store: Store, row: dict[str, Any]) -> bytes:
    """The payload of one index row (with its `shard`).

    Raises:
        DatasetError: the shard is shorter than the index says, or its bytes are not the indexed ones.
    """
    data = store.read_range(shard_name(row["shard"]), row["offset"], row["size"])
    if len(data) != row["size"]:
        raise DatasetError(
            f"{store.where(shard_name(row['shard']))}: sample {row['key']} ends after {len(data)} of {row['size']} bytes"
        )
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise DatasetError(
            f"{store.where(shard_name(row['shard']))}: the bytes of sample {row['key']} are not the ones that were committed"
        )
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

"""`plan.parquet` on disk: written as a stream, read shard by shard, two plans compared."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.schema import PLAN_SCHEMA, VideoRef
from pipeline.spill import hash_texts

PLAN_NAME = "plan.parquet"
_GROUP_ROWS = 2**16
_GROUP_BYTES = 2**26


class TableWriter:
    """A Parquet file from tables of any size; its bytes depend on the rows alone, not on how they were cut.

    A row group ends after 65,536 rows or 64 MiB, so that whoever reads one needs no more memory than that.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        few = [name for name in ("shard", "label", "split", "reject_class", "reason") if name in schema.names]
        statistics = [name for name in ("shard",) if name in schema.names]  # a long text would stand in the footer
        self._writer = pq.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=few, write_statistics=statistics or False
        )
        self._waiting: list[pa.Table] = []
        self._num_rows = self._num_bytes = 0

    def add(self, table: pa.Table) -> None:
        while len(table):
            ends = self._num_bytes + np.cumsum(_row_bytes(table))
            count = min(_GROUP_ROWS - self._num_rows, int(np.searchsorted(ends, _GROUP_BYTES)) + 1, len(table))
            self._waiting.append(table.slice(0, count))
            self._num_rows, self._num_bytes = self._num_rows + count, int(ends[count - 1])
            if self._num_rows == _GROUP_ROWS or self._num_bytes >= _GROUP_BYTES:
                self._flush()
            table = table.slice(count)

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        # One chunk a column: where a chunk ends, a page may end.
        self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks(), row_group_size=_GROUP_ROWS)
        self._waiting, self._num_rows, self._num_bytes = [], 0, 0


class TableDigest:
    """SHA-256 over the rows of tables, however they are cut into tables, and whatever writes them to a file."""

    def __init__(self, names: Iterable[str]) -> None:
        self._columns = {name: (hashlib.sha256(), hashlib.sha256()) for name in names}

    def update(self, table: pa.Table) -> None:
        for name, (shape, content) in self._columns.items():
            column = table[name].combine_chunks()
            if pa.types.is_string(column.type):
                shape.update(_little(pc.fill_null(pc.binary_length(column), -1), "<i4"))
                content.update(_text_bytes(column))
            else:
                shape.update(_little(pc.is_valid(column).cast(pa.uint8()), "u1"))
                content.update(_little(pc.fill_null(column, 0), "<f8" if pa.types.is_floating(column.type) else "<i8"))

    def digest(self) -> bytes:
        parts = (name.encode() + a.digest() + b.digest() for name, (a, b) in self._columns.items())
        return hashlib.sha256(b"".join(parts)).digest()


def read_plan_shards(file: Path, shards: Iterable[int]) -> Iterator[tuple[int, list[VideoRef]]]:
    """(shard, its inputs in the order of the plan) for each of `shards`, which ascend.

    A stream: one row group is held at a time, and those that hold none of them are not read.
    """
    waiting = deque(shards)
    refs: list[VideoRef] = []
    with pq.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):
            range_ = parquet.metadata.row_group(group).column(0).statistics
            while waiting and waiting[0] < range_.min:
                yield waiting.popleft(), refs
                refs = []
            if not waiting or waiting[0] > range_.max:
                continue
            table = parquet.read_row_group(group)
            numbers, table = table["shard"].to_numpy(), table.drop_columns(["shard"])
            while waiting and waiting[0] <= range_.max:
                first, end = np.searchsorted(numbers, (waiting[0], waiting[0] + 1)).tolist()
                refs += [VideoRef(**row) for row in table.slice(first, end - first).to_pylist()]
                if waiting[0] == range_.max:  # it may go on in the next group
                    break
                yield waiting.popleft(), refs
                refs = []
    while waiting:
        yield waiting.popleft(), refs
        refs = []


def name_changes(old_plan: Path, new_plan: Path, limit: int = 5) -> list[str]:
    """What differs between two plans' inputs, by path: at most `limit` of "added: x", "removed: x", "changed: x".

    Both are read as streams, since they are in the same order; where they were dealt to other shards does not count.
    """
    with pq.ParquetFile(old_plan) as old, pq.ParquetFile(new_plan) as new:
        return list(islice(_differ(_videos(old), _videos(new)), limit))


Video = tuple[tuple[int, str], list[dict[str, Any]]]


def _differ(old: Iterator[Video], new: Iterator[Video]) -> Iterator[str]:
    before, after = next(old, None), next(new, None)
    while before is not None or after is not None:
        if after is None or (before is not None and before[0] < after[0]):
            assert before is not None
            yield f"removed: {before[0][1]}"
            before = next(old, None)
        elif before is None or after[0] < before[0]:
            yield f"added: {after[0][1]}"
            after = next(new, None)
        else:
            if before[1] != after[1]:
                yield f"changed: {after[0][1]}"
            before, after = next(old, None), next(new, None)


def _videos(plan: pq.ParquetFile) -> Iterator[Video]:
    """((hash, path), rows) of each video, in the order of the plan, which is that of these pairs."""
    current: Video | None = None
    for batch in plan.iter_batches(batch_size=4096, columns=PLAN_SCHEMA.names[1:]):
        rows = batch.to_pylist()
        for key, row in zip(hash_texts(row["path"] for row in rows).tolist(), rows, strict=True):
            name = (key, row["path"])
            if current is not None and current[0] == name:
                current[1].append(row)
                continue
            if current is not None:
                yield current
            current = (name, [row])
    if current is not None:
        yield current


def _row_bytes(table: pa.Table) -> np.ndarray:
    sizes = np.full(len(table), 64, np.int64)
    for column in table.columns:
        if pa.types.is_string(column.type):
            sizes += pc.fill_null(pc.binary_length(column), 0).to_numpy()
    return sizes


def _text_bytes(column: pa.StringArray) -> pa.Buffer:
    filled = pc.fill_null(column, "")
    offsets = np.frombuffer(filled.buffers()[1], np.int32)[filled.offset : filled.offset + len(filled) + 1]
    data = filled.buffers()[2]
    return data[int(offsets[0]) : int(offsets[-1])] if data is not None and len(filled) else pa.py_buffer(b"")


def _little(column: pa.Array, kind: str) -> bytes:
    return np.ascontiguousarray(column.to_numpy(zero_copy_only=False), dtype=kind).tobytes()

"""What a loader must know of each sample, in one file of the node's cache that all its workers map into memory.

The index of a dataset is one Parquet file a shard. Ten million rows of it take a minute to read and gigabytes to hold, so
the first worker that asks writes the few columns of the selected rows into one file, in bounded memory, and everybody
maps it: 64 bytes a sample, in pages that the workers of a node share. The file is ours and never changes once it has its
name, which is why it may be mapped.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset import DatasetMeta, digest_contents, listed_shards
from pipeline.errors import DatasetError
from pipeline.node_cache import NodeCache
from pipeline.schema import SPLITS, fingerprint
from pipeline.shards import ShardInfo, index_name, read_shard_columns, tar_name
from pipeline.storage import Store
from pipeline.untrusted import check_num_rows, check_windows, list_members

_FORMAT = 2
_MAX_KEY_BYTES = 48
ROW = np.dtype([("key", f"S{_MAX_KEY_BYTES}"), ("offset", "<i8"), ("num_frames", "<i4"), ("tar", "<i4")])
"""A sample: its key, where its payload begins in its tar, its length, and which tar that is. One cache line."""
_TARS_A_SHARD = 4
_SPLIT_OF_TAR = ("", *SPLITS)
_COLUMNS = ("key", "offset", "num_frames", "height", "width")
_READ_THREADS = 8
_REMOTE_READ_THREADS = 32
_SHARDS_AT_A_TIME = 64
_TAIL_BYTES = 8
_ROOM_TIMEOUT_S = 60.0
Select = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedTar:
    """A tar of the dataset, of one split ("": of all of them, in format 3); `num_samples` of it are selected, `content` is what the
    index of its shard says."""

    shard: int
    split: str
    num_samples: int
    tar_bytes: int
    content: str

    @property
    def number(self) -> int:
        """What the rows call it."""
        return self.shard * _TARS_A_SHARD + _SPLIT_OF_TAR.index(self.split)


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)
class SampleIndex:
    """The selected samples of a dataset, in the order of shards and keys.

    rows: (n,) of `ROW`, mapped; a read touches the pages of the rows that it names.
    tars: all of the dataset, in the order of shards.
    grids: the (height, width) that occur, sorted.
    """

    rows: np.ndarray
    tars: tuple[IndexedTar, ...]
    grids: tuple[tuple[int, int], ...]

    @property
    def shard_of_each(self) -> np.ndarray:
        """(n,) int32 shard of each sample, non-decreasing; made without touching the rows."""
        return np.repeat(np.array([tar.shard for tar in self.tars], np.int32), [tar.num_samples for tar in self.tars])


def open_index(
    store: Store,
    meta: DatasetMeta,
    cache: NodeCache,
    select: Select,
    *,
    selection: Mapping[str, Any],
    columns: Sequence[str],
) -> SampleIndex:
    """The index of the rows that `select` leaves, from the cache, or made there first.

    Args:
        select: takes a table of a part of the index, and gives the rows of it that count, in their order.
        selection: says what `select` does, as plain JSON: the same words must mean the same rows.
        columns: index columns that `select` looks at.

    Raises:
        DatasetError: an index file is damaged, or the files are not those that `dataset.json` sums up.
        CacheFull: the cache cannot hold it.
    """
    identity = fingerprint(
        format=_FORMAT, url=store.url, dataset=meta.fingerprint, content=meta.content, selection=dict(selection)
    )
    name = f"index/{identity}"
    if not (cache.folder / name).exists():
        _require_possible(store, meta)
    wanted = list(dict.fromkeys((*_COLUMNS, *columns)))
    # The rows that were committed are the most that can be selected; the tars of a shard are described in less than 400 bytes.
    most = int((meta.totals or {}).get("committed", 0)) * ROW.itemsize + meta.num_shards * 400 + 4096
    descriptor = cache.open(
        name,
        most,
        lambda file: _build(file, store, meta, select, wanted),
        timeout_s=_ROOM_TIMEOUT_S,
    )
    index = _map(descriptor)
    weakref.finalize(index, os.close, descriptor)  # an open descriptor is what keeps a file in the cache
    return index


def _require_possible(store: Store, meta: DatasetMeta) -> None:
    """Raise `DatasetError` where `dataset.json` claims more than its index files can hold, before room is made for it."""
    sizes = [entry.size_bytes or 0 for entry in list_members(store, "index")]
    where = store.where("dataset.json")
    if meta.num_shards > len(sizes):
        raise DatasetError(f"{where}: num_shards = {meta.num_shards}; there are {len(sizes)} index files")
    check_num_rows(int((meta.totals or {}).get("committed", 0)), sum(sizes), f"{where}: totals.committed")


def _build(file: IO[bytes], store: Store, meta: DatasetMeta, select: Select, columns: list[str]) -> None:
    tars: list[IndexedTar] = []
    contents: list[str] = []
    grids: set[tuple[int, int]] = set()
    numbers = listed_shards(store)
    with ThreadPoolExecutor(_READ_THREADS if store.is_local else _REMOTE_READ_THREADS, "index") as pool:
        for first in range(0, len(numbers), _SHARDS_AT_A_TIME):
            part = numbers[first : first + _SHARDS_AT_A_TIME]
            read = list(pool.map(lambda shard: _read(store, meta, shard, columns), part))
            table = select(pa.concat_tables([table for _, table in read]))
            rows = _to_rows(store, table)
            file.write(rows.tobytes())
            counts = dict(zip(*(found.tolist() for found in np.unique(rows["tar"], return_counts=True)), strict=True))
            for shard, (info, _) in zip(part, read, strict=True):
                contents.append(info.content)
                for split, size in info.tars.items():
                    tar = IndexedTar(shard=shard, split=split, num_samples=0, tar_bytes=size, content=info.content)
                    tars.append(replace(tar, num_samples=counts.get(tar.number, 0)))
            sides = table.group_by(["height", "width"]).aggregate([])
            grids |= set(zip(sides["height"].to_pylist(), sides["width"].to_pylist(), strict=True))
    if digest_contents(contents) != meta.content:
        raise DatasetError(
            f"{store}: its index files are not those that dataset.json sums up; it is being written, or that was broken "
            "off: run the command that writes it again"
        )
    tail = json.dumps(
        {
            "tars": [[tar.shard, tar.split, tar.num_samples, tar.tar_bytes, tar.content] for tar in tars],
            "grids": sorted(grids),
        },
        separators=(",", ":"),
    ).encode()
    file.write(tail + len(tail).to_bytes(_TAIL_BYTES, "little"))
    file.flush()


def _read(store: Store, meta: DatasetMeta, shard: int, columns: list[str]) -> tuple[ShardInfo, pa.Table]:
    info, table = read_shard_columns(store, shard, columns)
    if info.fingerprint != meta.fingerprint:
        raise DatasetError(
            f"{store}: the index of shard {shard:06d} belongs to dataset {info.fingerprint}, not to {meta.fingerprint}; "
            "run the command that writes it again"
        )
    check_windows(table, info.tars, store.where(index_name(shard)))
    return info, table


def _to_rows(store: Store, table: pa.Table) -> np.ndarray:
    rows = np.empty(len(table), ROW)
    if not len(table):
        return rows
    # Padded by Arrow to one width, and so an array: a Python string a sample would take most of the time.
    keys = pa.concat_arrays(pc.utf8_rpad(table["key"], _MAX_KEY_BYTES, "\0").chunks)
    if (longest := pc.max(pc.binary_length(keys)).as_py()) > _MAX_KEY_BYTES:
        raise DatasetError(f"{store}: a key of {longest} bytes; at most {_MAX_KEY_BYTES}, in ASCII, can be loaded")
    rows["key"] = np.frombuffer(keys.buffers()[2], f"S{_MAX_KEY_BYTES}", len(keys))
    for name in ("offset", "num_frames"):
        rows[name] = table[name].to_numpy()
    rows["tar"] = _tar_numbers(table)
    return rows


def _tar_numbers(table: pa.Table) -> np.ndarray:
    """(n,) the number of the tar of each row."""
    tars = table["tar"].unify_dictionaries().combine_chunks()
    numbers = []
    for name in tars.dictionary.to_pylist():
        split, _, shard = Path(name).stem.rpartition("-")
        numbers.append(int(shard) * _TARS_A_SHARD + _SPLIT_OF_TAR.index(split))
    return np.array(numbers, np.int32)[tars.indices.to_numpy()]


def name_tar(number: int) -> str:
    """The file in the dataset that rows call `number`."""
    shard, place = divmod(number, _TARS_A_SHARD)
    return tar_name(shard, _SPLIT_OF_TAR[place])


def _map(descriptor: int) -> SampleIndex:
    size = os.fstat(descriptor).st_size
    tail_bytes = int.from_bytes(os.pread(descriptor, _TAIL_BYTES, size - _TAIL_BYTES), "little")
    tail = json.loads(os.pread(descriptor, tail_bytes, size - _TAIL_BYTES - tail_bytes))
    tars = tuple(
        IndexedTar(shard=shard, split=split, num_samples=num_samples, tar_bytes=tar_bytes, content=content)
        for shard, split, num_samples, tar_bytes, content in tail["tars"]
    )
    num_rows = (size - _TAIL_BYTES - tail_bytes) // ROW.itemsize
    with os.fdopen(os.dup(descriptor), "rb") as file:
        rows = np.memmap(file, ROW, "r", shape=(num_rows,)) if num_rows else np.empty(0, ROW)
    return SampleIndex(rows=rows, tars=tars, grids=tuple((height, width) for height, width in tail["grids"]))

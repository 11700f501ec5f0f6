"""The rows of a corpus in the order of the plan, each looked at where it lies: the middle of planning."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus import Examine, make_examine, reject
from pipeline.manifest import MAX_SIZE_BYTES
from pipeline.spill import Spill, is_new
from pipeline.storage import Entry, Store

_ORDER = [(name, "ascending") for name in ("key", "path", "reject_class", "start_s", "end_s", "row")]
_THREADS = 32


@dataclass(kw_only=True, slots=True)
class Totals:
    """Distinct good videos, the sum of the sizes that are known, and how many are not."""

    num_videos: int = 0
    num_bytes: int = 0
    num_unsized: int = 0


def order_rows(rows: Spill, store: Store, path: Path, *, need_sizes: bool) -> Totals:
    """Write the rows to `path`, an Arrow stream sorted by hash and path; no video is in two of its batches.

    A row that names what an earlier one names, and a file that is missing, leads out, or states a size that none has, is
    rejected. Local files are
    all looked at; those of an object store only if `need_sizes` and the manifest gives none.
    """
    examine = make_examine(store.path()) if store.is_local else partial(_ask, store) if need_sizes else None
    totals = Totals()
    writer: pa.ipc.RecordBatchStreamWriter | None = None
    with pa.OSFile(str(path), "wb") as sink, ThreadPoolExecutor(_THREADS) as pool:
        for table in rows.read():
            table = _reject_repeats(table.sort_by(_ORDER).combine_chunks())
            if examine is not None:
                table = _examine_files(table, examine, pool, all_files=store.is_local)
            videos = first_rows(table.filter(pc.is_null(table["reject_class"])))
            totals.num_videos += len(videos)
            totals.num_bytes += pc.sum(videos["size_bytes"]).as_py() or 0
            totals.num_unsized += videos["size_bytes"].null_count
            writer = writer or pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))
            writer.write_table(table.combine_chunks())
        if writer is not None:
            writer.close()
    return totals


def read_ordered(path: Path) -> Iterator[pa.Table]:
    """The tables that `order_rows` wrote, one at a time."""
    with pa.OSFile(str(path)) as source:
        for batch in pa.ipc.open_stream(source):
            yield pa.table(batch)


def first_rows(table: pa.Table) -> pa.Table:
    """The first row of each path in an ordered table."""
    return table.filter(pa.array(is_new(table["path"])))


def _reject_repeats(table: pa.Table) -> pa.Table:
    is_first = is_new(table["path"])
    for name in ("start_s", "end_s"):
        is_first |= is_new(pc.fill_null(table[name], -1))
    is_first |= pc.is_valid(table["reject_class"]).to_numpy()  # rejects stand before the good rows of their path
    is_first |= is_new(pc.is_valid(table["reject_class"]))
    starts = np.flatnonzero(is_first)
    first_row = table["row"].take(starts[np.cumsum(is_first) - 1])
    why = pc.binary_join_element_wise(
        "row ", table["row"].cast(pa.string()), ": row ", first_row.cast(pa.string()), " names it already", ""
    )
    return reject(table, pa.array(~is_first), "bad-row", why)


def _examine_files(table: pa.Table, examine: Examine, pool: ThreadPoolExecutor, *, all_files: bool) -> pa.Table:
    """`table` with size and time as the storage has them; rows of files that are none are rejected."""
    wanted = pc.is_null(table["reject_class"])
    if not all_files:
        wanted = pc.and_(wanted, pc.is_null(table["size_bytes"]))
    wanted = wanted.to_numpy()
    is_first = is_new(table["path"])
    video = np.cumsum(is_first) - 1
    asked = np.unique(video[wanted])
    paths = table["path"].take(np.flatnonzero(is_first)[asked]).to_pylist()
    found = list(pool.map(lambda chunk: [examine(path) for path in chunk], _cut(paths)))
    results = [result for chunk in found for result in chunk]
    index = pa.array(np.searchsorted(asked, video), mask=~wanted)
    entries = [result if isinstance(result, Entry) else None for result in results]
    refusals = [_refusal(result) for result in results]
    entries = [entry if refused[0] is None else None for entry, refused in zip(entries, refusals, strict=True)]
    for name, values in (
        ("size_bytes", [entry and entry.size_bytes for entry in entries]),
        ("mtime_ns", [entry and (entry.mtime_ns or None) for entry in entries]),
    ):
        column = pc.if_else(pa.array(wanted), pa.array(values, pa.int64()).take(index), table[name])
        table = table.set_column(table.schema.get_field_index(name), name, column)
    classes, reasons = (pa.array([r[i] for r in refusals], pa.string()).take(index) for i in (0, 1))
    return reject(table, pc.is_valid(classes), classes, reasons)


def _refusal(found: Entry | tuple[str, str]) -> tuple[str, str] | tuple[None, None]:
    if not isinstance(found, Entry):
        return found
    if (found.size_bytes or 0) > MAX_SIZE_BYTES:  # a sparse file, or what a server says
        return "too-large", f"states a size of {found.size_bytes} bytes; at most {MAX_SIZE_BYTES} can be planned"
    return None, None


def _cut(paths: list[str], size: int = 256) -> Iterator[list[str]]:
    return (paths[start : start + size] for start in range(0, len(paths), size))


def _ask(store: Store, path: str) -> Entry | tuple[str, str]:
    try:
        entry = store.stat(path)
    except OSError as error:
        return "unreadable", f"cannot be examined: {error.strerror or error}"
    return entry or ("unreadable", "cannot be examined: there is no such file")

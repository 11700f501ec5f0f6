"""Parquet files that are in memory."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def parse_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a Parquet file.

    Not `pq.read_table`: its scanner's threads can let go of `data` after it returned, and a process that ends then aborts.
    """
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(None if columns is None else list(columns), use_threads=False)

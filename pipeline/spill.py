"""Tables larger than memory in the order of a hash: spread over files by its top bits, then read back file by file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError

_FILES = 256
_MAX_DEPTH = 7
_BUFFER_ROWS = 2**18  # many rows at once, so that each file gets large pieces
_BUFFER_BYTES = 2**26
SPLIT_BYTES = 2**28
"""A file with more than this is spread again before it is read."""
MAX_GROUP_BYTES = 2**30
"""Rows that share one hash cannot be spread; they must fit in this."""
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)


def hash_texts(texts: Iterable[str]) -> np.ndarray:
    """A uint64 for each text, the same on every machine and in every version: the first 8 bytes of its BLAKE2b."""
    return keys_of(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)


def keys_of(digests: Iterable[bytes]) -> np.ndarray:
    """The first 8 bytes of each digest as a uint64, in the order of the bytes."""
    return np.frombuffer(b"".join(digest[:8] for digest in digests), ">u8").astype(np.uint64)


def is_new(column: pa.ChunkedArray) -> np.ndarray:
    """Whether each value differs from the one before it."""
    if not len(column):
        return np.zeros(0, bool)
    return np.append(True, pc.not_equal(column[1:], column[:-1]).to_numpy())


class Spill:
    """Rows by their uint64 column `key`: `add` tables in any order, then `read` each range of keys as one table.

    Args:
        folder: an empty or missing folder; what stands in it is deleted as it is read.
        depth: how many times the rows were spread already.
    """

    def __init__(self, folder: Path, *, depth: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._depth = folder, depth
        self._writers: list[pa.ipc.RecordBatchStreamWriter | None] = [None] * _FILES
        self._num_bytes = [0] * _FILES
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= _BUFFER_ROWS or sum(one.nbytes for one in self._waiting) >= _BUFFER_BYTES:
            self._spread()

    def read(self) -> Iterator[pa.Table]:
        """The rows in tables that follow each other by `key`, unsorted within one; none holds part of a key.

        Raises:
            ConfigError: more rows share one key than fit in memory.
        """
        self._spread()
        for writer in self._writers:
            if writer is not None:
                writer.close()
        for part, num_bytes in enumerate(self._num_bytes):
            if not num_bytes:
                continue
            path = self._folder / f"{part:03d}.arrow"
            if num_bytes <= SPLIT_BYTES or self._depth == _MAX_DEPTH:
                if num_bytes > MAX_GROUP_BYTES:
                    raise ConfigError(
                        f"planning: {num_bytes} bytes of rows share one key (one path, or one size, named again and again); at "
                        f"most {MAX_GROUP_BYTES} fit in memory; look for what the corpus repeats"
                    )
                with pa.OSFile(str(path)) as source:
                    table = pa.ipc.open_stream(source).read_all()
                path.unlink()
                yield table
            else:
                finer = Spill(self._folder / f"{part:03d}", depth=self._depth + 1)
                with pa.OSFile(str(path)) as source:
                    for batch in pa.ipc.open_stream(source):
                        finer.add(pa.table(batch))
                path.unlink()
                yield from finer.read()

    def _spread(self) -> None:
        if not self._waiting:
            return
        table, self._waiting = pa.concat_tables(self._waiting), []
        keys = table.column("key").to_numpy()
        parts = (keys >> np.uint64(56 - 8 * self._depth)).astype(np.uint8)
        ordered = table.take(np.argsort(parts, kind="stable"))
        ends = np.cumsum(np.bincount(parts, minlength=_FILES))
        start = 0
        for part, end in enumerate(ends.tolist()):
            if end > start:
                self._write(part, ordered.slice(start, end - start))
            start = end

    def _write(self, part: int, table: pa.Table) -> None:
        writer = self._writers[part]
        if writer is None:
            writer = pa.ipc.new_stream(str(self._folder / f"{part:03d}.arrow"), table.schema, options=_OPTIONS)
            self._writers[part] = writer
        writer.write_table(table)
        self._num_bytes[part] += table.nbytes

"""Files with equal bytes, in a corpus of any size: first by size, then by both ends, then by all bytes.

Only files that collide at one level are read at the next, so a corpus without duplicates costs next to nothing. The
levels meet on disk (`Spill`), not in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.schema import mix64
from pipeline.spill import Spill, is_new, keys_of
from pipeline.storage import Store

File = tuple[str, int]
"""(path, size in bytes)"""
MapFiles = Callable[[Callable[[File], bytes | None], list[File]], Iterable[bytes | None]]
"""Calls a function on each file, in any place, and returns the results in order."""

_END_BYTES = 2**16
_BLOCK_BYTES = 2**22
_CHUNK_FILES = 4096
_THREADS = 16


def find_duplicates(
    store: Store, videos: Iterable[pa.Table], scratch: Path, *, map_files: MapFiles | None = None
) -> Iterator[pa.Table]:
    """Tables `path, size_bytes, first` of the files whose bytes are those of `first`, the first by path of its kind.

    Empty files are left out: they are rejected for what they are. So are those whose size nobody states, and those that
    are missing or may not be read; of the latter the shard stage will say why.

    Args:
        videos: tables with `path` (each once) and `size_bytes`.
        scratch: folder for temporary files, some 100 bytes a video.
        map_files: runs `hash_ends` and `hash_whole`; threads of this process where it is None.

    Raises:
        TransientIO: the storage failed on every attempt; without that file nobody knows what is a copy.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        map_files = map_files or pool.map
        same_size = _share_digest((_by_size(table) for table in videos), scratch / "sizes")
        same_ends = _share_digest(_hashed(same_size, partial(hash_ends, store), map_files), scratch / "ends")
        for table in _share_digest(_hashed(same_ends, partial(hash_whole, store), map_files), scratch / "whole"):
            starts = is_new(table["digest"])
            first = table["path"].take(np.flatnonzero(starts)[np.cumsum(starts) - 1])
            named = table.append_column("first", first).select(["path", "size_bytes", "first"])
            yield named.filter(pc.not_equal(named["path"], named["first"]))


def hash_ends(store: Store, file: File) -> bytes | None:
    """SHA-256 of a file's size and its first and last 64 KiB; None where it cannot be read."""
    path, size_bytes = file
    digest = hashlib.sha256(size_bytes.to_bytes(8, "little"))
    try:
        digest.update(store.read_range(path, 0, min(size_bytes, _END_BYTES)))
        if size_bytes > _END_BYTES:
            offset = max(_END_BYTES, size_bytes - _END_BYTES)
            digest.update(store.read_range(path, offset, size_bytes - offset))
    except OSError:
        return None
    return digest.digest()


def hash_whole(store: Store, file: File) -> bytes | None:
    """SHA-256 of a file's bytes, read in blocks of 4 MiB; None where it cannot be read.

    To the end of the file, whatever its size is said to be: a manifest that is wrong must not make two files one.
    """
    digest = hashlib.sha256()
    try:
        for offset in count(0, _BLOCK_BYTES):
            block = store.read_range(file[0], offset, _BLOCK_BYTES)
            digest.update(block)
            if len(block) < _BLOCK_BYTES:
                break
    except OSError:
        return None
    return digest.digest()


def _by_size(videos: pa.Table) -> pa.Table:
    known = videos.select(["path", "size_bytes"]).filter(pc.greater(videos["size_bytes"], 0))
    keys = mix64(known["size_bytes"].to_numpy())
    return _with_digest(known, [key.tobytes() for key in keys.astype(">u8")])


def _hashed(
    tables: Iterable[pa.Table], function: Callable[[File], bytes | None], map_files: MapFiles
) -> Iterator[pa.Table]:
    for table in tables:
        for start in range(0, len(table), _CHUNK_FILES):
            part = table.slice(start, _CHUNK_FILES).select(["path", "size_bytes"])
            files = list(zip(part["path"].to_pylist(), part["size_bytes"].to_pylist(), strict=True))
            digests = list(map_files(function, files))
            readable = part.filter(pa.array([digest is not None for digest in digests], pa.bool_()))
            yield _with_digest(readable, [digest for digest in digests if digest is not None])


def _with_digest(table: pa.Table, digests: list[bytes]) -> pa.Table:
    columns = {"key": pa.array(keys_of(digests)), "digest": pa.array(digests, pa.binary())}
    return pa.table({**columns, "path": table["path"], "size_bytes": table["size_bytes"]})


def _share_digest(tables: Iterable[pa.Table], scratch: Path) -> Iterator[pa.Table]:
    """The rows that share their `digest` with another one, together, sorted by it and `path`."""
    spill = Spill(scratch)
    for table in tables:
        spill.add(table)
    for table in spill.read():
        table = table.sort_by([("digest", "ascending"), ("path", "ascending")])
        starts = is_new(table["digest"])
        alone = starts & np.append(starts[1:], True)
        yield table.filter(pa.array(~alone))

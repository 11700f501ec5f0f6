"""The tars of a dataset as open files: where they lie, or, from an object store, in the node's cache."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import IO, Any

from pipeline.dataset import DatasetMeta
from pipeline.errors import ConfigError, DatasetError, TokenreelError
from pipeline.node_cache import CacheFull, NodeCache
from pipeline.sample_index import IndexedTar, SampleIndex, name_tar
from pipeline.schema import fingerprint
from pipeline.shards import read_shard_columns
from pipeline.storage import RemoteStore, Store
from pipeline.untrusted import open_member

log = logging.getLogger(__name__)
_MAX_OPEN_TARS = 256
_ATTEMPTS = 3
_FETCH_THREADS = 4
_ROOM_TIMEOUT_S = 300.0


class ShardFiles:
    """Descriptors of the tars that are read, those used last kept open. Tars go by their numbers in the index."""

    reads_ahead = False
    """Whether a plan makes a difference."""

    def __init__(self, open_tar: Callable[[int], int]) -> None:
        self._open_tar = open_tar
        self._open: OrderedDict[int, int] = OrderedDict()

    def open(self, tar: int) -> int:
        """A descriptor of a tar; it stays good until the next call."""
        if tar not in self._open:
            while len(self._open) >= _MAX_OPEN_TARS:
                os.close(self._open.popitem(last=False)[1])
            self._open[tar] = self._open_tar(tar)
        self._open.move_to_end(tar)
        return self._open[tar]

    def plan(self, blocks: Sequence[Sequence[int]]) -> None:
        """Hear which shards are read next, block by block, in the order of their first use."""

    def release(self) -> None:
        """Close every descriptor."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.release()


class CachedShards(ShardFiles):
    """Tars of an object store, fetched into the node's cache ahead of their use and checked against their index.

    A tar counts as fetched when it has the length that its index says and every payload has its SHA-256; else it is
    fetched again, `_ATTEMPTS` times in all. The workers of a node share the work: each fetches what no other is fetching.

    Args:
        shards_per_block: shards that are read together; the cache must hold any so many of them.

    Raises:
        ConfigError: the cache is too small for the shards that are read together.
    """

    reads_ahead = True

    def __init__(
        self, store: Store, meta: DatasetMeta, index: SampleIndex, cache: NodeCache, shards_per_block: int
    ) -> None:
        super().__init__(self._open_cached)
        self._tars = {tar.number: tar for tar in index.tars if tar.num_samples}
        self._tars_of: dict[int, list[int]] = defaultdict(list)
        of_shards: Counter[int] = Counter()
        for number, tar in self._tars.items():
            self._tars_of[tar.shard].append(number)
            of_shards[tar.shard] += tar.tar_bytes
        largest = sorted(of_shards.values(), reverse=True)
        needed = sum(largest[:shards_per_block]) + index.rows.nbytes
        if needed > cache.max_bytes:
            raise ConfigError(
                f"loader.cache.max_bytes = {cache.max_bytes} is less than the {needed} bytes of the index and of the largest "
                f"{min(shards_per_block, len(largest))} shards of {store}, which are read together; raise it, or lower "
                f"loader.shards_per_block = {shards_per_block}"
            )
        assert isinstance(store, RemoteStore)
        self._store, self._cache = store, cache
        self._folder = fingerprint(dataset=meta.fingerprint, content=meta.content)
        self._planned: list[int] = []

    def plan(self, blocks: Sequence[Sequence[int]]) -> None:
        planned = [tar for block in blocks for shard in block for tar in self._tars_of[shard]]
        self._planned = planned
        for _ in range(_FETCH_THREADS):
            # Daemons: a worker that has trained its last step must not wait for shards that nobody will read.
            threading.Thread(target=self._fetch_planned, args=(planned,), name="fetch", daemon=True).start()
        for tar in self._open.keys() - set(planned):
            os.close(self._open.pop(tar))

    def _fetch_planned(self, planned: list[int]) -> None:
        spared = {self._name(tar) for tar in planned}
        for tar in planned:
            if self._planned is not planned:  # a newer plan has its own threads
                return
            try:
                self._cache.fetch(self._name(tar), self._tars[tar].tar_bytes, self._make(tar), spared=spared)
            except CacheFull:
                return  # the rest follows with the next plan, when these have been read
            except (TokenreelError, OSError) as error:
                log.warning("fetching %s ahead of its use failed, and is tried again then: %s", name_tar(tar), error)

    def _open_cached(self, tar: int) -> int:
        name, size, make = self._name(tar), self._tars[tar].tar_bytes, self._make(tar)
        try:
            found = self._cache.open(name, size, make)
        except CacheFull:
            self.release()  # maybe these are what fills it; no two tars are needed at a time
            found = self._cache.open(name, size, make, timeout_s=_ROOM_TIMEOUT_S)
        if os.fstat(found).st_size == size:
            return found
        os.close(found)
        log.warning("loader.cache: %s was changed by somebody; it is fetched again", name)
        self._cache.discard(name)
        return self._cache.open(name, size, make, timeout_s=_ROOM_TIMEOUT_S)

    def _name(self, tar: int) -> str:
        return f"{self._folder}/{name_tar(tar).rpartition('/')[2]}"

    def _make(self, tar: int) -> Callable[[IO[bytes]], None]:
        return lambda file: fetch_tar(self._store, self._tars[tar], file)


def open_shard_files(
    store: Store, meta: DatasetMeta, index: SampleIndex, cache: NodeCache, shards_per_block: int
) -> ShardFiles:
    """The tars of the dataset at `store`."""
    if not store.is_local:
        return CachedShards(store, meta, index, cache, shards_per_block)
    return ShardFiles(functools.partial(_open_local, store))


def _open_local(store: Store, tar: int) -> int:
    with open_member(store, name_tar(tar)) as file:
        return os.dup(file.fileno())


def fetch_tar(store: RemoteStore, tar: IndexedTar, file: IO[bytes]) -> None:
    """Fill `file` with a tar, every payload checked against its index.

    Raises:
        DatasetError: the bytes in the store are not those that the index describes, or both have changed.
    """
    name = name_tar(tar.number)
    info, table = read_shard_columns(store, tar.shard, ["key", "offset", "size", "sha256"])
    rows, where = [row for row in table.to_pylist() if row["tar"] == name], store.where(name)
    if info.content != tar.content:
        raise DatasetError(
            f"{where}: the dataset was changed while it is being read; start again with the same command"
        )
    trouble = ""
    for attempt in range(1, _ATTEMPTS + 1):
        store.fetch(name, file, None)
        trouble = _find_damage(file.fileno(), tar.tar_bytes, rows)
        if not trouble:
            return
        log.warning("%s: attempt %d: %s", where, attempt, trouble)
    raise DatasetError(f"{where}: {trouble}, {_ATTEMPTS} times over; run `tokenreel verify {store}`")


def _find_damage(descriptor: int, tar_bytes: int, rows: list[dict[str, Any]]) -> str:
    size = os.fstat(descriptor).st_size
    if size != tar_bytes:
        return f"{size} bytes came, its index says {tar_bytes}"
    for row in rows:
        if hashlib.sha256(os.pread(descriptor, row["size"], row["offset"])).hexdigest() != row["sha256"]:
            return f"the bytes of sample {row['key']} are not those that were committed"
    return ""

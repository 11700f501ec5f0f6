"""Which sample comes when: one global sequence that depends on (seed, epoch, dataset fingerprint) alone."""

from __future__ import annotations

import hashlib

import numpy as np

from pipeline.schema import mix64


class GlobalOrder:
    """The endless sequence of samples of a dataset, epoch after epoch, each a fresh shuffle.

    Position p is sample `p % n` of epoch `p // n`. Step k of a run with global batch B consumes the positions
    [k*B, (k+1)*B), and rank r of w the r-th of w equal parts of them: the order is the same for any number of workers,
    and a resume computes its place instead of replaying.

    Args:
        shards: (n,) shard number of each sample, non-decreasing.
        shards_per_block: shards are shuffled, then samples within blocks of this many: neighbours in the sequence
            stand in few shards, which a cache can hold.
    """

    def __init__(self, shards: np.ndarray, seed: int, fingerprint: str, shards_per_block: int) -> None:
        self._shards = shards
        self._shards_per_block = shards_per_block
        self._seed = int.from_bytes(hashlib.sha256(f"{seed}:{fingerprint}".encode()).digest()[:8], "little")
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self._shards)

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples), both (stop - start,) int64, at the positions [start, stop)."""
        positions = np.arange(start, stop)
        epochs, places = np.divmod(positions, len(self))
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            samples[epochs == epoch] = self._epoch(int(epoch))[places[epochs == epoch]]
        return epochs, samples

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._cached[0] != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            unique, inverse = np.unique(self._shards, return_inverse=True)
            block_of_shard = rng.permutation(len(unique)) // self._shards_per_block
            keys = rng.permutation(len(self))
            self._cached = (epoch, np.lexsort((keys, block_of_shard[inverse])))
        return self._cached[1]


def draw_seeds(seed: int, epochs: np.ndarray, key_hashes: np.ndarray, stream: int) -> np.ndarray:
    """uint64 (n,): a fresh number for every (seed, epoch, sample key, stream), whoever asks and whenever.

    Args:
        key_hashes: uint64 (n,) of `hash_keys`.
        stream: tells uses of the same sample apart (a view, a window start).
    """
    state = mix64(key_hashes ^ mix64(epochs.astype(np.uint64) + np.uint64(seed * 0x10001 % 2**64)))
    return mix64(state + np.uint64((stream + 1) * 0x9E3779B97F4A7C15 % 2**64))


def hash_keys(keys: list[str]) -> np.ndarray:
    """uint64 (n,): the first eight bytes of the SHA-256 of each key."""
    return np.array([int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys], np.uint64)

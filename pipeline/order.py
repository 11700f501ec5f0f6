"""Which sample comes when: one global sequence that depends on (seed, epoch, dataset fingerprint) alone."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pipeline.schema import mix64

ORDER_VERSION = 2
"""Changes whenever the sequence does: a run that began with another cannot be resumed."""
K = TypeVar("K")
V = TypeVar("V")


class GlobalOrder:
    """The endless sequence of samples of a dataset, epoch after epoch, each a fresh shuffle.

    Position p is sample `p % n` of epoch `p // n`. Step k of a run with global batch B consumes the positions
    [k*B, (k+1)*B), and rank r of w the r-th of w equal parts of them: the order is the same for any number of workers,
    and a resume computes its place instead of replaying: it draws the order of the shards, and of the samples in one block.

    Memory: 8 bytes for each shard of at most two epochs, and for each sample of at most four blocks.

    Args:
        shards: (n,) shard number of each sample, non-decreasing. It is read once and not kept.
        shards_per_block: shards are shuffled, then samples within blocks of this many: neighbours in the sequence
            stand in few shards, which a cache can hold.
    """

    def __init__(self, shards: np.ndarray, seed: int, fingerprint: str, shards_per_block: int) -> None:
        starts = (
            np.concatenate([[0], np.flatnonzero(shards[1:] != shards[:-1]) + 1]) if len(shards) else np.zeros(1, int)
        )
        self._numbers = shards[starts] if len(shards) else np.zeros(0, int)
        self._bounds = np.append(starts, len(shards))
        self._shards_per_block = shards_per_block
        self._seed = int.from_bytes(hashlib.sha256(f"{seed}:{fingerprint}".encode()).digest()[:8], "little")
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples), both (stop - start,) int64, at the positions [start, stop)."""
        epochs, places = np.divmod(np.arange(start, stop), len(self))
        samples = np.empty_like(places)
        for epoch, block in self._blocks_between(start, stop):
            bounds = self._epoch(epoch).bounds
            here = (epochs == epoch) & (places >= bounds[block]) & (places < bounds[block + 1])
            samples[here] = self._block(epoch, block)[places[here] - bounds[block]]
        return epochs, samples

    def block_of(self, position: int) -> tuple[int, int]:
        """(epoch, number within it) of the block that holds a position."""
        epoch, place = divmod(position, len(self))
        return epoch, self._epoch(epoch).block_at(place)

    def shards_ahead(self, start: int, num_blocks: int) -> list[list[int]]:
        """Numbers of the shards that are used from position `start` on, in the order of their first use, for the rest of
        its block and the blocks after it, `num_blocks` in all."""
        ahead = []
        for _ in range(num_blocks):
            epoch, block = self.block_of(start)
            first = start - epoch * len(self) - int(self._epoch(epoch).bounds[block])
            samples = self._block(epoch, block)[first:]
            places = np.searchsorted(self._bounds, samples, "right") - 1
            _, uses = np.unique(places, return_index=True)
            ahead.append(self._numbers[places[np.sort(uses)]].tolist())
            start += len(samples)
        return ahead

    def _blocks_between(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(epoch, block) of every block that holds a position of [start, stop)."""
        while start < stop:
            epoch, block = self.block_of(start)
            yield epoch, block
            start = epoch * len(self) + int(self._epoch(epoch).bounds[block + 1])

    def _epoch(self, epoch: int) -> _Epoch:
        # Two, as whoever fetches shards ahead of the training asks for the next one.
        return _remember(self._epochs, epoch, 2, lambda: self._draw_epoch(epoch))

    def _draw_epoch(self, epoch: int) -> _Epoch:
        rng = np.random.default_rng([self._seed, epoch])
        order = np.argsort(rng.permutation(len(self._numbers)))  # what was drawn is the place of each shard
        sizes = np.diff(self._bounds)[order]
        ends = np.cumsum(sizes)[self._shards_per_block - 1 :: self._shards_per_block]
        bounds = np.unique(np.concatenate([[0], ends, [len(self)]]))
        return _Epoch(order=order, bounds=bounds, shards_per_block=self._shards_per_block)

    def _block(self, epoch: int, block: int) -> np.ndarray:
        """The samples of a block in the order of the epoch."""
        return _remember(self._blocks, (epoch, block), 4, lambda: self._draw_block(epoch, block))

    def _draw_block(self, epoch: int, block: int) -> np.ndarray:
        shards = np.sort(self._epoch(epoch).shards_of(block))
        samples = np.concatenate([np.arange(self._bounds[one], self._bounds[one + 1]) for one in shards])
        np.random.default_rng([self._seed, epoch, block + 1]).shuffle(samples)  # a trailing 0 would be the same seed
        return samples


@dataclass(frozen=True, kw_only=True, slots=True)
class _Epoch:
    """What one epoch draws.

    order: places of the shards among all, shuffled; each `shards_per_block` of them are a block.
    bounds: place in the epoch where each block begins, and the end.
    """

    order: np.ndarray
    bounds: np.ndarray
    shards_per_block: int

    def block_at(self, place: int) -> int:
        return int(np.searchsorted(self.bounds, place, "right")) - 1

    def shards_of(self, block: int) -> np.ndarray:
        return self.order[block * self.shards_per_block : (block + 1) * self.shards_per_block]


def _remember(kept: OrderedDict[K, V], key: K, limit: int, make: Callable[[], V]) -> V:
    """`kept[key]`, made where it is missing; the entry that was used longest ago goes beyond `limit`."""
    if key not in kept:
        while len(kept) >= limit:
            kept.popitem(last=False)
        kept[key] = make()
    kept.move_to_end(key)
    return kept[key]


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
    return np.frombuffer(b"".join([hashlib.sha256(key.encode()).digest()[:8] for key in keys]), "<u8")

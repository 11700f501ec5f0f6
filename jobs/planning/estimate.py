"""From measured videos to the whole corpus: which are drawn, what each stands for, and how long shards take. Pure.

A video of known size is drawn with a chance that is half the same for all and half in proportion to its size, in one pass
over the videos by size. So what goes by videos (failures) and what goes by bytes (hours, clips) are both estimated well,
and a video that makes up much of the corpus is always measured. Source: systematic sampling with probability
proportional to size, and calibrated weights (Särndal, Swensson, Wretman: Model Assisted Survey Sampling, 3.6 and 6).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np

_FEW = 8
"""Videos, of those that chance drew, below which their scatter says little of how wrong a total is."""


def draw_videos(sizes: np.ndarray, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices, ascending; the chance that each had), both (n,); n is at most `num`, and less where large videos would
    be drawn more than once.

    Args:
        sizes: (N,) float; equal numbers where sizes are not known.
    """
    if num >= len(sizes):
        return np.arange(len(sizes)), np.ones(len(sizes))
    rng = np.random.default_rng(seed)
    chances = num * _shares(sizes)
    order = np.lexsort((rng.permutation(len(sizes)), sizes))
    places = np.searchsorted(np.cumsum(chances[order]), rng.random() + np.arange(num), side="right")
    found = np.unique(order[np.minimum(places, len(sizes) - 1)])
    return found, np.minimum(chances[found], 1.0)


def _shares(sizes: np.ndarray) -> np.ndarray:
    """(N,) summing to 1: half by number, half by size."""
    even = np.full(len(sizes), 1 / len(sizes))
    total = sizes.sum()
    return (even + (sizes / total if total else even)) / 2


class Estimate:
    """Totals over the corpus of what was measured on some of its videos.

    Args:
        sizes: (N,) of all videos.
        shards: (N,) the shard of each.
        videos, chances: (n,) those that were measured, and the chance that each had.
    """

    def __init__(self, sizes: np.ndarray, shards: np.ndarray, videos: np.ndarray, chances: np.ndarray) -> None:
        self._sizes, self._shards, self._videos, self._chances = sizes, shards, videos, chances
        self._num_shards = int(shards[-1]) + 1 if len(shards) else 0
        self.weights = _calibrate(sizes, videos, chances)

    def total(self, values: np.ndarray) -> float:
        """Of (n,) values over all N videos."""
        return float(self.weights @ values)

    def relative_error(self, values: np.ndarray) -> float:
        """Standard error of `total` over it; 0 where all was measured, NaN where too little was to tell.

        Of what a line through size leaves unexplained; videos that were certain to be drawn add nothing.
        """
        open_ = self._chances < 1
        num, total = int(open_.sum()), self.total(values)
        if not num or not total:
            return 0.0
        if num < _FEW:
            return float("nan")
        weights, x = self.weights[open_], self._sizes[self._videos[open_]]
        line = np.stack([np.ones(num), x], 1) * np.sqrt(weights)[:, None]
        y = values[open_]
        slope = np.linalg.lstsq(line, y * np.sqrt(weights), rcond=None)[0]
        left = weights * (y - slope[0] - slope[1] * x)
        return float(np.sqrt(num / (num - 2) * np.sum((1 - self._chances[open_]) * left**2)) / abs(total))

    def by_shard(self, values: np.ndarray) -> np.ndarray:
        """(shards,) of values of 0 or more: the measured videos' own, and the rest of the total over the others, half by
        number and half by size."""
        known = np.bincount(self._shards[self._videos], values, self._num_shards)
        rest = np.ones(len(self._sizes), bool)
        rest[self._videos] = False
        if not rest.any():
            return known
        left = max(0.0, self.total(values) - float(values.sum()))
        return known + left * np.bincount(self._shards[rest], _shares(self._sizes[rest]), self._num_shards)


def _calibrate(sizes: np.ndarray, videos: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """(n,) how many videos each measured one stands for, so that number and size of all come out exactly.

    Certain ones stand for themselves. Where size cannot be met with weights of 1 or more, number alone is.
    """
    weights, open_ = 1 / chances, chances < 1
    if not open_.any():
        return np.full(len(videos), len(sizes) / max(1, len(videos)))
    num = len(sizes) - int((~open_).sum())
    x = sizes[videos[open_]]
    size = sizes.sum() - sizes[videos[~open_]].sum()
    w = weights[open_] * num / weights[open_].sum()
    scale = x.mean() or 1.0
    design = np.stack([np.ones(len(x)), x / scale])
    moments = (design * w) @ design.T
    if np.linalg.cond(moments) < 1e9:
        factors = np.linalg.solve(moments, [num, size / scale]) @ design
        w = w * factors if (w * factors).min() >= 1 else w
    weights[open_] = w
    return weights


def schedule_s(seconds: Iterable[float], slots: int) -> float:
    """How long work takes that is begun in this order, each on the slot that is free first."""
    free = [0.0] * max(1, slots)
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)

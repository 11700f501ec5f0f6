"""Whether two token samples show the same: one laid over the other, at every offset in time and a few scales in space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_SIDE = 8
_SCALES = (1.0, 1.1, 1.25, 1.43)
"""How much larger one of the two may show the other's picture: up to what a crop of 15 % off each side does."""
_MIN_STEPS = 3
_LAG = 2
_STEADY = 3.0


class Match(NamedTuple):
    """score: 0 to 1, the least of how much two samples look alike, move alike, and do so all the time. offset: steps of the
    first sample that pass before the second one begins; negative where the second begins first."""

    score: float
    offset: int


@dataclass(frozen=True, slots=True)
class Film:
    """A sample ready to be compared: `maps[s]` is (t, _SIDE * _SIDE * d) at scale s; `products[s]` is the summed-area
    table of its Gram matrix, and `norms[s]` the running sum of that matrix's diagonal."""

    maps: list[np.ndarray]
    products: list[np.ndarray]
    norms: list[np.ndarray]

    def energy(self, scale: int, start: int, stop: int) -> float:
        """Sum of squared deviations of steps [start, stop) from their mean: how much moves in them."""
        total = self.norms[scale][stop] - self.norms[scale][start]
        return float(total - _block(self.products[scale], start, stop, start, stop) / (stop - start))


def make_film(codes: np.ndarray, vectors: np.ndarray) -> Film:
    """A film of codes (t h w), their vectors averaged with their neighbours' and brought to _SIDE x _SIDE places."""
    pictures = _blur(vectors[codes])
    maps = []
    for scale in _SCALES:
        rows, columns = (_resize_matrix(size, scale) for size in codes.shape[1:])
        scaled = np.einsum("ay,tyxd,bx->tabd", rows, pictures, columns, optimize=True)
        maps.append(np.ascontiguousarray(scaled.reshape(len(codes), -1)))
    grams = [one @ one.T for one in maps]
    norms = [np.append(0.0, np.cumsum(np.diag(gram), dtype=np.float64)) for gram in grams]
    return Film(maps, [_summed(gram) for gram in grams], norms)


def match(one: Film, other: Film, min_overlap: float, floor: float) -> Match:
    """The best way to lay one film over the other.

    Moving alike is the correlation of what changes: of each place's deviation from its own mean over the overlap. What stands
    still says nothing, so two quiet scenes of one room are no match. Looking alike is the correlation of those means. All the
    time: the mean over steps of the cosine of what changes in _LAG of them, times _STEADY, as these are short and noisy; a menu
    that opens at one moment in two quiet scenes is no match.

    Args:
        min_overlap: share of the shorter film that must lie on the other.
        floor: energy a step that is added to both sides, so that noise in what stands still does not count as motion.
    """
    best, place = -1.0, (0, 0, 0, 0, 1)
    lengths = len(one.maps[0]), len(other.maps[0])
    least = min(*lengths, max(_MIN_STEPS, math.ceil(min_overlap * min(lengths))))
    for a, b in [(0, 0), *((s, 0) for s in range(1, len(_SCALES))), *((0, s) for s in range(1, len(_SCALES)))]:
        gram = one.maps[a] @ other.maps[b].T
        products = _summed(gram)
        for offset in range(least - lengths[1], lengths[0] - least + 1):
            start, other_start = max(0, offset), max(0, -offset)
            count = min(lengths[0] - start, lengths[1] - other_start)
            shared = _block(products, start, start + count, other_start, other_start + count)
            energies = one.energy(a, start, start + count), other.energy(b, other_start, other_start + count)
            scale = math.sqrt(math.prod(max(0.0, energy) + floor * count + 1e-9 for energy in energies))
            alike = (np.trace(gram, -offset) - shared / count) / scale
            if alike > best:
                best, place = float(alike), (a, b, start, other_start, count)
    a, b, start, other_start, count = place
    shown, other_shown = one.maps[a][start : start + count], other.maps[b][other_start : other_start + count]
    looks = _cosines(shown.mean(0), other_shown.mean(0), 0.0)
    changes, other_changes = shown[_LAG:] - shown[:-_LAG], other_shown[_LAG:] - other_shown[:-_LAG]
    steady = _cosines(changes, other_changes, math.sqrt(floor)).mean() if len(changes) else 0.0
    return Match(max(0.0, min(best, float(looks), _STEADY * float(steady))), start - other_start)


def _cosines(one: np.ndarray, other: np.ndarray, floor: float) -> np.ndarray:
    """Of the vectors along the last axis, each made longer by `floor`."""
    lengths = [np.linalg.norm(part, axis=-1) + floor + 1e-6 for part in (one, other)]
    cosines: np.ndarray = np.einsum("...i,...i->...", one, other) / (lengths[0] * lengths[1])
    return cosines


def _summed(gram: np.ndarray) -> np.ndarray:
    table = np.zeros((gram.shape[0] + 1, gram.shape[1] + 1))
    np.cumsum(np.cumsum(gram, axis=0, dtype=np.float64), axis=1, out=table[1:, 1:])
    return table


def _block(table: np.ndarray, top: int, bottom: int, left: int, right: int) -> float:
    return float(table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left])


def _blur(pictures: np.ndarray) -> np.ndarray:
    """(t h w d): each place with half of either neighbour, along both sides."""
    for axis in (1, 2):
        size = pictures.shape[axis]
        before, after = np.maximum(np.arange(size) - 1, 0), np.minimum(np.arange(size) + 1, size - 1)
        pictures = (pictures + (pictures.take(before, axis) + pictures.take(after, axis)) / 2) / 2
    return pictures


def _resize_matrix(size: int, scale: float) -> np.ndarray:
    """(_SIDE, size): linear interpolation at the centres of _SIDE equal parts of the middle 1/`scale` of `size` places."""
    places = ((np.arange(_SIDE) + 0.5) / _SIDE - 0.5) / scale * size + size / 2 - 0.5
    places = np.clip(places, 0, size - 1)
    lower = np.minimum(places.astype(int), max(0, size - 2))
    matrix = np.zeros((_SIDE, size), np.float32)
    matrix[np.arange(_SIDE), lower] = 1 - (places - lower)
    matrix[np.arange(_SIDE), np.minimum(lower + 1, size - 1)] += places - lower
    return matrix

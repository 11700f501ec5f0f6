"""Near-duplicate samples of a token dataset, found from codes alone: candidates that share a key, then `alignment.match`.

A sample has keys at its steps of change: hashes (random hyperplanes) of what a picture looks like, coarsely, and of how it
changes within a second. They do not depend on where the sample starts, so a copy that is shifted in time shares some. A still
sample has none and is nobody's duplicate: nothing tells a copy of it from another take of the same still.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.alignment import Film, make_film
from pipeline.code_vectors import learn_code_vectors
from pipeline.errors import ConfigError
from pipeline.schema import mix64
from pipeline.spill import Spill

_STEPS_PER_S = 4.0
"""Of more frames a second only every n-th is looked at."""
_LEARN_STEPS = 64
_KEY_DIMS = 4
_KEY_BITS = 12
"""Of either half of a key, looks and change."""
_SHRINKAGE = 0.1
_QUIETEST = 0.1
"""Steps that change by less than this share of the median over the dataset have no keys, even in a quiet sample."""
_FLOOR = 0.01
"""Share of the median energy of a step that counts as noise."""
_BATCH_SAMPLES = 256
_MERGE_PAIRS = 2**23


@dataclass(frozen=True, kw_only=True, slots=True)
class NearDuplicateConfig:
    """What counts as a near-duplicate, and how hard to look for it."""

    min_score: float = 0.6
    """Samples that match by this much are near-duplicates, 0 to 1; `tokenreel bench dedup` shows what another value gains and
    costs."""
    min_overlap: float = 0.5
    """Share of the shorter sample that must be in both."""
    num_bands: int = 32
    """Keys a step of change: more find more copies, and take more time and disk."""
    min_shared_keys: int = 2
    """Keys that two samples must share to be compared: each one more saves most comparisons in a large dataset, and loses some
    copies."""
    max_bucket: int = 64
    """A key that more samples share than this is left out: comparing all of them would take their number squared."""
    learn_samples: int = 2000
    """Samples, spread over the dataset, that the vectors of the codes are learnt from."""

    def __post_init__(self) -> None:
        if not 0 < self.min_score <= 1 or not 0 < self.min_overlap <= 1:
            raise ConfigError(
                f"min_score = {self.min_score} and min_overlap = {self.min_overlap} must be more than 0 and at most 1"
            )
        if min(self.num_bands, self.min_shared_keys, self.learn_samples) < 1 or self.max_bucket < 2:
            raise ConfigError(
                f"num_bands = {self.num_bands}, min_shared_keys = {self.min_shared_keys} and learn_samples = "
                f"{self.learn_samples} must be 1 or more, max_bucket = {self.max_bucket} 2 or more"
            )


def stride_of(fps: float) -> int:
    """Every how many frames one is looked at."""
    return max(1, round(fps / _STEPS_PER_S))


@dataclass(frozen=True, slots=True)
class Sketcher:
    """Turns samples into keys and films by what `learn` found in some of them.

    looks, change: affine maps (16 + 1, bands * _KEY_BITS), last row the constant, whose signs are the bits of keys.
    min_change: median change of a step in the samples that were learnt from: more than this, or than the sample's own median
        where that is less, has keys.
    floor: for `alignment.match`.
    """

    vectors: np.ndarray
    looks: np.ndarray
    change: np.ndarray
    min_change: float
    floor: float

    @classmethod
    def learn(cls, samples: Iterable[tuple[np.ndarray, float]], codebook_size: int, num_bands: int) -> Sketcher:
        """The same samples, codes (t h w) with their frame rate, give the same sketcher."""
        thinned = [(codes[:: stride_of(fps)][:_LEARN_STEPS].copy(), fps) for codes, fps in samples]
        vectors = learn_code_vectors([codes for codes, _ in thinned], codebook_size)
        looks, changes = zip(*(_features(codes, fps, vectors) for codes, fps in thinned), strict=True)
        all_changes = np.concatenate(changes)
        energies = [make_film(codes, vectors).energy(0, 0, len(codes)) / len(codes) for codes, _ in thinned]
        rng = np.random.default_rng(0)
        return cls(
            vectors=vectors,
            looks=_hyperplanes(np.concatenate(looks), num_bands, rng),
            change=_hyperplanes(all_changes, num_bands, rng),
            min_change=float(np.median(np.linalg.norm(all_changes, axis=1))) if len(all_changes) else 0.0,
            floor=_FLOOR * float(np.median(energies)),
        )

    def keys(self, codes: np.ndarray, fps: float) -> np.ndarray:
        """uint64, sorted, each once; none for a sample of less than a second or in which little changes."""
        looks, changes = _features(codes[:: stride_of(fps)], fps, self.vectors)
        if not len(changes):
            return np.empty(0, np.uint64)
        change = np.linalg.norm(changes, axis=1)
        moving = change > max(self.min_change * _QUIETEST, min(self.min_change, float(np.median(change))))
        bits = [
            (part[moving] @ planes[:-1] + planes[-1] > 0).reshape(-1, planes.shape[1] // _KEY_BITS, _KEY_BITS)
            for part, planes in ((looks, self.looks), (changes, self.change))
        ]
        powers = 1 << np.arange(2 * _KEY_BITS, dtype=np.uint64)
        words = (np.concatenate(bits, axis=2) * powers).sum(2, dtype=np.uint64)
        bands = np.arange(words.shape[1], dtype=np.uint64) << np.uint64(2 * _KEY_BITS)
        return np.unique(mix64(words | bands))

    def film(self, codes: np.ndarray, fps: float) -> Film:
        return make_film(codes[:: stride_of(fps)], self.vectors)


def _features(codes: np.ndarray, fps: float, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(t', 4 * _KEY_DIMS) each: what the four quarters of a picture look like, softly parted, and how that changes from half
    a second before to half a second after."""
    half = max(1, round(fps / stride_of(fps) / 2))
    quarters = []
    for size in codes.shape[1:]:
        places = (np.arange(size, dtype=np.float32) + 0.5) / size
        quarters.append(np.stack([1 - places, places]) / size)
    means = np.einsum("ay,tyxd,bx->tabd", quarters[0], vectors[codes][..., :_KEY_DIMS], quarters[1], optimize=True)
    means = means.reshape(len(codes), -1)
    inner = max(0, len(codes) - 2 * half)
    return means[half : half + inner], means[2 * half :][:inner] - means[:inner]


def _hyperplanes(features: np.ndarray, num_bands: int, rng: np.random.Generator) -> np.ndarray:
    """Random planes through the mean of `features`, drawn where these are made equally wide in all directions."""
    num_dims = features.shape[1]
    mean, spread = np.zeros(num_dims), np.eye(num_dims)
    if len(features) > 1:
        mean, covariance = features.mean(0), np.cov(features.T)
        values, axes = np.linalg.eigh(covariance)
        spread = axes / np.sqrt(values + _SHRINKAGE * values.mean() + 1e-12)
    planes = spread @ rng.standard_normal((num_dims, num_bands * _KEY_BITS))
    return np.concatenate([planes, -(mean @ planes)[None]]).astype(np.float32)


class Candidates(NamedTuple):
    """pairs: int64 (n, 2) of samples that share keys, the smaller number first, sorted; num_crowded: keys left out."""

    pairs: np.ndarray
    num_crowded: int


def find_candidates(keys: Iterable[np.ndarray], scratch: Path, config: NearDuplicateConfig) -> Candidates:
    """Pairs of samples with enough keys in common. Keys are sorted on disk, 12 bytes each; memory is 16 bytes for every pair
    that shares a key at all.

    Args:
        keys: of sample 0, 1, ...
        scratch: folder for temporary files.
    """
    spill = Spill(scratch)
    numbered = enumerate(keys)
    while batch := list(islice(numbered, _BATCH_SAMPLES)):
        samples = [np.full(len(own), sample, np.int32) for sample, own in batch]
        own_keys = np.concatenate([own for _, own in batch])
        spill.add(pa.table({"key": pa.array(own_keys), "sample": pa.array(np.concatenate(samples))}))
    found, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    waiting: list[np.ndarray] = []
    num_crowded = 0
    for table in spill.read():
        pairs, crowded = _share_key(table["key"].to_numpy(), table["sample"].to_numpy(), config.max_bucket)
        num_crowded += crowded
        waiting.append(pairs)
        if sum(map(len, waiting)) > _MERGE_PAIRS:
            found, counts, waiting = *_merge(found, counts, waiting), []
    found, counts = _merge(found, counts, waiting)
    found = found[counts >= config.min_shared_keys]
    return Candidates(np.stack([found >> 32, found & 0xFFFFFFFF], axis=1), num_crowded)


def _share_key(keys: np.ndarray, samples: np.ndarray, max_bucket: int) -> tuple[np.ndarray, int]:
    """Pairs (first << 32 | second) of samples that share a key, once for each key, and how many keys are too crowded."""
    order = np.lexsort((samples, keys))
    keys, samples = keys[order], samples[order].astype(np.int64)
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    sizes = np.diff(np.append(starts, len(keys)))
    pairs = [np.empty(0, np.int64)]
    for size in np.unique(sizes[(sizes > 1) & (sizes <= max_bucket)]).tolist():
        buckets = samples[starts[sizes == size][:, None] + np.arange(size)]
        first, second = np.triu_indices(size, 1)
        pairs.append((buckets[:, first] << 32 | buckets[:, second]).ravel())
    return np.concatenate(pairs), int((sizes > max_bucket).sum())


def _merge(found: np.ndarray, counts: np.ndarray, waiting: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.concatenate([found, *waiting])
    weights = np.concatenate([counts, np.ones(len(pairs) - len(found), np.int64)])
    merged, places = np.unique(pairs, return_inverse=True)
    return merged, np.bincount(places, weights, len(merged)).astype(np.int64)


class Choice(NamedTuple):
    """duplicate_of: int64 (n,) the sample that each is dropped for, -1 where it stays. match: (n,) row of the pair that
    says so, -1. leader: (n,) the kept sample whose group each belongs to; itself where it stays."""

    duplicate_of: np.ndarray
    match: np.ndarray
    leader: np.ndarray


def choose_kept(
    pairs: np.ndarray, scores: np.ndarray, is_val: np.ndarray, lengths: np.ndarray, keys: Sequence[str]
) -> Choice:
    """Which samples stay. Every dropped one is itself a near-duplicate of one that stays or of a validation sample.

    Samples are asked in turn: those of the validation split first, then the longest, then by key. One goes if it matches one that
    stays; one of the training split also if it matches any of the validation split. Groups are not chained: of windows
    that each overlap the next, every other one stays.

    Args:
        pairs: (n, 2) near-duplicates, with their `scores`.
        is_val: of each sample, whether it is held out, for validation or for testing.
    """
    num_samples = len(keys)
    duplicate_of, match = np.full(num_samples, -1), np.full(num_samples, -1)
    leader = np.arange(num_samples)
    neighbours: dict[int, list[tuple[float, int, int]]] = {}
    for row, (one, other) in enumerate(pairs.tolist()):
        for sample, neighbour in ((one, other), (other, one)):
            neighbours.setdefault(sample, []).append((float(scores[row]), neighbour, row))
    asked: set[int] = set()
    for sample in sorted(neighbours, key=lambda n: (not is_val[n], -int(lengths[n]), keys[n])):
        asked.add(sample)
        reasons = [
            (score, -neighbour, row)
            for score, neighbour, row in neighbours[sample]
            if neighbour in asked and (duplicate_of[neighbour] < 0 or (is_val[neighbour] and not is_val[sample]))
        ]
        if reasons:
            _, negated, match[sample] = max(reasons)
            duplicate_of[sample] = -negated
            leader[sample] = leader[-negated]
    return Choice(duplicate_of, match, leader)

"""Probes on frozen features: what a small classifier, a neighbour or a search can read from them.

Each probe takes features of three splits. It is fitted on `train`; its one setting is chosen on `val`; `test` is looked at once,
at the end. Features are standardised by the statistics of `train`, the same for every probe, so that a network whose
features all point the same way is not measured by that.

Shapes: n rows; s tokens of a row; d width; c classes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from jobs.evaluation.metrics import Interval, bootstrap_interval

PENALTIES = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)
"""Of the squared weights, for a mean loss over rows; the linear probe tries each."""
NEIGHBOURS = (1, 5, 10, 20, 50, 100)
"""How many of them vote; the neighbour probe tries each that there are rows for."""
RECALLS = (1, 5, 10)
_TEMPERATURE = 0.07
_BLOCK_ROWS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Rows of one split.

    values: (n d) floats, or (n s d) for the attentive probe; may be a memory map.
    labels: (n,) whole numbers, 0 or more; the same number is the same class in every split.
    groups: (n,) numbers or texts: the source video of each row. Rows of one video are not independent, so intervals are
        over these; splits that share no video are the caller's business (`split_groups`).
    """

    values: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def __post_init__(self) -> None:
        shape = np.shape(self.values)
        if len(shape) not in (2, 3) or not len(self.values) == len(self.labels) == len(self.groups):
            raise ValueError(
                f"Features: values are {shape}, labels {np.shape(self.labels)}, groups {np.shape(self.groups)}; "
                "allowed: (n d) or (n s d), (n,), (n,)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> Features:
        """The rows with these numbers, or where this mask is true."""
        return Features(values=self.values[rows], labels=self.labels[rows], groups=self.groups[rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """What a probe reached on the rows of the test split.

    name: of the probe, such as "linear".
    hits: (n,) float64; 1 where a row was right, 0 where not, for a search in [0, 1].
    groups: (n,) source video of each row.
    interval: 95 %, of the mean of `hits`, by a bootstrap over source videos.
    chosen: the setting that the validation split chose, such as "penalty 0.01"; "" where there is none.
    val_accuracy: with that setting, on the validation split; NaN where there is none.
    """

    name: str
    hits: np.ndarray
    groups: np.ndarray
    interval: Interval
    chosen: str = ""
    val_accuracy: float = float("nan")

    @property
    def accuracy(self) -> float:
        """Mean of `hits`."""
        return float(self.hits.mean())

    def by_group(self) -> tuple[np.ndarray, np.ndarray]:
        """The source videos, sorted, and the mean of `hits` in each."""
        names, members = np.unique(self.groups, return_inverse=True)
        return names, np.bincount(members, weights=self.hits) / np.bincount(members)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How much more often the first of two results on the same rows is right, with the 95 % interval of that difference."""

    difference: float
    interval: Interval


def compare(first: ProbeResult, second: ProbeResult, *, seed: int = 0) -> Comparison:
    """`first` against `second` on the same test rows in the same order, by a paired bootstrap over source videos.

    Raises:
        ValueError: the rows are of other videos.
    """
    if not np.array_equal(first.groups, second.groups):
        raise ValueError(
            f"compare: {first.name} and {second.name} were not measured on the same rows in the same order"
        )
    difference = first.hits - second.hits
    return Comparison(
        difference=float(difference.mean()), interval=bootstrap_interval(difference, first.groups, seed=seed)
    )


def pool(results: Sequence[ProbeResult], *, seed: int = 0) -> ProbeResult:
    """Several results as one, such as those of folds, or of the same probe on networks of several seeds.

    A video that stands in several results is drawn with all its rows.
    """
    hits, groups = (np.concatenate([getattr(one, name) for one in results]) for name in ("hits", "groups"))
    settings = list(dict.fromkeys(one.chosen for one in results))
    return ProbeResult(
        name=results[0].name,
        hits=hits,
        groups=groups,
        interval=bootstrap_interval(hits, groups, seed=seed),
        chosen=", ".join(filter(None, settings)),
        val_accuracy=float(np.mean([one.val_accuracy for one in results])),
    )


def split_groups(
    groups: np.ndarray, *, shares: tuple[float, float] = (0.2, 0.2), seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of train, val and test. All rows of a group stand in one of them.

    Args:
        groups: (n,) source video of each row.
        shares: of the groups that go to val and to test, at least one each.

    Raises:
        ValueError: fewer than three groups.
    """
    names, members = np.unique(groups, return_inverse=True)
    if len(names) < 3:
        raise ValueError(f"split_groups: {len(names)} source videos cannot be split in three; allowed: 3 or more")
    order = np.random.default_rng(seed).permutation(len(names))
    num_val, num_test = (max(1, round(share * len(names))) for share in shares)
    num_val, num_test = min(num_val, len(names) - 2), min(num_test, len(names) - 1 - min(num_val, len(names) - 2))
    ends = (len(names) - num_val - num_test, len(names) - num_test)
    train, val, test = (np.flatnonzero(np.isin(members, part)) for part in np.split(order, ends))
    return train, val, test


def hold_out(groups: np.ndarray, share: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the rest, and of `share` of the groups, at least one and not all. All rows of a group stand together.

    Raises:
        ValueError: fewer than two groups.
    """
    names, members = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"hold_out: {len(names)} source videos cannot be split in two; allowed: 2 or more")
    held = np.random.default_rng(seed).permutation(len(names))[: min(max(1, round(share * len(names))), len(names) - 1)]
    is_held = np.isin(members, held)
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def majority(train: Features, test: Features, *, seed: int = 0) -> ProbeResult:
    """Always naming the most frequent class of `train`."""
    hits = test.labels == np.bincount(train.labels).argmax()
    return make_result("majority", hits, test.groups, seed=seed)


def linear_probe(train: Features, val: Features, test: Features, *, seed: int = 0) -> ProbeResult:
    """Multinomial logistic regression on (n d) features, its L2 penalty one of `PENALTIES`.

    Args:
        seed: of the bootstrap; fitting draws nothing.

    Raises:
        ValueError: `train` has fewer than two classes, a split is empty, or features are not (n d).
    """
    fitted_rows, *others = standardised(train, val, test)

    def predictions() -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
        classifier = LogisticRegression(max_iter=500, tol=1e-3, warm_start=True)
        for penalty in PENALTIES:  # the strongest first: from there the next one is not far
            classifier.set_params(C=1 / (penalty * len(train)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # an unconverged probe is still a probe
                classifier.fit(fitted_rows, train.labels)
            yield f"penalty {penalty:g}", classifier.predict

    return choose("linear", predictions(), val, test, others, seed=seed)


def knn_probe(train: Features, val: Features, test: Features, *, seed: int = 0) -> ProbeResult:
    """The vote of the nearest rows of `train` by cosine similarity, weighted by exp(similarity / 0.07).

    How many vote is one of `NEIGHBOURS`. Arguments and errors are those of `linear_probe`.
    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv 1805.01978.
    """
    normed, *others = (_normalised(rows) for rows in standardised(train, val, test))
    counts = sorted({min(count, len(train)) for count in NEIGHBOURS})

    def predictions() -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
        for count in counts:
            yield f"k {count}", functools.partial(_vote, normed, train.labels, count)

    return choose("knn", predictions(), val, test, others, seed=seed)


def retrieval(train: Features, test: Features, *, seed: int = 0) -> dict[str, ProbeResult]:
    """Each row of `test` as a query for rows of the same label in other source videos of `test`, by cosine similarity.

    `train` gives the scale of the features alone. A query that has nothing to find is left out, so rows are fewer than those
    of `test` where a label has one video. Rows that are as near as each other rank in the order of `test`.

    Returns:
        "recall@1", "recall@5", "recall@10": whether one of so many nearest rows has the label; "map": average precision of
        the whole ranking. Each with its chance level under "chance:NAME", that of a ranking drawn at random.

    Raises:
        ValueError: no query has anything to find, or as for `linear_probe`.
    """
    rows = _normalised(standardised(train, test)[1])
    videos = np.unique(test.groups, return_inverse=True)[1]
    measured: dict[str, list[np.ndarray]] = {}
    kept = []
    for first in range(0, len(rows), _BLOCK_ROWS):
        block = np.arange(first, min(first + _BLOCK_ROWS, len(rows)))
        is_other = videos[block][:, None] != videos
        is_wanted = is_other & (test.labels[block][:, None] == test.labels)
        can_find = is_wanted.any(axis=1)
        kept.append(block[can_find])
        similarity = np.where(is_other, rows[block] @ rows.T, -np.inf)[can_find]
        order = np.argsort(-similarity, axis=1, kind="stable")
        found = np.take_along_axis(is_wanted[can_find], order, axis=1)
        for name, values in _judge(found, is_other[can_find].sum(axis=1)).items():
            measured.setdefault(name, []).append(values)
    groups = test.groups[np.concatenate(kept)]
    if not len(groups):
        raise ValueError("retrieval: no two source videos of test have the same label, so there is nothing to find")
    return {name: make_result(name, np.concatenate(parts), groups, seed=seed) for name, parts in measured.items()}


def _judge(found: np.ndarray, num_others: np.ndarray) -> dict[str, np.ndarray]:
    """Measures of rankings (n m) bool, true where a row was wanted; each ranks `num_others` (n,) rows before the rest."""
    wanted = found.sum(axis=1)
    ranks = np.arange(1, found.shape[1] + 1)
    precision = np.cumsum(found, axis=1) / ranks
    # Of a ranking at random the rank-th place holds a wanted row with the same probability as any; given that it does, the
    # places before it hold their share of the others.
    harmonic = np.cumsum(1 / ranks)[num_others - 1]
    rest = (wanted - 1) / np.maximum(num_others - 1, 1)
    by_chance = {"map": (harmonic + rest * (num_others - harmonic)) / num_others}
    measures = {"map": np.where(found, precision, 0).sum(axis=1) / wanted}
    for count in RECALLS:
        measures[f"recall@{count}"] = found[:, :count].any(axis=1)
        left = num_others[:, None] - wanted[:, None] - np.arange(count)
        misses = np.clip(left, 0, None) / np.maximum(num_others[:, None] - np.arange(count), 1)
        by_chance[f"recall@{count}"] = 1 - misses.prod(axis=1)
    return {**measures, **{f"chance:{name}": values for name, values in by_chance.items()}}


def make_result(
    name: str,
    hits: np.ndarray,
    groups: np.ndarray,
    *,
    seed: int,
    chosen: str = "",
    val_accuracy: float = float("nan"),
) -> ProbeResult:
    """A result with its interval."""
    hits = np.asarray(hits, np.float64)
    interval = bootstrap_interval(hits, groups, seed=seed)
    return ProbeResult(name=name, hits=hits, groups=groups, interval=interval, chosen=chosen, val_accuracy=val_accuracy)


def choose(
    name: str,
    candidates: Iterable[tuple[str, Callable[[np.ndarray], np.ndarray]]],
    val: Features,
    test: Features,
    rows: Sequence[np.ndarray],
    *,
    seed: int,
) -> ProbeResult:
    """The result of the candidate that is right most often on `val`, of equals the first.

    Args:
        candidates: (setting in words, rows to class numbers (n,)). One may change the one before it, so predictions on both
            splits are made at once; those on `test` decide nothing.
        rows: of val and of test, as the candidates take them.
    """
    best: tuple[float, str, np.ndarray] | None = None
    for chosen, predict in candidates:
        accuracy = float(np.mean(predict(rows[0]) == val.labels))
        if best is None or accuracy > best[0]:
            best = accuracy, chosen, predict(rows[1]) == test.labels
    assert best is not None
    return make_result(name, best[2], test.groups, seed=seed, chosen=best[1], val_accuracy=best[0])


def standardised(train: Features, *others: Features) -> list[np.ndarray]:
    """float32 (n d) of each split: every dimension less its mean over `train`, over its deviation there; a dimension that
    does not vary in `train` is 0.

    Raises:
        ValueError: features are not (n d), a split has no rows, or `train` has fewer than two classes.
    """
    splits = (train, *others)
    if any(np.ndim(one.values) != 2 or not len(one) for one in splits):
        shapes = ", ".join(str(np.shape(one.values)) for one in splits)
        raise ValueError(f"frozen features: splits are {shapes}; allowed: (n d) with the same d and n of 1 or more")
    if len(np.unique(train.labels)) < 2:
        raise ValueError("frozen features: all rows of train have one label; allowed: two or more")
    mean, deviation = train.values.mean(axis=0, dtype=np.float64), train.values.std(axis=0, dtype=np.float64)
    # What is left of a constant after rounding is no signal, and must not be blown up to look like one.
    varies = deviation > 1e-6 * np.maximum(np.abs(mean), 1e-6)
    scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
    return [((one.values - mean) * scale).astype(np.float32) for one in splits]


def _normalised(rows: np.ndarray) -> np.ndarray:
    normed: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return normed


def _vote(train: np.ndarray, labels: np.ndarray, count: int, rows: np.ndarray) -> np.ndarray:
    """(n,) class numbers of normalised `rows`, a block of rows at a time."""
    found, num_classes = [], labels.max() + 1
    for first in range(0, len(rows), _BLOCK_ROWS):
        similarity = rows[first : first + _BLOCK_ROWS] @ train.T
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        weights = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1) / _TEMPERATURE)
        cells = np.arange(len(nearest))[:, None] * num_classes + labels[nearest]
        votes = np.bincount(cells.ravel(), weights=weights.ravel(), minlength=len(nearest) * num_classes)
        found.append(votes.reshape(-1, num_classes).argmax(axis=1))
    return np.concatenate(found)

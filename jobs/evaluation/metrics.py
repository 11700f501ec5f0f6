"""Figures of a classifier from its scores: accuracies, confusion, calibration, and how sure they are. numpy alone.

Shapes: n samples; c classes; b bins. Labels and predictions are class numbers in [0, c).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_RESAMPLES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """`[low, high]`, in the unit of the values it was made from."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How far confidence is from accuracy.

    error: expected calibration error, the mean of |accuracy - confidence| over bins, weighted by their samples; in [0, 1].
    edges: (b + 1,) of the bins `(edges[i], edges[i + 1]]` of confidence; the first holds 0 too.
    counts: (b,) samples. confidence, accuracy: (b,) means; nan in a bin without samples.
    """

    error: float
    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def top_k_hits(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """(n,) bool: is the label among the k highest of `scores` (n c)? Of equal scores the lower class number comes first,
    as in `argmax`.

    Raises:
        ValueError: shapes that do not fit, k < 1, labels out of range, or scores that are nan.
    """
    _check(labels, scores.shape[1] if scores.ndim == 2 else 0, len(scores))
    if k < 1 or np.isnan(scores).any():
        raise ValueError(f"top_k_hits: k = {k} must be 1 or more, and no score nan")
    own = scores[np.arange(len(labels)), labels][:, None]
    is_before = np.arange(scores.shape[1]) < labels[:, None]
    rank = (scores > own).sum(axis=1) + ((scores == own) & is_before).sum(axis=1)
    hits: np.ndarray = rank < k
    return hits


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of samples whose label is among the k highest of their scores; see `top_k_hits`."""
    return float(top_k_hits(scores, labels, k).mean())


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(c c) int64 counts of samples: row is the label, column the prediction.

    Raises:
        ValueError: lengths that differ, no samples, or a number out of range.
    """
    _check(labels, num_classes, len(predicted))
    _check(predicted, num_classes, len(labels))
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_accuracies(confusion: np.ndarray) -> np.ndarray:
    """(c,) share of each class's samples that were predicted right (its recall); nan where it has none."""
    counts = confusion.sum(axis=1)
    return np.divide(np.diag(confusion), counts, out=np.full(len(counts), np.nan), where=counts > 0)


def mean_class_accuracy(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> float:
    """Mean of `class_accuracies` over the classes that have samples: each class counts the same."""
    return float(np.nanmean(class_accuracies(confusion_matrix(labels, predicted, num_classes))))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> Calibration:
    """Calibration of the most probable class, in bins of equal width (Guo et al., arXiv 1706.04599, equation 3).

    Args:
        probabilities: (n c), rows that sum to 1.

    Raises:
        ValueError: shapes that do not fit, rows that are no distribution, labels out of range, or num_bins < 1.
    """
    _check(labels, probabilities.shape[1] if probabilities.ndim == 2 else 0, len(probabilities))
    if num_bins < 1 or (probabilities < 0).any() or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
        raise ValueError(f"calibration_error: num_bins = {num_bins} must be 1 or more, and each row must sum to 1")
    confidence = np.minimum(probabilities.max(axis=1), 1.0)
    hits = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, num_bins + 1)
    bins = np.clip(np.searchsorted(edges, confidence, "left") - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    sums = {
        "confidence": np.bincount(bins, weights=confidence, minlength=num_bins),
        "accuracy": np.bincount(bins, weights=hits, minlength=num_bins),
    }
    error = np.abs(sums["accuracy"] - sums["confidence"]).sum() / len(labels)
    means = {
        name: np.divide(total, counts, out=np.full(num_bins, np.nan), where=counts > 0) for name, total in sums.items()
    }
    return Calibration(error=float(error), edges=edges, counts=counts, **means)


def bootstrap_interval(
    values: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean of `values` (n,); the same for the same arguments.

    Whole groups are drawn again, with replacement, since samples of one source video are not independent. Where all
    values are equal, as with no mistake at all, the interval has no width and says less than it seems to.

    Args:
        values: (n,) numbers, such as hits.
        groups: (n,) what each value belongs to, such as its video's id; None: each stands for itself.
        level: share of resamples that the interval holds.

    Raises:
        ValueError: no values, lengths that differ, or a level or number of resamples that is not allowed.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or (groups is not None and len(groups) != len(values)):
        raise ValueError(f"bootstrap_interval: values of shape {values.shape}, groups of the same length are needed")
    if not 0 < level < 1 or num_resamples < 1:
        raise ValueError(f"bootstrap_interval: level = {level} must be in (0, 1), num_resamples = {num_resamples} >= 1")
    members = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1].ravel()
    sums, counts = np.bincount(members, weights=values), np.bincount(members)
    rng = np.random.default_rng(seed)
    means = []
    for first in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        drawn = rng.integers(len(sums), size=(min(_RESAMPLES_AT_ONCE, num_resamples - first), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high))


def _check(numbers: np.ndarray, num_classes: int, length: int) -> None:
    if len(numbers) != length or not length or numbers.min() < 0 or numbers.max() >= num_classes:
        raise ValueError(
            f"metrics: {len(numbers)} class numbers for {length} samples and {num_classes} classes; allowed: one a sample, "
            f"at least one, each in [0, {num_classes})"
        )

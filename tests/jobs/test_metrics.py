"""The figures of a classifier, against scikit-learn where it has them and by hand where not."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from jobs.evaluation.metrics import (
    bootstrap_interval,
    calibration_error,
    class_accuracies,
    confusion_matrix,
    mean_class_accuracy,
    top_k_accuracy,
    top_k_hits,
)

NUM_CLASSES = 7


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray]:
    """Scores (500 7), each row a distribution, and labels of which many are the likeliest class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(NUM_CLASSES, size=500)
    scores = rng.random((500, NUM_CLASSES))
    scores[np.arange(500), labels] += 0.4
    return scores / scores.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("k", [1, 3, 7, 9])
def test_top_k_accuracy_is_scikit_learns(scored: tuple[np.ndarray, np.ndarray], k: int) -> None:
    scores, labels = scored
    expected = reference.top_k_accuracy_score(labels, scores, k=k, labels=range(NUM_CLASSES)) if k < 7 else 1.0
    assert top_k_accuracy(scores, labels, k) == pytest.approx(expected)
    assert top_k_hits(scores, labels, k).mean() == top_k_accuracy(scores, labels, k)


def test_equal_scores_count_as_argmax_takes_them() -> None:
    scores = np.ones((NUM_CLASSES, NUM_CLASSES))
    labels = np.arange(NUM_CLASSES)
    assert top_k_hits(scores, labels, 1).tolist() == (scores.argmax(axis=1) == labels).tolist()
    assert top_k_accuracy(scores, labels, 3) == 3 / NUM_CLASSES


def test_the_confusion_matrix_is_scikit_learns(scored: tuple[np.ndarray, np.ndarray]) -> None:
    predicted, labels = scored[0].argmax(axis=1), scored[1]
    found = confusion_matrix(labels, predicted, NUM_CLASSES)
    assert (found == reference.confusion_matrix(labels, predicted, labels=range(NUM_CLASSES))).all()
    expected = reference.balanced_accuracy_score(labels, predicted)
    assert mean_class_accuracy(labels, predicted, NUM_CLASSES) == pytest.approx(expected)


def test_a_class_without_samples_has_no_accuracy_and_no_say() -> None:
    labels, predicted = np.array([0, 0, 0, 2]), np.array([0, 0, 1, 2])
    accuracies = class_accuracies(confusion_matrix(labels, predicted, 4))
    np.testing.assert_allclose(accuracies, [2 / 3, np.nan, 1, np.nan])
    assert mean_class_accuracy(labels, predicted, 4) == pytest.approx((2 / 3 + 1) / 2)


def test_calibration_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.0, 1.0]])
    found = calibration_error(probabilities, np.array([0, 1, 1, 1]), num_bins=10)
    # 0.9 twice with one hit, 0.6 and 1.0 once with a hit each.
    assert found.error == pytest.approx((abs(1 - 1.8) + 0.4 + 0) / 4)
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 2, 1]
    assert found.accuracy[8] == 0.5 and found.confidence[8] == pytest.approx(0.9)
    assert np.isnan(found.accuracy[0]) and found.edges[[0, -1]].tolist() == [0, 1]


def test_calibration_tells_honest_from_overconfident() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.5, 1, 20_000)
    labels = (rng.random(20_000) >= confidence).astype(int)  # class 0 as often as is said
    honest = np.stack([confidence, 1 - confidence], axis=1)
    boasting = np.tile([[1.0, 0.0]], (20_000, 1))
    assert calibration_error(honest, labels).error < 0.02
    assert calibration_error(boasting, labels).error == pytest.approx(0.25, abs=0.02)


def test_the_interval_is_as_wide_as_the_normal_one() -> None:
    values = np.random.default_rng(2).random(1000) < 0.3
    found = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - half, abs=0.005)
    assert found.high == pytest.approx(values.mean() + half, abs=0.005)
    assert bootstrap_interval(values) == found != bootstrap_interval(values, seed=1)
    narrow = bootstrap_interval(values, level=0.5, num_resamples=500)
    assert found.low < narrow.low < narrow.high < found.high


def test_windows_of_one_video_make_it_no_surer() -> None:
    """Ten windows of each video that all agree are worth one."""
    values = np.random.default_rng(3).random(200) < 0.5
    videos = np.array([f"video {n}" for n in range(200)])
    one = bootstrap_interval(values, videos)
    ten = bootstrap_interval(np.repeat(values, 10), np.repeat(videos, 10))
    blind = bootstrap_interval(np.repeat(values, 10))
    assert (ten.low, ten.high) == pytest.approx((one.low, one.high))
    assert blind.high - blind.low < 0.5 * (one.high - one.low)


@pytest.mark.parametrize(
    "call",
    [
        lambda: top_k_hits(np.ones((2, 3)), np.array([0, 3])),
        lambda: top_k_hits(np.ones((2, 3)), np.array([0])),
        lambda: top_k_hits(np.ones((2, 3)), np.array([0, 1]), k=0),
        lambda: top_k_hits(np.array([[np.nan, 1.0]]), np.array([0])),
        lambda: confusion_matrix(np.array([0, -1]), np.array([0, 1]), 2),
        lambda: confusion_matrix(np.array([], int), np.array([], int), 2),
        lambda: calibration_error(np.array([[0.5, 0.9]]), np.array([0])),
        lambda: bootstrap_interval(np.array([])),
        lambda: bootstrap_interval(np.ones(3), np.arange(2)),
        lambda: bootstrap_interval(np.ones(3), level=1.0),
    ],
)
def test_what_makes_no_sense_is_refused(call) -> None:
    with pytest.raises(ValueError, match=r"metrics:|top_k_hits:|calibration_error:|bootstrap_interval:"):
        call()

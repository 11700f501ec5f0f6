"""The attentive probe: finds the one token that tells, where a mean over tokens does not, and never looks at test rows."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.evaluation.attentive import attentive_probe
from jobs.evaluation.frozen import Features, linear_probe

NUM_CLASSES, WIDTH, TOKENS = 4, 24, 20


def make_rows(num_rows: int, seed: int) -> Features:
    """Noise in all tokens; one of them, marked by its last dimension, has the label in its first ones."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(NUM_CLASSES, size=num_rows)
    values = rng.normal(size=(num_rows, TOKENS, WIDTH))
    where = rng.integers(TOKENS, size=num_rows)
    values[np.arange(num_rows), where, :NUM_CLASSES] += 3 * np.eye(NUM_CLASSES)[labels]
    values[np.arange(num_rows), where, -1] += 8
    return Features(
        values=(values * 10 + 5).astype(np.float16), labels=labels, groups=np.arange(num_rows) // 5 + 10**6 * seed
    )


@pytest.fixture(scope="module")
def splits() -> list[Features]:
    return [make_rows(count, seed) for seed, count in enumerate((400, 150, 200))]


def test_it_finds_the_token_that_tells(splits: list[Features]) -> None:
    result = attentive_probe(*splits)
    means = [
        Features(values=one.values.astype(np.float32).mean(axis=1), labels=one.labels, groups=one.groups)
        for one in splits
    ]
    assert result.interval.low > linear_probe(*means).interval.high
    assert result.accuracy > 0.75 and result.chosen
    other = Features(values=splits[2].values, labels=splits[2].labels[::-1], groups=splits[2].groups)
    again = attentive_probe(*splits[:2], other)  # labels of test rows change neither what is chosen nor what is said
    assert (again.chosen, again.val_accuracy) == (result.chosen, result.val_accuracy)
    said = result.hits == 1
    assert np.array_equal(again.hits[said], (other.labels == splits[2].labels)[said])


def test_shuffled_labels_give_chance(splits: list[Features]) -> None:
    rng = np.random.default_rng(0)
    mixed = [Features(values=one.values, labels=rng.permutation(one.labels), groups=one.groups) for one in splits[:2]]
    assert attentive_probe(*mixed, splits[2]).accuracy < 0.4


def test_pooled_features_are_refused(splits: list[Features]) -> None:
    pooled = Features(values=splits[0].values[:, 0], labels=splits[0].labels, groups=splits[0].groups)
    with pytest.raises(ValueError, match=r"\(n s d\)"):
        attentive_probe(pooled, splits[1], splits[2])

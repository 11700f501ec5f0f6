"""Probes on frozen features: a planted signal is found, shuffled labels give chance, and the test split decides nothing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from jobs.evaluation.frozen import (
    Features,
    ProbeResult,
    compare,
    knn_probe,
    linear_probe,
    majority,
    make_result,
    pool,
    retrieval,
    split_groups,
    standardised,
)

PROBES = [linear_probe, knn_probe]
NUM_CLASSES = 4


def make_rows(num_rows: int, seed: int, *, signal: float = 1.0, width: int = 32) -> Features:
    """Noise, with the label in the first dimensions; five rows a source video."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(NUM_CLASSES, size=num_rows)
    values = rng.normal(size=(num_rows, width)).astype(np.float32)
    values[:, :NUM_CLASSES] += 4 * signal * np.eye(NUM_CLASSES)[labels]
    return Features(values=values * 100 + 7, labels=labels, groups=np.arange(num_rows) // 5 + 10**6 * seed)


@pytest.fixture(scope="module")
def splits() -> list[Features]:
    return [make_rows(count, seed) for seed, count in enumerate((300, 150, 200))]


def shuffled(rows: Features, seed: int = 0) -> Features:
    labels = np.random.default_rng(seed).permutation(rows.labels)
    return Features(values=rows.values, labels=labels, groups=rows.groups)


@pytest.mark.parametrize("probe", PROBES)
def test_a_planted_signal_is_found_and_shuffled_labels_give_chance(probe, splits: list[Features]) -> None:
    result = probe(*splits)
    assert result.accuracy > 0.8
    assert result.interval.low < result.accuracy < result.interval.high
    assert result.interval.low > majority(splits[0], splits[2]).interval.high
    train, val, test = splits
    chance = probe(shuffled(train), shuffled(val, 1), test)
    assert chance.accuracy < 0.4 and chance.interval.low < 1 / NUM_CLASSES + 0.05


@pytest.mark.parametrize("probe", PROBES)
def test_the_setting_is_chosen_on_validation_rows_alone(probe, splits: list[Features]) -> None:
    """A signal, or labels, that only the test split has change neither the setting nor any prediction."""
    train, val, test = splits
    honest = probe(train, val, test)
    spoiled = probe(train, val, shuffled(test))
    assert (spoiled.chosen, spoiled.val_accuracy) == (honest.chosen, honest.val_accuracy)
    noise = [make_rows(200, seed, signal=0.0) for seed in (5, 6, 7)]
    planted = noise[2].values.copy()
    planted[:, 9] += 1000.0 * noise[2].labels
    found = probe(*noise[:2], Features(values=planted, labels=noise[2].labels, groups=noise[2].groups))
    assert found.accuracy < 0.45  # 0.25 is chance; a probe that fitted on these rows would be right everywhere


@pytest.mark.parametrize("penalty", [10.0, 0.1, 1e-4])
def test_validation_rows_choose_the_penalty(penalty: float) -> None:
    """Labels of the validation split that one setting would give choose that setting."""
    train, val, test = noisy_splits()
    rows, val_rows = standardised(train, val)
    labels = LogisticRegression(C=1 / (penalty * len(train)), max_iter=500).fit(rows, train.labels).predict(val_rows)
    probed = linear_probe(train, Features(values=val.values, labels=labels, groups=val.groups), test)
    assert probed.chosen == f"penalty {penalty:g}" and probed.val_accuracy > 0.95


@pytest.mark.parametrize("k", [1, 20, 80])
def test_validation_rows_choose_how_many_neighbours_vote(k: int) -> None:
    train, val, test = noisy_splits()
    rows, val_rows = standardised(train, val)
    vote = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07))
    labels = vote.fit(rows, train.labels).predict(val_rows)
    probed = knn_probe(train, Features(values=val.values, labels=labels, groups=val.groups), test)
    assert probed.chosen == f"k {k}" and probed.val_accuracy == 1


def noisy_splits() -> list[Features]:
    return [make_rows(count, seed, signal=0.2, width=60) for seed, count in enumerate((80, 400, 400))]


@pytest.mark.parametrize("probe", PROBES)
def test_scales_and_offsets_of_dimensions_do_not_matter(probe, splits: list[Features]) -> None:
    scale = np.geomspace(0.01, 100, splits[0].values.shape[1])
    moved = [Features(values=one.values * scale - 3, labels=one.labels, groups=one.groups) for one in splits]
    assert probe(*moved).accuracy == pytest.approx(probe(*splits).accuracy, abs=0.02)


def test_a_dimension_that_only_rounds_is_left_out(splits: list[Features]) -> None:
    rows = [
        Features(
            values=np.c_[one.values, np.full(len(one), 0.1) + 1e-9 * one.labels], labels=one.labels, groups=one.groups
        )
        for one in splits
    ]
    assert np.array_equal(knn_probe(*rows).hits, knn_probe(*splits).hits)


def test_a_class_that_train_lacks_is_never_right(splits: list[Features]) -> None:
    train, val, test = splits
    fewer = train.select(train.labels != 3)
    for probe in PROBES:
        hits = probe(fewer, val, test).hits
        assert not hits[test.labels == 3].any() and hits[test.labels != 3].mean() > 0.8


def test_a_paired_comparison_is_surer_than_two_intervals() -> None:
    rng = np.random.default_rng(0)
    groups = np.arange(400) // 4
    easy = rng.random(100).repeat(4)  # videos differ much more than the two probes do
    draws = rng.random(400)
    first = make_result("a", draws < 0.9 * easy + 0.1, groups, seed=0)
    second = make_result("b", draws < 0.9 * easy, groups, seed=0)
    assert first.interval.low < second.interval.high
    compared = compare(first, second)
    assert compared.difference == pytest.approx(first.accuracy - second.accuracy) and compared.interval.low > 0
    assert compare(first, first).interval.high == 0
    with pytest.raises(ValueError, match="same rows"):
        compare(first, make_result("c", draws < 1, groups[::-1], seed=0))


def test_results_of_folds_and_seeds_pool() -> None:
    parts = [
        make_result("a", np.array(hits), np.array(groups), seed=0) for hits, groups in (([1, 1], [0, 1]), ([0], [0]))
    ]
    both: ProbeResult = pool(parts)
    assert both.accuracy == pytest.approx(2 / 3)
    names, means = both.by_group()
    assert names.tolist() == [0, 1] and means.tolist() == [0.5, 1.0]


def test_no_video_stands_in_two_splits() -> None:
    groups = np.random.default_rng(0).integers(20, size=300)
    parts = split_groups(groups, seed=1)
    assert sorted(np.concatenate(parts)) == list(range(300))
    assert [len(set(groups[part])) for part in parts] == [12, 4, 4]
    assert [len(set(np.arange(3)[part])) for part in split_groups(np.arange(3), shares=(0.9, 0.9))] == [1, 1, 1]
    with pytest.raises(ValueError, match="2 source videos"):
        split_groups(np.arange(2))


def test_features_that_cannot_be_probed_are_refused(splits: list[Features]) -> None:
    train, val, test = splits
    with pytest.raises(ValueError, match="one label"):
        linear_probe(train.select(train.labels == 0), val, test)
    with pytest.raises(ValueError, match=r"\(0, 32\)"):
        knn_probe(train, val.select(np.arange(0)), test)
    with pytest.raises(ValueError, match="allowed"):
        Features(values=train.values, labels=train.labels[1:], groups=train.groups)


def test_retrieval_finds_other_videos_of_the_same_label(splits: list[Features]) -> None:
    train, _, test = splits
    found = retrieval(train, test)
    for name in ("recall@1", "recall@5", "recall@10", "map"):
        assert found[name].interval.low > found[f"chance:{name}"].interval.high or name == "recall@10"
    shuffled_found = retrieval(train, shuffled(test))
    for name in ("recall@1", "map"):
        assert shuffled_found[name].accuracy == pytest.approx(shuffled_found[f"chance:{name}"].accuracy, abs=0.06)


def test_retrieval_against_scikit_learn_and_random_rankings() -> None:
    rng = np.random.default_rng(3)
    rows = Features(values=rng.normal(size=(30, 6)), labels=rng.integers(4, size=30), groups=np.arange(30) // 3)
    unit = standardised(rows)[0]
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    similarity, precisions, firsts, chances = unit @ unit.T, [], [], []
    for query in range(30):
        others = rows.groups != rows.groups[query]
        wanted = rows.labels[others] == rows.labels[query]
        if wanted.any():
            precisions.append(average_precision_score(wanted, similarity[query][others]))
            firsts.append(wanted[np.argsort(-similarity[query][others])[:5]].any())
            shuffles = [rng.permutation(wanted) for _ in range(400)]
            chances.append(
                (
                    np.mean([one[:5].any() for one in shuffles]),
                    np.mean([average_precision_score(one, -np.arange(len(one))) for one in shuffles[:40]]),
                )
            )
    found = retrieval(rows, rows)
    assert found["map"].hits == pytest.approx(precisions, abs=1e-6)
    assert found["recall@5"].hits.tolist() == firsts
    assert [found[f"chance:{name}"].accuracy for name in ("recall@5", "map")] == pytest.approx(
        np.mean(chances, axis=0), abs=0.02
    )


def test_a_query_with_nothing_to_find_is_left_out() -> None:
    rows = Features(values=np.eye(4), labels=np.array([0, 0, 1, 1]), groups=np.array([0, 1, 2, 2]))
    assert retrieval(rows, rows)["map"].groups.tolist() == [0, 1]
    with pytest.raises(ValueError, match="nothing to find"):
        retrieval(rows, rows.select(np.array([0, 2])))

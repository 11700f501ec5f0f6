"""Totals from a draw: exact where they must be, right on average elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.planning.estimate import Estimate, draw_videos, schedule_s

SIZES = np.random.default_rng(5).lognormal(15, 1, 400)
SHARDS = np.repeat(np.arange(40), 10)


def estimate(sizes: np.ndarray = SIZES, num: int = 40, seed: int = 0) -> tuple[Estimate, np.ndarray]:
    videos, chances = draw_videos(sizes, num, seed)
    return Estimate(sizes, np.arange(len(sizes)) // 10, videos, chances), videos


def test_a_draw_depends_on_its_seed_alone_and_stays_below_what_was_asked_for() -> None:
    first, again, other = (draw_videos(SIZES, 40, seed)[0].tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert 30 <= len(first) <= 40 and first == sorted(set(first))


def test_of_a_small_corpus_all_is_drawn_and_counts_as_it_is() -> None:
    made, videos = estimate(num=400)
    assert videos.tolist() == list(range(400)) and set(made.weights) == {1.0}
    values = np.sin(np.arange(400)) + 2
    assert made.total(values) == pytest.approx(values.sum()) and made.relative_error(values) == 0
    assert made.by_shard(values) == pytest.approx(values.reshape(40, 10).sum(1))


def test_a_video_that_is_most_of_the_corpus_is_always_drawn_and_stands_for_itself() -> None:
    sizes = np.append(SIZES, SIZES.sum())
    for seed in range(20):
        made, videos = estimate(sizes, 20, seed)
        assert videos[-1] == 400 and made.weights[-1] == 1


@given(st.lists(st.integers(1, 10**9), min_size=2, max_size=60), st.integers(1, 60), st.integers(0, 9))
def test_number_and_size_come_out(sizes: list[int], num: int, seed: int) -> None:
    corpus = np.array(sizes, float)
    videos, chances = draw_videos(corpus, num, seed)
    assert len(videos) and (chances > 0).all() and (chances <= 1).all()
    made = Estimate(corpus, np.zeros(len(corpus), int), videos, chances)
    assert made.total(np.ones(len(videos))) == pytest.approx(len(corpus))
    assert made.by_shard(corpus[videos]).sum() == pytest.approx(max(made.total(corpus[videos]), corpus[videos].sum()))


def test_what_goes_by_number_and_by_size_is_exact() -> None:
    for seed in range(20):
        made, videos = estimate(seed=seed)
        values = 3 + 2e-6 * SIZES[videos]
        assert made.total(values) == pytest.approx((3 + 2e-6 * SIZES).sum())
        assert made.relative_error(values) < 1e-6


def test_totals_are_right_on_average_and_the_error_says_how_far_off_they_are() -> None:
    """Seconds that scatter by half around their size, and failures of every tenth video, over 300 draws."""
    rng = np.random.default_rng(3)
    for truth in (SIZES * rng.uniform(0.5, 1.5, 400), (rng.random(400) < 0.1).astype(float)):
        found, errors = [], []
        for seed in range(300):
            made, videos = estimate(seed=seed)
            found.append(made.total(truth[videos]) / truth.sum())
            errors.append(made.relative_error(truth[videos]))
        assert np.mean(found) == pytest.approx(1, abs=0.06)
        assert np.mean(errors) == pytest.approx(np.std(found), rel=0.3)


def test_few_videos_say_nothing_of_their_error() -> None:
    made, videos = estimate(num=6)
    assert math.isnan(made.relative_error(np.arange(len(videos)) + 1.0))


def test_unknown_sizes_are_one_size() -> None:
    made, videos = estimate(np.ones(400))
    assert len(videos) == 40 and made.weights == pytest.approx(10)


def test_shards_get_what_their_videos_had_and_a_share_of_the_rest() -> None:
    made, videos = estimate()
    values = 2.0 * SIZES[videos]
    by_shard = made.by_shard(values)
    assert by_shard.sum() == pytest.approx(2 * SIZES.sum())
    assert (by_shard > 2 * np.bincount(SHARDS[videos], SIZES[videos], 40) - 1e-6).all()


def test_work_takes_the_slot_that_is_free_first() -> None:
    assert schedule_s([3, 1, 1, 1, 5], 2) == 8
    assert schedule_s([2, 2, 2], 8) == 2
    assert schedule_s([], 4) == 0

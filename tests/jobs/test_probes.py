"""The probes that need no labels: what is held out, and that a planted signal is found."""

from __future__ import annotations

import numpy as np

from jobs.evaluation.probes import ProbeTask, make_tasks, probe

VIDEOS = np.repeat(np.arange(12), 8)
TIMES_S = np.tile(np.arange(8.0)[::-1], 12)  # rows of a video are not in the order of time


def tasks() -> dict[str, ProbeTask]:
    return {task.name: task for task in make_tasks(VIDEOS, TIMES_S)}


def test_videos_are_held_out_and_time_is_where_the_label_is_the_video() -> None:
    found = tasks()
    assert found.keys() == {"direction", "speed", "source"}
    for train, val, test in found["direction"].folds:
        parts = [set(VIDEOS[rows].tolist()) for rows in (train, val, test)]
        assert all(parts) and len(set.union(*parts)) == sum(map(len, parts)) == 12
    assert sorted(np.concatenate([fold[2] for fold in found["speed"].folds])) == list(range(len(VIDEOS)))
    [(train, val, test)] = found["source"].folds
    for video in range(12):
        ends = [TIMES_S[rows[VIDEOS[rows] == video]] for rows in (train, val, test)]
        assert ends[0].max() < ends[1].min() and ends[1].max() < ends[2].min()


def test_a_planted_signal_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    noise = {view: rng.normal(size=(len(VIDEOS), 10)) for view in ("normal", "backward", "double")}
    direction = tasks()["direction"]
    result, most_frequent = probe(direction, noise)
    assert 0.35 < result.accuracy < 0.65 and most_frequent.accuracy == 0.5
    told = {**noise, "backward": noise["backward"] + 3}
    result, _ = probe(direction, told)
    assert result.interval.low > 0.9 and len(result.hits) == 2 * len(VIDEOS)


def test_two_videos_are_too_few_to_hold_out() -> None:
    assert [task.name for task in make_tasks(VIDEOS[:16], TIMES_S[:16])] == ["source"]

"""The clips of `tokenreel bench learn`: what they show is what their labels say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jobs.bench.learn import digits, footage, pen
from jobs.bench.learn.baselines import measure_baselines
from jobs.bench.learn.tasks import NUM_FRAMES, SPLITS, Counts, Task
from pipeline.errors import ConfigError

SIZE_PX = 32
COUNTS = Counts(train=160, val=48, test=48)


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the form of penbased.dat: strokes to the right are 1, to the left 2."""
    rng = np.random.default_rng(0)
    lines = ["@relation penbased", "@data"]
    for row in range(300):
        label = 1 + row % 2
        x = np.sort(rng.integers(0, 101, 8))[:: 1 if label == 1 else -1]
        y = rng.integers(0, 101, 8)
        lines.append(", ".join(map(str, [*np.stack([x, y], axis=1).ravel(), label])))
    path = tmp_path_factory.mktemp("pen") / pen.FILE_NAME
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def digit_tasks() -> dict[str, Task]:
    return {task.name: task for task in digits.make_tasks(COUNTS, SIZE_PX, seed=0)}


def make_footage() -> dict[str, np.ndarray]:
    """Two sources a split: a grey ramp whose phase rises by 2 grey levels a frame; sources differ in their mean."""
    ramp = np.arange(footage.SIDE_PX)[None, :] + np.arange(footage.SIDE_PX)[:, None]
    frames = {}
    for split, names in footage.SOURCES.items():
        for number, name in enumerate(("one", "two")):
            time = 2 * np.arange(3 * NUM_FRAMES)[:, None, None]
            clip = (ramp + time + 40 * number + 7 * SPLITS.index(split)) % 256
            frames[names[number % len(names)] + name] = np.repeat(clip[..., None], 3, axis=-1).astype(np.uint8)
    return frames


@pytest.fixture(scope="module")
def film_tasks() -> dict[str, Task]:
    return {task.name: task for task in footage.make_tasks(make_footage(), COUNTS, SIZE_PX, seed=0)}


def centroids(frames: np.ndarray) -> np.ndarray:
    """(n t 2) mean (x, y) of the light in frames (n t H W 1), in pixels from the upper left."""
    light = frames[..., 0].astype(float)
    along = np.arange(light.shape[-1]) + 0.5
    total = light.sum((2, 3))
    return np.stack([(light.sum(2) * along).sum(-1) / total, (light.sum(3) * along).sum(-1) / total], axis=-1)


def test_the_pen_tip_is_where_the_pen_was(trajectories: Path) -> None:
    points, classes = pen.read_trajectories(trajectories)
    frames = pen.render(points, 64)
    assert frames.shape == (300, NUM_FRAMES, 64, 64, 1) and frames.dtype == np.uint8
    places = centroids(frames)
    x, y = places[:, [0, -1], 0] / 64, 1 - places[:, [0, -1], 1] / 64
    np.testing.assert_allclose(x, 0.1 + 0.8 * points[:, [0, -1], 0], atol=0.01)
    np.testing.assert_allclose(y, 0.1 + 0.8 * points[:, [0, -1], 1], atol=0.01)
    assert ((x[:, 1] > x[:, 0]) == (classes == 1)).all()


def test_pen_digits_stand_in_one_split_each(trajectories: Path) -> None:
    task = pen.make_task(trajectories, COUNTS, SIZE_PX, seed=3)
    again = pen.make_task(trajectories, COUNTS, SIZE_PX, seed=3)
    assert (task.frames == again.frames).all() and (task.groups == again.groups).all()
    assert (task.groups != pen.make_task(trajectories, COUNTS, SIZE_PX, seed=4).groups).any()
    assert len(np.unique(task.groups)) == len(task.labels) == 256
    with pytest.raises(ConfigError, match="400 clips asked for; there are 300"):
        pen.make_task(trajectories, Counts(train=200, val=100, test=100), SIZE_PX, seed=0)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / pen.FILE_NAME
    path.write_text("@data\n1, 2, 3\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        pen.read_trajectories(path)


def test_coordinates_need_their_order(trajectories: Path) -> None:
    points, classes = pen.read_trajectories(trajectories)
    found = pen.coordinate_accuracies(points, classes)
    assert found["trajectory"] > 0.95
    assert abs(found["order_destroyed"] - 0.5) < 0.15  # left and right are all that there is to know


def test_digits_go_where_their_label_says(digit_tasks: dict[str, Task]) -> None:
    task = digit_tasks["digit-direction"]
    # Around the frame's edges the mean of places is none; of angles there is one.
    light = task.frames[..., 0].astype(float)
    turns = np.exp(2j * np.pi * np.arange(SIZE_PX) / SIZE_PX)
    x, y = (np.unwrap(np.angle((light.sum(axis) * turns).sum(-1)), axis=1) for axis in (2, 3))
    found = np.arctan2(y[:, -1] - y[:, 0], x[:, -1] - x[:, 0])
    wanted = task.labels * 2 * np.pi / 8
    off = np.abs(np.angle(np.exp(1j * (found - wanted))))
    assert off.max() < np.pi / 8


def test_digits_that_touch_share_pixels(digit_tasks: dict[str, Task]) -> None:
    """Light that two digits share is there once, so a clip in which they meet has frames with less of it."""
    task = digit_tasks["digit-collision"]
    light = task.frames[..., 0].astype(float).sum((2, 3))
    dips = (light.max(1) - light.min(1)) / light.max(1)
    assert dips[task.labels == 0].max() < 1e-9
    assert (dips[task.labels == 1] > 0).mean() > 0.9


def test_the_first_digit_is_alone_first(digit_tasks: dict[str, Task]) -> None:
    task = digit_tasks["digit-first"]
    light = task.frames[..., 0].astype(float).sum((2, 3))
    assert (light.max(1) > 1.2 * light[np.arange(len(light)), (light > 0).argmax(1)]).mean() > 0.9  # then two
    assert np.bincount(task.labels[task.of("test")], minlength=10).min() >= 4


def test_one_frame_says_nothing_of_direction(digit_tasks: dict[str, Task]) -> None:
    found = measure_baselines(digit_tasks["digit-direction"])
    assert found["chance"] == 1 / 8 and found["majority"] == pytest.approx(1 / 8)
    assert found["single_frame"] < 0.3  # 48 clips: chance is below 0.25 in 99 of 100 draws


def test_films_are_split_by_source(film_tasks: dict[str, Task]) -> None:
    for task in film_tasks.values():
        for split in SPLITS:
            sources = set(task.groups[task.of(split)])
            assert sources and all(source.startswith(footage.SOURCES[split]) for source in sources)
            assert np.bincount(task.labels[task.of(split)]).min() >= len(task.of(split)) // len(task.classes)


def phases(task: Task) -> np.ndarray:
    """(n t) how bright the middle of each frame is; in `make_footage` a clock, but where it wraps."""
    half = SIZE_PX // 2
    return task.frames[:, :, half - 1 : half + 1, half - 1 : half + 1, 0].astype(float).mean((2, 3))


def test_films_run_as_their_label_says(film_tasks: dict[str, Task]) -> None:
    steps = np.median(np.diff(phases(film_tasks["film-arrow"]), axis=1), axis=1)
    np.testing.assert_allclose(steps, np.where(film_tasks["film-arrow"].labels, -2, 2), atol=0.6)
    steps = np.median(np.diff(phases(film_tasks["film-speed"]), axis=1), axis=1)
    np.testing.assert_allclose(steps, np.where(film_tasks["film-speed"].labels, 4, 2), atol=0.6)
    order = film_tasks["film-order"]
    middle = NUM_FRAMES // 2
    jump = phases(order)[:, middle] - phases(order)[:, middle - 1]
    straight = np.abs(jump) < 100  # where the ramp wraps, brightness falls from 255 to 0
    assert ((jump[straight] < 0) == (order.labels[straight] == 1)).all() and straight.mean() > 0.5


def test_the_camera_goes_where_its_label_says(film_tasks: dict[str, Task]) -> None:
    """The ramp grows to the right and down, so a camera that goes there sees it brighten, one that goes back darken."""
    task = film_tasks["film-camera"]
    steps = np.median(np.diff(phases(task), axis=1), axis=1)
    names = np.array(task.classes)[task.labels]
    assert (steps[np.isin(names, ("right", "down"))] > 0).all()
    assert (steps[np.isin(names, ("left", "up"))] < 0).all()
    spread = np.diff(np.quantile(task.frames[..., 0][:, [0, -1]].astype(float), [0.25, 0.75], axis=(2, 3)), axis=0)[0]
    wraps = task.frames[..., 0].max((1, 2, 3)) > 250
    assert (spread[(names == "in") & ~wraps, 1] < spread[(names == "in") & ~wraps, 0]).all()
    assert (spread[(names == "out") & ~wraps, 1] > spread[(names == "out") & ~wraps, 0]).all()


def test_footage_that_is_missing_is_named() -> None:
    frames = {name: clip for name, clip in make_footage().items() if not name.startswith(footage.SOURCES["val"])}
    with pytest.raises(ConfigError, match="split val has 0"):
        footage.make_tasks(frames, COUNTS, SIZE_PX, seed=0)


def test_baselines_find_what_is_there_and_nothing_else(digit_tasks: dict[str, Task]) -> None:
    task = digit_tasks["digit-direction"]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 99, task.frames.shape, dtype=np.uint8)
    lit = noise + (100 * (task.labels % 2)).astype(np.uint8)[:, None, None, None, None]
    two = dataclasses.replace(task, classes=("dark", "light"), labels=task.labels % 2)
    bright = measure_baselines(dataclasses.replace(two, frames=lit))
    assert bright["pixel_statistics"] == bright["single_frame"] == 1.0
    nothing = measure_baselines(dataclasses.replace(two, frames=noise))
    assert max(nothing["pixel_statistics"], nothing["single_frame"], nothing["all_frames"]) < 0.8

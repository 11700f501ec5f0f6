"""What is reached without any pre-training, on pixels: chance, majority, pixel statistics, the best single frame."""

from __future__ import annotations

from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from jobs.bench.learn.tasks import Task
from jobs.evaluation.frozen import Features, linear_probe, majority
from pipeline.schema import Split

_THUMBNAIL = 8
_SINGLE_FRAMES = (0, 5, 10, 15)


def measure_baselines(task: Task) -> dict[str, Any]:
    """Accuracy on test of each; settings, and of single frames which one, are chosen on val.

    pixel_statistics: mean and deviation of brightness in every frame, and of the change from frame to frame.
    single_frame: one frame at 8 x 8, by a linear classifier.
    all_frames: all 16 frames at 8 x 8, by a linear classifier: what a task gives away to one that sees time, but learns from
        labels alone.
    """
    pixels = task.frames.mean(axis=-1, dtype=np.float32) / 255
    thumbnails = _shrink(pixels)
    statistics = _statistics(pixels)

    def features(values: np.ndarray) -> dict[Split, Features]:
        return {
            split: Features(values=values[rows], labels=task.labels[rows], groups=task.groups[rows])
            for split in ("train", "val", "test")
            for rows in [task.of(split)]
        }

    def probed(values: np.ndarray) -> tuple[float, float]:
        parts = features(values)
        with threadpool_limits(1):  # of small matrices; more threads wait for each other
            result = linear_probe(parts["train"], parts["val"], parts["test"])
        return result.val_accuracy, result.accuracy

    parts = features(statistics)
    singles = {place: probed(thumbnails[:, place].reshape(len(thumbnails), -1)) for place in _SINGLE_FRAMES}
    best = max(singles, key=lambda place: singles[place][0])
    return {
        "chance": 1 / len(task.classes),
        "majority": majority(parts["train"], parts["test"]).accuracy,
        "pixel_statistics": probed(statistics)[1],
        "single_frame": singles[best][1],
        "all_frames": probed(thumbnails.reshape(len(thumbnails), -1))[1],
    }


def _shrink(pixels: np.ndarray) -> np.ndarray:
    """(n t H W) to (n t 8 8) by means; sides are multiples of 8."""
    n, t, h, w = pixels.shape
    shaped = pixels.reshape(n, t, _THUMBNAIL, h // _THUMBNAIL, _THUMBNAIL, w // _THUMBNAIL)
    return shaped.mean(axis=(3, 5))


def _statistics(pixels: np.ndarray) -> np.ndarray:
    change = np.abs(np.diff(pixels, axis=1))
    parts = [part.reshape(*part.shape[:2], -1) for part in (pixels, change)]
    return np.concatenate([f(part, axis=-1) for part in parts for f in (np.mean, np.std)], axis=1)

"""What every part of the benchmark hands over: labelled clips, and how they stand in splits.

Shapes: n clips; t frames; H W pixels; c colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.schema import Split

NUM_FRAMES = 16
"""Frames t of every clip."""
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Pixels = Literal["rendered", "real"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Clips of a task in each split."""

    train: int
    val: int
    test: int

    def of(self, split: Split) -> int:
        return int(getattr(self, split))


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A question about clips, with the clips.

    pixels, labels_from: what is real and what was made, in words for a table.
    frames: (n t H W c) uint8; c is 1 where all colours are equal.
    labels: (n,) places in `classes`.
    splits: (n,) of SPLITS.
    groups: (n,) texts: the source of a clip; no source stands in two splits.
    """

    name: str
    question: str
    pixels: Pixels
    labels_from: str
    classes: tuple[str, ...]
    frames: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    groups: np.ndarray

    @property
    def rgb(self) -> np.ndarray:
        """(n t H W 3) uint8, without a copy."""
        return np.broadcast_to(self.frames, (*self.frames.shape[:-1], 3))

    def of(self, split: Split) -> np.ndarray:
        """Numbers of the clips in a split."""
        return np.flatnonzero(self.splits == split)


def even_labels(rng: np.random.Generator, count: int, num_classes: int) -> np.ndarray:
    """(count,) class numbers, each as often as the others but for one, in random order."""
    return rng.permutation(np.arange(count) % num_classes)

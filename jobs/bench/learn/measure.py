"""What an arm's backbone is worth: frozen features and fine-tuning, by task and share of labels.

Shapes: n clips; t h w token grid; d width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from jobs.evaluation.frozen import Features
from jobs.loop import Precision
from models.vimpac import VimpacBackbone
from pipeline.dataset import read_index
from pipeline.labelled import LabelledClips, LabelledConfig
from pipeline.schema import Split

_QUARTERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskTokens:
    """The tokens of a task: (n t h w) uint16, labels (n,), splits (n,), groups (n,): which source a clip shows."""

    name: str
    classes: tuple[str, ...]
    tokens: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    groups: np.ndarray

    def of(self, split: Split) -> np.ndarray:
        """Numbers of the clips in a split."""
        return np.flatnonzero(self.splits == split)

    def features(self, values: np.ndarray, split: Split, rows: np.ndarray | None = None) -> Features:
        """`values` (n ...) of a split, or of these clips alone."""
        rows = self.of(split) if rows is None else rows
        return Features(values=values[rows], labels=self.labels[rows], groups=self.groups[rows])


def read_task(tokens: Path, manifest: Path, window: tuple[int, int, int], pad: int) -> TaskTokens:
    """All clips of a task, into memory."""
    clips = LabelledClips(tokens, LabelledConfig(splits=manifest), window, pad)
    kept = np.flatnonzero([split is not None for split in clips.splits])
    classes = clips.classes()
    index = read_index(tokens, ["source", "extra"])
    shows = {
        source: json.loads(extra)["shows"]
        for source, extra in zip(index["source"].to_pylist(), index["extra"].to_pylist(), strict=True)
    }
    place, rows, starts = clips.spread(kept, LabelledConfig().views, 1)
    return TaskTokens(
        name=manifest.stem,
        classes=classes,
        tokens=clips.read(rows, starts),
        labels=clips.class_numbers(kept[place], classes),
        splits=clips.splits[kept[place]],
        groups=np.array([shows[source] for source in clips.sources[kept[place]]]),
    )


def draw_share(task: TaskTokens, share: float, seed: int) -> np.ndarray:
    """Training clips to `share` of the labels: as many of each class as that is, and at least one."""
    rng = np.random.default_rng([seed, 5])
    chosen = []
    for label in range(len(task.classes)):
        members = rng.permutation(np.flatnonzero((task.splits == "train") & (task.labels == label)))
        chosen.append(members[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(chosen))


class Embedded(NamedTuple):
    """Of n clips. pooled: (n, (w + 4) d) float32: CLS of each of the w windows, and the mean over the tokens of each quarter of
    the frames. frames: (n t d) float32: the mean over the tokens of each frame, which the attentive probe looks at."""

    pooled: np.ndarray
    frames: np.ndarray


@torch.inference_mode()
def embed(backbone: VimpacBackbone, tokens: np.ndarray, precision: Precision, batch_size: int = 16) -> Embedded:
    """Features of clips (n t h w) uint16 that hold no PAD, window by window, each as long as the backbone's, without overlap.

    Order in time is kept by windows and quarters, as linear probes cannot see it in a mean over all frames.
    """
    backbone.eval()
    config = backbone.config
    num_clips, num_frames = tokens.shape[:2]
    # Made beforehand: many small arrays between the large ones of each batch keep freed memory from being used again.
    pooled = np.empty((num_clips, (num_frames // config.num_frames + _QUARTERS) * config.hidden), np.float32)
    by_frame = np.empty((num_clips, num_frames, config.hidden), np.float32)
    for first in range(0, num_clips, batch_size):
        rows = slice(first, first + batch_size)
        batch = torch.from_numpy(tokens[rows].astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            windows = [backbone(part, padded=False) for part in batch.split(config.num_frames, dim=1)]
        frames = torch.cat([window.tokens.float().mean(dim=(2, 3)) for window in windows], dim=1)  # n t d
        quarters = [part.mean(dim=1) for part in frames.tensor_split(_QUARTERS, dim=1)]
        pooled[rows] = torch.cat([*(window.cls.float() for window in windows), *quarters], dim=1).numpy()
        by_frame[rows] = frames.numpy()
    return Embedded(pooled, by_frame)

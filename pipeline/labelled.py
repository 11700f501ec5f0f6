"""Labelled clips of a token dataset: what each shows, in which split it stands, and windows of it at a lower frame rate.

A clip is one sample for each of its views. Training draws a view and a start anew each epoch; a test reads several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset import Place
from pipeline.errors import ConfigError
from pipeline.loader import CacheConfig, WindowReader
from pipeline.manifest import read_manifest
from pipeline.order import GlobalOrder, draw_seeds, hash_keys
from pipeline.schema import Split
from pipeline.storage import Store
from pipeline.views import ViewChoice


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledConfig:
    """Which windows of which labelled clips make a batch."""

    batch_size: int = 128
    """Clips in the global batch of one optimiser step, over all workers."""
    fps: float | None = None
    """Frames a second of a window; those of the tokens must be a multiple. None: as they are."""
    views: ViewChoice = field(default_factory=ViewChoice)
    splits: Path | None = None
    """Manifest, such as `tokenreel manifest` writes, whose labels and splits count in place of those of the tokens; clips of
    videos that it does not name are left out. So one token dataset serves all official splits."""
    shards_per_block: int = 64
    """Shards whose clips are shuffled together."""
    seed: int = 0
    """Seed of the order, the views and the windows."""
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shards_per_block < 1 or (self.fps is not None and self.fps <= 0):
            raise ConfigError(
                f"loader: batch_size = {self.batch_size} and shards_per_block = {self.shards_per_block} must be 1 or more, "
                f"fps = {self.fps} more than 0, or none"
            )


class LabelledClips:
    """The clips of a token dataset, numbered in its order, with a window reader.

    Attributes: `keys`, `sources`, `video_ids` and `splits`, each (n,) of texts; `labels`, (n,), None where there is none;
    `shards`, (n,), non-decreasing; `fingerprint` of the dataset.

    Args:
        window: (t, h, w) of a window in tokens; its h and w must be the dataset's.
        pad: token that stands where a video is shorter than the window.

    Raises:
        ConfigError: the frame rate or the grid cannot be read from these tokens, or the manifest has a row that cannot be used
            or names no training video.
    """

    def __init__(self, place: Place, config: LabelledConfig, window: tuple[int, int, int], pad: int) -> None:
        self.place = Store.at(place)
        self._config = config
        self._reader = WindowReader(
            place, "all", window, pad, cache=config.cache, shards_together=config.shards_per_block
        )
        self.fingerprint = self._reader.fingerprint
        table = self._reader.read_columns("clip_key", "view", "video_id", "source", "label", "split", "fps")
        self.stride = self._find_stride(table["fps"])
        # A dictionary numbers values as they come, so clips are numbered in the order of the shards.
        _, self._clip_of_row = _encode(table["clip_key"])
        _, first = np.unique(self._clip_of_row, return_index=True)
        self._rows_by_clip = np.argsort(self._clip_of_row, kind="stable")
        self._view_names, self._view_of_row = _encode(table["view"])
        self.shards = self._reader.shards[first]
        clips = table.take(first)
        names = ("clip_key", "source", "video_id", "label", "split")
        columns = [np.array(clips[name].to_pylist(), object) for name in names]
        self.keys, self.sources, self.video_ids, self.labels, self.splits = columns
        if config.splits is not None:
            self._apply_manifest(config.splits)

    def __len__(self) -> int:
        return len(self.keys)

    def of_split(self, split: Split) -> np.ndarray:
        """Numbers of the clips in a split, ascending."""
        return np.flatnonzero(self.splits == split)

    def classes(self) -> tuple[str, ...]:
        """The labels of the training split, sorted: their places are the class numbers.

        Raises:
            ConfigError: a training clip has no label, or there are fewer than two labels.
        """
        train = self.of_split("train")
        for clip in train[self.labels[train] == None][:1]:  # noqa: E711  # element by element
            raise ConfigError(f"{self._name(clip)} has no label; give the corpus as a manifest with a column `label`")
        found = tuple(sorted(set(self.labels[train].tolist())))
        if len(found) < 2:
            raise ConfigError(
                f"{self.place}: the training split has {len(found)} labels {found}; two or more are needed"
            )
        return found

    def class_numbers(self, clips: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """(n,) int64 of the labels of `clips`.

        Raises:
            ConfigError: a label is not among `classes`; it and its sample are named.
        """
        numbers = {label: number for number, label in enumerate(classes)}
        for clip in clips:
            if self.labels[clip] not in numbers:
                raise ConfigError(
                    f"{self._name(clip)} has the label {self.labels[clip]!r}, which no training sample had; the model knows "
                    f"{len(classes)} labels, from {classes[0]!r} to {classes[-1]!r}. Correct the label, or leave the sample out"
                )
        return np.array([numbers[self.labels[clip]] for clip in clips], np.int64)

    def rows_of(self, choice: ViewChoice) -> tuple[np.ndarray, np.ndarray]:
        """(first, rows): the samples that show clip i in views of `choice` are `rows[first[i]:first[i + 1]]`.

        Raises:
            ConfigError: a clip has no such view.
        """
        allowed = np.array([choice.allows(name) for name in self._view_names], bool)[self._view_of_row]
        rows = self._rows_by_clip[allowed[self._rows_by_clip]]
        counts = np.bincount(self._clip_of_row[rows], minlength=len(self))
        if len(missing := np.flatnonzero(counts == 0)):
            raise ConfigError(
                f"{self._name(missing[0])} has no view of {choice}; there are {', '.join(self._view_names)}. Tokenize with "
                "the --views that are missing, or ask for others"
            )
        return np.concatenate([[0], np.cumsum(counts)]), rows

    def read(self, rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """(n, t, h, w) uint16 windows of samples that begin at stored frame `starts`, at the frame rate of the config."""
        return self._reader.read(rows, starts, self.stride)

    def num_starts(self, rows: np.ndarray) -> np.ndarray:
        """(n,) how many windows fit into each sample; 1 where it is shorter than a window."""
        return self._reader.num_starts(rows, self.stride)

    def read_keys(self, rows: np.ndarray) -> list[str]:
        """The keys of samples."""
        return self._reader.read_keys(rows)

    def spread(self, clips: np.ndarray, choice: ViewChoice, num_windows: int) -> tuple[np.ndarray, ...]:
        """(place, row, start), each (m,) int64: `num_windows` windows, evenly from the first to the last that fits, of every
        view of `clips`. `place` counts in `clips`. A single window is the middle one."""
        first, rows = self.rows_of(choice)
        counts = np.diff(first)[clips]
        place = np.repeat(np.arange(len(clips)), counts)
        nth = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        chosen = rows[first[clips][place] + nth]
        shares = np.linspace(0, 1, num_windows) if num_windows > 1 else np.array([0.5])
        starts = np.rint((self.num_starts(chosen) - 1)[:, None] * shares).astype(np.int64)
        return np.repeat(place, num_windows), np.repeat(chosen, num_windows), starts.ravel()

    def _name(self, clip: int) -> str:
        return f"{self.place}: sample {self.keys[clip]} ({self.sources[clip]}) of split {self.splits[clip]}"

    def _find_stride(self, fps: pa.ChunkedArray) -> int:
        stored, wanted = pc.unique(fps).to_pylist(), self._config.fps
        if wanted is None:
            return 1
        ratio = stored[0] / wanted if len(stored) == 1 else 0.0
        if round(ratio) < 1 or abs(ratio - round(ratio)) > 1e-6:
            raise ConfigError(
                f"loader.fps = {wanted}: {self.place} has tokens at {stored} fps; allowed: one of these divided by a whole number. "
                "Tokenize at 16 fps for 2 and 4"
            )
        return round(ratio)

    def _apply_manifest(self, path: Path) -> None:
        named: dict[str, tuple[Any, Any]] = {}
        for table in read_manifest(Store.at(path.parent), path.name):
            if reasons := table["reason"].drop_null().to_pylist():
                raise ConfigError(f"loader.splits = {path}: {reasons[0]}")
            for source, label, split in zip(
                *(table[name].to_pylist() for name in ("path", "label", "split")), strict=True
            ):
                if named.setdefault(source, (label, split)) != (label, split):
                    raise ConfigError(
                        f"loader.splits = {path}: {source} stands there twice, with other labels or splits"
                    )
        found = [named.get(source, (None, None)) for source in self.sources]
        self.labels, self.splits = (np.array([pair[part] for pair in found], object) for part in (0, 1))
        if not len(self.of_split("train")):
            raise ConfigError(
                f"loader.splits = {path}: names no training video that is in {self.place}; its paths must be those of the "
                f"corpus, such as {self.sources[0]}"
            )


class LabelledBatches:
    """Batches of the training split. Stateless: the batch of a step is a function of the step.

    Step k takes clips [k*B, (k+1)*B) of one endless sequence of epochs; of each a view and a start, drawn by (seed, epoch,
    clip). So the order is the same for any number of workers.

    Raises:
        ConfigError: the batch does not split over the workers, no clip is there, or a label is missing.
    """

    def __init__(self, clips: LabelledClips, config: LabelledConfig, *, rank: int, world_size: int) -> None:
        if config.batch_size % world_size:
            raise ConfigError(f"loader.batch_size = {config.batch_size} does not divide by the {world_size} workers")
        self._clips, self._config = clips, config
        self._members = clips.of_split("train")
        self._labels = clips.class_numbers(self._members, clips.classes())
        self._first, self._rows = clips.rows_of(config.views)
        self._hashes = hash_keys(clips.keys[self._members].tolist())
        self._order = GlobalOrder(clips.shards[self._members], config.seed, clips.fingerprint, config.shards_per_block)
        share = config.batch_size // world_size
        self._slice = (rank * share, (rank + 1) * share)

    def read(self, step: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """(windows (b t h w) uint16, class numbers (b,) int64, sample keys) of this rank's part of the batch of `step`."""
        start = step * self._config.batch_size
        epochs, drawn = self._order.samples(start + self._slice[0], start + self._slice[1])
        view, begin = (draw_seeds(self._config.seed, epochs, self._hashes[drawn], stream) for stream in (0, 1))
        members = self._members[drawn]
        counts = np.diff(self._first)[members].astype(np.uint64)
        rows = self._rows[self._first[members] + (view % counts).astype(np.int64)]
        starts = (begin % self._clips.num_starts(rows).astype(np.uint64)).astype(np.int64)
        return self._clips.read(rows, starts), self._labels[drawn], self._clips.read_keys(rows)


def _encode(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """(values, number of each row's value (n,)); values in the order of their first row."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

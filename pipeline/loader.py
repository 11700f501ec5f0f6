"""Token dataset to batches: exact order, resume in O(1), one read a window."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.dataset import read_index, read_meta, shard_path
from pipeline.errors import ConfigError, DatasetError
from pipeline.keep_list import read_keep_list
from pipeline.order import GlobalOrder, draw_seeds, hash_keys
from pipeline.quality import QualityThresholds, keep_mask
from pipeline.schema import Split, TokenBatch

_MAX_OPEN_SHARDS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """Which windows of which samples make a batch."""

    batch_size: int = 1024
    """Videos in the global batch of one optimiser step, over all workers."""
    split: Split = "train"
    """Which split to read."""
    shards_per_block: int = 64
    """Shards whose samples are shuffled together."""
    seed: int = 0
    """Seed of the order, the windows and the masks."""
    keep: QualityThresholds = field(default_factory=QualityThresholds)
    """Samples whose scores are beyond these are left out; nothing is decoded again."""
    keep_list: Path | None = None
    """Only samples in this file are used: the keep.parquet of `tokenreel dedup`, made for these very tokens."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shards_per_block < 1:
            raise ConfigError(
                f"loader: batch_size = {self.batch_size} and shards_per_block = {self.shards_per_block} must be 1 or more"
            )


class TokenLoader:
    """Batches of a token dataset. Stateless: the batch of a step is a function of the step.

    Args:
        window: (t, h, w) of a clip in tokens; its h and w must be the dataset's.
        num_views: clips a video, drawn uniformly and independently; they may overlap (VIMPAC: two).
        pad: token that stands where a video is shorter than `t`.

    Raises:
        ConfigError: the batch does not split over the workers, exceeds the dataset, or the grid is another one.
    """

    def __init__(
        self,
        folder: Path,
        config: LoaderConfig,
        *,
        window: tuple[int, int, int],
        num_views: int,
        pad: int,
        rank: int,
        world_size: int,
    ) -> None:
        if config.batch_size % world_size:
            raise ConfigError(f"loader.batch_size = {config.batch_size} does not divide by the {world_size} workers")
        self._reader = WindowReader(folder, config.split, window, pad, config.keep, config.keep_list)
        if config.batch_size > len(self._reader):
            raise ConfigError(
                f"loader.batch_size = {config.batch_size} exceeds the {len(self._reader)} samples of split {config.split} in "
                f"{folder}; a video would meet itself among its negatives. Lower it, or cut more clips"
            )
        self._config, self._num_views = config, num_views
        self._order = GlobalOrder(self._reader.shards, config.seed, self._reader.fingerprint, config.shards_per_block)
        self.unit = "tokens"
        self.units_per_step = config.batch_size * num_views * window[0] * window[1] * window[2]
        share = config.batch_size // world_size
        self._slice = (rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return len(self._order)

    def batch(self, step: int) -> TokenBatch:
        """This rank's part of the global batch of `step` (from 0)."""
        start = step * self._config.batch_size
        epochs, samples = self._order.samples(start + self._slice[0], start + self._slice[1])
        views = range(self._num_views)
        hashes = self._reader.key_hashes[samples]
        seeds = np.stack([draw_seeds(self._config.seed, epochs, hashes, 2 * view) for view in views], axis=1)
        draws = np.stack([draw_seeds(self._config.seed, epochs, hashes, 2 * view + 1) for view in views], axis=1)
        num_starts = self._reader.num_starts(samples)[:, None]
        starts = draws % num_starts.astype(np.uint64)
        tokens = np.stack([self._reader.read(samples, starts[:, view].astype(np.int64)) for view in views], axis=1)
        return TokenBatch(
            tokens=torch.from_numpy(tokens.astype(np.int64)),
            seeds=torch.from_numpy(seeds.view(np.int64)),
            keys=[self._reader.keys[sample] for sample in samples],
        )


def select_rows(
    index: pa.Table,
    split: Split | Literal["all"],
    keep: QualityThresholds | None,
    kept_keys: pa.ChunkedArray | None = None,
) -> pa.Table:
    """The rows of an index that belong to `split`, hold every threshold of `keep` and have one of `kept_keys`, in their order.

    Raises:
        ConfigError: a threshold is set on a score that no row has.
    """
    if split != "all":
        index = index.filter(pc.equal(index["split"], split))
    if kept_keys is not None:
        index = index.filter(pc.is_in(index["key"], value_set=kept_keys))
    return index if keep is None else index.filter(keep_mask(index, keep))


class WindowReader:
    """Random access to windows of a token dataset by index row: one positioned read a window, no tar parsing."""

    def __init__(
        self,
        folder: Path,
        split: Split | Literal["all"],
        window: tuple[int, int, int],
        pad: int,
        keep: QualityThresholds | None = None,
        keep_list: Path | None = None,
    ) -> None:
        self._folder, self._window, self._pad = folder, window, pad
        self.num_frames = window[0]
        meta = read_meta(folder, kind="tokens", complete=True)
        self.fingerprint = meta.fingerprint
        kept = None if keep_list is None else read_keep_list(keep_list, meta)
        self.index = select_rows(read_index(folder), split, keep, kept)
        grids = set(zip(self.index["height"].to_pylist(), self.index["width"].to_pylist(), strict=True))
        if grids - {window[1:]}:
            raise ConfigError(f"{folder} holds grids of {sorted(grids)} tokens; the model takes {window[1:]}")
        self.keys: list[str] = self.index["key"].to_pylist()
        self.key_hashes = hash_keys(self.keys)
        self.shards = self.index["shard"].to_numpy()
        self.lengths = self.index["num_frames"].to_numpy()
        self._offsets = self.index["offset"].to_numpy()
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def num_starts(self, samples: np.ndarray) -> np.ndarray:
        """(n,) how many windows fit into each sample; 1 where it is shorter than a window."""
        return np.maximum(1, self.lengths[samples] - self._window[0] + 1)

    def read(self, samples: np.ndarray, starts: np.ndarray, stride: int = 1) -> np.ndarray:
        """(n, t, h, w) uint16 windows that begin at frame `starts` and take every `stride`-th frame; PAD at the end.

        Raises:
            DatasetError: a shard is shorter than its index says.
        """
        t, h, w = self._window
        frame = h * w
        out = np.full((len(samples), t, frame), self._pad, np.uint16)
        for row, (sample, start) in enumerate(zip(samples, starts, strict=True)):
            count = min((t - 1) * stride + 1, int(self.lengths[sample] - start))
            shard = int(self.shards[sample])
            data = os.pread(self._open(shard), count * frame * 2, int(self._offsets[sample] + start * frame * 2))
            if len(data) != count * frame * 2:
                raise DatasetError(
                    f"{shard_path(self._folder, shard)}: sample {self.keys[sample]} is cut off; run `tokenreel verify {self._folder}`"
                )
            frames = np.frombuffer(data, np.uint16).reshape(count, frame)[::stride]
            out[row, : len(frames)] = frames
        return out.reshape(len(samples), t, h, w)

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(shard_path(self._folder, shard), os.O_RDONLY)
        return self._files[shard]

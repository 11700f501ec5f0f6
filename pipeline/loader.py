"""Token dataset to batches: exact order, resume in O(1), one read a window, from a folder or an object store."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.dataset import Place, codebook_size, read_index, read_meta
from pipeline.errors import ConfigError, DatasetError
from pipeline.keep_list import keep_list_digest, read_keep_list
from pipeline.node_cache import NodeCache, default_folder
from pipeline.order import GlobalOrder, draw_seeds, hash_keys
from pipeline.quality import QualityThresholds, keep_mask
from pipeline.sample_index import name_tar, open_index
from pipeline.schema import Split, TokenBatch
from pipeline.shard_files import open_shard_files
from pipeline.storage import Store
from pipeline.untrusted import check_codes

_BLOCKS_AHEAD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Where a node keeps its copy of the index and, of a dataset in an object store, of the shards.

    All workers of a node share it, whatever they train; so may several jobs.
    """

    folder: Path | None = None
    """Folder on a disk of each node; by default $XDG_CACHE_HOME/tokenreel, or ~/.cache/tokenreel."""
    max_bytes: int = 64 * 2**30
    """Most that it holds, in bytes; what was used longest ago goes first. It must hold the shards of one block."""

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ConfigError(f"loader.cache.max_bytes = {self.max_bytes}: must be 1 or more")

    def open(self) -> NodeCache:
        """The cache on this node; see `NodeCache`."""
        return NodeCache(self.folder or default_folder(), self.max_bytes)


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
    distance: int | None = None
    """Most frames that the start of a further clip of a video may lie from that of the first; none: anywhere."""
    keep: QualityThresholds = field(default_factory=QualityThresholds)
    """Samples whose scores are beyond these are left out; nothing is decoded again."""
    keep_list: Path | None = None
    """Only samples in this file are used: the keep.parquet of `tokenreel dedup`, made for these very tokens."""
    views: tuple[str, ...] = ()
    """Views of clips that are used, such as 128c, where the tokens have several; none given: all of the model's size."""
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shards_per_block < 1:
            raise ConfigError(
                f"loader: batch_size = {self.batch_size} and shards_per_block = {self.shards_per_block} must be 1 or more"
            )
        if self.distance is not None and self.distance < 0:
            raise ConfigError(f"loader.distance = {self.distance}: must be 0 frames or more, or none")


class TokenLoader:
    """Batches of a token dataset. Stateless: the batch of a step is a function of the step.

    Args:
        place: folder or URL of the dataset.
        window: (t, h, w) of a clip in tokens; its h and w must be the dataset's.
        num_views: clips a video (VIMPAC: two). Their starts are drawn uniformly and may overlap: the first over all
            that there are, the others over those within `config.distance` of it.
        pad: token that stands where a video is shorter than `t`.

    Raises:
        ConfigError: the batch does not split over the workers, exceeds the dataset, the grid is another one, or the
            cache is too small.
    """

    def __init__(
        self,
        place: Place,
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
        self._reader = WindowReader(
            place,
            config.split,
            window,
            pad,
            config.keep,
            keep_list=config.keep_list,
            views=config.views,
            cache=config.cache,
            shards_together=config.shards_per_block,
        )
        if config.batch_size > len(self._reader):
            raise ConfigError(
                f"loader.batch_size = {config.batch_size} exceeds the {len(self._reader)} samples of split {config.split} in "
                f"{place}; a video would meet itself among its negatives. Lower it, or cut more clips"
            )
        self._config, self._num_views = config, num_views
        self._order = GlobalOrder(self._reader.shards, config.seed, self._reader.fingerprint, config.shards_per_block)
        self._planned = (-1, -1)
        self.unit = "tokens"
        self.units_per_step = config.batch_size * num_views * window[0] * window[1] * window[2]
        share = config.batch_size // world_size
        self._slice = (rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return len(self._order)

    def batch(self, step: int) -> TokenBatch:
        """This rank's part of the global batch of `step` (from 0).

        Raises:
            DatasetError: a shard is shorter than its index says, or an object store does not hold what it says.
        """
        start = step * self._config.batch_size
        self._plan_reading(start + self._slice[0])
        epochs, samples = self._order.samples(start + self._slice[0], start + self._slice[1])
        keys = self._reader.read_keys(samples)
        hashes = hash_keys(keys)
        draws = [draw_seeds(self._config.seed, epochs, hashes, stream) for stream in range(2 * self._num_views)]
        starts = _draw_starts(np.stack(draws[1::2], axis=1), self._reader.num_starts(samples), self._config.distance)
        tokens = self._reader.read(np.repeat(samples, self._num_views), starts.ravel())
        return TokenBatch(
            tokens=torch.from_numpy(tokens.astype(np.int64).reshape(-1, self._num_views, *tokens.shape[1:])),
            seeds=torch.from_numpy(np.stack(draws[::2], axis=1).view(np.int64)),
            keys=keys,
        )

    def _plan_reading(self, position: int) -> None:
        if self._reader.files.reads_ahead and (block := self._order.block_of(position)) != self._planned:
            self._planned = block
            self._reader.files.plan(self._order.shards_ahead(position, _BLOCKS_AHEAD))


def _draw_starts(draws: np.ndarray, num_starts: np.ndarray, distance: int | None) -> np.ndarray:
    """(n, v) int64 first frames in [0, num_starts), from uint64 draws (n, v); views after the first within `distance`."""
    first = (draws[:, :1] % num_starts[:, None].astype(np.uint64)).astype(np.int64)
    last = num_starts[:, None].astype(np.int64) - 1
    reach = int(last.max(initial=0)) if distance is None else distance
    low, high = np.maximum(first - reach, 0), np.minimum(first + reach, last)
    others = low + (draws[:, 1:] % (high - low + 1).astype(np.uint64)).astype(np.int64)
    return np.concatenate([first, others], axis=1)


def select_rows(
    index: pa.Table,
    split: Split | Literal["all"],
    keep: QualityThresholds | None,
    *,
    kept_keys: pa.ChunkedArray | None = None,
    views: Sequence[str] = (),
    grid: tuple[int, int] | None = None,
) -> pa.Table:
    """The rows of an index that belong to `split`, hold every threshold of `keep`, have one of `kept_keys`, show one of
    `views` and have `grid`, in their order.

    Raises:
        ConfigError: a threshold is set on a score that no row has.
    """
    if split != "all":
        index = index.filter(pc.equal(index["split"], split))
    if kept_keys is not None:
        index = index.filter(pc.is_in(index["key"], value_set=kept_keys))
    if views:
        index = index.filter(pc.is_in(index["view"], value_set=pa.array(views)))
    if grid is not None:
        index = index.filter(pc.and_(pc.equal(index["height"], grid[0]), pc.equal(index["width"], grid[1])))
    return index if keep is None else index.filter(keep_mask(index, keep))


class WindowReader:
    """Random access to windows of a token dataset by index row: one positioned read a window, no tar parsing.

    Args:
        shards_together: shards that are read in turn, which the cache of a remote dataset must hold.
    """

    def __init__(
        self,
        place: Place,
        split: Split | Literal["all"],
        window: tuple[int, int, int],
        pad: int,
        keep: QualityThresholds | None = None,
        *,
        keep_list: Path | None = None,
        views: Sequence[str] = (),
        cache: CacheConfig | None = None,
        shards_together: int = 1,
    ) -> None:
        self._store, self._window, self._pad = Store.at(place), window, pad
        self.num_frames = window[0]
        meta = read_meta(self._store, kind="tokens", complete=True)
        self.fingerprint, self._codebook_size = meta.fingerprint, codebook_size(meta)
        self._select = functools.partial(
            select_rows,
            split=split,
            keep=keep,
            kept_keys=None if keep_list is None else read_keep_list(keep_list, meta),
            views=views,
        )
        thresholds = keep.given() if keep else {}
        selection: dict[str, Any] = {"split": split, "keep": thresholds, "views": list(views)}
        if keep_list is not None:
            selection["keep_list"] = keep_list_digest(keep_list)
        self._selected_by = columns = ["split", "view", *(f"score_{name[4:]}" for name in thresholds)]
        node_cache = (cache or CacheConfig()).open()
        self._index = open_index(self._store, meta, node_cache, self._select, selection=selection, columns=columns)
        grids, grid = self._index.grids, window[1:]
        if grids and grid not in grids:
            raise ConfigError(f"{place} holds grids of {list(grids)} tokens; the model takes {grid}")
        if len(grids) > 1:  # the same clips in several sizes
            self._select = functools.partial(self._select, grid=grid)
            selection["grid"] = grid
            self._index = open_index(self._store, meta, node_cache, self._select, selection=selection, columns=columns)
        self.files = open_shard_files(self._store, meta, self._index, node_cache, shards_together)

    def __len__(self) -> int:
        return len(self._index.rows)

    @property
    def shards(self) -> np.ndarray:
        """(n,) int32 shard of each sample, non-decreasing; made anew."""
        return self._index.shard_of_each

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int32 frames of each sample."""
        lengths: np.ndarray = self._index.rows["num_frames"]
        return lengths

    @functools.cached_property
    def index(self) -> pa.Table:
        """All columns of the samples, read from the dataset: for datasets that fit into memory."""
        return self._select(read_index(self._store))

    def read_columns(self, *names: str) -> pa.Table:
        """These columns of the samples, and the one number `shard`, read from the dataset."""
        wanted = dict.fromkeys((*names, *self._selected_by, "key", "height", "width"))
        return self._select(read_index(self._store, list(wanted))).select([*names, "shard"])

    @functools.cached_property
    def key_hashes(self) -> np.ndarray:
        """(n,) uint64 of `hash_keys`, for datasets that fit into memory."""
        return hash_keys(self.read_keys(np.arange(len(self))))

    def read_keys(self, samples: np.ndarray) -> list[str]:
        """The keys of these samples."""
        return [key.decode() for key in self._index.rows["key"][samples].tolist()]

    def num_starts(self, samples: np.ndarray, stride: int = 1) -> np.ndarray:
        """(n,) how many windows of every `stride`-th frame fit into each sample; 1 where it is shorter than a window."""
        return np.maximum(1, self.lengths[samples] - (self._window[0] - 1) * stride)

    def read(self, samples: np.ndarray, starts: np.ndarray, stride: int = 1) -> np.ndarray:
        """(n, t, h, w) uint16 windows that begin at frame `starts` and take every `stride`-th frame; PAD at the end.

        Raises:
            DatasetError: a shard is shorter than its index says.
        """
        t, h, w = self._window
        span, frame_bytes = (t - 1) * stride + 1, h * w * 2
        rows = self._index.rows[samples]
        counts = np.minimum(span, rows["num_frames"] - starts)
        offsets = rows["offset"] + starts * frame_bytes
        windows = np.empty((len(samples), span * h * w), np.uint16)
        targets = list(windows)
        short = [(place, counts[place] * h * w) for place in np.flatnonzero(counts < span).tolist()]
        for place, filled in short:
            windows[place, filled:] = 0
            targets[place] = windows[place, :filled]
        order = np.argsort(rows["tar"], kind="stable")
        opened = descriptor = -1
        for place, tar, offset in zip(
            order.tolist(), rows["tar"][order].tolist(), offsets[order].tolist(), strict=True
        ):
            if tar != opened:
                opened, descriptor = tar, self.files.open(tar)
            if os.preadv(descriptor, [targets[place]], offset) != targets[place].nbytes:
                raise DatasetError(
                    f"{self._store.where(name_tar(tar))}: sample {rows['key'][place].decode()} is cut off; run "
                    f"`tokenreel verify {self._store}`"
                )
        if len(windows) and windows.max() >= self._codebook_size:
            place = int(windows.max(axis=1).argmax())
            check_codes(
                windows[place],
                self._codebook_size,
                f"{self._store.where(name_tar(int(rows['tar'][place])))}: sample {rows['key'][place].decode()}",
            )
        for place, filled in short:
            windows[place, filled:] = self._pad
        return windows.reshape(len(samples), span, h, w)[:, ::stride]

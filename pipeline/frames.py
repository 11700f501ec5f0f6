"""Clip dataset to batches of single frames, for training a tokenizer: same exact order as the token loader."""

from __future__ import annotations

import logging
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.dataset import read_index, read_meta
from pipeline.decode import FrameConfig
from pipeline.errors import ConfigError, DatasetError, TransientIO
from pipeline.loader import select_rows
from pipeline.order import GlobalOrder, draw_seeds, hash_keys
from pipeline.quality import QualityThresholds
from pipeline.schema import Reject, Split
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clip

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameLoaderConfig:
    """Which frames of which clips make a batch."""

    frames: FrameConfig = field(default_factory=FrameConfig)
    batch_size: int = 64
    """Frames in the global batch, over all workers."""
    frames_per_clip: int = 4
    """Frames drawn from each clip that a batch touches: more means fewer decodes and more alike frames."""
    split: Split = "train"
    """Which split to read."""
    seed: int = 0
    """Seed of the order and of the frames drawn."""
    keep: QualityThresholds = field(default_factory=QualityThresholds)
    """Clips whose scores are beyond these are left out."""
    cache_bytes: int = 2**30
    """Decoded clips kept in memory by each worker, in bytes."""
    decode_threads: int = 2
    """Clips that each worker decodes at a time."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.frames_per_clip, self.decode_threads) < 1 or self.cache_bytes < 0:
            raise ConfigError(f"loader: counts must be 1 or more and cache_bytes 0 or more, got {self}")
        if self.batch_size % self.frames_per_clip:
            raise ConfigError(
                f"loader.batch_size = {self.batch_size} is no multiple of loader.frames_per_clip = {self.frames_per_clip}"
            )


class FrameLoader:
    """Batches of frames. The frames of a step are a function of the step; a cache spares repeated decoding."""

    def __init__(self, folder: Path, config: FrameLoaderConfig, *, rank: int, world_size: int) -> None:
        if config.batch_size // config.frames_per_clip % world_size:
            raise ConfigError(
                f"loader.batch_size = {config.batch_size} frames are {config.batch_size // config.frames_per_clip} clips, "
                f"which do not divide by the {world_size} workers"
            )
        fingerprint = read_meta(folder, kind="clips", complete=True).fingerprint
        self._rows: list[dict[str, Any]] = select_rows(read_index(folder), config.split, config.keep).to_pylist()
        if not self._rows:
            raise ConfigError(f"{folder} holds no clip in split {config.split}, or loader.keep leaves none")
        self._store, self._config = Store.at(folder), config
        self._settings = TokenizeSettings(frames=config.frames)
        self._order = GlobalOrder(np.array([row["shard"] for row in self._rows]), config.seed, fingerprint, 64)
        self._key_hashes = hash_keys([row["key"] for row in self._rows])
        self.unit, self.units_per_step = "frames", config.batch_size
        clips = config.batch_size // config.frames_per_clip
        self._step_clips, self._slice = clips, (rank * clips // world_size, (rank + 1) * clips // world_size)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached_bytes = 0
        self._grey = np.full((1, config.frames.size_px, config.frames.size_px, 3), 128, np.uint8)
        self._warned: set[int] = set()
        self._pool = ThreadPoolExecutor(config.decode_threads, "decode")

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, step: int) -> dict[str, Any]:
        """{"frames": uint8 (b h w c) tensor, "keys": list of clip keys}: this rank's part of the batch of `step`.

        A clip whose bytes are there but give no frame (copied and remuxed clips need not have been decoded whole before)
        gives grey frames rather than another clip's, so that the order stands; its reason is logged, once.

        Raises:
            DatasetError: a shard is missing or cannot be read.
            TransientIO: the storage failed on every attempt.
        """
        start = step * self._step_clips
        epochs, samples = self._order.samples(start + self._slice[0], start + self._slice[1])
        per_clip = self._config.frames_per_clip
        draws = [draw_seeds(self._config.seed, epochs, self._key_hashes[samples], n) for n in range(per_clip)]
        frames = []
        for place, clip in enumerate(self._decode([int(sample) for sample in samples])):
            frames += [clip[int(draw[place] % np.uint64(len(clip)))] for draw in draws]
        return {"frames": torch.from_numpy(np.stack(frames)), "keys": [self._rows[sample]["key"] for sample in samples]}

    def _decode(self, samples: list[int]) -> list[np.ndarray]:
        missing = sorted({sample for sample in samples if sample not in self._cache})
        decoded = dict(zip(missing, self._pool.map(self._decode_one, missing), strict=True))
        clips = [self._cache[sample] if sample in self._cache else decoded[sample] for sample in samples]
        for sample in samples:
            if sample in self._cache:
                self._cache.move_to_end(sample)
            elif decoded[sample] is not self._grey and decoded[sample].nbytes <= self._config.cache_bytes:
                self._cache[sample] = decoded[sample]
                self._cached_bytes += decoded[sample].nbytes
        while self._cached_bytes > self._config.cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return clips

    def _decode_one(self, sample: int) -> np.ndarray:
        outcome = decode_clip(self._store, self._rows[sample], self._settings)
        if not isinstance(outcome, Reject):
            return outcome
        # Grey in place of what is only out of reach would train a model on nothing, and nobody would know.
        if outcome.reject_class == "storage":
            raise TransientIO(f"{self._store}: clip {outcome.key}: {outcome.reason}")
        if outcome.reject_class == "unreadable":
            raise DatasetError(
                f"{self._store}: clip {outcome.key} cannot be read: {outcome.reason}; run `tokenreel verify {self._store}`"
            )
        if sample not in self._warned:
            self._warned.add(sample)
            log.warning(
                f"{self._store}: clip {outcome.key} gives grey frames: {outcome.reject_class}: {outcome.reason}"
            )
        return self._grey

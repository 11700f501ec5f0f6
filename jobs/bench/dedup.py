"""`tokenreel bench dedup`: how many copies of real videos `dedup` finds, and how often it is wrong."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro

from jobs import shard, tokenize
from jobs.bench.dedup_copies import COPY_KINDS, ORIGINAL, make_copies
from jobs.data_job import RejectPolicy
from jobs.dedup import Found, find
from jobs.result import JobResult
from pipeline.clips import ClipConfig
from pipeline.dataset import read_index, read_meta
from pipeline.decode import FrameConfig
from pipeline.errors import ConfigError
from pipeline.near_duplicates import NearDuplicateConfig
from pipeline.sharding import ShardSettings
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings
from pipeline.transcode import TranscodeConfig

log = logging.getLogger(__name__)

_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_CLEAR_OVERLAP = 0.1
_NUM_WRONG_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchDedupConfig:
    """Copy every video in several ways, shard and tokenize the copies, find near-duplicates, and compare with what is known.

    Recall is over pairs of an original sample and a copy that share at least a tenth more than `min_overlap` of the shorter
    one. Precision is over all pairs of samples: one is wrong where the two share no moment of one video. Broken off, it
    goes on where it stopped.
    """

    videos: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEOS")]
    """Folder of videos, no two of which share footage."""
    tokenizer: Path
    """Folder of a tokenizer, or of the run that trained or imported it."""
    folder: Path = Path("bench-dedup")
    """Where to work; the copies and their tokens stay there for the next run."""
    max_s: float = 96.0
    """Seconds of each video that are used, from its start."""
    window_s: float = 8.0
    """Length of a sample in seconds."""
    fps: float = 4.0
    """Frames per second that are tokenized."""
    size_px: int = 128
    """Side of the square crop in pixels."""
    settings: Annotated[NearDuplicateConfig, tyro.conf.arg(name="")] = field(default_factory=NearDuplicateConfig)

    def __post_init__(self) -> None:
        if self.max_s <= 0 or self.window_s <= 0:
            raise ConfigError(f"max_s = {self.max_s} and window_s = {self.window_s} must be more than 0")


def run(config: BenchDedupConfig) -> JobResult:
    started_s = time.monotonic()
    tokens = Store.at(_tokenize_copies(config))
    meta, index = read_meta(tokens, kind="tokens", complete=True), read_index(tokens).combine_chunks()
    found = find(tokens, meta, index, config.settings, config.folder / ".keys")
    figures = {
        "keys_cpu_ms_per_sample": round(1e3 * found.keys_cpu_s / len(index), 3),
        "compare_cpu_ms_per_pair": round(1e3 * found.compare_cpu_s / max(1, len(found.pairs)), 3),
        **measure(index, found, config.settings),
    }
    log.info(f"bench dedup: {figures}")
    return JobResult(
        job="bench dedup", out=str(config.folder), planned=len(index), committed=len(index),
        elapsed_s=time.monotonic() - started_s, figures=figures,
    )  # fmt: skip


def _tokenize_copies(config: BenchDedupConfig) -> Path:
    copies, clips, tokens = (config.folder / name for name in ("copies", "clips", "tokens"))
    if not copies.exists():
        making = config.folder / ".making"
        shutil.rmtree(making, ignore_errors=True)
        make_copies(config.videos, making, config.max_s)
        making.rename(copies)
    settings = ShardSettings(
        clips=ClipConfig(mode="window", window_s=config.window_s, min_s=1.5),
        storage="transcode",
        transcode=TranscodeConfig(short_side_px=config.size_px + 16),
        videos_per_shard=8,
        val_fraction=0.3,
    )
    frames = TokenizeSettings(frames=FrameConfig(fps=config.fps, size_px=config.size_px))
    lenient = RejectPolicy(max_reject_fraction=1.0)
    shard.run(shard.ShardConfig(corpus=str(copies), out=str(clips), settings=settings, rejects=lenient))
    tokenize.run(
        tokenize.TokenizeConfig(clips=str(clips), out=str(tokens), tokenizer=config.tokenizer, settings=frames)
    )
    return tokens


def measure(index: pa.Table, found: Found, settings: NearDuplicateConfig) -> dict[str, Any]:
    """Precision and recall by kind of copy and by video at `settings.min_score`, and over all at other thresholds."""
    videos, kinds = zip(
        *(source.removesuffix(".mp4").rsplit(".", 1) for source in index["source"].to_pylist()), strict=True
    )
    video, kind = np.array(videos), np.array(kinds)
    shift = np.array([COPY_KINDS[name].start_s for name in kinds])
    start, end = index["start_s"].to_numpy() + shift, index["end_s"].to_numpy() + shift

    shared = np.minimum(end[:, None], end) - np.maximum(start[:, None], start)
    overlap = np.where(video[:, None] == video, shared / np.minimum((end - start)[:, None], end - start), 0.0)
    is_copy = (kind[:, None] == ORIGINAL) & (kind != ORIGINAL) & (overlap >= settings.min_overlap + _CLEAR_OVERLAP)
    scores = np.zeros(overlap.shape)
    for (one, other), score in zip(found.pairs.tolist(), found.scores, strict=True):
        scores[one, other] = scores[other, one] = score
    once = np.triu(np.ones(scores.shape, bool), 1)

    def rates(threshold: float) -> dict[str, Any]:
        near = scores >= threshold
        right, wrong = (
            int((near & once & (overlap >= settings.min_overlap)).sum()),
            int((near & once & (overlap <= 0)).sum()),
        )
        return {
            "recall": _share(near[is_copy]),
            "precision": round(right / max(1, right + wrong), 4),
            "wrong_pairs": wrong,
        }

    near = scores >= settings.min_score
    wrong = np.argwhere(near & once & (overlap <= 0))
    names = [
        f"{source} at {at:g} s"
        for source, at in zip(index["source"].to_pylist(), index["start_s"].to_pylist(), strict=True)
    ]
    return {
        "samples": len(index),
        "copy_pairs": int(is_copy.sum()),
        "compared_pairs": len(found.pairs),
        "compared_share": round(2 * len(found.pairs) / max(1, len(index) * (len(index) - 1)), 5),
        "compared_copies": _share((scores > 0)[is_copy]),
        **rates(settings.min_score),
        "recall_by_kind": {name: _share(near[is_copy & (kind == name)]) for name in COPY_KINDS if name != ORIGINAL},
        "recall_by_video": {str(name): _share(near[is_copy & (video == name)]) for name in np.unique(video)},
        "curve": {str(threshold): rates(threshold) for threshold in _THRESHOLDS},
        "wrong_examples": [
            f"{names[one]} / {names[other]}: {scores[one, other]:.3f}"
            for one, other in sorted(wrong.tolist(), key=lambda pair: -scores[tuple(pair)])[:_NUM_WRONG_SHOWN]
        ],
    }


def _share(hits: np.ndarray) -> float | None:
    return round(float(hits.mean()), 4) if hits.size else None

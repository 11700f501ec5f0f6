"""The tokenize stage without Ray: clips to frames, frames to full batches, codes to one committed shard."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline.dataset import DatasetMeta
from pipeline.decode import FrameConfig, decode_frames, open_bytes
from pipeline.errors import BadVideo, ConfigError, DatasetError, TransientIO
from pipeline.ffmpeg import FfmpegLimits
from pipeline.quality import QualityThresholds, failed_threshold
from pipeline.schema import SCORES, Reject, fingerprint
from pipeline.shards import ShardWriter, Written, read_payload, read_shard_info, read_shard_rows
from pipeline.storage import LOCAL_TROUBLE, Store

Encode = Callable[[np.ndarray], np.ndarray]
"""Frames uint8 (b h w c) to codes uint16 (b h w); the caller of this package brings it."""
Decoded = np.ndarray | Reject


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeSettings:
    """What decides the content of a token dataset, beside its clips and its tokenizer."""

    frames: FrameConfig = field(default_factory=FrameConfig)
    batch_frames: int = 32
    """Frames that are encoded together; part of the identity, because rounding may depend on it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the encoder's large convolutions multiply in; `tokenreel bench tokenize` says what it costs and saves."""
    keep: QualityThresholds = field(default_factory=QualityThresholds)
    """Clips whose scores are beyond these are filtered, not tokenized."""
    limits: FfmpegLimits = field(default_factory=FfmpegLimits)

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ConfigError(f"precision = {self.precision!r}: allowed are fp32, bf16, fp16")
        if self.batch_frames < 1:
            raise ConfigError(f"batch_frames = {self.batch_frames}: must be 1 or more")


def describe_tokens(clips: DatasetMeta, config: dict[str, Any], tokenizer: dict[str, Any]) -> DatasetMeta:
    """The identity of the token dataset that `config` and a tokenizer make of `clips`.

    Args:
        tokenizer: plain JSON with its `fingerprint`, `codebook_size` and `patch`.
    """
    config = {**{k: v for k, v in config.items() if k != "limits"}, "tokenizer": tokenizer["fingerprint"]}
    return DatasetMeta(
        kind="tokens",
        fingerprint=fingerprint(kind="tokens", parent=clips.fingerprint, config=config),
        config=config,
        parent_fingerprint=clips.fingerprint,
        inputs_digest="",
        num_shards=clips.num_shards,
        extra={"tokenizer": tokenizer},
    )


def decode_clip(clips: Store, row: dict[str, Any], settings: TokenizeSettings) -> Decoded:
    """Frames uint8 (t h w c) of one clip, or the reject that it becomes."""
    scores = {name: math.nan if row[f"score_{name}"] is None else row[f"score_{name}"] for name in SCORES}
    if (failed := failed_threshold(scores, settings.keep)) is not None:
        return Reject(
            path=row["source"],
            key=row["key"],
            stage="tokenize",
            outcome="filtered",
            reject_class=failed[0],
            reason=failed[1],
        )
    try:
        data = read_payload(clips, row)
        with open_bytes(data) as file:
            return decode_frames(file, row["end_s"] - row["start_s"], settings.frames, settings.limits)
    except BadVideo as bad:
        reject_class, reason, stderr = bad.reject_class, bad.reason, bad.stderr
    except TransientIO as error:
        reject_class, reason, stderr = "storage", str(error), ""
    except DatasetError as error:
        reject_class, reason, stderr = "corrupt", str(error), ""
    except OSError as error:
        if error.errno in LOCAL_TROUBLE:  # a full disk is not the clip's fault
            raise
        reject_class, reason, stderr = "unreadable", str(error), ""
    return Reject(
        path=row["source"], key=row["key"], stage="tokenize", reject_class=reject_class, reason=reason, stderr=stderr
    )


def write_token_shard(
    clips: Store,
    out: Store,
    dataset_fingerprint: str,
    shard: int,
    decoded: Iterable[Decoded],
    encode: Encode,
    settings: TokenizeSettings,
) -> Written:
    """Encode the clips of one shard and commit their tokens.

    Args:
        decoded: `decode_clip` of each row of the clip shard, in the order of its index.
    """
    parent, rows = read_shard_info(clips, shard), read_shard_rows(clips, shard)
    assert parent is not None
    writer = ShardWriter(out, "tokens", dataset_fingerprint, shard)
    rejects: list[Reject] = []

    def frames_of_good_clips() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        for row, outcome in zip(rows, decoded, strict=True):
            if isinstance(outcome, Reject):
                rejects.append(outcome)
            else:
                yield row, outcome

    try:
        for row, codes in encode_clips(frames_of_good_clips(), encode, settings.batch_frames):
            member, header_bytes = _npy(codes)
            writer.add(_token_row(row, codes, settings), "tokens.npy", member, header_bytes)
        read_bytes = sum(row["size"] for row in rows)
        return Written(writer.commit(len(rows), rejects, parent_content=parent.content), read_bytes)
    finally:
        writer.abort()


def encode_clips(
    clips: Iterable[tuple[dict[str, Any], np.ndarray]], encode: Encode, batch_frames: int
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Codes (t h w) of each clip, in order; frames of many clips share a batch.

    Every batch has exactly `batch_frames` frames (the last one is padded), so the kernels, and with them the rounding
    and the codes, do not depend on how far a broken-off run came.
    """
    waiting: list[tuple[dict[str, Any], int]] = []  # clips whose codes are not complete, with their frame counts
    codes: list[np.ndarray] = []  # codes that no finished clip has taken yet
    frames: list[np.ndarray] = []  # frames that no batch has taken yet

    def drain() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        nonlocal codes
        ready = np.concatenate(codes) if codes else np.empty((0,))
        start = 0
        while waiting and start + waiting[0][1] <= len(ready):
            row, count = waiting.pop(0)
            yield row, ready[start : start + count]
            start += count
        codes = [ready[start:]] if start < len(ready) else []

    for row, clip in clips:
        waiting.append((row, len(clip)))
        frames.append(clip)
        while sum(map(len, frames)) >= batch_frames:
            joined = np.concatenate(frames) if len(frames) > 1 else frames[0]  # a long clip is not copied per batch
            codes.append(encode(joined[:batch_frames]))
            frames = [joined[batch_frames:]]
        yield from drain()
    if rest := sum(map(len, frames)):
        joined = np.concatenate(frames)
        padding = np.repeat(joined[-1:], batch_frames - rest, axis=0)
        codes.append(encode(np.concatenate([joined, padding]))[:rest])
    yield from drain()


def _token_row(row: dict[str, Any], codes: np.ndarray, settings: TokenizeSettings) -> dict[str, Any]:
    same = ("key", "video_id", "source", "start_s", "end_s", "caption", "label", "split", "extra")
    return {
        **{name: row[name] for name in (*same, *(f"score_{score}" for score in SCORES))},
        "num_frames": codes.shape[0],
        "height": codes.shape[1],
        "width": codes.shape[2],
        "fps": settings.frames.fps,
        "clip_sha256": row["sha256"],
    }


def _npy(codes: np.ndarray) -> tuple[bytes, int]:
    assert codes.dtype == np.uint16
    buffer = io.BytesIO()
    np.save(buffer, codes, allow_pickle=False)
    return buffer.getvalue(), buffer.tell() - codes.nbytes

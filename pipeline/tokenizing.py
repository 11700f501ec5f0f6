"""The tokenize stage without Ray: clips to frames, frames to full batches, codes to one committed shard."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.dataset import DatasetMeta, ShardWriter, read_payload
from pipeline.decode import FrameConfig, decode_frames, open_bytes
from pipeline.errors import BadVideo, ConfigError, DatasetError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.ledger import Ledger
from pipeline.schema import Reject, fingerprint

Encode = Callable[[np.ndarray], np.ndarray]
"""Frames uint8 (b h w c) to codes uint16 (b h w); the caller of this package brings it."""
Decoded = np.ndarray | Reject


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeSettings:
    """What decides the content of a token dataset, beside its clips and its tokenizer."""

    frames: FrameConfig = field(default_factory=FrameConfig)
    batch_frames: int = 32
    """Frames that are encoded together; part of the identity, because rounding may depend on it."""
    limits: FfmpegLimits = field(default_factory=FfmpegLimits)

    def __post_init__(self) -> None:
        if self.batch_frames < 1:
            raise ConfigError(f"batch_frames = {self.batch_frames}: must be 1 or more")


def describe_tokens(clips: DatasetMeta, config: dict[str, Any], tokenizer: dict[str, Any]) -> DatasetMeta:
    """The identity of the token dataset that `config` and a tokenizer make of `clips`.

    Args:
        tokenizer: plain JSON with its `fingerprint`, `codebook_size` and `patch`.
    """
    config = {**config, "tokenizer": tokenizer["fingerprint"]}
    return DatasetMeta(
        kind="tokens",
        fingerprint=fingerprint(kind="tokens", parent=clips.fingerprint, config=config),
        config=config,
        parent_fingerprint=clips.fingerprint,
        inputs_digest="",
        num_shards=clips.num_shards,
        extra={"tokenizer": tokenizer},
    )


def read_clip_rows(clips: Path, shard: int) -> list[dict[str, Any]]:
    """Index rows of one clip shard, with their shard number."""
    table = pq.read_table(clips / "index" / f"{shard:06d}.parquet")
    return [{**row, "shard": shard} for row in table.to_pylist()]


def decode_clip(clips: Path, row: dict[str, Any], settings: TokenizeSettings) -> Decoded:
    """Frames uint8 (t h w c) of one clip, or the reject that it becomes."""
    try:
        data = read_payload(clips, row)
        with open_bytes(data) as file:
            return decode_frames(file, row["end_s"] - row["start_s"], settings.frames, settings.limits)
    except BadVideo as bad:
        reject_class, reason = bad.reject_class, bad.reason
    except (DatasetError, OSError) as error:
        reject_class, reason = "corrupt", str(error)
    return Reject(path=row["source"], key=row["key"], stage="tokenize", reject_class=reject_class, reason=reason)


def write_token_shard(
    out: Path,
    meta: DatasetMeta,
    shard: int,
    rows: list[dict[str, Any]],
    decoded: Iterable[Decoded],
    encode: Encode,
    settings: TokenizeSettings,
) -> Ledger:
    """Encode the clips of one shard and commit their tokens.

    Args:
        rows: index rows of the clips.
        decoded: `decode_clip` of each row, in the order of `rows`.
    """
    writer = ShardWriter(out, meta, shard)
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
        return writer.commit(len(rows), rejects)
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
    same = ("key", "video_id", "source", "start_s", "end_s", "caption", "label", "split")
    return {
        **{name: row[name] for name in same},
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

"""The tokenize stage without Ray: clips to frames, and their codes to one committed shard."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from pipeline import ffmpeg
from pipeline.dataset import DatasetMeta
from pipeline.decode import FrameConfig, iter_frames, open_bytes
from pipeline.display import stored_picture
from pipeline.encoding import Encode, Piece, encode_pieces
from pipeline.errors import BadVideo, ConfigError, DatasetError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.internal import as_bad_video
from pipeline.quality import QualityThresholds, failed_threshold
from pipeline.schema import SCORES, Outcome, Reject, identify_dataset
from pipeline.shards import ShardWriter, Written, read_payload, read_shard_info
from pipeline.storage import LOCAL_TROUBLE, Store
from pipeline.views import Crop, View, ViewConfig, crops_of

_GROUP_BYTES = 4 * 2**20
"""Frames that travel together, in bytes: large enough that a message costs little beside what it carries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeSettings:
    """What decides the content of a token dataset, beside its clips and its tokenizer."""

    frames: FrameConfig = field(default_factory=FrameConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
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
        self.all_views()

    def all_views(self) -> list[View]:
        """What becomes a sample of each clip, the plainest view first."""
        return self.views.views(self.frames.size_px)

    def view(self, name: str) -> View | None:
        """The view of that name, as the index has it; None where these settings make none of that name."""
        return next((view for view in self.all_views() if view.name == name), None)


def describe_tokens(clips: DatasetMeta, config: dict[str, Any], tokenizer: dict[str, Any]) -> DatasetMeta:
    """The identity of the token dataset that `config`, a tokenizer and this machine's ffmpeg make of `clips`.

    Args:
        tokenizer: plain JSON with its `fingerprint`, `codebook_size` and `patch`.
    """
    config = {**{k: v for k, v in config.items() if k != "limits"}, "tokenizer": tokenizer["fingerprint"]}
    decoder = ffmpeg.identity()
    return DatasetMeta(
        kind="tokens",
        fingerprint=identify_dataset(kind="tokens", parent=clips.fingerprint, config=config, decoder=decoder),
        config=config,
        parent_fingerprint=clips.fingerprint,
        inputs_digest="",
        num_shards=clips.num_shards,
        extra={"tokenizer": tokenizer},
        decoder=decoder,
    )


def decode_clip(
    clips: Store, row: dict[str, Any], settings: TokenizeSettings, view: View | None = None
) -> np.ndarray | Reject:
    """Frames uint8 (t h w c) of one clip in one view (by default the plainest), or the reject that it becomes."""
    view = view or settings.all_views()[0]
    (piece,) = _decode_pieces(clips, row, settings, [view.crop], max_frames=None)
    if piece.reject is not None:
        return piece.reject
    return piece.frames[0][:, :, ::-1] if view.flip else piece.frames[0]


def decode_clips(clips: Store, rows: Iterable[dict[str, Any]], settings: TokenizeSettings) -> Iterator[list[Piece]]:
    """The pieces of these clips, one clip after the other, a few MB at a time whatever the clips' sizes."""
    crops = crops_of(settings.all_views())
    max_frames = max(1, _GROUP_BYTES // _bytes_of(crops))
    group: list[Piece] = []
    size = 0
    for row in rows:
        for piece in _decode_pieces(clips, row, settings, crops, max_frames):
            group.append(piece)
            size += sum(frames.nbytes for frames in piece.frames)
            if size >= _GROUP_BYTES:
                yield group
                group, size = [], 0
    if group:
        yield group


def group_rows(rows: Sequence[dict[str, Any]], settings: TokenizeSettings) -> Iterator[list[dict[str, Any]]]:
    """`rows` in groups that one decoder takes, of a few MB of frames by what their spans promise."""
    second_bytes = settings.frames.fps * _bytes_of(crops_of(settings.all_views()))
    group: list[dict[str, Any]] = []
    size = 0.0
    for row in rows:
        group.append(row)
        size += (row["end_s"] - row["start_s"]) * second_bytes
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0.0
    if group:
        yield group


def _bytes_of(crops: Sequence[Crop]) -> int:
    """What one frame takes in all crops."""
    return 3 * sum(crop.size_px**2 for crop in crops)


def _decode_pieces(
    clips: Store, row: dict[str, Any], settings: TokenizeSettings, crops: Sequence[Crop], max_frames: int | None
) -> Iterator[Piece]:
    def reject(reject_class: str, reason: str, stderr: str = "", outcome: Outcome = "rejected") -> Piece:
        return Piece([], True, _reject(row, row["key"], BadVideo(reject_class, reason, stderr), outcome))

    try:
        scores = {name: math.nan if row[f"score_{name}"] is None else row[f"score_{name}"] for name in SCORES}
        if (failed := failed_threshold(scores, settings.keep)) is not None:
            yield reject(*failed, outcome="filtered")
            return
        duration_s = row["end_s"] - row["start_s"]
        if settings.frames.start_s and duration_s <= settings.frames.start_s:
            reason = f"lasts {duration_s:.3f} s; frames begin at frames.start_s = {settings.frames.start_s:g}"
            yield reject("too-short", reason, outcome="filtered")
            return
        with open_bytes(read_payload(clips, row)) as file:
            ahead: list[np.ndarray] | None = None
            picture = stored_picture(row.get("scan"), row.get("color"))
            for frames in iter_frames(file, duration_s, settings.frames, crops, settings.limits, max_frames, picture):
                if ahead is not None:
                    yield Piece(ahead, False)
                ahead = frames
        assert ahead is not None
        yield Piece(ahead, True)
    except DatasetError as error:
        yield reject("corrupt", str(error))
    except OSError as error:
        if error.errno in LOCAL_TROUBLE:  # a full disk is not the clip's fault
            raise
        yield reject("unreadable", str(error))
    except Exception as error:
        bad = as_bad_video(error)
        yield reject(bad.reject_class, bad.reason, bad.stderr)


def _reject(row: dict[str, Any], key: str, bad: BadVideo, outcome: Outcome = "rejected") -> Reject:
    return Reject(
        path=row["source"],
        key=key,
        stage="tokenize",
        outcome=outcome,
        reject_class=bad.reject_class,
        reason=bad.reason,
        stderr=bad.stderr,
    )


def write_token_shard(
    clips: Store,
    out: Store,
    dataset_fingerprint: str,
    shard: int,
    rows: Sequence[dict[str, Any]],
    pieces: Iterable[Piece],
    encode: Encode,
    settings: TokenizeSettings,
) -> Written:
    """Encode the clips of one shard and commit their tokens, a sample for each view of each clip.

    Args:
        rows: of the clip shard, in the order of its index.
        pieces: what `decode_clips` makes of these rows.

    Raises:
        ValueError: the pieces are not those of all rows; nothing was committed.
        DatasetError: the encoder lost frames; likewise.
    """
    parent, views = read_shard_info(clips, shard), settings.all_views()
    assert parent is not None
    writer = ShardWriter(out, "tokens", dataset_fingerprint, shard)
    rejects: list[Reject] = []
    try:
        shown = (_show(piece, views) for piece in pieces)
        for row, encoded in zip(rows, encode_pieces(shown, encode, settings.batch_frames), strict=True):
            if isinstance(encoded, Reject):
                rejects += [replace(encoded, key=view.key(encoded.key)) for view in views]
                continue
            mark = writer.mark()
            try:
                for view, codes in zip(views, encoded, strict=True):
                    member, header_bytes = _npy(codes)
                    writer.add(_token_row(row, view, codes, settings), "tokens.npy", member, header_bytes)
            except Exception as error:
                bad = as_bad_video(error)
                writer.rewind(mark)
                rejects += [_reject(row, view.key(row["key"]), bad) for view in views]
        info = writer.commit(len(rows) * len(views), rejects, parent_content=parent.content)
        return Written(info, sum(row["size"] for row in rows))
    finally:
        writer.abort()


def _show(piece: Piece, views: Sequence[View]) -> Piece:
    """A piece with the crops of `views` as one with the views themselves; nothing is copied."""
    if not piece.frames:
        return piece
    frames = dict(zip(crops_of(views), piece.frames, strict=True))
    return piece._replace(frames=[frames[view.crop][:, :, ::-1] if view.flip else frames[view.crop] for view in views])


def _token_row(row: dict[str, Any], view: View, codes: np.ndarray, settings: TokenizeSettings) -> dict[str, Any]:
    same = ("video_id", "source", "start_s", "end_s", "caption", "label", "split", "extra")
    return {
        "key": view.key(row["key"]),
        "clip_key": row["key"],
        "view": view.name,
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

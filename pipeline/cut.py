"""What cutting a video gives: one record a planned clip; and the settings that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Protocol

from pipeline.clips import ClipConfig
from pipeline.display import DisplayConfig
from pipeline.errors import BadVideo
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import VideoInfo
from pipeline.quality import QualityConfig, Scores
from pipeline.schema import ClipSpan
from pipeline.transcode import TranscodeConfig


class CutSettings(Protocol):
    """The part of a shard job's settings that cutting needs."""

    @property
    def clips(self) -> ClipConfig: ...
    @property
    def storage(self) -> str: ...
    @property
    def transcode(self) -> TranscodeConfig: ...
    @property
    def audio(self) -> bool: ...
    @property
    def display(self) -> DisplayConfig: ...
    @property
    def quality(self) -> QualityConfig: ...
    @property
    def limits(self) -> FfmpegLimits: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What became of one planned clip: a file (`error` and `filtered` None), a failure, or a clip left out on purpose.

    planned: the span that was asked for; its start is unique within the video (mode manifest: as the manifest's is), so
        keys come from it.
    span: the span that the stored file really holds. It differs from `planned` with storage remux, which starts at the
        last keyframe at or before the planned start, and where a manifest's span ends after the video.
    clip: the file, open at its start, unnamed, valid until the next `Cut` is asked for; None: the input as it is.
    info: of the stored file; None where there is none.
    ext: the stored file's extension, without a dot; "" where there is none.
    scores: where quality.score is set; also of a clip that a threshold filtered.
    filtered: (filter reason, text with both values).
    """

    planned: ClipSpan
    span: ClipSpan
    clip: IO[bytes] | None = None
    info: VideoInfo | None = None
    ext: str = ""
    scores: Scores | None = None
    error: BadVideo | None = None
    filtered: tuple[str, str] | None = None


def too_short(span: ClipSpan, settings: CutSettings) -> tuple[str, str] | None:
    """The filter reason and its line where a clip is shorter than `clips.min_s`."""
    if span.duration_s >= settings.clips.min_s:
        return None
    return "too-short", f"{span.duration_s:.3f} s; clips.min_s is {settings.clips.min_s:g}"

"""Spans of video files to frames, or to smaller video files."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ffmpeg as ffmpeg_python
import numpy as np

from pipeline import ffmpeg
from pipeline.errors import BadVideo, ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import VideoInfo, probe
from pipeline.schema import ClipSpan


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameConfig:
    """Which frames a model sees: `fps` -> shorter side to `size_px` -> centre crop."""

    fps: float = 2.0
    """Frames per second."""
    size_px: int = 128
    """Side of the square crop in pixels; the shorter side of the video is scaled to it."""

    def __post_init__(self) -> None:
        if not 0 < self.fps < math.inf:
            raise ConfigError(f"frames.fps = {self.fps}: must be more than 0, and finite")
        if self.size_px < 8 or self.size_px % 8:
            raise ConfigError(f"frames.size_px = {self.size_px}: must be a multiple of 8 px")


@dataclass(frozen=True, kw_only=True, slots=True)
class TranscodeConfig:
    """The H.264 video that a transcoded clip becomes; audio is dropped."""

    short_side_px: int = 256
    """Shorter side in pixels; a smaller video keeps its size."""
    gop_frames: int = 30
    """Frames between keyframes: fewer seek faster and weigh more."""
    crf: int = 20
    """x264's constant quality, 0 (lossless) to 51."""

    def __post_init__(self) -> None:
        if self.short_side_px < 16 or self.short_side_px % 2:
            raise ConfigError(f"transcode.short_side_px = {self.short_side_px}: must be even and at least 16 px")
        if self.gop_frames < 1 or not 0 <= self.crf <= 51:
            raise ConfigError(f"transcode: gop_frames = {self.gop_frames} (1 or more), crf = {self.crf} (0 to 51)")


def decode_frames(source: IO[bytes], duration_s: float, config: FrameConfig, limits: FfmpegLimits) -> np.ndarray:
    """Frames of a whole clip as uint8 RGB (t h w c), at `config.fps` from its start.

    Args:
        duration_s: what the probe said; more than about this many frames is refused as `too-large`.

    Raises:
        BadVideo: the clip cannot be decoded, or holds no frame.
    """
    side = config.size_px
    frame_bytes = side * side * 3
    # A clip shorter than one frame of the output has that frame; rounding would leave it none.
    at_end = "pass" if duration_s * config.fps < 1 else "round"
    stream = _open(source, limits).filter("fps", fps=config.fps, eof_action=at_end)
    # Bicubic with exact rounding: the same pixels on every CPU, whatever SIMD it has.
    stream = stream.filter(
        "scale",
        side,
        side,
        force_original_aspect_ratio="increase",
        flags="bicubic+accurate_rnd+full_chroma_int+bitexact",
    ).filter("crop", side, side)
    command = stream.output("pipe:", format="rawvideo", pix_fmt="rgb24", **{"threads": 1}).compile()
    # Rates are rarely exact, so a second's worth of slack stands between an honest file and an endless one.
    budget = (math.ceil((duration_s + 1.0) * config.fps) + 1) * frame_bytes
    raw = ffmpeg.run(_quiet(command), source, limits, budget)
    if len(raw) < frame_bytes:
        raise BadVideo("corrupt", "not one frame could be decoded")
    return np.frombuffer(raw, np.uint8)[: len(raw) // frame_bytes * frame_bytes].reshape(-1, side, side, 3)


def require_decodable(source: IO[bytes], info: VideoInfo, limits: FfmpegLimits) -> None:
    """Check that a frame can be decoded at nine tenths of the stated duration, or two frames before its end.

    Finds files that were cut off, or whose data is not what the header says; a duration overstated by less than a
    tenth, which is common, passes. Costs a seek and a few frames; only a file that fails this (some codecs cannot
    start between keyframes that their container does not mark) is decoded from its start.

    Raises:
        BadVideo: `corrupt`, or a limit was exceeded.
    """
    # The last of n frames starts at (n - 1) / n of the duration, which is before nine tenths in a short video.
    start_s = max(0.0, min(0.9 * info.duration_s, info.duration_s - 2 / info.fps))
    try:
        if _has_frame(_open(source, limits, ss=start_s), 0.0, source, limits):
            return
    except BadVideo as bad:
        if bad.reject_class != "corrupt":
            raise
    if not _has_frame(_open(source, limits), start_s, source, limits):
        raise BadVideo(
            "corrupt",
            f"states {info.duration_s:.3f} s, but holds no frame from {start_s:.3f} s on: cut off or damaged",
        )


def transcode(
    source: IO[bytes], span: ClipSpan, config: TranscodeConfig, limits: FfmpegLimits
) -> tuple[bytes, VideoInfo]:
    """The span as an MP4 file (H.264, no audio); the same input gives the same bytes. With its metadata.

    Raises:
        BadVideo: the span cannot be decoded, or holds no frame.
    """
    side = config.short_side_px
    # The end is a filter's work: as an input option, -t lets some containers run over by seconds.
    stream = _open(source, limits, ss=span.start_s).filter("trim", end=span.duration_s)
    stream = stream.filter(
        "scale",
        f"if(gt(iw,ih),-2,min(iw,{side}))",
        f"if(gt(iw,ih),min(ih,{side}),-2)",
        flags="bicubic+accurate_rnd+full_chroma_int+bitexact",
    ).filter("crop", "trunc(iw/2)*2", "trunc(ih/2)*2")
    with tempfile.TemporaryDirectory(prefix="tokenreel-") as folder:
        out = Path(folder) / "clip.mp4"
        command = stream.output(
            f"file:{out}",
            vcodec="libx264",
            pix_fmt="yuv420p",
            preset="veryfast",
            crf=config.crf,
            g=config.gop_frames,
            fflags="+bitexact",
            movflags="+faststart",
            map_metadata=-1,
            **{"flags:v": "+bitexact", "threads": 1},
        ).compile()
        ffmpeg.run(_quiet(command), source, limits, max_output_bytes=0)
        data = out.read_bytes()
    with open_bytes(data) as clip:
        try:
            return data, probe(clip, limits)
        except BadVideo as bad:
            raise BadVideo("corrupt", f"no frame in [{span.start_s:g}, {span.end_s:g}) s could be decoded") from bad


def open_bytes(data: bytes) -> IO[bytes]:
    """`data` as an open file that ffmpeg can seek in; it has no name and goes away with its descriptor."""
    file = tempfile.TemporaryFile(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)  # noqa: SIM115
    file.write(data)
    file.flush()
    return file


def _has_frame(stream: Any, start_s: float, source: IO[bytes], limits: FfmpegLimits) -> bool:
    stream = stream.filter("trim", start=start_s).filter("scale", 16, 16)
    command = stream.output("pipe:", format="rawvideo", pix_fmt="gray", vframes=1, **{"threads": 1}).compile()
    return bool(ffmpeg.run(_quiet(command), source, limits, max_output_bytes=16 * 16))


def _open(source: IO[bytes], limits: FfmpegLimits, **options: float) -> Any:
    return ffmpeg_python.input(ffmpeg.source_url(source), **ffmpeg.input_options(limits), **options)["V:0"]


def _quiet(command: list[str]) -> list[str]:
    return [command[0], "-v", "error", "-nostdin", "-y", *command[1:]]

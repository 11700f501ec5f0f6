"""Spans of video files to smaller video files."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import IO, Literal

from pipeline import ffmpeg
from pipeline.display import (
    AS_DISPLAYED,
    DisplayConfig,
    Picture,
    color_conversion,
    deinterlacing,
    tagging,
    tone_mapping,
    transcoded,
)
from pipeline.errors import BadVideo, ConfigError
from pipeline.ffmpeg import FfmpegLimits, Pipe, Process
from pipeline.mp4 import MP4_CONTAINER, read_video_track
from pipeline.probe import VideoInfo
from pipeline.schema import ClipSpan
from pipeline.scoring import SCALE_FLAGS, Watch, frame_rate
from pipeline.timeline import as_stored, at_rate, keep_times, open_at, same_size, sound

MP4 = ("-f", "mp4", "-movflags", "+faststart", "-fflags", "+bitexact", "-map_metadata", "-1", "-map_chapters", "-1")
"""Output options: the index in front, and nothing that differs from run to run."""
_AUDIO = ("-c:a", "aac", "-b:a", "128k", "-flags:a", "+bitexact")
ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9"}
_MAX_FPS = 1000
_MAX_GOP_FRAMES = 10_000
_MAX_CRF = {"h264": 51, "hevc": 51, "vp9": 63}


@dataclass(frozen=True, kw_only=True, slots=True)
class TranscodeConfig:
    """The MP4 video that a transcoded clip becomes."""

    codec: Literal["h264", "hevc", "vp9"] = "h264"
    """Codec, encoded by libx264, libx265 or libvpx-vp9."""
    preset: Literal["standard", "fast_decode"] = "standard"
    """fast_decode (h264): no B frames, no loop filter, no CABAC; it decodes 1.8 times as fast, and the file is 1.4 times as
    large."""
    short_side_px: int = 256
    """Shorter side in pixels; a smaller video keeps its size."""
    fps: float | None = None
    """Frames per second; by default the video's own."""
    gop_frames: int = 30
    """Frames between keyframes: fewer seek faster and weigh more."""
    crf: int = 20
    """Constant quality, 0 (best) to 51, for vp9 to 63."""

    def __post_init__(self) -> None:
        if self.codec not in _MAX_CRF:
            raise ConfigError(f"transcode.codec = {self.codec!r}: allowed are {', '.join(_MAX_CRF)}")
        if self.preset not in ("standard", "fast_decode"):
            raise ConfigError(f"transcode.preset = {self.preset!r}: allowed are standard, fast_decode")
        if self.preset == "fast_decode" and self.codec != "h264":  # x265's own decoded slower than without
            raise ConfigError(f"transcode.preset = fast_decode is for codec = h264 alone, not {self.codec}")
        if self.short_side_px < 16 or self.short_side_px % 2:
            raise ConfigError(f"transcode.short_side_px = {self.short_side_px}: must be even and at least 16 px")
        if self.fps is not None and not 0 < self.fps <= _MAX_FPS:
            raise ConfigError(f"transcode.fps = {self.fps}: must be more than 0 and at most {_MAX_FPS}")
        if not 1 <= self.gop_frames <= _MAX_GOP_FRAMES:
            raise ConfigError(f"transcode.gop_frames = {self.gop_frames}: must be 1 to {_MAX_GOP_FRAMES}")
        if not 0 <= self.crf <= _MAX_CRF[self.codec]:
            raise ConfigError(f"transcode.crf = {self.crf}: must be 0 to {_MAX_CRF[self.codec]} for {self.codec}")


def transcode_span(
    file: IO[bytes],
    info: VideoInfo,
    span: ClipSpan,
    config: TranscodeConfig,
    limits: FfmpegLimits,
    audio: bool = False,
    watch: Watch | None = None,
    display: DisplayConfig = AS_DISPLAYED,
) -> tuple[IO[bytes], VideoInfo]:
    """The span as an MP4 file without a name, and its metadata; the same input gives the same bytes.

    Args:
        audio: keep the first audio stream, as AAC.
        watch: looks at the pictures of the same decoding, before they are made smaller.

    Raises:
        BadVideo: the span cannot be decoded, holds no frame, or a limit was exceeded.
    """
    bound = max_encoded_bytes(info, span.duration_s, config, limits)
    opened = open_at(file, info, span.start_s, limits)
    # To the end, where the span reaches it: the stated end may come before the last frames.
    until_s = None if span.end_s >= info.duration_s else span.duration_s
    source, graph = f"0:{info.stream}", []
    once = [same_size(info), *deinterlacing(info.picture, display), *(["split=2"] if watch else [])]
    graph += [f"[{source}]{','.join(once)}[picture]{'[look]' if watch else ''}"]
    source = "picture"
    if watch:
        graph += [f"[look]{at_rate(frame_rate(info), opened.shift_s, until_s)}[looked]", watch.graph("looked")]
    if config.fps:
        graph += [f"[{source}]{at_rate(config.fps, opened.shift_s, until_s)}[shown]"]
    else:
        graph += [as_stored(source, "shown", opened.shift_s, until_s, frame_rate(info))]
    graph += [f"[shown]{','.join(scaling(info, config, display))}[video]"]
    has_sound = audio and info.audio_codec
    if has_sound:
        graph += [f"[0:a:0]{sound(opened.shift_s, span.duration_s)}[sound]"]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(ffmpeg.open_unnamed(bound))
        command = [*ffmpeg.command(), *opened.words, "-filter_complex", ";".join(graph), "-map", "[video]"]
        command += ["-map", "[sound]", *_AUDIO] if has_sound else []
        command += [] if config.fps else keep_times(span.duration_s, config.codec, frame_rate(info))
        command += [*encoder_words(config), *MP4, ffmpeg.source_url(out)]
        pipes: list[Pipe] = []
        if watch:
            command += watch.outputs()
            pipes = watch.pipes
        with Process(command, [file, out], limits, pipes=pipes, max_file_bytes=bound) as process:
            for pipe, chunk in process.read():
                assert watch is not None
                watch.take(pipe, chunk)
            process.finish()
        stored = describe_mp4(
            out, config.codec, "aac" if has_sound else "", transcoded(info.picture, display, config.codec)
        )
        if stored is None:
            raise BadVideo("corrupt", f"no frame in [{span.start_s:g}, {span.end_s:g}) s could be decoded")
        # Of pictures far apart the MP4 can state too late an end: it adds steps of decoding to times of showing.
        duration_s = min(stored.duration_s, span.duration_s)
        stored = replace(stored, duration_s=duration_s, fps=stored.num_frames / duration_s)
        stack.pop_all()
    return out, stored


def add_sound(clip: IO[bytes], source: IO[bytes], info: VideoInfo, span: ClipSpan, limits: FfmpegLimits) -> IO[bytes]:
    """The clip's pictures as they are, with the sound of `source` in `span`, as a new MP4 file without a name.

    Args:
        info: the probe of `source`.
    """
    opened = open_at(source, info, span.start_s, limits)
    clip_bytes = clip.seek(0, 2)
    bound = clip_bytes + 2**20 + int(2**16 * span.duration_s)
    out = ffmpeg.open_unnamed(bound)
    command = [*ffmpeg.command(), "-i", ffmpeg.source_url(clip), *opened.words]
    command += ["-map", "0:v:0", "-c:v", "copy"]
    command += [
        "-filter_complex",
        f"[1:a:0]{sound(opened.shift_s, span.duration_s)}[sound]",
        "-map",
        "[sound]",
        *_AUDIO,
    ]
    command += [*MP4, ffmpeg.source_url(out)]
    try:
        with Process(command, [source, clip, out], limits, max_file_bytes=bound) as process:
            process.finish()
    except BaseException:
        out.close()
        raise
    return out


def describe_mp4(out: IO[bytes], codec: str, audio_codec: str, picture: Picture) -> VideoInfo | None:
    """Metadata of an MP4 that ffmpeg wrote for us, and the file at its start; None where it holds no frame."""
    track = read_video_track(out)
    out.seek(0)
    if track is None:
        return None
    return VideoInfo(
        container=MP4_CONTAINER,
        codec=codec,
        width=track.width,
        height=track.height,
        frame_px=(track.width, track.height),
        fps=track.num_frames / track.duration_s,
        duration_s=track.duration_s,
        audio_codec=audio_codec,
        picture=picture,
        start_s=track.start_s,
        last_s=track.last_s,
        num_packets=track.num_packets,
        num_frames=track.num_frames,
    )


def max_encoded_bytes(info: VideoInfo, duration_s: float, config: TranscodeConfig, limits: FfmpegLimits) -> int:
    """More than this is no compressed video: twice the raw frames of the stored size, and a little."""
    width, height = stored_size(info, config)
    raw = (duration_s + 1) * (config.fps or info.fps) * width * height * 1.5
    return min(limits.max_file_bytes, int(2 * raw) + 2**20 + int(2**16 * duration_s))


def stored_size(info: VideoInfo, config: TranscodeConfig) -> tuple[int, int]:
    """Width and height of the transcoded video: even, its shorter side at most `short_side_px`."""
    short = min(info.width, info.height, config.short_side_px)
    factor = short / min(info.width, info.height)
    width, height = (max(2, 2 * round(side * factor / 2)) for side in (info.width, info.height))
    return (width, short // 2 * 2) if info.width > info.height else (short // 2 * 2, height)


def encoder_words(config: TranscodeConfig) -> list[str]:
    """Output options of the video encoder: one thread, the same bytes in every run."""
    words = ["-c:v", ENCODERS[config.codec], "-pix_fmt", "yuv420p", "-g", str(config.gop_frames)]
    words += ["-crf", str(config.crf), "-flags:v", "+bitexact", "-threads", "1"]
    if config.codec == "vp9":
        return [*words, "-b:v", "0", "-deadline", "good", "-cpu-used", "4", "-row-mt", "0"]
    words += ["-preset", "veryfast"]
    if config.preset == "fast_decode":
        # No CABAC, no loop filter; and no B frames, so that every frame follows from earlier ones.
        words += ["-tune", "fastdecode", "-bf", "0"]
    if config.codec == "hevc":
        # Closed groups: each keyframe can be decoded without the frames before it.
        words += ["-tag:v", "hvc1", "-x265-params", "log-level=none:pools=none:frame-threads=1:info=0:open-gop=0"]
    return words


def scaling(info: VideoInfo, config: TranscodeConfig, display: DisplayConfig) -> list[str]:
    """The filters from upright frames to the stored size, in square pixels, tone-mapped; to yuv420p where colours change."""
    picture, tone = info.picture, tone_mapping(info.picture, display, "yuv420p")
    colors = "" if tone else color_conversion(picture)
    if picture.is_square:
        side = config.short_side_px
        size = f"if(gt(iw\\,ih)\\,-2\\,min(iw\\,{side})):if(gt(iw\\,ih)\\,min(ih\\,{side})\\,-2)"
        fit = ["crop=trunc(iw/2)*2:trunc(ih/2)*2", "setsar=1"]
    else:
        size, fit = ":".join(map(str, stored_size(info, config))), ["setsar=1"]
    tag = ["format=yuv420p", *tagging(transcoded(picture, display, config.codec))] if colors else []
    return [f"scale={size}:flags={SCALE_FLAGS}{colors}", *tone, *fit, *tag]

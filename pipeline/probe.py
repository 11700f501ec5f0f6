"""Video file to metadata."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import IO, Any

from pipeline import ffmpeg
from pipeline.display import Picture, read_picture, shown_size
from pipeline.errors import BadVideo
from pipeline.ffmpeg import FfmpegLimits
from pipeline.packets import measure_duration

_LAST_PACKETS = 3
"""Of all streams, read from the last keyframe on: sound may stand before the picture, and each frame costs its decoding."""
_LEAST_SIDE_PX = 3
"""A transcoded clip needs an even side, the score of sharpness three rows and columns."""
_MAX_PROBE_OUTPUT_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What the container says of its first real video stream. Sizes are as displayed, upright and in square pixels."""

    container: str
    codec: str
    width: int
    height: int
    fps: float
    duration_s: float
    audio_codec: str = ""
    """Of the first audio stream; "" without one."""
    picture: Picture = field(default_factory=Picture)
    decoded_at_s: float = -1.0
    """Time of the last keyframe, where a seek to the end found one and it could be decoded; -1 where not."""


def probe(source: IO[bytes], limits: FfmpegLimits) -> VideoInfo:
    """Metadata of an open video file.

    Raises:
        BadVideo: `empty`, `not-video`, `no-video-stream`, `corrupt` or `too-large`.
    """
    if not source.seek(0, 2):
        raise BadVideo("empty", "the file has 0 bytes")
    report = _report(source, limits)
    streams = report.get("streams", [])
    videos = [s for s in _of_type(streams, "video") if not s.get("disposition", {}).get("attached_pic")]
    if not videos:
        raise BadVideo("no-video-stream", f"container {_container(report)} holds no video stream")
    audio = next((str(s.get("codec_name", "unknown")) for s in _of_type(streams, "audio")), "")
    info = replace(_info(report, videos[0]), audio_codec=audio, decoded_at_s=_decoded_at(report, videos[0]))
    # A live recording says nothing, and a container alone speaks for its sound too, which may last longer.
    if not _own_duration(videos[0]) and (audio or not info.duration_s):
        info = replace(info, duration_s=measure_duration(source, limits))
    return _check(info, limits)


def _report(source: IO[bytes], limits: FfmpegLimits) -> dict[str, Any]:
    """What ffprobe says of the file and of its end; of the file alone, where a seek to its end fails."""
    # Beyond every end, so that the last keyframe comes: one process says what the file is, and that it is all there.
    end = [
        "-read_intervals",
        f"99999999%+#{_LAST_PACKETS}",
        "-show_frames",
        "-show_entries",
        "frame=stream_index,pts_time",
    ]
    for options in (end, []):
        try:
            output = ffmpeg.run(_command(source, limits, options), source, limits, _MAX_PROBE_OUTPUT_BYTES)
            report: dict[str, Any] = json.loads(output)
            return report
        except BadVideo as bad:
            if bad.reject_class != "corrupt":
                raise
            error = bad
    raise BadVideo("not-video", f"no supported container: {error.reason}", error.stderr)


def _command(source: IO[bytes], limits: FfmpegLimits, options: list[str]) -> list[str]:
    # ffmpeg-python's own probe() can neither pass a descriptor nor bound its time, hence the plain list.
    # No max_pixels here: the probe decodes next to nothing, and it shall report the size that is then refused by name.
    limited = [
        word
        for name, value in ffmpeg.input_options(limits).items()
        if name != "max_pixels"
        for word in (f"-{name}", str(value))
    ]
    show = ["-show_format", "-show_streams", *options, "-of", "json"]
    return ["ffprobe", "-v", "error", *limited, *show, ffmpeg.source_url(source)]


def _info(report: dict[str, Any], stream: dict[str, Any]) -> VideoInfo:
    width, height = shown_size(stream)
    fps = _rate(stream.get("avg_frame_rate")) or _rate(stream.get("r_frame_rate"))
    duration_s = _own_duration(stream) or _number(report.get("format", {}).get("duration"))
    if not duration_s and fps:
        duration_s = _number(stream.get("nb_frames")) / fps
    return VideoInfo(
        container=_container(report),
        codec=stream.get("codec_name", "unknown"),
        width=width,
        height=height,
        fps=fps,
        duration_s=duration_s,
        picture=read_picture(stream),
    )


def _decoded_at(report: dict[str, Any], stream: dict[str, Any]) -> float:
    frames = [frame for frame in report.get("frames", []) if frame.get("stream_index") == stream.get("index")]
    times_s = [_number(frame.get("pts_time")) - _number(stream.get("start_time")) for frame in frames]
    return max(times_s, default=-1.0)


def _own_duration(stream: dict[str, Any]) -> float:
    # Not the container's: sound often lasts longer than the picture. Matroska has it as a tag.
    return _number(stream.get("duration")) or _clock(stream.get("tags", {}).get("DURATION"))


def _check(info: VideoInfo, limits: FfmpegLimits) -> VideoInfo:
    if info.width * info.height > limits.max_pixels:
        raise BadVideo(
            "too-large", f"a frame of {info.width} x {info.height} pixels; at most {limits.max_pixels} are allowed"
        )
    if info.width < 1 or info.height < 1:
        raise BadVideo("corrupt", f"the {info.codec} stream states no frame size")
    if min(info.width, info.height) < _LEAST_SIDE_PX:
        raise BadVideo(
            "corrupt", f"a frame of {info.width} x {info.height} pixels; a side must have at least {_LEAST_SIDE_PX}"
        )
    if not info.duration_s > 0 or not info.fps > 0:
        raise BadVideo("corrupt", f"the {info.codec} stream states a duration of {info.duration_s} s at {info.fps} fps")
    if info.duration_s > limits.max_duration_s:
        raise BadVideo("too-large", f"{info.duration_s:.0f} s long; at most {limits.max_duration_s:.0f} s are allowed")
    return info


def _of_type(streams: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [stream for stream in streams if stream.get("codec_type") == kind]


def _container(report: dict[str, Any]) -> str:
    return str(report.get("format", {}).get("format_name", "unknown"))


def _rate(text: str | None) -> float:
    numerator, _, denominator = (text or "0/0").partition("/")
    if not float(denominator or 1):
        return 0.0
    return float(Fraction(int(numerator), int(denominator or 1)))


def _clock(text: Any) -> float:
    """Seconds of "HH:MM:SS.fraction", 0 for anything else."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", str(text), re.ASCII)
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0

"""Video file to metadata."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import IO, Any

from pipeline import ffmpeg
from pipeline.display import Picture, read_picture, shown_size
from pipeline.errors import BadVideo
from pipeline.ffmpeg import SPLIT_FIRST, FfmpegLimits
from pipeline.mp4 import MP4_CONTAINER, read_video_track
from pipeline.packets import PacketTimes, list_packets

_LAST_PACKETS = 3
"""Of all streams, read from the last keyframe on: sound may stand before the picture, and each frame costs its decoding."""
_LEAST_SIDE_PX = 3
"""A transcoded clip needs an even side, the score of sharpness three rows and columns."""
_SEEKS_EARLY_S = 3 / 23
"""What ffmpeg does in FLV, which it seeks in by when packets are decoded, if frames are stored out of order."""
LEAST_CHANGE_PX = 16
"""Less is how a codec pads its pictures."""
_MAX_PROBE_OUTPUT_BYTES = 16 * 2**20
_FIRST_PACKETS = 12
"""Enough that the decoder gives its first frame, whatever it holds back."""
_JOINED = ("mpegts", "mpeg", "ogg")
"""Containers in which ffmpeg takes a leap of time for a seam, and closes it."""
_JOINED_GAP_S, _JOINED_RETURN_S = 10.0, 0.1
"""From these on it does."""
_MAX_RETURN_S = 1.0
_MAX_STAND_S = 600.0
"""A picture that stays longer is taken for one wrong timestamp, which could promise a day of equal clips."""
_RATE_TOLERANCE = 0.1
_MOST_UNTIMED = 0.1
"""Share of the packets; ffmpeg guesses the times of a few."""
_MAX_PACKETS = 2**31 - 1
_MAX_NUMBER = 1e12
_MOST_COMMON_HZ = 120.0
"""ffprobe's rate of times that have none in common is that of their unit."""
_MAX_START_S = 100 * 365 * 24 * 3600.0
"""Some cameras stamp pictures with the time of day, or of the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What a file says of the video stream that is used. Sizes are as displayed, upright and in square pixels.

    Times of a video count from when its first picture is shown: `start_s` is that instant in the file's own timestamps.
    """

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
    frame_px: tuple[int, int] = (0, 0)
    """Width and height of the decoded pictures, upright, whatever the shape of their pixels; 0: unknown."""
    stream: int = 0
    """Number of the stream in the file."""
    is_first: bool = True
    """Whether it is the first video stream that is no cover, which is what programs take that do not choose."""
    unit_hz: int = 0
    """Times a second that the stream can tell apart."""
    rate_hz: float = 0.0
    """A rate at which each picture of a variable frame rate has a place of its own; 0: `fps` is one."""
    seek_lead_s: float = 0.0
    """How much earlier than its time to seek, beyond what ffmpeg does by itself, so that no keyframe after it is found."""
    reorders: bool = False
    """Whether frames are stored in another order than they are shown in."""
    audio_hz: int = 0
    """Samples a second of the first audio stream."""
    start_s: float = 0.0
    """Timestamp of the first shown picture."""
    container_start_s: float = 0.0
    """Timestamp of what comes first in the file, sound or picture; ffmpeg counts from it where it seeks."""
    last_s: float = 0.0
    """How long after it the last one begins; it may stay on screen for long."""
    num_packets: int = 0
    """Packets of the stream, measured."""
    num_frames: int = 0
    """Packets of the stream that are shown: those that an edit list hides, and those that lack the keyframe they are
    decoded from, are no frames."""


def probe(source: IO[bytes], limits: FfmpegLimits) -> VideoInfo:
    """Metadata of an open video file.

    Of several video streams the one that is marked as the default is used, else the longest; covers are none.

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
    video = _choose(videos)
    audio = next(iter(_of_type(streams, "audio")), {})
    info = replace(
        _info(report, video),
        audio_codec=str(audio.get("codec_name", "unknown")) if audio else "",
        audio_hz=int(_number(audio.get("sample_rate"))),
        is_first=video is videos[0],
    )
    _check_size(info, report, limits)
    _check_length(info, limits)  # before its packets are listed
    _check_frames(report, video)
    info = _measure(source, info, report, video, limits)
    return _check_times(replace(info, decoded_at_s=_decoded_at(report, video, info.start_s)), limits)


def _choose(videos: list[dict[str, Any]]) -> dict[str, Any]:
    defaults = [stream for stream in videos if stream.get("disposition", {}).get("default")]
    if len(defaults) == 1:
        return defaults[0]
    return max(defaults or videos, key=_own_duration)  # the first of those that are equally long


def _measure(
    source: IO[bytes], info: VideoInfo, report: dict[str, Any], video: dict[str, Any], limits: FfmpegLimits
) -> VideoInfo:
    """`info` with what its packets say, by the sample table of an MP4, and by a list of the packets of all else."""
    start_s = _number(video.get("start_time"))
    info = replace(info, container_start_s=_number(report.get("format", {}).get("start_time")))
    if info.container == MP4_CONTAINER:
        track = read_video_track(source, _track_id(video))
        if track:
            measured = replace(info, num_packets=track.num_packets, num_frames=track.num_frames, start_s=start_s)
            measured = replace(measured, last_s=track.last_s)
            own_s = _own_duration(video)
            if own_s > track.last_s:
                measured = replace(measured, duration_s=own_s)
            else:  # a sum of decoding steps, short where pictures are far apart: the last one would begin after it
                fps = _plausible_rate(info.fps, track.num_frames, track.duration_s)
                measured = replace(measured, duration_s=track.duration_s, fps=fps)
            _check_stand(max(track.longest_step_s, measured.duration_s - track.last_s))
            return measured
    times = list_packets(source, info.stream, limits)
    if times.num_untimed > _MOST_UNTIMED * times.num_packets:
        raise BadVideo("corrupt", f"{times.num_untimed} of {times.num_packets} packets have no time")
    if not times.num_frames:
        raise BadVideo("corrupt", f"the {info.codec} stream holds no packet with a time")
    _check_steps(times, info)
    _check_stand(max(times.longest_leap_s, times.end_s - times.last_s))
    duration_s = round(times.end_s - times.first_s, 6)
    # A container alone speaks for its sound too, which may last longer.
    stated_s = _own_duration(video) or (0.0 if info.audio_codec else info.duration_s)
    reach_s = times.end_s - times.earliest_s  # what is stated counts the packets before the first keyframe too
    if reach_s <= least_reach(stated_s, info.fps):
        raise BadVideo(
            "corrupt", f"states {stated_s:.3f} s, but its packets end at {reach_s:.3f} s: cut off or damaged"
        )
    if times.is_timed:
        start_s = times.first_s
    if info.container == "avi":
        # It numbers packets and has no times of frames, which come later by as many as are stored out of order.
        start_s = _first_frame_s(report, video, start_s)
    return replace(
        info,
        duration_s=duration_s,
        fps=_plausible_rate(info.fps, times.num_frames, duration_s),
        seek_lead_s=max(0.0, times.longest_delay_s - _SEEKS_EARLY_S) if info.container == "flv" else 0.0,
        num_packets=times.num_packets,
        num_frames=times.num_frames,
        start_s=start_s,
        last_s=times.last_s - times.first_s,
    )


def _check_steps(times: PacketTimes, info: VideoInfo) -> None:
    """Refuse a video whose times leap: ffmpeg closes such a gap where it reads through it, and not where it seeks."""
    joins = info.container in _JOINED
    if times.longest_return_s > (_JOINED_RETURN_S if joins else _MAX_RETURN_S):
        leap = f"go back by {times.longest_return_s:.3f} s"
    elif joins and times.longest_leap_s > _JOINED_GAP_S:
        leap = f"leap ahead by {times.longest_leap_s:.3f} s"
    else:
        return
    raise BadVideo(
        "corrupt",
        f"its timestamps {leap}, as in recordings that were joined; give them one run of times first, such as by "
        "ffmpeg -i IN -c copy OUT.mkv",
    )


def _check_stand(longest_s: float) -> None:
    if longest_s > _MAX_STAND_S:
        raise BadVideo(
            "unsupported",
            f"one of its pictures stays for {longest_s:.0f} s; more than {_MAX_STAND_S:.0f} s are taken for a wrong timestamp. "
            "Where it is right, give the video a constant rate first, such as by ffmpeg -i IN -vf fps=1 OUT.mkv",
        )


def _plausible_rate(stated: float, num_frames: int, duration_s: float) -> float:
    """The stated rate, which is exact in most files; the measured one where that is far from it."""
    measured = num_frames / duration_s if duration_s > 0 else 0.0
    return stated if abs(stated - measured) <= _RATE_TOLERANCE * measured else measured


def _report(source: IO[bytes], limits: FfmpegLimits) -> dict[str, Any]:
    """What ffprobe says of the file and of its end; of the file alone, where a seek to its end fails."""
    # Beyond every end, so that the last keyframe comes: one process says what the file is, and that it is all there.
    source.seek(0)
    is_avi = source.read(12)[8:] == b"AVI "
    start = f"%+#{_FIRST_PACKETS}," if is_avi else ""
    end = [
        "-read_intervals",
        f"{start}99999999%+#{_LAST_PACKETS}",
        "-show_frames",
        "-show_entries",
        "frame=stream_index,pts_time,best_effort_timestamp_time,width,height",
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
    show = ["-show_format", "-show_streams", *options, "-of", "json"]
    return ["ffprobe", "-v", "error", *ffmpeg.probe_words(limits), *show, ffmpeg.source_url(source)]


def _info(report: dict[str, Any], stream: dict[str, Any]) -> VideoInfo:
    width, height = shown_size(stream)
    fps = _rate(stream.get("avg_frame_rate")) or _rate(stream.get("r_frame_rate"))
    duration_s = _own_duration(stream) or _number(report.get("format", {}).get("duration"))
    return VideoInfo(
        container=_container(report),
        codec=stream.get("codec_name", "unknown"),
        width=width,
        height=height,
        fps=fps,
        duration_s=duration_s,
        picture=read_picture(stream),
        frame_px=shown_size({**stream, "sample_aspect_ratio": "1:1"}),
        stream=int(stream.get("index", 0)),
        rate_hz=_common_rate(fps, _rate(stream.get("r_frame_rate"))),
        unit_hz=int(str(stream.get("time_base", "0/0")).partition("/")[2] or 0),
        reorders=int(_number(stream.get("has_b_frames"))) > 0,
    )


def _common_rate(fps: float, rate_hz: float) -> float:
    """ffprobe's rate that all times are multiples of, where it is another than the mean and can be one of pictures."""
    fields = abs(rate_hz - 2 * fps) <= 0.01 * rate_hz
    return rate_hz if 1.01 * fps < rate_hz <= _MOST_COMMON_HZ and not fields else 0.0


def _decoded_at(report: dict[str, Any], stream: dict[str, Any], start_s: float) -> float:
    times_s = [_number(frame.get("pts_time")) - start_s for frame in _frames(report, stream)]
    return max(times_s, default=-1.0)


def _first_frame_s(report: dict[str, Any], stream: dict[str, Any], default_s: float) -> float:
    for frame in _frames(report, stream)[:1]:
        return _number(frame.get("best_effort_timestamp_time"))
    return default_s


def _frames(report: dict[str, Any], stream: dict[str, Any]) -> list[dict[str, Any]]:
    return [frame for frame in report.get("frames", []) if frame.get("stream_index") == stream.get("index")]


def _own_duration(stream: dict[str, Any]) -> float:
    # Not the container's: sound often lasts longer than the picture. Matroska has the end as a tag.
    end_s = _clock(stream.get("tags", {}).get("DURATION"))
    return _number(stream.get("duration")) or max(0.0, end_s - _number(stream.get("start_time")))


def _track_id(stream: dict[str, Any]) -> int | None:
    text = str(stream.get("id", ""))
    return int(text, 16) if re.fullmatch(r"0x[0-9a-f]{1,8}", text) else None


def least_reach(duration_s: float, fps: float) -> float:
    """The time from which on a sound video has a frame: nine tenths of its stated duration, or two frames before its end.

    The last of n frames starts at (n - 1) / n of the duration, which is before nine tenths in a short video.
    """
    return max(0.0, min(0.9 * duration_s, duration_s - 2 / fps)) if fps > 0 else 0.0


def _check_size(info: VideoInfo, report: dict[str, Any], limits: FfmpegLimits) -> None:
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


def _check_frames(report: dict[str, Any], stream: dict[str, Any]) -> None:
    """Refuse a video whose last pictures are of another size than its first: all would be squeezed to one."""
    for frame in _frames(report, stream):
        stated, seen = ((one.get("width", 0), one.get("height", 0)) for one in (stream, frame))
        if all(seen) and any(abs(a - b) >= LEAST_CHANGE_PX for a, b in zip(stated, seen, strict=True)):
            sizes = " to ".join(f"{width} x {height}" for width, height in (stated, seen))
            raise BadVideo("unsupported", f"the size of its pictures changes from {sizes} pixels: {SPLIT_FIRST}")


def _check_length(info: VideoInfo, limits: FfmpegLimits) -> None:
    if info.duration_s > limits.max_duration_s:
        raise BadVideo("too-large", f"{info.duration_s:.0f} s long; at most {limits.max_duration_s:.0f} s are allowed")


def _check_times(info: VideoInfo, limits: FfmpegLimits) -> VideoInfo:
    if not 0 < info.duration_s < math.inf or not 0 < info.fps < math.inf:
        raise BadVideo("corrupt", f"the {info.codec} stream states a duration of {info.duration_s} s at {info.fps} fps")
    _check_length(info, limits)
    if info.num_packets > _MAX_PACKETS:
        raise BadVideo("too-large", f"{info.num_packets} packets; at most {_MAX_PACKETS} are allowed")
    if max(abs(info.start_s), abs(info.container_start_s)) > _MAX_START_S:
        raise BadVideo("corrupt", f"its first picture has the timestamp {info.start_s:g} s")
    return info


def _of_type(streams: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [stream for stream in streams if stream.get("codec_type") == kind]


def _container(report: dict[str, Any]) -> str:
    return str(report.get("format", {}).get("format_name", "unknown"))


def _rate(text: Any) -> float:
    """Of "30000/1001"; 0 for anything that is no rate."""
    match = re.fullmatch(r"(\d{1,18})/(\d{1,18})", str(text), re.ASCII)
    return int(match[1]) / int(match[2]) if match and int(match[2]) else 0.0


def _clock(text: Any) -> float:
    """Seconds of "HH:MM:SS.fraction", 0 for anything else."""
    match = re.fullmatch(r"(\d{1,9}):(\d\d):(\d\d(?:\.\d{1,18})?)", str(text), re.ASCII)
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0


def _number(value: Any) -> float:
    """A number as ffprobe writes it; 0 for none, and for one that no file can mean."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if abs(number) < _MAX_NUMBER else 0.0

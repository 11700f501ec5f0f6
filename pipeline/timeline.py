"""The time axis of a video in ffmpeg's words: 0 is when its first picture is shown, and a picture stays until the next."""

from __future__ import annotations

from typing import IO, NamedTuple

from pipeline.ffmpeg import FfmpegLimits, input_words, source_url
from pipeline.packets import find_lead
from pipeline.probe import LEAST_CHANGE_PX, VideoInfo

TOLERANCE_S = 1e-3
"""Matroska and FLV round times to this: a frame that begins this much after an instant counts as there."""
UNIT_HZ = 90_000
"""Of the times of a clip that keeps those of its source."""
NO_SEEK_S = 0.5
"""Where B frames may be, ffmpeg seeks 3/23 s earlier than asked in some containers; a seek to before the start fails."""


class Opened(NamedTuple):
    """An input that is read from a keyframe at or before an instant on.

    words: the input with its options.
    shift_s: the timestamp of that instant; earlier frames come too.
    """

    words: list[str]
    shift_s: float


def open_at(file: IO[bytes], info: VideoInfo, start_s: float, limits: FfmpegLimits) -> Opened:
    """Open a video so that the picture on screen at `start_s` can be decoded, which may have begun long before.

    Raises:
        BadVideo: a limit was exceeded while its keyframe was looked for.
    """
    at_s = start_s + info.start_s
    seek_s = 0.0
    if start_s > 0:
        lead_s = find_lead(file, info.container, info.stream, at_s, info.container_start_s, limits)
        seek_s = at_s - lead_s - info.seek_lead_s - info.container_start_s
    # Not exact: that would drop the picture that is on screen already.
    seek = ["-noaccurate_seek", "-ss", f"{seek_s:.9f}"] if seek_s > NO_SEEK_S else []
    # With the timestamps that the file has: which others ffmpeg gives depends on the container and on what is mapped.
    words = [*input_words(limits), "-copyts", *seek, "-i", source_url(file)]
    return Opened(words, at_s)


def same_size(info: VideoInfo) -> str:
    """A filter, to be the first, that fails where a picture comes that is larger or smaller; ffmpeg would squeeze it."""
    width, height = info.frame_px
    if not width or not height:
        return "null"
    same = f"lt(abs(iw-{width})\\,{LEAST_CHANGE_PX})*lt(abs(ih-{height})\\,{LEAST_CHANGE_PX})"
    return f"crop=if({same}\\,iw\\,-1):ih:0:0:exact=1"


def shift(shift_s: float) -> str:
    """Filters that put the instant `shift_s` at 0."""
    # In microseconds: in a container's own unit, which may be a whole frame, the shift would be lost or become a frame.
    return f"settb=1/1000000,setpts=PTS-{_microseconds(shift_s)}"


def at_rate(rate_hz: float, shift_s: float, duration_s: float | None = None) -> str:
    """Filters after which frame n is the picture on screen at `shift_s + n / rate_hz`.

    Args:
        duration_s: nothing from there on; None: to the end.
    """
    end = f",trim=end={duration_s - TOLERANCE_S:.6f}" if duration_s is not None else ""
    return f"{shift(shift_s + TOLERANCE_S)},fps={rate_hz:.10g}:start_time=0:round=up{end}"


def as_stored(source: str, label: str, shift_s: float, duration_s: float | None, rate_hz: float) -> str:
    """A graph from `source` to `label`: the picture on screen at `shift_s`, then each when it begins."""
    end = f":end={duration_s - TOLERANCE_S:.6f}" if duration_s is not None else ""
    return (
        f"[{source}]{shift(shift_s)},split=2[{label}_on][{label}_all];"
        f"[{label}_on]{at_rate(rate_hz, 0)},trim=end_frame=1[{label}_first];"
        f"[{label}_all]trim=start={TOLERANCE_S + 1e-6:.6f}{end}[{label}_rest];"
        f"[{label}_first][{label}_rest]interleave=n=2[{label}]"
    )


def sound(shift_s: float, duration_s: float) -> str:
    """Filters to the sound from `shift_s` on; what is missing is filled with silence, so that it stays in step."""
    trim = f"atrim=start={max(0.0, shift_s):.9f}:end={shift_s + duration_s:.9f}"
    return f"{trim},asetpts=PTS-round({shift_s:.9f}/TB),aresample=async=1:first_pts=0"


def keep_times(duration_s: float, codec: str, rate_hz: float) -> list[str]:
    """Output options of an encoded video that keep the times of its frames; its last picture stays to `duration_s`."""
    # Of each packet to the end of all, as the muxer takes the latest end for the video's. Of the last it keeps the duration
    # itself: what is left in the order of decoding, so that a constant rate stays one and players know it.
    # Not by the filter's TB, which is another unit than that of its times.
    end, is_last = round(duration_s * UNIT_HZ), "gt(abs(NEXT_DTS)\\,1e17)+isnan(NEXT_DTS)"
    rest = f"max(1\\,if({is_last}\\,{end}-DTS+STARTDTS\\,{end}-PTS))"
    # The stream itself would state the unit as its rate, and decoders take the last picture's duration from that.
    ticks = {"h264": 2, "hevc": 1}.get(codec)
    rate = f",{codec}_metadata=tick_rate={round(ticks * rate_hz * 1000)}/1000" if ticks else ""
    words = ["-fps_mode:v", "vfr", "-enc_time_base:v", f"1/{UNIT_HZ}", "-video_track_timescale", f"{UNIT_HZ}"]
    return [*words, "-bsf:v", f"setts=pts=PTS:dts=DTS:duration={rest}{rate}"]


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)

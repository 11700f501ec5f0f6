"""Which frames of a video stand for it at a lower rate: the filters that pick them."""

from __future__ import annotations

import math
from typing import Literal

Pick = Literal["shown", "nearest"]
PICKS = ("shown", "nearest")

_TOLERANCE_US = 1000
"""Matroska and FLV round times to milliseconds: a frame that begins this much after an instant counts as there."""


def num_shown(duration_s: float, start_s: float, fps: float) -> int:
    """Frames that `shown` gives of a video: one for every k with k / fps before its end, and one at least."""
    return max(1, math.ceil((duration_s - start_s - _TOLERANCE_US / 1e6) * fps))


def sampling_filters(
    fps: float,
    start_s: float = 0.0,
    pick: Pick = "shown",
    short: bool = False,
    from_zero: bool = False,
    duration_s: float | None = None,
) -> str:
    """Filters after which frame k is the picture at `start_s + k / fps`, counted from the first frame; its time is k / fps.

    `shown` gives the picture that a player has on screen then: the last frame that begins by `start_s + k / fps` + 1 ms, for
    every k / fps up to the end. `nearest` gives what ffmpeg's `fps` filter gives by itself: each time is rounded to the
    nearest k / fps, so that frame k may be one that begins up to half an interval later.

    Args:
        short: the video lasts less than one interval from `start_s` on, where `nearest` alone might give no frame.
        from_zero: times count from 0, not from the first frame, which may begin a little later.
        duration_s: of the video, to which its last picture stays (`shown`): one frame for every k with k / fps before that, and
            one at least. None: as long as ffmpeg takes the last picture to stay.
    """
    if pick == "nearest" and not start_s:
        return f"fps={fps:.10g}:eof_action={'pass' if short else 'round'}"
    # In microseconds: in a container's own unit, which may be a whole frame, the shift would be lost or become a frame.
    earlier_us = round(start_s * 1e6) + (_TOLERANCE_US if pick == "shown" else 0)
    rounding = "up:eof_action=pass" if pick == "shown" else f"near:eof_action={'pass' if short else 'round'}"
    # From time 0 on, whatever began before it: the picture that is on screen at the start may have begun long ago.
    stay, end = "", ""
    if pick == "shown" and duration_s is not None:
        num_frames = num_shown(duration_s, start_s, fps)
        # Copies of the last picture without end, before `fps`: that drops a picture which nothing follows.
        stay, end = "tpad=stop=-1:stop_mode=clone,", f",trim=end_frame={num_frames}"
    times = f"settb=1/1000000,setpts=PTS{'' if from_zero else '-STARTPTS'}-{earlier_us}"
    return f"{times},{stay}fps={fps:.10g}:start_time=0:round={rounding}{end}"

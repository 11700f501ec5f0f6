"""When a stream begins and ends by its packets, as ffprobe lists them, or ffmpeg beside a copy."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import IO

from pipeline import ffmpeg
from pipeline.errors import BadVideo
from pipeline.ffmpeg import FfmpegLimits, Pipe, Process
from pipeline.mp4 import MP4_CONTAINER, keyframe_lead

_LINE_BYTES = 160
_MAX_LISTING_BYTES = 2**30
_SEEK_LEADS_S = (3.0, 12.0, 60.0)
"""How much earlier to seek in MPEG-TS, one after the other, until a keyframe is found."""
_ROUNDING_S = 1e-3
_NO_TIME = -(2**63)
"""What ffmpeg lists for a packet without a time."""
_KEY, _HIDDEN = 1, 4
"""Flags: of a keyframe, and of a packet that is decoded for others alone."""


class PacketTimes:
    """What one listing says of the packets of a stream. Memory does not grow with it.

    Packets that the container hides (edit lists), those before the first keyframe (recordings that begin amid a group of
    pictures), and those shown before it, which lack what they are decoded from, count as packets but not as frames. Where
    no packet is a keyframe, the first packet takes its place.
    """

    def __init__(self) -> None:
        self.num_packets = self.num_frames = self.num_untimed = 0
        self.hidden_first = False
        """Whether the container hides what comes first."""
        self.is_timed = False
        """Whether the first frame has a time of its own, not one that was guessed."""
        self.first_s, self.end_s = 0.0, 0.0
        """When the first frame begins, and the last one ends."""
        self.last_s = 0.0
        """When the last one begins."""
        self.longest_leap_s, self.longest_return_s = 0.0, 0.0
        """How far time moves from one packet to the next: ahead, and back."""
        self.earliest_s = math.inf
        """When the first packet begins that no edit list hides, whether or not it can be shown."""
        self.longest_delay_s = 0.0
        """Longest time from when a frame is decoded to when it is shown."""
        self._last_s: float | None = None
        self._lead_s: float | None = None
        self._guesses = self._keyframe_came = False

    def add(self, pts_s: float | None, dts_s: float | None, duration_s: float, hidden: bool, is_key: bool) -> None:
        """Count one packet, in the order of decoding."""
        if self._lead_s is None and pts_s is not None and dts_s is not None:
            self._lead_s = pts_s - dts_s
        if pts_s is not None and dts_s is not None:
            self.longest_delay_s = max(self.longest_delay_s, pts_s - dts_s)
        self._guesses |= pts_s is None and self._lead_s is not None
        begin_s = dts_s if pts_s is None else pts_s
        self.num_packets += 1
        if is_key and not self._keyframe_came:
            self._keyframe_came, self.num_frames = True, 0
        self.num_untimed += begin_s is None
        if dts_s is not None:
            step_s = 0.0 if self._last_s is None else dts_s - self._last_s
            self.longest_leap_s = max(self.longest_leap_s, step_s)
            self.longest_return_s = max(self.longest_return_s, -step_s)
            self._last_s = dts_s
        if hidden or begin_s is None:
            self.hidden_first |= hidden and not self.num_frames
            return
        self.earliest_s = min(self.earliest_s, begin_s)
        if not self.num_frames:
            self.first_s, self.end_s, self.is_timed = begin_s, begin_s + duration_s, pts_s is not None
        self.num_frames += begin_s >= self.first_s
        if self._guesses and dts_s is not None and self._lead_s is not None:
            # MPEG-PS states the times of few packets. Whatever their order, a frame is shown as long after a packet is
            # decoded as after the first.
            begin_s = max(begin_s, dts_s + self._lead_s)
        self.end_s = max(self.end_s, begin_s + duration_s)
        self.last_s = begin_s if self.num_frames == 1 else max(self.last_s, begin_s)


class CopiedPackets(PacketTimes):
    """The packets that a command of ffmpeg copies, with the times that they have there.

    Args:
        max_packets: more than this is an endless or lying stream.
    """

    def __init__(self, max_packets: float) -> None:
        super().__init__()
        self.pipe = Pipe(int(min(max_packets * _LINE_BYTES + 2**16, _MAX_LISTING_BYTES)))
        self._unit = Fraction(1)
        self._rest = b""

    def output(self) -> list[str]:
        """The output's format and name; what to list is the caller's to map."""
        return ["-c", "copy", "-f", "framecrc", self.pipe.url]

    def take(self, chunk: bytes) -> None:
        """Read lines: `#tb 0: 1/1000`, then for each packet stream, dts, pts, duration, size, checksum, flags."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"#tb 0:"):
                self._unit = Fraction(line.split(b":")[1].strip().decode())
            elif not line.startswith(b"#"):
                words = line.split(b",")
                dts_s, pts_s, duration_s = (
                    None if int(word) == _NO_TIME else float(int(word) * self._unit) for word in words[1:4]
                )
                flags = next((int(word.split(b"=")[1], 16) for word in words[6:] if word.strip().startswith(b"F=")), 0)
                self.add(pts_s, dts_s, duration_s or 0.0, bool(flags & _HIDDEN), bool(flags & _KEY))


def list_packets(source: IO[bytes], stream: int, limits: FfmpegLimits) -> PacketTimes:
    """The packets of one stream of a whole file, with their times as they are stored: one pass without decoding.

    Args:
        stream: its number in the file.

    Raises:
        BadVideo: the file cannot be read, or a limit was exceeded.
    """
    times, rest = PacketTimes(), b""
    output = Pipe(int(min(limits.max_duration_s * 240 * _LINE_BYTES, _MAX_LISTING_BYTES)))
    # By ffprobe: ffmpeg mends times that go back, also in a copy.
    show = ["-select_streams", f"{stream}", "-show_entries", "packet=pts_time,dts_time,duration_time,flags"]
    command = [
        "ffprobe",
        "-v",
        "error",
        *ffmpeg.probe_words(limits),
        *show,
        "-of",
        "csv=p=0",
        ffmpeg.source_url(source),
    ]
    source.seek(0)
    with Process(command, [source], limits, stdout=output) as process:
        for _, chunk in process.read():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                words = line.split(b",")
                if len(words) >= 4:  # side data has lines of its own
                    pts_s, dts_s, duration_s = (None if word == b"N/A" else float(word) for word in words[:3])
                    times.add(pts_s, dts_s, duration_s or 0.0, b"D" in words[3], b"K" in words[3])
        process.finish()
    return times


def find_lead(
    source: IO[bytes], container: str, stream: int, start_s: float, first_s: float, limits: FfmpegLimits
) -> float:
    """How many seconds before `start_s` to seek, so that every frame from there on can be decoded; all: read it all.

    In MP4 what its sample table says. 0 but for containers without an index, where a seek may land after the last keyframe before its time, and all frames up
    to the next one would be lost. In MPEG-TS a process looks for that keyframe, earlier and earlier. MPEG-PS is read from
    its start, whatever that costs: after a seek in it, ffmpeg may take the times of all frames for some frames too late.

    Args:
        container: ffprobe's name for it.
        stream: number of the video stream in the file.
        start_s, first_s: timestamps of the instant, and of what comes first in the file.

    Raises:
        BadVideo: a limit was exceeded.
    """
    if container == MP4_CONTAINER:
        return keyframe_lead(source, stream, start_s)
    if container == "mpegts":
        for lead_s in _SEEK_LEADS_S:
            seek_s = start_s - lead_s - first_s
            if seek_s > 0 and _finds_keyframe(source, stream, seek_s, start_s, limits):
                return lead_s
    return start_s - first_s if container in ("mpegts", "mpeg") else 0.0


def _finds_keyframe(source: IO[bytes], stream: int, seek_s: float, until_s: float, limits: FfmpegLimits) -> bool:
    """Whether the first keyframe that a seek to `seek_s` finds has a timestamp of `until_s` or before."""
    times = CopiedPackets(1)
    command = [*ffmpeg.command(), *ffmpeg.input_words(limits), "-copyts", "-ss", f"{seek_s:.9f}"]
    command += ["-i", ffmpeg.source_url(source), "-map", f"0:{stream}", "-frames:v", "1", *times.output()]
    try:
        with Process(command, [source], limits, pipes=[times.pipe]) as process:
            for _, chunk in process.read():
                times.take(chunk)  # a copy leaves out what stands before a keyframe
            process.finish()
    except BadVideo as bad:
        if bad.reject_class != "corrupt":
            raise
        return False
    return times.num_packets > 0 and times.first_s <= until_s + _ROUNDING_S

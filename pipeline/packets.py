"""When a stream begins and ends by its packets, as ffmpeg lists them in its framecrc format."""

from __future__ import annotations

from fractions import Fraction
from typing import IO

from pipeline import ffmpeg
from pipeline.errors import BadVideo
from pipeline.ffmpeg import FfmpegLimits, Pipe, Process

_LINE_BYTES = 160
_MAX_LISTING_BYTES = 2**30
_SEEK_LEADS_S = (3.0, 12.0, 60.0)
"""How much earlier to seek in MPEG-TS, one after the other, until a keyframe is found."""
_ROUNDING_S = 1e-3


class PacketTimes:
    """What one listing says: `count` packets, shown in `[first_s, end_s)`. Memory does not grow with it.

    Args:
        max_packets: more than this is an endless or lying stream.
    """

    def __init__(self, max_packets: float) -> None:
        self.pipe = Pipe(int(min(max_packets * _LINE_BYTES + 2**16, _MAX_LISTING_BYTES)))
        self.count = 0
        self._first = self._end = 0
        self._unit = Fraction(1)
        self._rest = b""

    def output(self) -> list[str]:
        """The output's format and name; what to list is the caller's to map."""
        return ["-c", "copy", "-f", "framecrc", self.pipe.url]

    @property
    def first_s(self) -> float:
        return float(self._first * self._unit)

    @property
    def end_s(self) -> float:
        return float(self._end * self._unit)

    def take(self, chunk: bytes) -> None:
        """Read lines: `#tb 0: 1/1000`, then for each packet stream, dts, pts, duration, size, checksum."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"#tb 0:"):
                self._unit = Fraction(line.split(b":")[1].strip().decode())
            elif not line.startswith(b"#"):
                _, _, pts, duration = (int(word) for word in line.split(b",")[:4])
                self._first = min(self._first, pts) if self.count else pts
                self._end = max(self._end, pts + duration) if self.count else pts + duration
                self.count += 1


def measure_duration(source: IO[bytes], limits: FfmpegLimits) -> float:
    """Seconds from 0 to the end of the last packet of the first real video stream: one pass without decoding.

    Raises:
        BadVideo: the file cannot be read, or a limit was exceeded.
    """
    times = PacketTimes(limits.max_duration_s * 240)
    command = [*ffmpeg.command(), *ffmpeg.input_words(limits), "-i", ffmpeg.source_url(source), "-map", "0:V:0"]
    with Process([*command, *times.output()], [source], limits, pipes=[times.pipe]) as process:
        for _, chunk in process.read():
            times.take(chunk)
        process.finish()
    return times.end_s


def find_lead(source: IO[bytes], container: str, start_s: float, limits: FfmpegLimits) -> float:
    """How many seconds before `start_s` to seek, so that every frame from there on can be decoded; `start_s`: read it all.

    0 but for containers without an index, where a seek may land after the last keyframe before its time, and all frames up
    to the next one would be lost. In MPEG-TS a process looks for that keyframe, earlier and earlier. MPEG-PS is read from
    its start, whatever that costs: after a seek in it, ffmpeg may take the times of all frames for some frames too late.

    Args:
        container: ffprobe's name for it.

    Raises:
        BadVideo: a limit was exceeded.
    """
    if container == "mpegts":
        for lead_s in _SEEK_LEADS_S:
            if lead_s < start_s and _finds_keyframe(source, start_s - lead_s, start_s, limits):
                return lead_s
    return start_s if container in ("mpegts", "mpeg") else 0.0


def _finds_keyframe(source: IO[bytes], seek_s: float, until_s: float, limits: FfmpegLimits) -> bool:
    """Whether the first keyframe that a seek to `seek_s` finds is shown at `until_s` or before."""
    times = PacketTimes(1)
    command = [*ffmpeg.command(), *ffmpeg.input_words(limits), *ffmpeg.start_words(seek_s)]
    command += ["-i", ffmpeg.source_url(source), "-map", "0:V:0", "-frames:v", "1", *times.output()]
    try:
        with Process(command, [source], limits, pipes=[times.pipe]) as process:
            for _, chunk in process.read():
                times.take(chunk)  # a copy leaves out what stands before a keyframe
            process.finish()
    except BadVideo as bad:
        if bad.reject_class != "corrupt":
            raise
        return False
    return times.count > 0 and seek_s + times.first_s <= until_s + _ROUNDING_S

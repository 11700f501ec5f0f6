"""What is in the stored bytes of a clip, counted on them."""

from __future__ import annotations

from typing import IO

from pipeline import ffmpeg
from pipeline.errors import BadVideo
from pipeline.ffmpeg import FfmpegLimits
from pipeline.mp4 import read_video_track

_MAX_OUTPUT_BYTES = 4096


def count_packets(clip: IO[bytes], limits: FfmpegLimits) -> int:
    """Packets of the video stream: by the sample table of an MP4, which costs no process, else by one pass over the file.

    Raises:
        BadVideo: it cannot be read, or a limit was exceeded.
    """
    track = read_video_track(clip)
    return track.num_packets if track else _count(clip, "packets", limits)


def count_frames(clip: IO[bytes], limits: FfmpegLimits) -> int:
    """Pictures that a player shows, all of them decoded; errors are those of `count_packets`."""
    return _count(clip, "frames", limits)


def _count(clip: IO[bytes], what: str, limits: FfmpegLimits) -> int:
    words = ["-select_streams", "V:0", f"-count_{what}", "-show_entries", f"stream=nb_read_{what}", "-of", "csv=p=0"]
    command = ["ffprobe", "-v", "error", *_without_threads(ffmpeg.input_words(limits)), *words, ffmpeg.source_url(clip)]
    lines = ffmpeg.run(command, clip, limits, _MAX_OUTPUT_BYTES).decode().split()
    said = lines[0].strip(",") if lines else ""  # a stream of a program (MPEG-TS) is listed twice
    if not said.isdecimal():
        raise BadVideo("corrupt", f"ffprobe counts no {what} in it: {said[:80]!r}")
    return int(said)


def _without_threads(words: list[str]) -> list[str]:
    return words[: words.index("-threads")]

"""What a stored clip holds, counted in its bytes: packets without decoding, frames by decoding."""

from __future__ import annotations

from typing import IO

from pipeline import ffmpeg
from pipeline.errors import BadVideo
from pipeline.ffmpeg import FfmpegLimits, Pipe, Process
from pipeline.mp4 import read_video_track
from pipeline.probe import probe

_FRAME_BYTES = 4
"""Of a grey picture of 2 x 2: the fewest that a frame can leave in a pipe."""


def count_packets(file: IO[bytes], limits: FfmpegLimits) -> int:
    """Packets of the video stream of a stored clip, which its index states as `num_packets`.

    By the sample table of an MP4 with one video, which costs no process; for all else by a list of the packets.

    Raises:
        BadVideo: the clip cannot be read, or a limit was exceeded.
    """
    track = read_video_track(file)
    return track.num_packets if track else probe(file, limits).num_packets


def count_frames(file: IO[bytes], limits: FfmpegLimits) -> int:
    """Frames that a decoder gives of the video stream of a stored clip: all of it is decoded.

    It is what the index states as `num_frames`, unless frames are damaged, or packets hold none of their own (references
    that VP8 does not show, fields of interlaced video that are stored one by one).

    Raises:
        BadVideo: the clip cannot be decoded, or a limit was exceeded.
    """
    file.seek(0)
    pictures = Pipe(int(limits.max_duration_s * 240) * _FRAME_BYTES)
    command = [*ffmpeg.command(), *ffmpeg.input_words(limits), "-i", ffmpeg.source_url(file), "-map", "0:V:0"]
    command += ["-vf", "scale=2:2,format=gray", "-fps_mode", "passthrough", "-f", "rawvideo", pictures.url]
    with Process(command, [file], limits, pipes=[pictures]) as process:
        num_bytes = sum(len(chunk) for _, chunk in process.read())
        process.finish()
    if not num_bytes:
        raise BadVideo("corrupt", "not one frame could be decoded")
    return num_bytes // _FRAME_BYTES

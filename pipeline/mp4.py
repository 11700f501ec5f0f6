"""What an MP4 file of our own making holds, read from its boxes: no process has to be started for it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

_HEADER_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """The video track: sizes in pixels, `num_frames` samples that last `duration_s` in all."""

    width: int
    height: int
    num_frames: int
    duration_s: float


def read_video_track(file: IO[bytes]) -> Track | None:
    """The first video track of an MP4 that ffmpeg wrote for us with its index in front; None where it has no frame.

    Not for foreign files: `pipeline.probe` is.
    """
    file.seek(0)
    moov = next((body for kind, body in _boxes(memoryview(file.read(_HEADER_BYTES))) if kind == b"moov"), None)
    if moov is None:
        return None
    for trak in (body for kind, body in _boxes(moov) if kind == b"trak"):
        if bytes(_find(trak, b"mdia", b"hdlr")[8:12]) != b"vide":
            continue
        # Of the sample entry: the track header's have the pixels' shape in them.
        width, height = struct.unpack_from(">HH", _find(trak, b"mdia", b"minf", b"stbl", b"stsd"), 40)
        mdhd = _find(trak, b"mdia", b"mdhd")
        timescale, duration = struct.unpack_from(">IQ" if mdhd[0] else ">II", mdhd, 20 if mdhd[0] else 12)
        _, num_frames = struct.unpack_from(">II", _find(trak, b"mdia", b"minf", b"stbl", b"stsz"), 4)
        if not num_frames or not duration:
            return None
        return Track(width=width, height=height, num_frames=num_frames, duration_s=duration / timescale)
    return None


def _find(box: memoryview, *path: bytes) -> memoryview:
    for name in path:
        box = next(body for kind, body in _boxes(box) if kind == name)
    return box


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        header = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, at + 8)
            header = 16
        if size < header:
            return
        yield kind, data[at + header : at + size]
        at += size

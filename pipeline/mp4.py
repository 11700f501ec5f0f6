"""What the sample table of an MP4 or MOV file says, read from its boxes: no process has to be started for it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import IO

import numpy as np

MP4_CONTAINER = "mov,mp4,m4a,3gp,3g2,mj2"
"""The name that ffprobe has for it."""
_MAX_HEADER_BYTES = 256 * 2**20
_MAX_BOXES = 2**16
_UNTIMED_EDIT = -1
_FULL_SPEED = 0x10000


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """A video track. Of `num_packets` samples that have bytes the edit list shows `num_frames`, for `duration_s` from `start_s` on.

    width, height: in pixels, of the sample entry.
    start_s: when the first shown picture begins.
    last_s: how long after it the last one does.
    longest_step_s: the longest time from one picture to the next.
    """

    width: int
    height: int
    num_packets: int
    num_frames: int
    start_s: float
    last_s: float
    longest_step_s: float
    duration_s: float


class _Odd(Exception):
    """The table is not of the plain kind that this module reads."""


def read_video_track(file: IO[bytes], track_id: int | None = None) -> Track | None:
    """A video track of an MP4 or MOV, own or foreign: the one numbered `track_id`, or else the only one.

    None where there is no such track or none with frames, and where the table alone does not tell: fragmented files,
    edit lists of several parts, damaged boxes. The caller then has to list the packets.
    """
    try:
        size_bytes = file.seek(0, 2)
        moov = _read_header(file, size_bytes)
        movie_scale = _scale(_find(moov, b"mvhd"))[0]
        if any(kind == b"mvex" for kind, _ in _boxes(moov)):
            raise _Odd
        tracks = [body for kind, body in _boxes(moov) if kind == b"trak"]
        videos = [track for track in tracks if _kind(track) == b"vide" and track_id in (None, _number(track))]
        if len(videos) != 1:
            raise _Odd
        return _describe(videos[0], movie_scale, size_bytes)
    except (_Odd, StopIteration, struct.error, ValueError, IndexError, OverflowError, ZeroDivisionError):
        return None


def keyframe_lead(file: IO[bytes], stream: int, at_s: float) -> float:
    """How much earlier than its time a seek has to go, in seconds, for the last keyframe that is shown by `at_s`.

    ffmpeg seeks by when packets are decoded; where that is long before they are shown (a frame that stays for long among
    frames stored out of order), a keyframe that is shown after `at_s` may be decoded before.

    Args:
        stream: number of the stream in the file.
        at_s: its timestamp. 0 where the table does not tell.
    """
    try:
        moov = _read_header(file, file.seek(0, 2))
        track = [body for kind, body in _boxes(moov) if kind == b"trak"][stream]
        table = _find(track, b"mdia", b"minf", b"stbl")
        keys = _find(table, b"stss")
        numbers = np.frombuffer(keys[8 : 8 + 4 * struct.unpack_from(">I", keys, 4)[0]], ">u4").astype(np.int64) - 1
        count = int(struct.unpack_from(">II", _find(table, b"stsz"), 4)[1])
        steps, late = _runs(_find(table, b"stts"), ">u4", count), _runs(_find(table, b"ctts"), ">i4", count)
        decoded = np.concatenate([[0], np.cumsum(steps)[:-1]])
        delay_s, media_start, _ = _edit(track, _scale(_find(moov, b"mvhd"))[0])
        scale = _scale(_find(track, b"mdia", b"mdhd"))[0]
        at = (at_s - float(delay_s)) * scale + media_start + 0.5
        by_then = numbers[decoded[numbers] + late[numbers] <= at]
        # It takes every frame to be shown as long after it is decoded as the first of all.
        usual = int((decoded + late).min())
        return max(0.0, float(at - decoded[by_then[-1]] - usual - 1) / scale) if len(by_then) else 0.0
    except (_Odd, StopIteration, struct.error, ValueError, IndexError, OverflowError, ZeroDivisionError):
        return 0.0


def has_several_edits(file: IO[bytes], stream: int) -> bool:
    """Whether the edit list of a stream shows more than one part of it, as QuickTime joins and cuts do."""
    try:
        moov = _read_header(file, file.seek(0, 2))
        edits = _edits([body for kind, body in _boxes(moov) if kind == b"trak"][stream])
    except (_Odd, StopIteration, struct.error, ValueError, IndexError):
        return False
    return sum(media_start >= 0 for _, media_start, _ in edits) > 1


def _describe(track: memoryview, movie_scale: int, size_bytes: int) -> Track:
    table = [b"mdia", b"minf", b"stbl"]
    width, height = struct.unpack_from(">HH", _find(track, *table, b"stsd"), 40)
    scale, stated = _scale(_find(track, b"mdia", b"mdhd"))
    count = int(struct.unpack_from(">II", _find(track, *table, b"stsz"), 4)[1])
    if not 0 < count <= size_bytes:
        raise _Odd
    steps = _runs(_find(track, *table, b"stts"), ">u4", count)
    begins = np.concatenate([[0], np.cumsum(steps)[:-1]])
    if any(kind == b"ctts" for kind, _ in _boxes(_find(track, *table))):
        begins = begins + _runs(_find(track, *table, b"ctts"), ">i4", count)  # negative ones are in version 0 too
    delay_s, media_start, length_s = _edit(track, movie_scale)
    shown = begins >= media_start
    if length_s:
        # In units of the movie, which may be coarse: to the nearest unit of the track, as ffmpeg does.
        shown &= begins < media_start + int(length_s * scale + Fraction(1, 2))
    is_whole = bool(shown.all())
    stored = _are_stored(_find(track, *table, b"stsz"), count)
    shown &= stored
    shown_begins, shown_steps = begins[shown], steps[shown]
    num_frames = len(shown_begins)
    if not num_frames or not stated:
        raise _Odd
    first = int(shown_begins.min())
    # Of a part the edit says how long it is shown; steps are those of decoding.
    end = media_start + length_s * scale if length_s else int((shown_begins + shown_steps).max())
    length = stated if is_whole else end - first
    start_s = delay_s + Fraction(max(0, first - media_start), scale)
    return Track(
        width=width,
        height=height,
        num_packets=int(stored.sum()),
        num_frames=num_frames,
        start_s=float(start_s),
        last_s=(int(shown_begins.max()) - first) / scale,
        longest_step_s=float(np.diff(np.sort(shown_begins)).max(initial=0)) / scale,
        duration_s=float(length / scale),
    )


def _are_stored(sizes: memoryview, count: int) -> np.ndarray:
    """Which samples (count,) have bytes; those without are no packets, and the picture before them stays."""
    if struct.unpack_from(">I", sizes, 4)[0]:
        return np.ones(count, bool)
    each_bytes = np.frombuffer(sizes[12 : 12 + 4 * count], ">u4")
    if len(each_bytes) != count:
        raise _Odd
    return each_bytes > 0


def _edit(track: memoryview, movie_scale: int) -> tuple[Fraction, int, Fraction]:
    """(seconds before the track, where it begins on its own axis, seconds of it that are shown; 0: all)."""
    try:
        edits = _edits(track)
    except StopIteration:
        return Fraction(0), 0, Fraction(0)
    delay = 0
    while edits and edits[0][1] == _UNTIMED_EDIT:
        delay += edits.pop(0)[0]
    if len(edits) != 1 or edits[0][2] != _FULL_SPEED or edits[0][1] < 0:
        raise _Odd
    return Fraction(delay, movie_scale), edits[0][1], Fraction(edits[0][0], movie_scale)


def _edits(track: memoryview) -> list[tuple[int, int, int]]:
    """(length in units of the movie, begin in units of the track, speed in 1/65536) of each entry of the edit list."""
    table = _find(track, b"edts", b"elst")
    count = struct.unpack_from(">I", table, 4)[0]
    entry = struct.Struct(">Qqi" if table[0] else ">Iii")
    if count * entry.size > len(table):
        raise _Odd
    return list(entry.iter_unpack(table[8 : 8 + count * entry.size]))


def _runs(table: memoryview, value_type: str, count: int) -> np.ndarray:
    """The values (count,) int64 of a table of (how many, value) in runs."""
    entries = struct.unpack_from(">I", table, 4)[0]
    pairs = np.frombuffer(table[8 : 8 + 8 * entries], ">u4").reshape(-1, 2)
    repeats = pairs[:, 0].astype(np.int64)
    if len(pairs) != entries or int(repeats.sum()) != count or (repeats > count).any():
        raise _Odd
    return np.repeat(pairs[:, 1].astype(">u4").view(value_type).astype(np.int64), repeats)


def _scale(header: memoryview) -> tuple[int, int]:
    """(units a second, duration in them) of an mvhd or mdhd box."""
    scale, duration = struct.unpack_from(">IQ" if header[0] else ">II", header, 20 if header[0] else 12)
    return int(scale), int(duration)


def _kind(track: memoryview) -> bytes:
    return bytes(_find(track, b"mdia", b"hdlr")[8:12])


def _number(track: memoryview) -> int:
    header = _find(track, b"tkhd")
    return int(struct.unpack_from(">I", header, 20 if header[0] else 12)[0])


def _read_header(file: IO[bytes], size_bytes: int) -> memoryview:
    """The body of the moov box, wherever it stands; the samples are skipped."""
    at = 0
    for _ in range(_MAX_BOXES):
        file.seek(at)
        head = file.read(16)
        size, kind = struct.unpack_from(">I4s", head)
        header_bytes = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", head, 8)
            header_bytes = 16
        if kind == b"moof" or size < header_bytes or size > size_bytes - at:
            raise _Odd
        if kind == b"moov":
            if size > _MAX_HEADER_BYTES:
                raise _Odd
            file.seek(at + header_bytes)
            return memoryview(file.read(size - header_bytes))
        at += size
    raise _Odd


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

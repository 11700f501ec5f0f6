"""Videos that were damaged on purpose: real clips with seeded changes, and addresses of files that nobody may read."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path

from tests.corpora import real_clips
from tests.faults.cases import copy_piece

_MAX_BYTES = 400_000


def make_pieces(folder: Path) -> list[Path]:
    """A second of each real clip, or its first bytes where ffmpeg has no muxer that takes its streams as they are."""
    folder.mkdir()
    pieces = []
    for name, path in sorted(real_clips().items()):
        piece = folder / name.replace("/", "-")
        copy_piece(path, piece, 1)
        assert piece.stat().st_size > 0
        pieces.append(piece)
    return pieces


def mutate(data: bytes, others: Sequence[bytes], addresses: Sequence[str], draw: random.Random) -> tuple[bytes, str]:
    """`data` with one to three changes, and their names."""
    names = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        name = draw.choice(list(_CHANGES) if len(data) > 64 else ["splice"])
        data = _CHANGES[name](data, draw.choice(others), draw.choice(addresses), draw)[:_MAX_BYTES]
        names.append(name)
    return data, "+".join(names)


def _flip_bits(data: bytes, other: bytes, address: str, draw: random.Random) -> bytes:
    changed = bytearray(data)
    # Headers stand at the ends; a flip in the middle of the pictures is seldom news to a demuxer.
    near = draw.choice((len(data), min(len(data), 2048)))
    for _ in range(draw.choice((1, 8, 64, 512))):
        place = draw.randrange(near)
        changed[-1 - place if draw.random() < 0.3 else place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, other: bytes, address: str, draw: random.Random) -> bytes:
    return data[: draw.randrange(1, len(data))]


def _splice(data: bytes, other: bytes, address: str, draw: random.Random) -> bytes:
    """A box or chunk, or any range, of another file in the place of, or between, ranges of this one."""
    start, end = _span(data, draw)
    first, last = _box(other, draw) if draw.random() < 0.5 else _span(other, draw)
    return data[:start] + other[first:last] + data[draw.choice((start, end)) :]


def _repeat(data: bytes, other: bytes, address: str, draw: random.Random) -> bytes:
    start, end = _box(data, draw) if draw.random() < 0.5 else _span(data, draw)
    return data[:start] + data[start:end] * draw.randint(2, 4) + data[end:]


def _remove(data: bytes, other: bytes, address: str, draw: random.Random) -> bytes:
    start, end = _box(data, draw) if draw.random() < 0.5 else _span(data, draw)
    return data[:start] + data[end:]


def _zero(data: bytes, other: bytes, address: str, draw: random.Random) -> bytes:
    start, end = _span(data, draw)
    return data[:start] + bytes(end - start) + data[end:]


def _inflate(data: bytes, other: bytes, address: str, draw: random.Random) -> bytes:
    """A size, a count or a time that is far too large, or negative."""
    place = draw.randrange(min(len(data), 4096) - 8)
    value = draw.choice((0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0x00FFFFFF, 0xFFFF0000))
    return data[:place] + struct.pack(draw.choice("<>") + "I", value) + data[place + 4 :]


def _point_outside(data: bytes, other: bytes, address: str, draw: random.Random) -> bytes:
    """An address where a container, or whoever believes the first line, would look for one."""
    text = address.encode()
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n" + text + b"\n#EXT-X-ENDLIST\n"
    script = b"ffconcat version 1.0\nfile '" + text + b"'\nduration 2\n"
    url = struct.pack(">I4sI", 12 + len(text) + 1, b"url ", 0) + text + b"\0"
    reference = struct.pack(">I4sII", 16 + len(url), b"dref", 0, 1) + url
    kind = draw.choice(("playlist", "script", "box", "text"))
    if kind in ("playlist", "script"):
        head = playlist if kind == "playlist" else script
        return head if draw.random() < 0.5 else head + data
    place = data.find(b"dref") - 4 if kind == "box" else -1
    place = place if place >= 0 else draw.randrange(len(data))
    new = reference if kind == "box" else text
    return data[:place] + new + data[place + len(new) :]


_CHANGES = {
    "flip": _flip_bits,
    "truncate": _truncate,
    "splice": _splice,
    "repeat": _repeat,
    "remove": _remove,
    "zero": _zero,
    "inflate": _inflate,
    "address": _point_outside,
}


def _span(data: bytes, draw: random.Random) -> tuple[int, int]:
    size = min(len(data), draw.choice((4, 64, 1024, 65_536)))
    start = draw.randrange(len(data) - size + 1)
    return start, start + size


def _box(data: bytes, draw: random.Random) -> tuple[int, int]:
    """Something that looks like a box of MP4 or a chunk of RIFF: four letters, and the size beside them."""
    for _ in range(200):
        place = draw.randrange(max(1, len(data) - 8))
        for at, kind in ((data.find(mark, place), order) for mark, order in _MARKS):
            if at < 4 or at + 8 > len(data):
                continue
            start = at - 4 if kind == ">" else at
            (size,) = struct.unpack_from(f"{kind}I", data, at - 4 if kind == ">" else at + 4)
            if 8 <= size <= len(data) - start:
                return start, start + size
    return _span(data, draw)


_MARKS = tuple(
    (mark, order)
    for order, marks in (
        (">", (b"trak", b"stbl", b"stsz", b"stco", b"moov", b"mdat")),
        ("<", (b"LIST", b"idx1", b"strl")),
    )
    for mark in marks
)

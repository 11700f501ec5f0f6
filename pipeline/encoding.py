"""Frames of many clips to full batches, and the codes back to the clips that they belong to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from pipeline.errors import DatasetError
from pipeline.schema import Reject

Encode = Callable[[np.ndarray], np.ndarray]
"""Frames uint8 (b h w c) to codes uint16 (b h w); the caller of this package brings it."""


class Piece(NamedTuple):
    """Frames of one clip, in their order. A clip is one piece or several; its last one says so.

    frames: uint8 (t h w c), one array for each picture that is shown of them (a crop, a view), with the same t; none in
        the piece of a reject.
    reject: why the clip has no sample; earlier pieces of it count for nothing then.
    """

    frames: list[np.ndarray]
    is_last: bool
    reject: Reject | None = None


Encoded = list[np.ndarray] | Reject
"""What became of a clip: codes uint16 (t h w) for each of its pictures, or its reject."""


def encode_pieces(pieces: Iterable[Piece], encode: Encode, batch_frames: int) -> Iterator[Encoded]:
    """The outcome of each clip, in order; frames of many clips share a batch, one size a batch.

    Every batch has exactly `batch_frames` frames (the last one is padded), so the kernels, and with them the rounding
    and the codes, do not depend on how far a broken-off run came.

    Raises:
        DatasetError: the encoder gave codes for another number of frames than it got.
    """
    batches: dict[int, _Batch] = {}
    waiting: deque[_Clip] = deque()  # from the first one whose outcome is not known
    is_new = True
    for piece in pieces:
        if is_new:
            waiting.append(_Clip())
        clip, is_new = waiting[-1], piece.is_last
        clip.is_whole, clip.reject = piece.is_last, piece.reject
        clip.codes = clip.codes or [_Codes() for _ in piece.frames]
        for frames, codes in zip(piece.frames, clip.codes, strict=False):  # a reject has none
            batches.setdefault(frames.shape[1], _Batch(encode, batch_frames)).add(frames, codes)
        yield from _known(waiting)
    for batch in batches.values():
        batch.finish()
    yield from _known(waiting)


class _Clip:
    def __init__(self) -> None:
        self.codes: list[_Codes] = []
        self.is_whole = False
        self.reject: Reject | None = None


class _Codes:
    """The codes of one picture as they come, and how many frames' are still due."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.due = 0


def _known(waiting: deque[_Clip]) -> Iterator[Encoded]:
    while waiting and waiting[0].is_whole:
        clip = waiting[0]
        if clip.reject is None and any(codes.due for codes in clip.codes):
            return
        waiting.popleft()
        yield clip.reject or [np.concatenate(codes.parts) for codes in clip.codes]


class _Batch:
    """Frames of one size that wait for a full batch."""

    def __init__(self, encode: Encode, batch_frames: int) -> None:
        self._encode, self._size = encode, batch_frames
        self._frames: deque[tuple[np.ndarray, _Codes]] = deque()
        self._count = 0

    def add(self, frames: np.ndarray, codes: _Codes) -> None:
        codes.due += len(frames)
        self._frames.append((frames, codes))
        self._count += len(frames)
        while self._count >= self._size:
            self._run(self._size)

    def finish(self) -> None:
        if self._count:
            self._run(self._count)

    def _run(self, count: int) -> None:
        parts: list[np.ndarray] = []
        owners: list[tuple[_Codes, int]] = []
        left = count
        while left:
            frames, codes = self._frames.popleft()
            if len(frames) > left:
                self._frames.appendleft((frames[left:], codes))
                frames = frames[:left]
            parts.append(frames)
            owners.append((codes, len(frames)))
            left -= len(frames)
        self._count -= count
        if count < self._size:
            parts.append(np.repeat(parts[-1][-1:], self._size - count, axis=0))
        found = self._encode(np.concatenate(parts))
        if len(found) != self._size:
            raise DatasetError(f"the encoder gave codes for {len(found)} of {self._size} frames")
        for codes, length in owners:
            codes.parts.append(found[:length])
            codes.due -= length
            found = found[length:]

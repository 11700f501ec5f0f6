"""Pieces of clips to codes: full batches, and the codes of a frame are the codes of that frame, in every view."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.encoding import Piece, encode_pieces
from pipeline.errors import DatasetError
from pipeline.schema import Reject

REJECT = Reject(path="a.mp4", stage="tokenize", reject_class="corrupt", reason="cut off")


def hash_frames(frames: np.ndarray) -> np.ndarray:
    """A toy tokenizer: 2 x 2 codes of a frame from the SHA-256 of its bytes."""
    digests = [np.frombuffer(hashlib.sha256(frame.tobytes()).digest()[:8], np.uint16) for frame in frames]
    return np.stack(digests).reshape(-1, 2, 2)


@settings(deadline=None, max_examples=60)
@given(
    clips=st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans()), max_size=8),
    batch_frames=st.integers(1, 16),
    sides=st.sampled_from([(8,), (8, 8), (8, 16, 8)]),
)
def test_codes_belong_to_their_frames(
    clips: list[tuple[list[int], bool]], batch_frames: int, sides: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    pieces: list[Piece] = []
    expected: list[Reject | list[np.ndarray]] = []
    for lengths, fails in clips:
        parts = [[rng.integers(0, 256, (length, side, side, 3), np.uint8) for side in sides] for length in lengths]
        ends = [not fails and number == len(parts) - 1 for number in range(len(parts))]
        pieces += [Piece(part, is_last) for part, is_last in zip(parts, ends, strict=True)]
        if fails:  # after it gave frames
            pieces.append(Piece([], True, REJECT))
        expected.append(REJECT if fails else [hash_frames(np.concatenate(all)) for all in zip(*parts, strict=True)])
    batches: dict[int, list[int]] = {}

    def encode(frames: np.ndarray) -> np.ndarray:
        batches.setdefault(frames.shape[1], []).append(len(frames))
        return hash_frames(frames)

    found = list(encode_pieces(pieces, encode, batch_frames))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, Reject) or isinstance(ours, Reject):
            assert ours is theirs
        else:
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)
    frames = sum(sum(lengths) for lengths, _ in clips)
    for side, sizes in batches.items():
        assert set(sizes) == {batch_frames}
        assert len(sizes) == -(-frames * sides.count(side) // batch_frames)  # only the last one is padded


def test_it_works_while_clips_arrive() -> None:
    """A clip is handed on as soon as its last frame is encoded, so memory does not grow with the shard."""
    taken = []

    def arrive() -> Iterator[Piece]:
        for n in range(6):
            taken.append(n)
            yield Piece([np.zeros((4, 8, 8, 3), np.uint8)], True)

    ahead = [len(taken) - n for n, _ in enumerate(encode_pieces(arrive(), hash_frames, 4))]
    assert ahead == [1] * 6


def test_an_encoder_that_loses_a_frame() -> None:
    pieces = [Piece([np.zeros((4, 8, 8, 3), np.uint8)], True)]
    with pytest.raises(DatasetError, match="codes for 3 of 4 frames"):
        list(encode_pieces(pieces, lambda frames: hash_frames(frames)[1:], 4))

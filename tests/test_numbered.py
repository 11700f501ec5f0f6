"""The helper itself: what it draws it reads, and it notices what is not as drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.numbered import draw, encode, read, show


@pytest.mark.parametrize(("width", "height"), [(96, 96), (160, 90), (48, 64)])
def test_what_is_drawn_is_read(width: int, height: int) -> None:
    assert [read(draw(number, width, height)) for number in (0, 1, 1365, 4095)] == [
        (0, 0.0), (1, 0.0), (1365, 0.0), (4095, 0.0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "turn", [np.fliplr, np.flipud, lambda frame: np.rot90(frame, 1), lambda frame: np.rot90(frame, 2)]
)
def test_a_turned_frame_is_not_read_as_upright(turn: object) -> None:
    assert callable(turn)
    assert read(turn(draw(1365, 96, 96)))[1] > 20


def test_two_frames_in_one_have_no_number() -> None:
    mixed = (draw(0, 96, 96).astype(int) + draw(4095, 96, 96)) // 2
    assert read(mixed)[0] is None


def test_an_encoded_video_shows_its_numbers(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", range(7, 17), "-c:v", "libx264", fps=10)
    assert show(path) == list(range(7, 17))
    assert show(path, fps=5) == [7, 9, 11, 13, 15]

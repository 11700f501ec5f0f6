"""Frames that carry their number, and coloured marks that tell which way up they are: drawn, encoded, and read again.

Reading goes by plain ffmpeg and numpy, never through the pipeline, so that a test compares with what a player shows.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

NUM_BITS = 12
_CELLS = 6
_GREY, _DARK, _LIGHT = 96, 20, 235
_MARKS = {
    (0, 0): (210, 50, 50),
    (0, 5): (50, 190, 60),
    (5, 0): (50, 60, 210),
    (5, 5): (225, 225, 225),
    (0, 2): (190, 190, 60),
    (5, 3): (180, 110, 70),
}
"""Colour (r g b) of a cell (row, column): each corner is another, so that no turn or mirror image reads as upright."""
_LEAST_CONTRAST = 60


def draw(number: int, width: int, height: int) -> np.ndarray:
    """uint8 (height width 3): `number`, 0 to 4095, in the centre square, as twelve bits, each beside its inverse."""
    assert 0 <= number < 2**NUM_BITS
    frame = np.full((height, width, 3), _GREY, np.uint8)
    rows, columns = _edges(frame)
    for (row, column), colour in [*_MARKS.items(), *_bit_cells(number)]:
        frame[rows[row] : rows[row + 1], columns[column] : columns[column + 1]] = colour
    return frame


def read(frame: np.ndarray) -> tuple[int | None, float]:
    """(number or None where it cannot be read, largest error of a mark's colour in 0..255) of an RGB frame (h w 3).

    An error of 1 to 4 is what coding costs; None or an error far above that says turned, mixed or in wrong colours.
    """
    rows, columns = _edges(frame)
    seen = np.array(
        [[_inner(frame, rows, columns, row, column) for column in range(_CELLS)] for row in range(_CELLS)]
    )  # (6 6 3)
    error = max(float(np.abs(seen[cell] - colour).max()) for cell, colour in _MARKS.items())
    grey, number = seen.mean(2), 0
    for bit in range(NUM_BITS):
        row, column = _place(bit)
        contrast = grey[row, column] - grey[row, column + 1]
        if abs(contrast) < _LEAST_CONTRAST:
            return None, error
        number |= int(contrast > 0) << bit
    return number, error


def encode(
    path: Path,
    numbers: Iterable[int],
    *words: str,
    width: int = 96,
    height: int = 96,
    fps: float = 25,
    before: Sequence[str] = (),
) -> Path:
    """Write a video of numbered frames at `fps` and return `path`; its container is that of its extension.

    Args:
        words: further output options of ffmpeg, such as "-c:v", "libx264", "-g", "25"; input 0 is the pictures.
        before: further inputs with their options, such as "-f", "lavfi", "-i", "sine".
    """
    command = ["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-framerate", f"{fps}", "-i", "-", *before, "-pix_fmt", "yuv420p", "-threads", "1", *words, str(path)]
    pictures = b"".join(draw(number, width, height).tobytes() for number in numbers)
    subprocess.run(command, input=pictures, check=True)
    return path


def show(path: Path, fps: float | None = None, stream: str = "v:0") -> list[int | None]:
    """The numbers of the frames that plain ffmpeg shows of a video, once each, or at `fps` as a player holds them.

    Pixels are made square and the file's rotation is applied, both as a player does.
    """
    rate = f"fps={fps:g}:start_time=0:round=up," if fps else ""
    side = 96
    shown = f"{rate}scale=trunc(iw*sar/2)*2:ih,setsar=1,crop=min(iw\\,ih):min(iw\\,ih),scale={side}:{side}"
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-map", f"0:{stream}", "-fps_mode", "passthrough"]
    command += ["-vf", shown, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return [read(frame)[0] for frame in np.frombuffer(raw, np.uint8).reshape(-1, side, side, 3)]


def _place(bit: int) -> tuple[int, int]:
    """Row and column of a bit; its inverse is the cell to the right."""
    return 1 + bit % 4, bit // 4 * 2


def _bit_cells(number: int) -> list[tuple[tuple[int, int], tuple[int, int, int]]]:
    cells = []
    for bit in range(NUM_BITS):
        row, column = _place(bit)
        pair = (_LIGHT, _DARK) if number >> bit & 1 else (_DARK, _LIGHT)
        cells += [((row, column + side), (level,) * 3) for side, level in enumerate(pair)]
    return cells


def _edges(frame: np.ndarray) -> tuple[list[int], list[int]]:
    """Where the rows and the columns of the cells of the centre square begin, and where the last ends, in pixels."""
    height, width = frame.shape[:2]
    side = min(height, width)
    steps = [round(step * side / _CELLS) for step in range(_CELLS + 1)]
    return [(height - side) // 2 + step for step in steps], [(width - side) // 2 + step for step in steps]


def _inner(frame: np.ndarray, rows: list[int], columns: list[int], row: int, column: int) -> np.ndarray:
    """The mean colour (3,) of the inner third of a cell, away from what the coding blurs."""

    def third(edges: list[int], place: int) -> slice:
        start, stop = edges[place : place + 2]
        margin = (stop - start) // 3
        return slice(start + margin, stop - margin)

    return frame[third(rows, row), third(columns, column)].astype(float).mean((0, 1))

"""Equal instants of a video show equal frames in every container and storage mode: a matrix of numbered frames.

Here each property alone, and every pair of two values; tests/faults has each property in every container and mode.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.pipeline.axis_cells import MODES, RATES_HZ, Cell, check_cell, pair_cells, single_cells
from tests.pipeline.axis_inputs import DIMENSIONS, impossible

CELLS = list(dict.fromkeys([*single_cells(["mp4-600"], ["remux window"]), *pair_cells()]))

KNOWN_WRONG = {
    "MPEG-PS has a pts now and then: the last frame's end, and a remux's times, are guessed": (
        "mpg 2:1 late b-frames 709-tv interlaced, copy whole, 12.5 Hz",
        "mpg equal open-gop 2020-tv, transcode window, 4 Hz",
        "mpg plain, remux window, 4 Hz",
        "mpg plain, remux shots, 4 Hz",
        "mpg plain, transcode whole, 4 Hz",
    ),
    "copied packets of a timescale of 600 last one tick, so the index ends a remux with B-frames 38 ms early": (
        "mp4-600 90 2:1 held equal b-frames 709-tv 10 interlaced, remux whole, 7 Hz",
        "mp4-600 270 late b-frames 601-pc interlaced, remux shots, 12.5 Hz",
        "mov leads b-frames 2020-tv, remux whole, 4 Hz",
        "mp4-600 b-frames, remux window, 12.5 Hz",
        "mp4-600 open-gop, remux window, 4 Hz",
    ),
    "shots of a variable frame rate are transcoded at its mean, which drops frames": (
        "mp4-1000 270 held leads open-gop 2020-tv interlaced, transcode shots, 4 Hz",
    ),
}
"""Why, to the cells that are wrong; one that becomes right fails until it is taken off."""
_WHY = {cell: why for why, cells in KNOWN_WRONG.items() for cell in cells}


def _marked(cell: Cell) -> ParameterSet:
    marks = [pytest.mark.xfail(strict=True, reason=_WHY[str(cell)])] if str(cell) in _WHY else []
    return pytest.param(cell, id=str(cell), marks=marks)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("axis")


@pytest.mark.parametrize("cell", map(_marked, CELLS))
def test_cell(cell: Cell, videos: Path, tmp_path: Path) -> None:
    assert check_cell(cell, videos, tmp_path / "out") == []


def test_every_pair_of_values_that_can_meet_does() -> None:
    dimensions = {**DIMENSIONS, "mode": MODES, "rate_hz": RATES_HZ}
    plain = {name: values[0] for name, values in DIMENSIONS.items()}
    possible = {
        pair
        for (a, xs), (b, ys) in itertools.combinations(dimensions.items(), 2)
        for pair in itertools.product(((a, x) for x in xs), ((b, y) for y in ys))
        if any(not impossible({**plain, "container": container, **dict(pair)}) for container in DIMENSIONS["container"])
    }
    met = set()
    for cell in CELLS:
        values = {name: getattr(cell.video, name) for name in DIMENSIONS} | {"mode": cell.mode, "rate_hz": cell.rate_hz}
        assert impossible(values) == ""
        met |= set(itertools.combinations(values.items(), 2))
    print(f"{len(CELLS)} cells, {len({cell.video for cell in CELLS})} videos, {len(possible)} pairs of values")
    assert met == possible

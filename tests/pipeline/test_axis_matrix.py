"""Equal instants of a video show equal frames in every container and storage mode: a matrix of numbered frames.

Here each property alone, and every pair of two values; tests/faults has each property in every container and mode.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.pipeline.axis_cells import MODES, RATES_HZ, Cell, check_cell, pair_cells, single_cells
from tests.pipeline.axis_inputs import DIMENSIONS, impossible

CELLS = list(dict.fromkeys([*single_cells(["mp4-600"], ["remux window"]), *pair_cells()]))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("axis")


@pytest.mark.parametrize("cell", CELLS, ids=str)
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

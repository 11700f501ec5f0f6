"""The matrix of tests/pipeline/test_axis_matrix.py at full size: every property in every container and every mode of storage and
clips, and drawn cells in which all properties vary together."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.axis_cells import MODES, Cell, check_cell, draw_cell, single_cells
from tests.pipeline.axis_inputs import DIMENSIONS

_DRAWN_CELLS = 40
"""For each seed."""


@pytest.fixture(scope="module")
def videos(only_in_make_faults: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("axis")


@pytest.fixture(scope="module")
def checked() -> Iterator[list[Cell]]:
    cells: list[Cell] = []
    yield cells
    print(f"\n{len(cells)} cells of the matrix checked, {len({cell.video for cell in cells})} videos")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("container", DIMENSIONS["container"])
def test_every_property(container: str, mode: str, videos: Path, checked: list[Cell], tmp_path: Path) -> None:
    _check(list(single_cells([container], [mode])), videos, checked, tmp_path)


@pytest.mark.timeout(3600)
def test_drawn_cells(seed: int, videos: Path, checked: list[Cell], tmp_path: Path) -> None:
    draw = random.Random(f"axis {seed}")
    _check([draw_cell(draw) for _ in range(_DRAWN_CELLS)], videos, checked, tmp_path)


def _check(cells: list[Cell], videos: Path, checked: list[Cell], place: Path) -> None:
    wrong = []
    for cell in cells:
        if found := check_cell(cell, videos, place / "out"):
            wrong += [f"{cell}:", *(f"  {one}" for one in found)]
        shutil.rmtree(place / "out")
        checked.append(cell)
    assert not wrong, "\n".join(wrong)

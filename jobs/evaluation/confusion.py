"""A confusion matrix as a picture.

Axes: c classes; h height, w width of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIDE_PX = 900
_MAX_CELL_PX = 44
_MIN_LABELLED_PX = 11
_MIN_COUNTED_PX = 30
_MAX_NAME = 28
_PAPER, _INK = (251, 251, 250), (28, 30, 33)
_FULL = np.array([10, 95, 86])


def draw_confusion(matrix: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """uint8 (h w 3): a row a label, a column a prediction, darker for a larger share of the label's samples.

    Names stand beside the rows where there is room for them, counts in the cells of few classes. A label without samples
    is an empty row.

    Args:
        matrix: (c c) counts; row is the label.
    """
    num_classes = len(classes)
    if matrix.shape != (num_classes, num_classes):
        raise ValueError(f"draw_confusion: matrix is {matrix.shape} for {num_classes} classes")
    cell = max(1, min(_MAX_CELL_PX, _SIDE_PX // num_classes))
    font = ImageFont.load_default(max(10, min(14, cell - 2)))
    names = [name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 3]}..." for name in classes]
    is_labelled = cell >= _MIN_LABELLED_PX
    left = 16 + (int(max(font.getlength(name) for name in names)) if is_labelled else 0)
    side, top = cell * num_classes, 34
    canvas = Image.new("RGB", (left + side + 16, top + side + 16), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((left, 10), "row: label, column: prediction, in the same order", _INK, ImageFont.load_default(13))
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    colours = (np.array([238, 239, 236]) * (1 - shares[..., None]) + _FULL * shares[..., None]).astype(np.uint8)
    cells = Image.fromarray(colours.repeat(cell, 0).repeat(cell, 1))
    canvas.paste(cells, (left, top))
    for row in range(num_classes) if is_labelled else ():
        middle = top + row * cell + cell // 2
        draw.text((left - 6, middle), names[row], _INK, font, anchor="rm")
        for column in np.flatnonzero(matrix[row]).tolist() if cell >= _MIN_COUNTED_PX else ():
            ink = _PAPER if shares[row, column] > 0.5 else _INK
            draw.text((left + column * cell + cell // 2, middle), str(matrix[row, column]), ink, font, anchor="mm")
    return np.asarray(canvas)

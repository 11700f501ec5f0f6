"""Points on a page: an SVG that needs no script. The name of a point shows where the pointer rests, its picture if it has one."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

COLOURS = (
    "#4269d0", "#efb118", "#e5484d", "#3ca951", "#a463f2", "#12a5b5",
    "#ff8ab7", "#9c6b4e", "#6b8e23", "#d2691e", "#5f6caf", "#c71585",
)  # fmt: skip
"""One a class; further classes share grey."""
_WIDTH, _HEIGHT, _MARGIN, _PANEL = 1000, 640, 12, 240


@dataclass(frozen=True, kw_only=True, slots=True)
class Scatter:
    """Points in classes.

    places: (n 2) floats, x to the right and y upward, in any unit. names: of each point, for a person.
    classes: (n,) class number of each, the largest class first. class_names: of each class.
    pictures: uint8 (h w 3) of some points, by their number.
    """

    places: np.ndarray
    names: Sequence[str]
    classes: np.ndarray
    class_names: Sequence[str]
    pictures: Mapping[int, np.ndarray]


def render_scatter(scatter: Scatter) -> str:
    """HTML of the legend and the points, with names escaped."""
    low, high = scatter.places.min(axis=0), scatter.places.max(axis=0)
    unit = (scatter.places - low) / np.where(high > low, high - low, 1)
    x = _MARGIN + unit[:, 0] * (_WIDTH - 2 * _MARGIN)
    y = _HEIGHT - _MARGIN - unit[:, 1] * (_HEIGHT - 2 * _MARGIN)
    radius = 2.0 if len(unit) > 2000 else 3.5
    groups = []
    for number in range(min(len(scatter.class_names), len(COLOURS) + 1)):
        is_last = number == len(COLOURS)
        members = np.flatnonzero(scatter.classes >= number if is_last else scatter.classes == number)
        circles = "".join(
            f'<circle cx="{x[place]:.1f}" cy="{y[place]:.1f}" r="{radius}"><title>{_escape(scatter.names[place])}</title></circle>'
            for place in members.tolist()
            if place not in scatter.pictures
        )
        groups.append(f'<g fill="{_colour(number)}">{circles}</g>')
    # Drawn last, so that no other point lies over the ones that have a picture.
    for place, picture in scatter.pictures.items():
        name = _escape(scatter.names[place])
        groups.append(
            f'<g class="pictured" fill="{_colour(int(scatter.classes[place]))}"><circle cx="{x[place]:.1f}" '
            f'cy="{y[place]:.1f}" r="{radius + 2}"><title>{name}</title></circle>'
            f'<image href="{_data_uri(picture)}" x="{_WIDTH}" y="0" width="{_PANEL}" height="{_PANEL}"/>'
            f'<text x="{_WIDTH}" y="{_PANEL + 20}">{_escape(scatter.class_names[scatter.classes[place]])}</text></g>'
        )
    return (
        f'<ul class="classes">{_legend(scatter)}</ul><svg class="scatter" viewBox="0 0 {_WIDTH + _PANEL} {_HEIGHT}" '
        f'role="img">{"".join(groups)}</svg>'
    )


def _legend(scatter: Scatter) -> str:
    counts = np.bincount(scatter.classes, minlength=len(scatter.class_names))
    shown = [(name, _colour(number), counts[number]) for number, name in enumerate(scatter.class_names[: len(COLOURS)])]
    if (rest := len(scatter.class_names) - len(COLOURS)) > 0:
        shown.append((f"{rest} others", _colour(len(COLOURS)), counts[len(COLOURS) :].sum()))
    return "".join(
        f'<li style="--role:{colour}"><b>{_escape(name)}</b> {count:,}</li>' for name, colour, count in shown
    )


def _colour(number: int) -> str:
    return COLOURS[number] if number < len(COLOURS) else "#9aa0a6"


def _data_uri(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)


CSS = """
.scatter{display:block;width:100%;background:var(--card);border:1px solid var(--line);border-radius:8px}
.scatter circle{fill-opacity:.72}.scatter circle:hover{fill-opacity:1;stroke:var(--fg);stroke-width:1.5}
.pictured circle{stroke:var(--fg);stroke-width:1;fill-opacity:1}.pictured image,.pictured text{display:none}
.pictured:hover image,.pictured:hover text{display:inline}.pictured text{fill:var(--fg);font-size:15px}
ul.classes{border:0;margin:0 0 10px;padding:0;--role:#9aa0a6}
""".replace("\n", "")

"""Pages a person looks at: one self-contained HTML file of frame strips, tables and plots.

Corpora are untrusted: file names and captions are escaped, the page holds no script, and its content policy lets a
browser load nothing but the images that are inside it.

Axes: t frames, h height, w width, c channels (RGB or 1 grey).
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from jobs.pictures import check_frames, stack_frames
from jobs.scatter import CSS as SCATTER_CSS
from jobs.scatter import Scatter, render_scatter
from pipeline.files import write_atomic

Role = Literal["original", "reconstruction", "masked", "predicted"]

_LEGEND: dict[str, str] = {
    "original": "frames as decoded",
    "reconstruction": "tokens decoded back to frames",
    "masked": "what the model sees; hatched patches are hidden",
    "predicted": "hidden patches filled in by the model",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """The frames of one clip, side by side. frames: uint8 (t h w c), c 1 or 3; role: its colour in the legend."""

    label: str
    frames: np.ndarray
    role: Role = "original"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One clip: its caption (a file name, a text) and strips that are compared with each other, one below the other."""

    caption: str
    strips: Sequence[Strip]


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Counts of values between n + 1 ascending edges; `unit` stands behind the edges."""

    edges: Sequence[float]
    counts: Sequence[int]
    unit: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Texts in columns."""

    columns: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading, one sentence that says what to look for, and what there is to see."""

    heading: str
    note: str
    rows: Sequence[Row] = ()
    histogram: Histogram | None = None
    table: Table | None = None
    picture: np.ndarray | None = None
    """uint8 (h w 3)."""
    scatter: Scatter | None = None


def write_contact_sheet(
    path: Path, *, title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], max_frames: int = 8
) -> None:
    """Write one HTML file that needs nothing else, by rename: a reader sees the old page or the whole new one.

    Args:
        path: the file; its folder must be there.
        title: the page's heading.
        facts: name and value pairs under the heading, such as fingerprint, checkpoint step, PSNR.
        sections: in the order of the page.
        max_frames: a longer strip shows this many of its frames, evenly spaced, the first and the last among them.

    Raises:
        ValueError: frames are not uint8 (t h w c) with c 1 or 3.
        OSError: the file cannot be written.
    """
    roles = [
        role for role in _LEGEND if any(s.role == role for sec in sections for row in sec.rows for s in row.strips)
    ]
    legend = "".join(f'<li class="{role}"><b>{role}</b> {_LEGEND[role]}</li>' for role in roles)
    body = "".join(_render_section(section, max_frames) for section in sections)
    terms = "".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in facts)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{_escape(title)}</title><style>{_CSS}{SCATTER_CSS}</style></head><body>"
        f"<header><h1>{_escape(title)}</h1><dl>{terms}</dl><ul>{legend}</ul></header>"
        f"<main>{body}</main></body></html>\n"
    )
    write_atomic(path, page.encode(errors="replace"))  # a file name may hold bytes that are no UTF-8


def _render_section(section: Section, max_frames: int) -> str:
    parts = [
        _render_histogram(section.histogram) if section.histogram else "",
        _render_table(section.table) if section.table else "",
        _render_picture(section) if section.picture is not None else "",
        render_scatter(section.scatter) if section.scatter else "",
        *(_render_row(row, max_frames) for row in section.rows),
    ]
    return f"<section><h2>{_escape(section.heading)}</h2><p>{_escape(section.note)}</p>{''.join(parts)}</section>"


def _render_histogram(histogram: Histogram) -> str:
    highest, width = max(1, *histogram.counts), 100 / len(histogram.counts)
    bars = "".join(
        f'<rect x="{place * width:.3f}" y="{100 - 100 * count / highest:.3f}" width="{width * 0.94:.3f}" '
        f'height="{100 * count / highest:.3f}"><title>{low:.4g} to {high:.4g}: {count}</title></rect>'
        for place, (count, low, high) in enumerate(
            zip(histogram.counts, histogram.edges[:-1], histogram.edges[1:], strict=True)
        )
    )
    ends = [f"{edge:.4g} {_escape(histogram.unit)}" for edge in (histogram.edges[0], histogram.edges[-1])]
    return (
        f'<div class="histogram"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img">{bars}</svg>'
        f"<div><span>{ends[0]}</span><span>at most {highest:,} in a bar</span><span>{ends[1]}</span></div></div>"
    )


def _render_table(table: Table) -> str:
    head = "".join(f"<th>{_escape(name)}</th>" for name in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in line) + "</tr>" for line in table.lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _render_picture(section: Section) -> str:
    assert section.picture is not None
    image = Image.fromarray(section.picture)
    return (
        f'<img class="picture" src="{_encode(image)}" width="{image.width}" height="{image.height}" '
        f'alt="{_escape(section.heading)}">'
    )


def _render_row(row: Row, max_frames: int) -> str:
    strips = []
    for strip in row.strips:
        check_frames(strip.frames)
        t, h, w, _ = strip.frames.shape
        shown = strip.frames[np.unique(np.linspace(0, t - 1, min(t, max_frames)).round().astype(int))]
        uri = _encode(stack_frames(shown, 1, 0))
        count = f"{t} frames" if len(shown) == t else f"{len(shown)} of {t} frames"
        # Frames are butted in the image and parted by lines that the page draws, so a scaled strip keeps exact pixels.
        strips.append(
            f'<div class="strip {strip.role}"><span>{_escape(strip.label)}<i>{count}, {w}×{h}</i></span>'
            f'<div class="frames" style="--n:{len(shown)}">'
            f'<img src="{uri}" width="{w * len(shown)}" height="{h}" alt="{_escape(strip.label)}"></div></div>'
        )
    return f"<figure><figcaption>{_escape(row.caption)}</figcaption>{''.join(strips)}</figure>"


def _encode(image: Image.Image) -> str:
    """A data URI: PNG, exact, for small strips; WebP at high quality where PNG would make the page heavy."""
    buffer = io.BytesIO()
    small = image.width * image.height <= 1 << 16
    if small or image.width > 16383:  # WebP's limit
        image.convert("RGB").save(buffer, "PNG")
        kind = "png"
    else:
        image.convert("RGB").save(buffer, "WEBP", quality=88, method=4)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)


_CSS = """
:root{color-scheme:light dark;--bg:#fbfbfa;--fg:#1c1e21;--dim:#6b7078;--line:#e3e4e1;--card:#fff;
--original:#7b818b;--reconstruction:#0a7f6f;--masked:#b26a00;--predicted:#5b4bd6}
@media(prefers-color-scheme:dark){:root{--bg:#131518;--fg:#e8eaed;--dim:#989ea8;--line:#2b2f35;--card:#1a1d21;
--original:#8d949f;--reconstruction:#35c2ac;--masked:#e9a23b;--predicted:#9d91ff}}
*{box-sizing:border-box;margin:0}
body{background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
max-width:1560px;margin:0 auto;padding:40px 32px 72px;overflow-wrap:anywhere}
h1{font-size:27px;line-height:1.2;font-weight:650;letter-spacing:-.015em}
h2{font-size:18px;font-weight:650;letter-spacing:-.005em}
dl{display:flex;flex-wrap:wrap;gap:14px 34px;margin-top:20px}
dt{color:var(--dim);font-size:12px;line-height:1.4}
dd{font-variant-numeric:tabular-nums;font-weight:550}
ul{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:6px 26px;margin-top:24px;padding-top:16px;
border-top:1px solid var(--line);font-size:13px;color:var(--dim)}
li b{color:var(--fg);font-weight:600;margin-right:3px}
li::before{content:"";display:inline-block;width:10px;height:10px;border-radius:2px;background:var(--role);margin-right:8px}
section{margin-top:44px}
section>p{color:var(--dim);max-width:90ch;margin:2px 0 16px}
figure{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px 16px 16px;margin-top:12px}
figcaption{font-weight:550;font-size:14px;margin-bottom:10px}
.strip{display:grid;grid-template-columns:132px minmax(0,1fr);gap:14px;align-items:center}
.strip+.strip{margin-top:6px}
.strip>span{font-size:13px;line-height:1.35;border-left:3px solid var(--role);padding-left:10px}
.strip i{display:block;font-style:normal;font-size:11.5px;color:var(--dim);font-variant-numeric:tabular-nums}
.frames{position:relative;max-width:calc(var(--n)*176px);border-radius:3px;overflow:hidden}
.frames img{display:block;width:100%;height:auto;image-rendering:pixelated}
.frames::after{content:"";position:absolute;inset:0;background:repeating-linear-gradient(90deg,
transparent 0 calc(100%/var(--n) - 2px),var(--card) calc(100%/var(--n) - 2px) calc(100%/var(--n)))}
.original{--role:var(--original)}.reconstruction{--role:var(--reconstruction)}
.masked{--role:var(--masked)}.predicted{--role:var(--predicted)}
.histogram{max-width:760px}.histogram svg{display:block;width:100%;height:120px;fill:var(--reconstruction);
border-bottom:1px solid var(--line)}
.histogram div{display:flex;justify-content:space-between;font-size:12px;color:var(--dim);font-variant-numeric:tabular-nums}
.picture{max-width:100%;height:auto}
table{border-collapse:collapse;font-size:13.5px;width:100%}
th{text-align:left;color:var(--dim);font-weight:500}
th,td:not(:last-child){white-space:nowrap}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
@media(max-width:760px){body{padding:24px 16px 48px}
.strip{grid-template-columns:1fr;gap:4px}.strip+.strip{margin-top:12px}}
@media print{figure{break-inside:avoid}}
""".replace("\n", "")

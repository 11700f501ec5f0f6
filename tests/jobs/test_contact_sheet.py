from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.contact_sheet import Row, Section, Strip, write_contact_sheet

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>\" onload=\"x\udcff"
    strip = Strip(label=evil, frames=FRAMES)
    section = Section(heading=evil, note=evil, rows=[Row(caption=evil, strips=[strip])])
    path = tmp_path / "sheet.html"
    write_contact_sheet(path, title=evil, facts=[(evil, evil)], sections=[section])
    page = path.read_text()
    assert "<script" not in page and 'onload="' not in page
    assert "Content-Security-Policy" in page
    assert not re.search(r"(src|href)=\"(?!data:image/)", page) and "url(" not in page
    assert [one.name for one in tmp_path.iterdir()] == ["sheet.html"]


def test_small_strip_is_exact(tmp_path: Path) -> None:
    row = Row(caption="a", strips=[Strip(label="o", frames=FRAMES), Strip(label="g", frames=FRAMES[..., :1])])
    write_contact_sheet(
        tmp_path / "s.html", title="t", facts=[], sections=[Section(heading="h", note="n", rows=[row])], max_frames=3
    )
    colour, grey = re.findall(r"data:image/png;base64,([^\"]+)", (tmp_path / "s.html").read_text())
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(colour))))
    assert (image == np.concatenate(FRAMES[[0, 2, 4]], axis=1)).all()
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(grey)))).shape == (16, 72, 3)

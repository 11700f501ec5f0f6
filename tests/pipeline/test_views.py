"""Which views a config asks for, what they are called, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.views import Crop, ViewChoice, ViewConfig, crops_of


def test_one_view_has_no_name() -> None:
    (view,) = ViewConfig().views(128)
    assert (view.name, view.crop, view.flip) == ("", Crop(size_px=128, scaled_px=128, place="center"), False)
    assert view.key("0123456789abcdef") == "0123456789abcdef"
    (view,) = ViewConfig(resizes=(1.25,), crops=("end",)).views(128)
    assert (view.name, view.crop) == ("", Crop(size_px=128, scaled_px=160, place="end"))


def test_every_combination_is_a_view() -> None:
    config = ViewConfig(more_sizes_px=(256,), resizes=(1.0, 1.25), crops=("start", "center", "end"), flip=True)
    views = config.views(128)
    assert len(views) == len({view.name for view in views}) == 24
    assert [view.name for view in views[:4]] == ["128s", "128sf", "128c", "128cf"]
    assert views[-1].name == "256of320ef" and views[-1].key("ab") == "ab-256of320ef"
    assert all("." not in view.name for view in views)  # webdataset ends a sample's key at its first dot
    assert len(crops_of(views)) == 12  # a flip needs no crop of its own


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (ViewChoice(), ["64s", "64sf", "64c", "64cf", "64of80s", "64of80sf", "64of80c", "64of80cf"]),
        (ViewChoice(flip=False), ["64s", "64c", "64of80s", "64of80c"]),
        (ViewChoice(resized=False), ["64s", "64sf", "64c", "64cf"]),
        (ViewChoice(crops=("center", "end"), resized=False, flip=False), ["64c"]),
    ],
)
def test_views_are_chosen_by_what_they_show(choice: ViewChoice, names: list[str]) -> None:
    views = ViewConfig(resizes=(1.0, 1.25), crops=("start", "center"), flip=True).views(64)
    assert [view.name for view in views if choice.allows(view.name)] == names
    assert choice.allows("")
    with pytest.raises(ConfigError, match="not a name of ours"):
        choice.allows("64x")
    with pytest.raises(ConfigError, match="at least one"):
        ViewChoice(crops=())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"more_sizes_px": (20,)}, "multiples of 8"),
        ({"more_sizes_px": (128,)}, r"frames\.size_px = 128 stands there too"),
        ({"more_sizes_px": (64, 64)}, "twice"),
        ({"resizes": ()}, "at least one"),
        ({"resizes": (0.5,)}, r"in \[1, 16\]"),
        ({"crops": ()}, "at least one"),
        ({"crops": ("left",)}, "start, center, end"),
        ({"crops": ("end", "end")}, "twice"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViewConfig(**options).views(128)

"""Views: which squares of a video's frames become samples, all of them from one decode."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.errors import ConfigError

Place = Literal["start", "center", "end"]
_NAME = re.compile(r"\d+(?P<resized>of\d+)?(?P<place>[sce])(?P<flip>f?)")
"""What `_name` makes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """A square of `size_px` out of frames whose shorter side is scaled to `scaled_px`.

    place: where it lies along the longer side (a square frame's height); along the other side it is centred.
    """

    size_px: int
    scaled_px: int
    place: Place = "center"


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What one sample of a clip shows: a crop of its frames, maybe mirrored left to right.

    name: "" where a clip has this one view only; else letters and digits, part of the sample's key: 128c is 128 px at the
        centre, 128of160sf 128 px out of a shorter side of 160 at the start, mirrored.
    """

    name: str
    crop: Crop
    flip: bool

    def key(self, clip_key: str) -> str:
        """The key of the sample that shows a clip in this view."""
        return f"{clip_key}-{self.name}" if self.name else clip_key


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """More than the centre of each frame: every combination of these is a sample of its own."""

    more_sizes_px: tuple[int, ...] = ()
    """Further sides of the square crop in pixels, beside frames.size_px."""
    resizes: tuple[float, ...] = (1.0,)
    """Shorter sides that a crop is taken from, as multiples of its own side: 1.25 leaves a tenth out at each edge."""
    crops: tuple[Place, ...] = ("center",)
    """Where crops lie along the longer side."""
    flip: bool = False
    """Each crop mirrored left to right as well; not for data where direction matters."""

    def __post_init__(self) -> None:
        if any(size < 8 or size % 8 for size in self.more_sizes_px):
            raise ConfigError(f"views.more_sizes_px = {self.more_sizes_px}: must be multiples of 8 px")
        if not self.resizes or any(not 1 <= resize <= 16 for resize in self.resizes):
            raise ConfigError(f"views.resizes = {self.resizes}: must be at least one, in [1, 16]")
        if not self.crops or not set(self.crops) <= set(get_args(Place)):
            raise ConfigError(f"views.crops = {self.crops}: must be at least one; allowed are start, center, end")
        for name in ("more_sizes_px", "resizes", "crops"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ConfigError(f"views.{name} = {getattr(self, name)}: one stands there twice")

    def views(self, size_px: int) -> list[View]:
        """All views, the plainest first: `size_px`, the first resize, the first crop, not mirrored.

        Raises:
            ConfigError: `size_px` is one of `more_sizes_px`.
        """
        if size_px in self.more_sizes_px:
            raise ConfigError(
                f"views.more_sizes_px = {self.more_sizes_px}: frames.size_px = {size_px} stands there too"
            )
        sizes = (size_px, *self.more_sizes_px)
        flips = (False, True) if self.flip else (False,)
        combinations = list(itertools.product(sizes, self.resizes, self.crops, flips))
        return [
            View(
                name=_name(size, resize, place, flip) if len(combinations) > 1 else "",
                crop=Crop(size_px=size, scaled_px=round(size * resize), place=place),
                flip=flip,
            )
            for size, resize, place, flip in combinations
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewChoice:
    """Which of a clip's views are wanted. The view of a clip that has but one always is."""

    crops: tuple[Place, ...] = get_args(Place)
    """Where they lie along the longer side."""
    resized: bool = True
    """Also those that are cut out of larger frames."""
    flip: bool = True
    """Also those that are mirrored; not where left and right matter."""

    def __post_init__(self) -> None:
        if not self.crops or not set(self.crops) <= set(get_args(Place)):
            raise ConfigError(f"views.crops = {self.crops}: must be at least one; allowed are start, center, end")

    def allows(self, name: str) -> bool:
        """Whether the view `name`, as `ViewConfig.views` names them, is wanted.

        Raises:
            ConfigError: no such name.
        """
        if not name:
            return True
        found = _NAME.fullmatch(name)
        if found is None:
            raise ConfigError(f"view {name!r}: not a name of ours, such as 128c or 128of160sf")
        return (
            found["place"] in {place[0] for place in self.crops}
            and (self.resized or not found["resized"])
            and (self.flip or not found["flip"])
        )


def crops_of(views: Sequence[View]) -> list[Crop]:
    """The crops that the views show, each once, in their order."""
    return list(dict.fromkeys(view.crop for view in views))


def _name(size_px: int, resize: float, place: Place, flip: bool) -> str:
    scaled = "" if resize == 1 else f"of{round(size_px * resize)}"
    return f"{size_px}{scaled}{place[0]}{'f' if flip else ''}"

"""Video metadata to the spans that become samples. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ConfigError
from pipeline.schema import ClipSpan

_MODES = ("whole", "window", "shots", "manifest")
_ROUNDING_S = 1e-6
"""A window that ends this close to the video's end has reached it."""
_TIMESTAMP_S = 1e-3
"""Matroska and FLV round times to this, so that one frame may last as much less."""


LEAST_S = 0.001
"""Between the starts of two clips: keys tell them apart by milliseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """How a video is cut into clips."""

    mode: Literal["whole", "window", "shots", "manifest"] = "whole"
    """whole: one clip a video (VIMPAC's unit). window: windows of equal length. shots: from one cut to the next, as the
    pictures have them. manifest: the spans that the manifest gives (start_s, end_s)."""
    window_s: float = 10.0
    """Length of a window in seconds (mode window)."""
    stride_s: float | None = None
    """Seconds from one window's start to the next one's (mode window); by default window_s, one after another. Less makes
    windows overlap, more leaves gaps."""
    cut_threshold: float = 0.35
    """How different two frames in a row must be for a cut between them (mode shots), 0 (equal) to 1; less finds more."""
    max_s: float = 60.0
    """A shot longer than this is cut every max_s seconds (mode shots); its last part has what is left."""
    min_s: float = 0.0
    """Clips shorter than this many seconds are filtered as too-short."""

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ConfigError(f"clips.mode = {self.mode!r}: allowed are {', '.join(_MODES)}")
        for name in ("window_s", "stride_s", "max_s"):
            value = getattr(self, name)
            if value is not None and not LEAST_S <= value < math.inf:
                raise ConfigError(f"clips.{name} = {value}: must be {LEAST_S:g} s or more, and finite")
        if not 0 < self.cut_threshold < 1:
            raise ConfigError(f"clips.cut_threshold = {self.cut_threshold}: must be between 0 and 1")
        if not 0 <= self.min_s < math.inf:
            raise ConfigError(f"clips.min_s = {self.min_s}: must be 0 s or more, and finite")
        for mode, longest in (("window", "window_s"), ("shots", "max_s")):
            if self.mode == mode and self.min_s > getattr(self, longest):
                raise ConfigError(
                    f"clips.min_s = {self.min_s} exceeds clips.{longest} = {getattr(self, longest)}: no clip could pass"
                )


def plan_clips(
    duration_s: float, config: ClipConfig, cuts_s: Iterable[float] = (), frame_s: float = 0.0
) -> list[ClipSpan]:
    """Spans within `[0, duration_s)`, in order of their starts; none is empty.

    Whole, shots and windows without a stride tile the video without gap or overlap; the last window may be shorter, and
    what is left after it is less than a frame. (The spans of mode manifest come from the plan, not from here.)

    Args:
        cuts_s: where shots begin, ascending, in seconds (mode shots).
        frame_s: how long a frame lasts; less than that is not split off a shot, and is no window at the end, where a
            container counts sound that outlasts the picture: it would hold no frame.
    """
    if config.mode == "window":
        return _windows(duration_s, config.window_s, config.stride_s or config.window_s, frame_s)
    if config.mode == "shots":
        return _shots(duration_s, config.max_s, cuts_s, frame_s)
    return [ClipSpan(start_s=0.0, end_s=duration_s)]


def _windows(duration_s: float, window_s: float, stride_s: float, frame_s: float) -> list[ClipSpan]:
    spans = []
    index = 0
    # Products, not a running sum, so that the last window does not depend on rounding along the way.
    while (start_s := index * stride_s) < duration_s:
        if index and duration_s - start_s < frame_s - _TIMESTAMP_S:
            break
        end_s = (index + 1) * window_s if stride_s == window_s else start_s + window_s
        spans.append(ClipSpan(start_s=start_s, end_s=min(end_s, duration_s)))
        if end_s >= duration_s - _ROUNDING_S:  # with overlap, a later window would lie within this one
            break
        index += 1
    return spans


def _shots(duration_s: float, max_s: float, cuts_s: Iterable[float], frame_s: float) -> list[ClipSpan]:
    edges = [0.0, *(cut_s for cut_s in cuts_s if 0 < cut_s < duration_s), duration_s]
    spans = []
    for start_s, end_s in itertools.pairwise(edges):
        # Every max_s, not equal parts: a stream that is cut as it comes does not know yet how long a shot will be.
        parts = math.ceil((end_s - start_s) / max_s)
        if parts > 1 and end_s - (start_s + (parts - 1) * max_s) < max(frame_s, 2 * _ROUNDING_S) - _ROUNDING_S:
            parts -= 1
        inner = [start_s + n * max_s for n in range(1, parts)]
        spans += [ClipSpan(start_s=a, end_s=b) for a, b in zip([start_s, *inner], [*inner, end_s], strict=True)]
    return spans

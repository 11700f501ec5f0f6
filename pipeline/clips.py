"""Video metadata to the spans that become samples. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ConfigError
from pipeline.schema import ClipSpan


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """How a video is cut into clips."""

    mode: Literal["whole", "window"] = "whole"
    """whole: one clip a video (VIMPAC's unit). window: fixed windows one after another."""
    window_s: float = 10.0
    """Length of a window in seconds (mode window)."""
    min_s: float = 0.0
    """Clips shorter than this many seconds are filtered as too-short."""

    def __post_init__(self) -> None:
        if self.mode not in ("whole", "window"):
            raise ConfigError(f"clips.mode = {self.mode!r}: allowed are whole, window")
        if not 0 < self.window_s < math.inf:
            raise ConfigError(f"clips.window_s = {self.window_s}: must be more than 0 s, and finite")
        if not 0 <= self.min_s < math.inf:
            raise ConfigError(f"clips.min_s = {self.min_s}: must be 0 s or more, and finite")
        if self.mode == "window" and self.min_s > self.window_s:
            raise ConfigError(
                f"clips.min_s = {self.min_s} exceeds clips.window_s = {self.window_s}: no clip could pass"
            )


def plan_clips(duration_s: float, config: ClipConfig) -> list[ClipSpan]:
    """Spans that tile `[0, duration_s)` without gap or overlap, in order; the last window may be shorter."""
    if config.mode == "whole":
        return [ClipSpan(start_s=0.0, end_s=duration_s)]
    spans = []
    index = 0
    while (start_s := index * config.window_s) < duration_s:
        # Products, not a running sum, so that the last window does not depend on rounding along the way.
        spans.append(ClipSpan(start_s=start_s, end_s=min((index + 1) * config.window_s, duration_s)))
        index += 1
    return spans

"""What one pass over a clip's pictures says of it, and thresholds on that. Pure: numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.schema import SCORES

Scores = dict[str, float]
"""One value for each name in `schema.SCORES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityThresholds:
    """Which scored clips stay; None checks nothing. The same when sharding and when reading a dataset later."""

    max_black: float | None = None
    """Largest share of frames that are black, 0 to 1."""
    max_frozen: float | None = None
    """Largest share of frames that show nothing new, 0 to 1."""
    max_letterbox: float | None = None
    """Largest share of the picture that black bars may take, 0 to 1."""
    min_brightness: float | None = None
    """Least mean brightness, 0 (black) to 1 (white)."""
    max_brightness: float | None = None
    """Largest mean brightness, 0 to 1."""
    min_sharpness: float | None = None
    """Least variance of the Laplacian, in grey levels squared; below about 50 a picture looks blurred."""
    min_motion: float | None = None
    """Least mean change of a pixel in an eighth of a second, 0 to 1; 0.01 is calm."""
    max_motion: float | None = None
    """Largest mean change of a pixel in an eighth of a second, 0 to 1."""
    max_cuts_per_min: float | None = None
    """Largest number of cuts a minute."""

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            limit = np.inf if name in ("min_sharpness", "max_cuts_per_min") else 1.0
            if not 0 <= value <= limit or value == np.inf:
                allowed = "0 or more, and finite" if limit == np.inf else "in [0, 1]"
                raise ConfigError(f"{name} = {value}: must be {allowed}")
        for score in ("brightness", "motion"):
            low, high = getattr(self, f"min_{score}"), getattr(self, f"max_{score}")
            if low is not None and high is not None and low > high:
                raise ConfigError(f"min_{score} = {low} exceeds max_{score} = {high}: no clip could pass")

    def given(self) -> dict[str, float]:
        """The thresholds that are set, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityConfig:
    """Scoring while sharding."""

    score: bool = False
    """Score every clip from its pictures; costs decoding where the storage mode does not decode anyway."""
    keep: QualityThresholds = field(default_factory=QualityThresholds)
    """Clips beyond these are filtered; they need score."""

    def __post_init__(self) -> None:
        if self.keep.given() and not self.score:
            name, value = next(iter(self.keep.given().items()))
            raise ConfigError(f"quality.keep.{name} = {value} needs scores: set quality.score as well")


def failed_threshold(scores: Mapping[str, float], thresholds: QualityThresholds) -> tuple[str, str] | None:
    """The first threshold that a clip fails: the score's name and a line with both values; None where all hold."""
    for name, limit in thresholds.given().items():
        side, score = name[:3], name[4:]
        value = scores[score]
        if not (value <= limit if side == "max" else value >= limit):  # so that nan, not scored, fails
            return score, f"{score} {value:.4g}; {'at most' if side == 'max' else 'at least'} {limit:g} is allowed"
    return None


def keep_mask(table: pa.Table, thresholds: QualityThresholds) -> np.ndarray:
    """Which rows of an index hold every threshold: bool (rows,). A row without a score fails its threshold.

    Raises:
        ConfigError: a threshold is set on a score that no row has.
    """
    mask = np.ones(len(table), dtype=bool)
    for name, limit in thresholds.given().items():
        column = table[f"score_{name[4:]}"]
        if len(table) and column.null_count == len(table):
            raise ConfigError(f"{name} = {limit:g}: no clip of this dataset was scored; shard with --quality.score")
        values = column.to_numpy(zero_copy_only=False).astype(np.float64)  # null becomes nan, which compares false
        mask &= values <= limit if name.startswith("max") else values >= limit
    return mask


assert {name[4:] for name in QualityThresholds.__slots__} == set(SCORES)

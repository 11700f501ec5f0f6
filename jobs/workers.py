"""Who trains: how many workers of a run there are, on what, and what becomes of those that are lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jobs.paths import PathOrUrl
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersConfig:
    """Who trains. None of it changes the order of the data."""

    num_workers: int = 1
    """Data-parallel workers (DDP): one GPU each, or one CPU each."""
    min_workers: int | None = None
    """With it the run is elastic: it starts with this many or more, takes up to num_workers as the cluster has them, and
    goes on with fewer when it loses some. The batch must divide by it."""
    resize_every_s: float = 60.0
    """Seconds between two looks at whether an elastic run can have more workers; taking them costs a restart."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes GPUs where the cluster has enough for all workers, or for min_workers."""
    max_failures: int = 3
    """Times that a died worker is replaced, and the run resumed from its checkpoint, before the job fails; counted anew
    after a preemption."""
    max_preemptions: int = 100
    """Times that workers may be told to stop (SIGTERM, a drained node) and the run goes on with others."""
    mirror: PathOrUrl = ""
    """Folder or URL (s3://, gs://, abfs://) that gets a copy of each checkpoint; a run whose own folder is lost goes on
    from there. With it, driver and workers need not share `out`. Empty for none."""

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.max_failures < 0:
            raise ConfigError(
                f"workers: num_workers = {self.num_workers} must be 1 or more, max_failures = {self.max_failures} 0 or more"
            )
        if self.resize_every_s <= 0 or self.max_preemptions < 0:
            raise ConfigError(
                f"workers: resize_every_s = {self.resize_every_s} must be more than 0, max_preemptions = "
                f"{self.max_preemptions} 0 or more"
            )
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ConfigError(
                f"workers: min_workers = {self.min_workers}; allowed: 1 to num_workers = {self.num_workers}, or none"
            )

    @property
    def fewest(self) -> int:
        """The fewest workers that the run goes on with."""
        return self.num_workers if self.min_workers is None else self.min_workers


def usable_workers(num_workers: int, num_parts: int) -> int:
    """How many of `num_workers` can work: the most that `num_parts`, which one step is made of, divides by."""
    return next(size for size in range(num_workers, 0, -1) if num_parts % size == 0)

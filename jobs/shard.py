"""`tokenreel shard`: a corpus of videos to a clip dataset."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jobs.cluster import connect
from jobs.config import save_config, to_plain
from jobs.data_job import DataJob
from jobs.result import JobResult
from jobs.tracking import DatasetInput
from pipeline.errors import ConfigError
from pipeline.sharding import ShardSettings, describe_clips, list_inputs, plan_shards

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardConfig:
    """Turn a corpus of videos into a clip dataset: WebDataset shards with an index, and rejects with their reasons.

    Run the same command again after a crash: finished shards stay, the others are made, byte for byte the same.
    """

    corpus: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """Folder of videos, or a manifest (.csv, .jsonl, .parquet) with a column 'video' and, as you have them, 'caption',
    'label', 'split'."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write the dataset to."""
    settings: Annotated[ShardSettings, tyro.conf.arg(name="")] = field(default_factory=ShardSettings)
    max_reject_fraction: float = 0.1
    """More rejects than this share of the planned clips make the exit code 3."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_reject_fraction <= 1:
            raise ConfigError(f"max_reject_fraction = {self.max_reject_fraction}: must be in [0, 1]")


def run(config: ShardConfig) -> JobResult:
    plan = plan_shards(config.corpus, config.settings)
    log.info(
        "shard: %d videos in %d shards, %d rejected by the plan", plan.num_videos, len(plan.items), len(plan.rejects)
    )
    meta = describe_clips(plan, to_plain(config.settings))
    corpus = DatasetInput(
        name=plan.root.name,
        fingerprint=meta.inputs_digest,
        uri=str(plan.root),
        context="corpus",
        totals={"videos": plan.num_videos, "bytes": sum(ref.size_bytes for item in plan.items for ref in item)},
    )
    with DataJob.open("shard", config.out, meta, to_plain(config), [corpus], list_inputs(plan)) as job:
        save_config(config.out, config)
        if job.todo:
            from pipeline.stages import run_shard

            with connect(), job.progress("clips") as on_shard:
                run_shard(plan, config.out.resolve(), job.meta, config.settings, job.todo, on_shard)
        return job.finish(plan.rejects, config.max_reject_fraction, videos=plan.num_videos)

"""`tokenreel shard`: a corpus of videos to a clip dataset."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jobs.cluster import connect
from jobs.config import to_plain
from jobs.data_job import DataJob, RejectPolicy
from jobs.folder import lock_folder, work_folder
from jobs.paths import PathOrUrl
from jobs.planning.prediction import read_prediction
from jobs.result import JobResult
from jobs.tracking import DatasetInput
from pipeline.errors import TransientIO
from pipeline.plan_file import name_changes, read_plan_shards
from pipeline.planning import plan_shards
from pipeline.sharding import ShardSettings, describe_clips
from pipeline.storage import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardConfig:
    """Turn a corpus of videos into a clip dataset: WebDataset shards with an index, and rejects with their reasons.

    Run the same command again after a crash: finished shards stay, the others are made, byte for byte the same.
    """

    corpus: Annotated[PathOrUrl, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """Folder of videos, a glob ('videos/**/*.mp4'), or a manifest (.txt, .csv, .jsonl, .parquet) with a column 'video' and, as
    you have them, 'caption', 'label', 'split', 'start_s', 'end_s'; every other column is carried along. A path, or
    s3://, gs://, abfs://."""
    out: Annotated[PathOrUrl, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write the dataset to: a path that all nodes share, or s3://, gs://, abfs://."""
    root: PathOrUrl | None = None
    """What a manifest's paths are relative to, also https://; by default the manifest's folder. Nothing outside of it is
    read."""
    settings: Annotated[ShardSettings, tyro.conf.arg(name="")] = field(default_factory=ShardSettings)
    rejects: Annotated[RejectPolicy, tyro.conf.arg(name="")] = field(default_factory=RejectPolicy)
    plan: Path | None = None
    """What `tokenreel plan --save` wrote for this very command: predicted over actual goes to the result and to MLflow."""


def run(config: ShardConfig, remake: Collection[int] = ()) -> JobResult:
    """Write the dataset; shards in `remake` are made again, and each takes the place of the old one when it is whole."""
    out = Store.at(config.out)
    work = work_folder(out)
    with lock_folder(work):
        scratch = work / ".plan"
        shutil.rmtree(scratch, ignore_errors=True)  # of a job that was killed while it planned
        scratch.mkdir()
        try:
            return _run(config, out, scratch, remake)
        except OSError as error:  # of a video it would be a reject
            raise TransientIO(
                f"{out}: stopped by a disk or a storage that refuses: {' '.join(str(error).split())}; "
                "when that is mended, the same command resumes"
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _run(config: ShardConfig, out: Store, scratch: Path, remake: Collection[int]) -> JobResult:
    plan = plan_shards(config.corpus, config.settings, scratch, root=config.root)
    refused = plan.ledger.planned
    log.info(f"shard: {plan.num_videos} videos in {plan.num_shards} shards, {refused} rejected by the plan")
    root = Store.at(plan.root)
    corpus = DatasetInput(
        name=root.name,
        fingerprint=plan.inputs_digest,
        uri=plan.root,
        context="corpus",
        totals={"videos": plan.num_videos, "bytes": plan.num_bytes},
    )
    meta = describe_clips(plan, to_plain(config.settings))
    predicted = read_prediction(config.plan, "shard", meta.fingerprint) if config.plan else None
    with DataJob.open(
        "shard", out, meta, config, [corpus], policy=config.rejects, plan_books=plan.ledger, plan=plan.path,
        plan_rejects=plan.rejects, name_changes=name_changes, remake=remake,
    ) as job:  # fmt: skip
        if job.todo:
            from pipeline.stages import run_shard

            with connect(), job.progress() as on_shard:
                items = read_plan_shards(plan.path, job.todo)
                run_shard(root, out, job.meta, config.settings, items, config.rejects.retry_rejects, on_shard)
        return job.finish(predicted, planned_videos=plan.num_videos)

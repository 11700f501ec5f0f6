"""`tokenreel verify`: every byte of a dataset against its index, and its books against its files."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.result import JobResult
from pipeline.dataset import read_meta
from pipeline.verify import verify as verify_dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Check a clip or token dataset: hashes, offsets, tar members, books, splits, duplicates, foreign shards."""

    dataset: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """Folder of the dataset."""


def run(config: VerifyConfig) -> JobResult:
    started_s = time.monotonic()
    meta = read_meta(config.dataset)
    problems = list(verify_dataset(config.dataset))
    for problem in problems:
        log.error(problem)
    num_samples = (meta.totals or {}).get("committed", 0)
    log.info("verify: %d samples, %d problems", num_samples, len(problems))
    return JobResult(
        job="verify",
        out=str(config.dataset),
        status="failed" if problems else "done",
        planned=num_samples,
        committed=num_samples,
        fingerprint=meta.fingerprint,
        elapsed_s=time.monotonic() - started_s,
        figures={"num_problems": len(problems), "problems": problems[:20]},
    )

"""`tokenreel verify`: every byte of a dataset against its index, and its books against its files."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from jobs.config import CONFIG_NAME, from_plain
from jobs.result import JobResult
from pipeline.dataset import find_parent, read_meta
from pipeline.errors import ConfigError
from pipeline.storage import Store
from pipeline.verify import Problem, repair
from pipeline.verify import verify as verify_dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Check a clip or token dataset: hashes, offsets, tar members, books, splits, duplicates, stale or foreign shards."""

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """The dataset: a path, or s3://, gs://, abfs://."""
    repair: bool = False
    """Make the shards that fail again, from the same inputs by the command that the dataset keeps (config.json), and check
    once more."""


def run(config: VerifyConfig) -> JobResult:
    started_s = time.monotonic()
    store = Store.at(config.dataset)
    problems = _check(store)
    repaired: list[int] = []
    if problems and config.repair:
        repaired = repair(store, problems)
        log.info("verify: %d shards are made again: %s", len(repaired), ", ".join(f"{s:06d}" for s in repaired[:20]))
        _rebuild(store)
        problems = _check(store)
    meta = read_meta(store)
    num_samples = (meta.totals or {}).get("committed", 0)
    log.info("verify: %d samples, %d problems", num_samples, len(problems))
    return JobResult(
        job="verify",
        out=store.url,
        status="failed" if problems else "done",
        planned=num_samples,
        committed=num_samples,
        fingerprint=meta.fingerprint,
        elapsed_s=time.monotonic() - started_s,
        figures={
            "num_problems": len(problems),
            "problems": [problem.text for problem in problems[:20]],
            "repaired_shards": repaired,
        },
    )


def _check(store: Store) -> list[Problem]:
    problems = list(verify_dataset(store, find_parent(store, read_meta(store))))
    for problem in problems:
        log.error(problem.text)
    return problems


def _rebuild(store: Store) -> None:
    """Run the job that wrote the dataset again, by its own config; it makes what is missing."""
    from jobs import shard, tokenize

    try:
        plain = json.loads(store.read(CONFIG_NAME))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(
            f"{store.where(CONFIG_NAME)} cannot be read, so the dataset cannot be repaired: {error}"
        ) from error
    if read_meta(store).kind == "clips":
        shard.run(replace(from_plain(plain, shard.ShardConfig, store.where(CONFIG_NAME)), out=store.url))
    else:
        tokenize.run(replace(from_plain(plain, tokenize.TokenizeConfig, store.where(CONFIG_NAME)), out=store.url))

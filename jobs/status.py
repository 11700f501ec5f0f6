"""`tokenreel status`: every job of a project's folder, from the files that they keep there; asks no server."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jobs.config import CONFIG_NAME
from jobs.journal import JOURNAL_NAME, last_row
from jobs.result import JobResult
from jobs.spool import SPOOL_NAME, STATE_NAME, read_json
from pipeline.dataset import listed_shards
from pipeline.errors import ConfigError, TokenreelError
from pipeline.storage import Store
from pipeline.untrusted import MAX_JSON_BYTES, parse_object, read_member

log = logging.getLogger(__name__)
_INNER = frozenset(("shards", "index", "rejects", "checkpoints", "pictures", "model", "best_model", "tokenizer"))
"""Folders that a job makes in its own, in which no other job writes."""
_ELSEWHERE = frozenset((".git", ".venv", "node_modules"))
_SILENT_S = 60.0
_SHOWN = (
    *("loss", "masked_token_accuracy", "tokens_per_s", "data_wait_share"),
    *("videos_per_s", "frames_per_s", "gb_per_s"),
)
_LOCAL_UI = "http://127.0.0.1:5000"


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusConfig:
    """Say how every job stands that writes, or wrote, beneath a folder: progress, rejects, where MLflow shows it.

    A job whose dataset lies in an object store keeps its files in `.tokenreel` where it was started, which is found too.
    """

    project: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PROJECT")] = Path()
    """Folder to look beneath."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """One job. state: running, finished, failed, killed, or lost: it never said how it ended, and nothing has been written
    for a minute (the same command resumes it). done of total: in `unit`; None where that is not known."""

    folder: str
    job: str
    state: str
    done: int | None
    total: int | None
    unit: str
    rejected: int
    figures: dict[str, float]
    age_s: float
    mlflow: str


def run(config: StatusConfig) -> JobResult:
    """Print the table; `jobs` among the figures has the same. The exit code says nothing about the jobs."""
    if not config.project.is_dir():
        raise ConfigError(f"project = {config.project}: no such folder")
    jobs = [read_status(folder) for folder in sorted(find_jobs(config.project))]
    log.info(f"{len(jobs)} jobs in {config.project.resolve()}:\n{format_statuses(jobs, config.project)}")
    return JobResult(job="status", out=str(config.project), figures={"jobs": [asdict(one) for one in jobs]})


def find_jobs(project: Path) -> Iterator[Path]:
    """The folders beneath `project` in which a job keeps its files; neither links nor the insides of datasets and runs
    are followed."""
    for folder, names, files in os.walk(project):
        is_job = SPOOL_NAME in files
        names[:] = [name for name in names if name not in (_INNER if is_job else _ELSEWHERE)]
        if is_job:
            yield Path(folder)


def read_status(folder: Path) -> JobStatus:
    """How the job of `folder` stands, from its files as they are at this moment; never raises on damaged ones."""
    spool, config = read_json(folder / SPOOL_NAME), read_json(folder / CONFIG_NAME)
    tags, row = spool.get("tags") or {}, last_row(folder / JOURNAL_NAME) or {}
    written_s = max((path.stat().st_mtime for path in _files(folder)), default=0.0)
    state = str((spool.get("ending") or {}).get("status", "")).lower()
    age_s = max(0.0, time.time() - written_s)
    progress = _read_training(config["loop"], row) if "loop" in config else _read_dataset(folder, tags, row)
    return JobStatus(
        folder=str(folder),
        job=tags.get("tokenreel.job", "?"),
        state=state or ("running" if age_s < _SILENT_S else "lost"),
        age_s=round(age_s, 1),
        figures={name: float(row[name]) for name in _SHOWN if name in row},
        mlflow=_link(read_json(folder / STATE_NAME)),
        **progress,
    )


def _files(folder: Path) -> Iterator[Path]:
    """What a living job writes to at least every ten seconds, and what it began with."""
    yield from folder.glob("system*.jsonl")
    yield from (path for name in (SPOOL_NAME, JOURNAL_NAME) if (path := folder / name).exists())


def _read_training(loop: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return {"done": int(row.get("step", 0)), "total": loop.get("steps"), "unit": "steps", "rejected": 0}


def _read_dataset(folder: Path, tags: dict[str, str], row: dict[str, Any]) -> dict[str, Any]:
    """Shards and rejects; the dataset may have been moved, or lie in an object store."""
    out = tags.get("tokenreel.out", "")
    done = total = None
    rejected = int(float(row.get("rejected", 0)))
    try:
        store = Store.at(out if "://" in out else folder)
        if store.exists("dataset.json"):
            meta = parse_object(read_member(store, "dataset.json", MAX_JSON_BYTES), store.where("dataset.json"))
            done, total = len(listed_shards(store)), meta["num_shards"]
            if meta["totals"]:
                rejected = sum(meta["totals"]["rejected"].values())
    except (OSError, ValueError, KeyError, TokenreelError) as error:
        log.warning(f"{folder}: {error}")
    return {"done": done, "total": total, "unit": "shards", "rejected": rejected}


def _link(state: dict[str, Any]) -> str:
    """The run's page: on the server that has it, or on the one that `tokenreel ui` starts; empty where none took it."""
    if not state.get("run_id"):
        return ""
    uri = str(state.get("tracking_uri", ""))
    server = uri.rstrip("/") if uri.startswith(("http://", "https://")) else _LOCAL_UI
    return f"{server}/#/experiments/{state.get('experiment_id') or 0}/runs/{state['run_id']}"


def format_statuses(jobs: list[JobStatus], project: Path) -> str:
    """The report as lines of text, two a job."""
    lines = []
    for one in jobs:
        share = f" ({one.done / one.total:.0%})" if one.done is not None and one.total else ""
        progress = f"{one.done} of {one.total} {one.unit}{share}" if one.done is not None else "progress not known"
        shown = [progress, *([f"{one.rejected} rejected"] if one.rejected else [])]
        shown += [f"{name} {value:.3g}" for name, value in one.figures.items()]
        age = "" if one.state == "finished" else f", {one.age_s:.0f} s ago"
        lines.append(
            f"  {one.state + age:<18} {one.job:<15} {os.path.relpath(one.folder, project)}: {', '.join(shown)}"
        )
        lines.append(f"  {'':<18} {one.mlflow or 'MLflow has no run of it yet'}")
    return "\n".join(lines)

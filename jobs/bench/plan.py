"""`tokenreel bench plan`: time and peak memory of planning a manifest of any length, and that it is the same plan twice."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from jobs.result import JobResult
from pipeline.errors import ConfigError, TokenreelError
from pipeline.plan_file import PLAN_NAME
from pipeline.planning import plan_shards
from pipeline.sharding import ShardSettings

log = logging.getLogger(__name__)

_CHUNK_ROWS = 100_000
_ROOT = "s3://bench/videos?region=us-east-1"  # named, never asked: nothing is planned that needs it


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchPlanConfig:
    """Plan a made-up manifest, and the same one shuffled, each in a process of its own, and compare the two plans.

    Without --stat the videos are said to lie in an object store, their sizes stand in the manifest, and duplicates are
    kept, so planning asks for no file. With --stat they are empty local files, which planning looks at one by one.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the manifests and plans, some 300 bytes a row and plan; it must be empty or missing, and is emptied."""
    rows: int = 10_000_000
    """Rows of the manifest."""
    format: Literal["csv", "jsonl", "parquet", "txt"] = "csv"
    stat: bool = False
    """Make an empty file for each row, and let planning look at it."""
    videos_per_shard: int = 1000
    """Videos that share one shard."""
    seed: int = 0
    """Draws sizes, captions and the order of the shuffled manifest."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"rows = {self.rows}: must be 1 or more")
        if self.format not in ("csv", "jsonl", "parquet", "txt"):
            raise ConfigError(f"format = {self.format!r}: allowed are csv, jsonl, parquet, txt")
        if self.videos_per_shard < 1:
            raise ConfigError(f"videos_per_shard = {self.videos_per_shard}: must be 1 or more")


def run(config: BenchPlanConfig) -> JobResult:
    """Two plans of `config.rows` rows; failed where they differ in a byte. Figures: seconds, rows/s, peak bytes of each."""
    started_s = time.monotonic()
    config.out.mkdir(parents=True, exist_ok=True)
    if any(config.out.iterdir()):
        raise ConfigError(f"out = {config.out}: must be an empty or missing folder, as it is emptied at the end")
    videos = config.out.resolve() / "videos"
    if config.stat:
        _make_files(videos, config)
    runs = []
    for shuffled in (False, True):
        workdir = config.out / ("shuffled" if shuffled else "as-written")
        workdir.mkdir()
        manifest = _write_manifest(workdir, config, shuffled)
        figures = _plan_in_process(manifest, str(videos) if config.stat else _ROOT, workdir, config)
        log.info("bench plan: %s: %s", workdir.name, figures)
        runs.append(figures)
        shutil.rmtree(workdir)
    shutil.rmtree(videos, ignore_errors=True)
    same = runs[0]["sha256"] == runs[1]["sha256"] and runs[0]["inputs_digest"] == runs[1]["inputs_digest"]
    if not same:
        log.error("bench plan: the plan of the shuffled manifest differs from that of the first")
    return JobResult(
        job="bench plan",
        out=str(config.out),
        status="done" if same and all(one["num_videos"] == config.rows for one in runs) else "failed",
        planned=config.rows,
        committed=runs[0]["num_videos"],
        fingerprint=runs[0]["inputs_digest"],
        elapsed_s=time.monotonic() - started_s,
        figures={
            "format": config.format,
            "same_plan": same,
            "plan_s": [one["plan_s"] for one in runs],
            "rows_per_s": [round(config.rows / one["plan_s"]) for one in runs],
            "peak_rss_bytes": [one["peak_rss_bytes"] for one in runs],
            "manifest_bytes": runs[0]["manifest_bytes"],
            "plan_bytes": runs[0]["plan_bytes"],
            "num_shards": runs[0]["num_shards"],
            "num_cpus": len(os.sched_getaffinity(0)),
        },
    )


def _plan_in_process(manifest: Path, root: str, workdir: Path, config: BenchPlanConfig) -> dict[str, Any]:
    """Plan in a fresh process, so that its peak memory is that of planning alone."""
    arguments = [str(manifest), root, str(workdir), str(config.videos_per_shard)]
    done = subprocess.run([sys.executable, "-m", "jobs.bench.plan", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise TokenreelError(
            f"bench plan: planning {manifest} ended with exit code {done.returncode}; its log is above"
        )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _measure(manifest: Path, root: str, workdir: Path, videos_per_shard: int) -> dict[str, Any]:
    settings = ShardSettings(duplicates="keep", videos_per_shard=videos_per_shard)
    started_s = time.monotonic()
    plan = plan_shards(manifest, settings, workdir, root=root)
    plan_s = time.monotonic() - started_s
    # Not ru_maxrss: that starts at the size of the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    with plan.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "plan_s": round(plan_s, 2),
        "peak_rss_bytes": int(peak[1]) * 1024,
        "sha256": digest,
        "inputs_digest": plan.inputs_digest,
        "num_videos": plan.num_videos,
        "num_shards": plan.num_shards,
        "manifest_bytes": manifest.stat().st_size,
        "plan_bytes": (workdir / PLAN_NAME).stat().st_size,
    }


def _path(row: int) -> str:
    return f"source-{row % 977:03d}/{row // 100_000:04d}/video-{row:09d}.mp4"


def _chunks(config: BenchPlanConfig, shuffled: bool) -> Iterator[list[dict[str, Any]]]:
    """The rows in chunks of 100,000: in order, or the chunks and the rows of each in another order."""
    starts = np.arange(0, config.rows, _CHUNK_ROWS)
    order = np.random.default_rng(config.seed)
    for start in order.permutation(starts).tolist() if shuffled else starts.tolist():
        draw = np.random.default_rng((config.seed, start))
        size = min(_CHUNK_ROWS, config.rows - start)
        sizes, words = draw.integers(10**5, 10**8, size).tolist(), draw.integers(0, 10**6, (size, 3)).tolist()
        chunk = [
            {
                "video": _path(start + i),
                "caption": f"a person doing {a}, then {b}",
                "label": f"{c % 400:03d}",
                "size_bytes": sizes[i],
            }
            for i, (a, b, c) in enumerate(words)
        ]
        yield [chunk[i] for i in order.permutation(size)] if shuffled else chunk


def _write_manifest(folder: Path, config: BenchPlanConfig, shuffled: bool) -> Path:
    path = folder / f"manifest.{config.format}"
    chunks = _chunks(config, shuffled)
    if config.format == "parquet":
        first = pa.Table.from_pylist(next(chunks))
        with pq.ParquetWriter(path, first.schema) as writer:
            writer.write_table(first)
            for chunk in chunks:
                writer.write_table(pa.Table.from_pylist(chunk))
        return path
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, ["video", "caption", "label", "size_bytes"])
        if config.format == "csv":
            rows.writeheader()
        for chunk in chunks:
            if config.format == "csv":
                rows.writerows(chunk)
            elif config.format == "jsonl":
                file.writelines(json.dumps(row) + "\n" for row in chunk)
            else:
                file.writelines(f"{row['video']}\n" for row in chunk)
    return path


def _make_files(folder: Path, config: BenchPlanConfig) -> None:
    made: set[Path] = set()
    for row in range(config.rows):
        path = folder / _path(row)
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        path.touch()


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))

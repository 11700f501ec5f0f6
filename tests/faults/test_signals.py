"""Every job, stopped by each signal: once, twice, and sent to all its processes. A Ray of its own for each.

Signals take turns over the manners, so that each job meets all three of either.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs.mlflow_store import open_client
from jobs.tracking import read_run_id
from tests.conftest import Stages
from tests.jobs.labelled_tokens import make_labelled_tokens

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
MANNERS = ("once", "twice", "group")
LONG = ["--loop.steps", 10**6]
TINY = ["--backbone.codebook-size", 64, "--backbone.hidden", 32, "--backbone.layers", 1, "--backbone.heads", 4]


def commands(stages: Stages, scratch: Path, out: Path) -> dict[str, tuple[list[object], Path | None]]:
    """The words of each job and the file that shows that it is at work; None: stopped as soon as it answers signals."""
    tokens, model = scratch / "tokens", scratch / "model"
    for folder, copy in ((stages.tokens, tokens), (stages.model, model)):
        if not copy.exists():
            shutil.copytree(folder, copy)
    labelled = scratch / "labelled"
    if not labelled.exists():
        make_labelled_tokens(labelled, {"train": 8, "val": 3, "test": 4}, views=("",))
    grid = [*TINY, "--loader.batch-size", 4]
    frames = ["--frames.size-px", 64]
    return {
        "shard": (["shard", stages.corpus, out, "--storage", "transcode"], out / "plan.parquet"),
        "train-tokenizer": (["train-tokenizer", stages.clips, out, *LONG], out / "metrics.jsonl"),
        "tokenize": (["tokenize", stages.clips, out, "--tokenizer", stages.tokenizer, *frames], out / "dataset.json"),
        "pretrain": (
            ["pretrain", "debug", "--tokens", tokens, "--out", out, *grid, *LONG,
             "--backbone.grid-height", 8, "--backbone.grid-width", 8],
            out / "metrics.jsonl",
        ),
        "finetune": (
            ["finetune", "debug", labelled, out, *TINY, *LONG,
             "--backbone.grid-height", 2, "--backbone.grid-width", 2],
            out / "run.json",
        ),
        "evaluate": (["evaluate", model, "--max-windows", 10**5], model / "evaluation" / "mlflow_spool.json"),
        "embed": (["embed", tokens, model, out], out / "dataset.json"),
        "dedup": (["dedup", tokens, out], out / "mlflow_spool.json"),
        "inspect": (["inspect", tokens], None),
        "verify": (["verify", tokens], None),
        "demo": (["demo", "--corpus", stages.corpus, "--out", out], out / "clips" / "plan.parquet"),
    }  # fmt: skip


JOBS = ("shard", "train-tokenizer", "tokenize", "pretrain", "finetune", "evaluate", "embed", "dedup", "inspect")
JOBS += ("verify", "demo")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signals")


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("job", JOBS)
def test_a_stopped_job_ends_in_order(
    only_in_make_faults: None, job: str, manner: str, stages: Stages, scratch: Path, tmp_path: Path
) -> None:
    name = SIGNALS[(JOBS.index(job) + MANNERS.index(manner)) % 3]
    out, number, store = tmp_path / "out", getattr(signal, name), f"sqlite:///{scratch / 'mlflow.db'}"
    words, mark = commands(stages, scratch, out)[job]
    if mark is not None:
        shutil.rmtree(mark.parent, ignore_errors=True)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *map(str, words)],
            env={**os.environ, "RAY_ADDRESS": "local", "MLFLOW_TRACKING_URI": store},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    while not (mark.exists() if mark else _answers(process.pid)):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    own = psutil.Process(process.pid).children(recursive=True)
    if manner == "group":
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
        if manner == "twice":
            time.sleep(0.2)
            process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    log_text = (tmp_path / "log").read_text()
    result = json.loads(said.splitlines()[-1])
    assert process.returncode == 1 and result["status"] == "failed", log_text
    assert result["error"] == f"stopped by {name}; run the same command again to resume", log_text
    assert "Traceback" not in log_text and "received at time" not in log_text
    if mark is not None and (run_id := read_run_id(mark.parent)):
        assert open_client(store).get_run(run_id).info.status == "KILLED"
    assert not psutil.wait_procs(own, timeout=15)[1]


def _answers(pid: int) -> bool:
    """Whether a process has come to its handlers: of SIGTERM, as Python itself has one of SIGINT from the start."""
    (caught,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

"""Signals to whole commands on a Ray of their own; tests/faults/test_signals.py has every job."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from jobs.mlflow_store import open_client
from jobs.tracking import read_run_id
from tests.e2e.command import start_command
from tests.e2e.training import CODEBOOK_SIZE, make_tokens

SMALL = [
    "--backbone.codebook-size",
    CODEBOOK_SIZE,
    "--backbone.hidden",
    32,
    "--backbone.layers",
    1,
    "--backbone.heads",
    4,
]
SMALL += ["--backbone.grid-height", 2, "--backbone.grid-width", 3, "--loader.batch-size", 4]


def test_sigterm_to_all_processes_of_a_training_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `timeout`, a terminal and Slurm send it; with a name that is not ASCII, which Ray's gauges cannot take."""
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    tokens, out = make_tokens(tmp_path / "tokéns"), tmp_path / "my rün 日本"
    words = ["pretrain", "debug", "--tokens", tokens, "--out", out, *SMALL, "--loop.steps", 10**6]
    process = start_command(*words, cwd=tmp_path, address="local", start_new_session=True)
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    own = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    result = json.loads(said.splitlines()[-1])
    assert process.returncode == 1
    assert result["error"] == "stopped by SIGTERM; run the same command again to resume"
    assert open_client(store).get_run(read_run_id(out)).info.status == "KILLED"
    assert own and not psutil.wait_procs(own, timeout=10)[1], "processes were left behind"

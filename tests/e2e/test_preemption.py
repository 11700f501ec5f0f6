"""Workers that are told to stop: they save at the next step, and the run goes on there with others."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from jobs import pretrain
from jobs.journal import read_journal
from jobs.training import TrainingFailed, WorkersConfig
from tests.conftest import Stages, small_pretrain_config
from tests.e2e.test_kill_and_resume import losses

STEPS = 60
LONG = {"steps": STEPS, "save_every_steps": 1000, "picture_every_steps": 0}


@contextlib.contextmanager
def sigterm_to_a_worker(journal: Path, at_step: int) -> Iterator[threading.Event]:
    """Send SIGTERM to one training worker when the journal has `at_step` rows; the event tells that it was sent."""
    sent = threading.Event()

    def watch() -> None:
        while sum(1 for _ in read_journal(journal)) < at_step:
            time.sleep(0.01)
        workers = [one for one in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in str(one.info["cmdline"])]
        workers[-1].send_signal(signal.SIGTERM)
        sent.set()

    threading.Thread(target=watch, daemon=True).start()
    yield sent


def test_a_worker_that_gets_sigterm_costs_no_step(stages: Stages, tmp_path: Path) -> None:
    config = small_pretrain_config(stages.tokens, tmp_path / "run")
    config = replace(config, register_as="", loop=replace(config.loop, **LONG))
    with sigterm_to_a_worker(tmp_path / "run" / "metrics.jsonl", 3) as sent:
        result = pretrain.run(config)
    assert sent.is_set()
    print([(row["step"], row["time_s"], row["step_s"], row.get("checkpoint_pause_s")) for row in read_journal(tmp_path / "run" / "metrics.jsonl")])
    assert result.committed == STEPS

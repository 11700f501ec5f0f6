"""Workers that are told to stop: they save at the next step, and the run goes on there with another number of them."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import loop, pretrain
from jobs.checkpoint import Cursor, list_checkpoints, read_cursor
from jobs.journal import JOURNAL_NAME, read_journal
from jobs.loop import Context
from jobs.pretrain import PretrainConfig
from jobs.tracking import read_run_id
from jobs.training import TrainingFailed
from jobs.workers import WorkersConfig
from tests.e2e.training import find_train_worker, make_config, make_tokens

LOOP = {"steps": 60, "save_every_steps": 1000}


@contextlib.contextmanager
def sigterm_to_a_worker(journal: Path) -> Iterator[None]:
    """Send SIGTERM to a training worker when the journal has a step."""
    sent = threading.Event()

    def watch() -> None:
        while not any(True for _ in read_journal(journal)):
            time.sleep(0.01)
        find_train_worker().send_signal(signal.SIGTERM)
        sent.set()

    threading.Thread(target=watch, daemon=True).start()
    yield
    assert sent.is_set()


def train_alone(config: PretrainConfig) -> Cursor:
    """What one worker does that nobody stops, without Ray."""
    loop.seed_everything(config.loop.seed, -1, 0)
    context = Context(run=config.out)
    task = pretrain.build(config, context)
    return loop.train(task.objective, task.batches, context, config.loop, config.optim)


def test_sigterm_to_a_worker_costs_no_step_and_a_run_may_go_on_with_others(cluster: str, tmp_path: Path) -> None:
    """Two workers, then one, from a step at which no checkpoint was due; against a run of one that nobody stops.

    Between them the run's folder is lost, and comes back from its mirror.
    """
    tokens, out = make_tokens(tmp_path / "tokens"), tmp_path / "run"
    two = WorkersConfig(num_workers=2, max_failures=0, max_preemptions=0, mirror=str(tmp_path / "mirror"))
    whole = train_alone(make_config(tokens, tmp_path / "whole", WorkersConfig(), **LOOP))
    with (
        sigterm_to_a_worker(out / JOURNAL_NAME),
        pytest.raises(TrainingFailed, match=r"max_preemptions = 0; all \d+ steps so far are saved"),
    ):
        pretrain.run(make_config(tokens, out, two, **LOOP))
    stopped, run_id = read_cursor(list_checkpoints(out)[-1]).step, read_run_id(out)
    shutil.rmtree(out)
    resized = pretrain.run(make_config(tokens, out, replace(two, num_workers=1), **LOOP))
    rows = list(read_journal(out / JOURNAL_NAME))
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert 0 < stopped < 60 and [row["num_workers"] for row in rows] == [2] * stopped + [1] * (60 - stopped)
    assert resized.figures["keys_digest"] == whole.keys_digest
    assert run_id == resized.mlflow_run_id
    expected = [row["loss"] for row in read_journal(tmp_path / "whole" / JOURNAL_NAME)]
    assert [row["loss"] for row in rows][:20] == pytest.approx(expected[:20], rel=1e-3)

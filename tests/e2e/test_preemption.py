"""Workers that are told to stop: they save at the next step, and the run goes on there with others."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from jobs import pretrain
from jobs.checkpoint import list_checkpoints
from jobs.journal import read_journal
from jobs.tracking import read_run_id
from jobs.training import TrainingFailed, WorkersConfig
from tests.e2e.training import make_config, make_tokens

LOOP = {"steps": 60, "save_every_steps": 1000}


@contextlib.contextmanager
def sigterm_to_a_worker(journal: Path, after: int) -> Iterator[None]:
    """Send SIGTERM to a training worker when the journal has a step after `after`."""
    sent = threading.Event()

    def watch() -> None:
        while not any(row["step"] > after for row in read_journal(journal)):
            time.sleep(0.01)
        ours = psutil.Process().children(recursive=True)  # the session's cluster, and nobody else's
        next(one for one in ours if "RayTrainWorker" in str(one.cmdline())).send_signal(signal.SIGTERM)
        sent.set()

    threading.Thread(target=watch, daemon=True).start()
    yield
    assert sent.is_set()


def test_sigterm_to_a_worker_costs_no_step_and_a_run_may_go_on_with_others(cluster: str, tmp_path: Path) -> None:
    """Two workers, one, two again, from steps at which no checkpoint was due; against a run of one that nobody stops.

    Between them the run's folder is lost, and comes back from its mirror.
    """
    tokens, out = make_tokens(tmp_path / "tokens"), tmp_path / "run"
    two = WorkersConfig(num_workers=2, max_failures=0, max_preemptions=0, mirror=str(tmp_path / "mirror"))
    one = replace(two, num_workers=1)
    whole = pretrain.run(make_config(tokens, tmp_path / "whole", WorkersConfig(), **LOOP))
    after, run_ids = 0, set()
    for workers in (two, one):
        with (
            sigterm_to_a_worker(out / "metrics.jsonl", after),
            pytest.raises(TrainingFailed, match=r"max_preemptions = 0; all \d+ steps so far are saved"),
        ):
            pretrain.run(make_config(tokens, out, workers, **LOOP))
        after = int(list_checkpoints(out)[-1].name)
        run_ids.add(read_run_id(out))
        shutil.rmtree(out)
    resized = pretrain.run(make_config(tokens, out, two, **LOOP))
    rows = list(read_journal(out / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 61))
    sizes = [row["num_workers"] for row in rows]
    assert sorted(set(sizes)) == [1, 2] and sizes[0] == sizes[-1] == 2
    assert resized.figures["keys_digest"] == whole.figures["keys_digest"]
    assert run_ids == {resized.mlflow_run_id}
    expected = [row["loss"] for row in read_journal(tmp_path / "whole" / "metrics.jsonl")]
    assert [row["loss"] for row in rows][:20] == pytest.approx(expected[:20], rel=1e-3)


def test_a_worker_that_the_batch_does_not_divide_by_stands_by(cluster: str, tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "tokens")
    elastic = WorkersConfig(num_workers=2, min_workers=1)
    config = make_config(tokens, tmp_path / "run", elastic, steps=6, save_every_steps=6)
    result = pretrain.run(replace(config, loader=replace(config.loader, batch_size=3)))
    assert result.committed == 6
    assert {row["num_workers"] for row in read_journal(tmp_path / "run" / "metrics.jsonl")} == {1}

"""An elastic run while nodes come and go: it grows, shrinks and moves, and consumes the same samples in the same order."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import pretrain
from jobs.checkpoint import Cursor, list_checkpoints, read_cursor
from jobs.config import save_config
from jobs.journal import JOURNAL_NAME, read_journal
from jobs.pretrain import PretrainConfig
from jobs.workers import WorkersConfig
from tests.e2e.training import make_config, make_tokens


class OwnCluster:
    """A head without CPUs, and nodes with one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        self.address = str(self._cluster.address)

    def add_node(self) -> Any:
        return self._cluster.add_node(num_cpus=1)

    def kill_node(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def drain_node(self, node: Any) -> None:
        """What a spot instance's two-minute notice does."""
        options = ("--address", self.address, "--node-id", node.node_id, "--deadline-remaining-seconds", "120")
        why = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "drain-node", *options, *why], check=True)

    def stop(self) -> None:
        self._cluster.shutdown()


@pytest.fixture
def own_cluster(request: pytest.FixtureRequest) -> Iterator[OwnCluster]:
    """In a folder of its own, where no other job of this machine finds it (see `test_kills.Nodes`)."""
    if not request.config.getoption("--fault-runs"):
        pytest.skip("needs a cluster of its own and minutes: make faults")
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="tr", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        cluster = OwnCluster()
        yield cluster
        cluster.stop()


_STEPS = 20_000
"""More than a run takes until a test ends it, however fast the machine is."""


class Run:
    """`tokenreel pretrain` in a process of its own, on a cluster whose nodes a test adds and takes away."""

    def __init__(self, folder: Path, address: str, workers: WorkersConfig) -> None:
        self.folder = folder
        self.out = folder / "run"
        tokens = make_tokens(folder / "tokens")
        config = make_config(tokens, self.out, workers, layers=8, steps=_STEPS, save_every_steps=20)
        store = f"sqlite:///{folder}/mlflow.db"
        self._environment = {**os.environ, "RAY_ADDRESS": address, "MLFLOW_TRACKING_URI": store}
        self._alone = make_config(tokens, folder / "alone", WorkersConfig(), layers=8, schedule_steps=_STEPS)
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                self._words(config), env=self._environment, cwd=folder, stdout=log, stderr=log
            )
        self._began_s = time.monotonic()

    @property
    def said(self) -> str:
        return (self.folder / "log").read_text()

    def steps(self, num_workers: int) -> list[int]:
        rows = read_journal(self.out / JOURNAL_NAME)
        return [row["step"] for row in rows if row["num_workers"] == num_workers]

    def wait_for(self, what: str, happened: Callable[[], bool]) -> None:
        while not happened():
            assert self._process.poll() is None, f"it ended before {what}:\n{self.said[-3000:]}"
            assert time.monotonic() < self._began_s + 280, f"no {what}:\n{self.said[-3000:]}"
            time.sleep(0.05)
        print(f"{time.monotonic() - self._began_s:.0f} s: {what}")

    def interrupt(self) -> Cursor:
        """End it as Ctrl-C does; the cursor of its last checkpoint."""
        self._process.send_signal(signal.SIGINT)
        assert self._process.wait(100) == 1 and "interrupted" in self.said, self.said[-3000:]
        cursor = read_cursor(list_checkpoints(self.out)[-1])
        print(f"{time.monotonic() - self._began_s:.0f} s: interrupted; step {cursor.step} is saved")
        return cursor

    def check_against_one_that_nobody_disturbs(self, cursor: Cursor) -> None:
        alone = replace(self._alone, loop=replace(self._alone.loop, steps=cursor.step))
        subprocess.run(self._words(alone), env=self._environment, cwd=self.folder, check=True)
        ours, theirs = (list(read_journal(out / JOURNAL_NAME)) for out in (self.out, alone.out))
        assert [row["step"] for row in ours[: cursor.step]] == [row["step"] for row in theirs]
        assert cursor.keys_digest == read_cursor(list_checkpoints(alone.out)[-1]).keys_digest
        # Rounding grows with the steps; these are the first ones after the first change.
        assert [row["loss"] for row in ours[:80]] == pytest.approx([row["loss"] for row in theirs[:80]], rel=1e-2)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _words(self, config: PretrainConfig) -> list[str]:
        saved = save_config(self.folder / f"config-{config.out.name}", config)
        return [sys.executable, "-m", "jobs", "pretrain", "debug", "--config", str(saved)]


def test_a_run_grows_and_shrinks_with_the_cluster(own_cluster: OwnCluster, tmp_path: Path) -> None:
    own_cluster.add_node()
    elastic = WorkersConfig(num_workers=2, min_workers=1, resize_every_s=2.0)
    run = Run(tmp_path, own_cluster.address, elastic)
    try:
        run.wait_for("one worker", lambda: len(run.steps(1)) > 30)
        second = own_cluster.add_node()
        run.wait_for("two workers", lambda: len(run.steps(2)) > 10)
        reached = run.steps(2)[-1]
        own_cluster.kill_node(second)
        run.wait_for("one again", lambda: run.steps(1)[-1] > reached + 30)
        run.check_against_one_that_nobody_disturbs(run.interrupt())
    finally:
        run.kill()


def test_a_node_that_is_drained_costs_no_step(own_cluster: OwnCluster, tmp_path: Path) -> None:
    first = own_cluster.add_node()
    run = Run(tmp_path, own_cluster.address, WorkersConfig())
    try:
        run.wait_for("a step", lambda: len(run.steps(1)) > 2)
        own_cluster.drain_node(first)
        run.wait_for("a stop", lambda: "told to stop" in run.said)
        stopped = int(re.findall(r"did after step (\d+)", run.said)[0])
        print(f"stopped after step {stopped}")
        assert read_cursor(list_checkpoints(run.out)[-1]).step == stopped == run.steps(1)[-1]
        own_cluster.add_node()
        own_cluster.kill_node(first)
        run.wait_for("steps on the other node", lambda: run.steps(1)[-1] > stopped + 30)
        assert run.interrupt().step > stopped
    finally:
        run.kill()


def test_a_worker_that_the_batch_does_not_divide_by_stands_by(
    cluster: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--fault-runs"):
        pytest.skip("takes over a minute: make faults")
    tokens = make_tokens(tmp_path / "tokens")
    elastic = WorkersConfig(num_workers=2, min_workers=1)
    config = make_config(tokens, tmp_path / "run", elastic, steps=6, save_every_steps=6)
    result = pretrain.run(replace(config, loader=replace(config.loader, batch_size=3)))
    assert result.committed == 6
    assert {row["num_workers"] for row in read_journal(tmp_path / "run" / JOURNAL_NAME)} == {1}

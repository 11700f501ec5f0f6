"""An elastic run while nodes come and go: it grows, shrinks and moves, and consumes the same samples in the same order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.config import save_config
from jobs.journal import read_journal
from jobs.training import WorkersConfig
from tests.e2e.training import make_config, make_tokens

STEPS = 400


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


def test_a_run_grows_shrinks_and_moves_with_the_cluster(own_cluster: OwnCluster, tmp_path: Path) -> None:
    workers = WorkersConfig(num_workers=2, min_workers=1, resize_every_s=2.0)
    tokens, out = make_tokens(tmp_path / "tokens"), tmp_path / "run"
    config = make_config(tokens, out, workers, layers=8, steps=STEPS, save_every_steps=20)
    first = own_cluster.add_node()
    words = [sys.executable, "-m", "jobs", "pretrain", "debug", "--config", str(save_config(tmp_path / "c", config))]
    store = f"sqlite:///{tmp_path}/mlflow.db"
    environment = {**os.environ, "RAY_ADDRESS": own_cluster.address, "MLFLOW_TRACKING_URI": store}
    with (tmp_path / "log").open("w") as log:
        command = subprocess.Popen(words, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    began_s = time.monotonic()

    def steps(num_workers: int) -> list[int]:
        rows = read_journal(out / "metrics.jsonl")
        return [row["step"] for row in rows if row["num_workers"] == num_workers]

    def wait_for(what: str, happened: Callable[[], bool]) -> None:
        while not happened():
            assert command.poll() is None, f"the run ended before {what}:\n{(tmp_path / 'log').read_text()[-3000:]}"
            assert time.monotonic() < began_s + 280, f"no {what}:\n{(tmp_path / 'log').read_text()[-3000:]}"
            time.sleep(0.05)
        print(f"{time.monotonic() - began_s:.0f} s: {what}")

    try:
        wait_for("one worker", lambda: len(steps(1)) > 30)
        second = own_cluster.add_node()
        wait_for("two workers", lambda: len(steps(2)) > 10)
        at_most = steps(2)[-1]
        own_cluster.kill_node(second)
        wait_for("one again", lambda: steps(1)[-1] > at_most)
        own_cluster.add_node()
        own_cluster.drain_node(first)
        wait_for("a stop", lambda: "told to stop" in (tmp_path / "log").read_text())
        own_cluster.kill_node(first)
        command.wait(200)
    finally:
        command.kill()
        said = (tmp_path / "log").read_text()
        print(said[-3000:])
    assert command.returncode == 0
    stop = int(re.search(r"did after step (\d+)", said)[1])  # type: ignore[index]
    assert [row["step"] for row in read_journal(out / "metrics.jsonl")] == list(range(1, STEPS + 1))
    print(f"stopped at {stop}")
    whole = tmp_path / "whole"
    subprocess.run(
        [
            *words[:-1],
            str(save_config(tmp_path / "w", make_config(tokens, whole, WorkersConfig(), layers=8, steps=STEPS))),
        ],
        env={**environment, "RAY_ADDRESS": own_cluster.address},
        check=True,
        cwd=tmp_path,
    )
    expected = {row["step"]: row["loss"] for row in read_journal(whole / "metrics.jsonl")}
    losses = {row["step"]: row["loss"] for row in read_journal(out / "metrics.jsonl")}
    assert max(abs(losses[step] / expected[step] - 1) for step in range(1, 60)) < 1e-3
    digests = {
        (run / "checkpoints" / f"{STEPS:08d}" / "state.json").read_text().split('keys_digest": "')[1][:16]
        for run in (out, whole)
    }
    assert len(digests) == 1

"""An elastic run while nodes come and go: it grows, shrinks and moves, and consumes the same samples in the same order."""

from __future__ import annotations

import os
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


class OwnCluster:
    """A head without CPUs, and nodes with one CPU each, in a folder of their own (see `test_kills.Nodes`)."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        self.address = str(self._cluster.address)

    def add_node(self) -> Any:
        return self._cluster.add_node(num_cpus=1)

    def kill_node(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        self._cluster.shutdown()


@pytest.fixture
def own_cluster() -> Iterator[OwnCluster]:
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="tr", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        cluster = OwnCluster(Path(folder))
        yield cluster
        cluster.stop()


def wait_until(happened: Callable[[], bool], command: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not happened():
        assert command.poll() is None, "the run ended before"
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.05)


def test_a_run_grows_and_shrinks_with_the_cluster(own_cluster: OwnCluster, tmp_path: Path) -> None:
    steps = 240
    workers = WorkersConfig(num_workers=2, min_workers=1, resize_every_s=2.0, max_failures=5)
    config = make_config(
        make_tokens(tmp_path / "tokens"), tmp_path / "run", workers, layers=8, steps=steps, save_every_steps=20
    )
    journal = tmp_path / "run" / "metrics.jsonl"

    def rows(num_workers: int) -> list[int]:
        return [row["step"] for row in read_journal(journal) if row["num_workers"] == num_workers]

    own_cluster.add_node()
    words = [sys.executable, "-m", "jobs", "pretrain", "debug", "--config", str(save_config(tmp_path / "c", config))]
    environment = {
        **os.environ,
        "RAY_ADDRESS": own_cluster.address,
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db",
    }
    with (tmp_path / "log").open("w") as log:
        command = subprocess.Popen(words, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    t = time.time()
    try:
        wait_until(lambda: len(rows(1)) > 30, command)
        print("at 1", time.time() - t, len(rows(1)))
        second = own_cluster.add_node()
        wait_until(lambda: len(rows(2)) > 30, command)
        print("at 2", time.time() - t, rows(2)[0], rows(2)[-1])
        own_cluster.kill_node(second)
        last = rows(2)[-1]
        wait_until(lambda: rows(1)[-1] > last, command)
        print("at 1 again", time.time() - t, rows(1)[-1])
        command.wait(200)
    finally:
        command.kill()
        print((tmp_path / "log").read_text()[-3000:])
    assert command.returncode == 0

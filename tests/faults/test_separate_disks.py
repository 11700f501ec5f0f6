"""Nodes that have no disk in common with the driver, but for tokens and a mirror: each has a file system of its own where the
run's folder lies (a tmpfs in a mount namespace)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import loop, pretrain
from jobs.checkpoint import list_checkpoints
from jobs.config import save_config
from jobs.journal import read_journal
from jobs.loop import Context
from jobs.pretrain import PretrainConfig, continue_run
from jobs.training import _open_run
from jobs.workers import WorkersConfig
from tests.e2e.training import make_config, make_tokens
from tests.faults.command import Command
from tests.faults.ray_head import started_head


@contextlib.contextmanager
def started_node(gcs: str, disk: Path, log: Path) -> Iterator[None]:
    """A node with one CPU, which sees an empty file system at `disk`."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={gcs}", "--num-cpus=1", "--block"]
    ray += ["--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(disk), *ray]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline_s = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline_s, f"no node:\n{log.read_text()[-3000:]}"
            time.sleep(0.2)
        yield
    finally:
        process.terminate()  # it ends what it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _can_mount() -> bool:
    return shutil.which("unshare") is not None and (
        subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    )


def train_alone(config: PretrainConfig) -> list[float]:
    """What one worker does, without Ray; the losses."""
    _open_run(config.out, config, [])
    loop.seed_everything(config.loop.seed, -1, 0)
    context = Context(run=config.out)
    task = pretrain.build(config, context)
    loop.train(task.objective, task.batches, context, config.loop, config.optim)
    return [row["loss"] for row in read_journal(config.out / "metrics.jsonl")]


def test_a_second_stage_on_nodes_with_disks_of_their_own(only_in_make_faults: None, tmp_path: Path) -> None:
    if not _can_mount():
        pytest.skip("needs root and unshare (util-linux), to give nodes a file system of their own")
    tokens, disk = make_tokens(tmp_path / "tokens"), tmp_path / "disk"
    disk.mkdir()
    first = make_config(tokens, tmp_path / "first", WorkersConfig(), steps=5, schedule_steps=20, save_every_steps=5)
    train_alone(first)
    workers = WorkersConfig(num_workers=2)
    second = make_config(tokens, disk / "run", workers, steps=20, save_every_steps=5)
    second = replace(second, continue_from=first.out)
    mirrored = replace(second, workers=replace(workers, mirror=str(tmp_path / "mirror")))
    env = {"RAY_AUTH_MODE": "disabled", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(started_head(num_cpus=0))
        for number in range(2):
            stack.enter_context(started_node(head.gcs, disk, tmp_path / f"node{number}.log"))

        def run(name: str, config: PretrainConfig) -> Command:
            words = ("pretrain", "debug", "--config", save_config(tmp_path / f"config-{name}", config))
            return Command(*words, cwd=tmp_path / name, address=head.gcs, env=env)

        refused = run("refused", second).end(expect=2)
        assert "is another folder than the driver's. Put --out on a file system that all" in refused["error"]
        shutil.rmtree(second.out)
        result = run("mirrored", mirrored).end()
    assert result["committed"] == 20
    assert list_checkpoints(second.out)[-1].name == "00000020" and (second.out / "model" / "config.json").exists()
    rows = list(read_journal(second.out / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(6, 21)) and {row["num_workers"] for row in rows} == {2}
    few = replace(second.loop, steps=10, schedule_steps=20)
    alone = replace(second, out=tmp_path / "alone", workers=WorkersConfig(), loop=few)
    _open_run(alone.out, alone, [])
    continue_run(alone, first.out)
    assert [row["loss"] for row in rows][:5] == pytest.approx(train_alone(alone), rel=1e-3)

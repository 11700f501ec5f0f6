"""kill -9 of the driver, of a worker at work, of a node's raylet and of the head, at seeded points; then the same command again.
The dataset is the unbroken run's, byte for byte."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cases import STAGES, check_subset
from tests.faults.command import Command, run
from tests.faults.conftest import Unbroken
from tests.faults.kills import TITLES, Nodes, check_finished, run_and_kill


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    # Sockets lie in it, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="tr", ignore_cleanup_errors=True) as folder:
        own = Nodes(Path(folder))
        yield own
        own.stop()


def test_the_dataset_is_the_unbroken_runs(
    kill: tuple[str, str, int], unbroken: Unbroken, cluster: str, nodes: Nodes, tmp_path: Path
) -> None:
    stage, kind, seed = kill
    draw = random.Random(f"{stage} {kind} {seed}")
    mode = draw.choice(STAGES[stage])
    whole, out = unbroken[mode], tmp_path / "out"
    words = unbroken.words(mode, out)
    print(f"{mode}, seed {seed}")
    address = nodes.ready() if kind in ("raylet", "head") else cluster
    command = run_and_kill(stage, kind, draw, words, out=out, whole=whole, nodes=nodes, address=address)
    if kind in TITLES:
        command.end()  # Ray does its work again; nobody has to run the job again
    elif kind == "raylet":
        nodes.replace_worker()
        command.end()
    else:
        if kind == "head":
            _check_head_loss(command)
            nodes.stop()
            check_subset(out, whole)
        run(*words, cwd=tmp_path / "again", address=cluster)
    check_finished(out, whole)


def _check_head_loss(command: Command) -> None:
    """Without a head the job cannot go on: Ray ends it, in bounded time, with exit code 1 and a word about it."""
    if command.end(expect=None, timeout_s=150)["exit_code"] != 0:  # it may have been past its last shard
        assert "Failed to connect to GCS" in command.said, command.said[-3000:]

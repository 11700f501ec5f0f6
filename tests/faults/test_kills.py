"""kill -9 of the driver, of a worker at work, of a node's raylet and of the head, at seeded points; then the same command again.
The dataset, or the trained model with its checkpoints and losses, is the unbroken run's, byte for byte."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cases import STAGES, check_subset
from tests.faults.command import Command, run
from tests.faults.conftest import Unbroken
from tests.faults.differences import describe_differences
from tests.faults.kills import TITLES, Nodes, check_finished, explained, run_and_kill
from tests.faults.training import UnbrokenTraining, files_of_run


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    # Sockets lie in it, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="tr", ignore_cleanup_errors=True) as folder:
        own = Nodes(Path(folder))
        yield own
        own.stop()


@pytest.fixture(scope="session")
def count() -> Iterator[Counter[str]]:
    """Of what was killed and came out right; printed at the end."""
    right: Counter[str] = Counter()
    yield right
    print("\nkilled, and right: " + (", ".join(f"{what} {number}" for what, number in sorted(right.items())) or "none"))


@pytest.fixture(scope="session")
def unbroken_training(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> UnbrokenTraining:
    return UnbrokenTraining(tmp_path_factory.mktemp("training"), cluster)


def test_all_is_as_the_unbroken_run_leaves_it(
    kill: tuple[str, str, int],
    cluster: str,
    nodes: Nodes,
    count: Counter[str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    stage, kind, seed = kill
    draw = random.Random(f"{stage} {kind} {seed}")
    with explained(tmp_path):
        if stage == "pretrain":
            training: UnbrokenTraining = request.getfixturevalue("unbroken_training")
            training.kill_and_go_on(kind, draw, tmp_path)
            different = describe_differences(files_of_run(tmp_path / "run"), training.files)
            assert not different, "\n".join(different)
        else:
            _check_dataset(stage, kind, draw, request.getfixturevalue("unbroken"), cluster, nodes, tmp_path)
    count[f"{stage} {kind}"] += 1


def _check_dataset(
    stage: str, kind: str, draw: random.Random, unbroken: Unbroken, cluster: str, nodes: Nodes, place: Path
) -> None:
    mode = draw.choice(STAGES[stage])
    whole, out = unbroken[mode], place / "out"
    words = unbroken.words(mode, out)
    print(mode)
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
        run(*words, cwd=place / "again", address=cluster)
    check_finished(out, whole)


def _check_head_loss(command: Command) -> None:
    """Without a head the job cannot go on: Ray ends it, in bounded time, with exit code 1 and a word about it."""
    if command.end(expect=None, timeout_s=150)["exit_code"] != 0:  # it may have been past its last shard
        assert "Failed to connect to GCS" in command.said, command.said[-3000:]

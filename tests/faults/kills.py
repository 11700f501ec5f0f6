"""kill -9 of the driver, of a worker at work (one that holds a shard; an encoder, a decoder), of a node's raylet and of the
head, at drawn points."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.cases import check_no_ffmpeg_left, check_same, check_subset
from tests.faults.command import Command
from tests.faults.points import DRIVER_POINTS, SHARD_POINTS, Watch

TITLES = {"worker": "_shard_task", "encoder": "_Encoder", "decoder": "_decode_task"}
"""Kind to what Ray calls the processes of its workers while they are at that."""
_MAX_TOO_LATE = 5
_ENV = {"head": {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}}  # Ray's own patience with a lost head is a minute
_TELLING = re.compile(r"error|exception|traceback|died|dead|kill|signal|reject", re.IGNORECASE)
_MAX_LINES = 40
"""Of one log, in a failed check."""
_LONGEST_WAIT_S = {"shard": (8.0, 8.0), "tokenize": (6.0, 1.0)}
"""Stage to how long a random time is at most: the driver's from the job's first point on, and others' from the first tar on."""


class Nodes:
    """A cluster of our own: a head without CPUs, on which the driver lives, a node that works, and, if it shall have
    `steady_cpus`, one that works and that nobody kills. Each is a raylet of its own.

    `ray.cluster_utils` notes its address in Ray's folder, where every `ray.init()` on this machine finds it, and deletes
    whatever note is there when it stops. It gets a folder of its own, so that nobody else's job joins what is killed here.
    """

    def __init__(
        self, folder: Path, *, num_cpus: int = 2, steady_cpus: int = 0, include_dashboard: bool = False
    ) -> None:
        self._folder, self._num_cpus, self._steady_cpus = folder, num_cpus, steady_cpus
        self._head_args = {"num_cpus": 0, "include_dashboard": include_dashboard}
        self._cluster: Any = None
        self._worker: Any = None

    @contextlib.contextmanager
    def _own_folder(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_TMPDIR", str(self._folder))
            yield

    def ready(self) -> str:
        """The address, with all nodes alive."""
        from ray.cluster_utils import Cluster

        with self._own_folder():
            if self._cluster is None:
                self._cluster = Cluster(initialize_head=True, head_node_args=self._head_args, shutdown_at_exit=False)
                if self._steady_cpus:
                    self._cluster.add_node(num_cpus=self._steady_cpus)
            if self._worker is None:
                self._worker = self._cluster.add_node(num_cpus=self._num_cpus)
        return str(self._cluster.address)

    def steady_processes(self) -> dict[str, int]:
        """Name to pid of each process of the nodes that nobody kills, as `head gcs_server` or `node raylet`."""
        found: dict[str, int] = {}
        for place, node in zip(("head", "node"), self._cluster.list_all_nodes(), strict=False):
            if node is not self._worker:
                found |= {f"{place} {name}": infos[0].process.pid for name, infos in node.all_processes.items()}
                agents = [one for one in psutil.Process(found[f"{place} raylet"]).children() if "Agent" in one.name()]
                if dashboard := found.get(f"{place} dashboard"):
                    agents += psutil.Process(dashboard).children(recursive=True)
                found |= {f"{place} {Path(one.cmdline()[0].split()[0]).name}": one.pid for one in agents}
        return found

    def kill_raylet(self) -> None:
        """Kill the raylet of the node that works."""
        _kill(self._worker, "raylet")

    def replace_worker(self) -> None:
        with self._own_folder():
            self._cluster.remove_node(self._worker, allow_graceful=False)
            self._worker = self._cluster.add_node(num_cpus=self._num_cpus)

    def kill_head(self) -> None:
        """Kill what the head consists of."""
        _kill(self._cluster.head_node, "gcs_server")
        _kill(self._cluster.head_node, "raylet")

    def stop(self) -> None:
        if self._cluster is not None:
            with self._own_folder(), contextlib.suppress(Exception):  # half of it is dead
                self._cluster.shutdown()
            self._cluster = self._worker = None


def _kill_a_worker(kind: str, out: Path, draw: random.Random, command: Command) -> bool:
    """Kill a worker that is at it: a decoder, or who has a shard of `out` in the making; False where all is done.

    It is stopped before it is looked at, so that it is killed in the state in which it was seen.
    """
    while command.is_running:
        for worker in draw.sample(workers := _workers(kind), len(workers)):
            with contextlib.suppress(psutil.Error):
                worker.suspend()
                if _is_at_work(worker, kind, out):
                    worker.kill()
                    return True
                worker.resume()
        time.sleep(0.005)
    return False


def _is_at_work(worker: psutil.Process, kind: str, out: Path) -> bool:
    if kind == "decoder":
        return TITLES[kind] in " ".join(worker.cmdline())
    return any(Path(file.path).is_relative_to(out / "shards") for file in worker.open_files())


def _workers(kind: str) -> list[psutil.Process]:
    """Ray's workers of this session that are at such work; not what they have just forked to become ffmpeg."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if TITLES[kind] in " ".join(process.cmdline()) and parent is not None and parent.name() == "raylet":
                found.append(process)
    return found


def _kill(node: Any, name: str) -> None:
    for info in node.all_processes[name]:
        os.kill(info.process.pid, signal.SIGKILL)


def run_and_kill(
    stage: str,
    kind: str,
    draw: random.Random,
    words: tuple[object, ...],
    *,
    out: Path,
    whole: dict[str, bytes],
    nodes: Nodes | None,
    address: str,
) -> Command:
    """Start a command that makes the dataset `out`, kill what `kind` says at a drawn point, and check that what counts then
    is as in `whole`. Where the job was done before the kill, all is made again and another point is drawn.

    Returns:
        The command, which goes on unless it is the killed driver.
    """
    for _ in range(_MAX_TOO_LATE):
        command = Command(*words, cwd=out.parent, address=address, env=_ENV.get(kind))
        if _kill_at(_Point.drawn(stage, kind, draw, whole), kind, draw, command, out, nodes):
            print(f"{stage}, {kind}: {check_subset(out, whole)} shards counted then")
            return command
        command.end()
        shutil.rmtree(out)
    raise AssertionError(f"{_MAX_TOO_LATE} times the job was done before the kill")


@dataclass(frozen=True)
class _Point:
    """The `count`-th time that a file of `name` appears (see POINTS), and `delay_s` seconds more."""

    name: str
    count: int
    delay_s: float

    @staticmethod
    def drawn(stage: str, kind: str, draw: random.Random, whole: dict[str, bytes]) -> _Point:
        num_shards = sum(name.startswith("index/") for name in whole)
        point = draw.choice([*(DRIVER_POINTS[stage] if kind == "driver" else SHARD_POINTS), "time"])
        count = draw.randint(1, num_shards - 1) if point in SHARD_POINTS else 2 if point == "finishing" else 1
        longest_s = _LONGEST_WAIT_S[stage][kind != "driver"]
        delay_s = draw.uniform(0, longest_s) if point == "time" else draw.choice([0, 0, draw.uniform(0, 0.05)])
        print(f"{stage}, {kind}: {point} {count}, and {delay_s:.3f} s more")
        if point == "time":
            point = DRIVER_POINTS[stage][0] if kind == "driver" else "writing a tar"
        return _Point(point, count, delay_s)


def _kill_at(point: _Point, kind: str, draw: random.Random, command: Command, out: Path, nodes: Nodes | None) -> bool:
    """Kill at that point; False where the job was done by then."""
    with Watch(out) as watch:
        seen = watch.wait(point.name, point.count, lambda: command.is_running)
        assert seen is not None, f"ended before it could be killed:\n{command.said}"
        time.sleep(point.delay_s)
        if kind in TITLES:
            return _kill_a_worker(kind, out, draw, command)
        if not command.is_running:
            return False
        if kind == "driver":
            command.kill()
        else:
            assert nodes is not None
            (nodes.kill_raylet if kind == "raylet" else nodes.kill_head)()
        return True


@contextlib.contextmanager
def explained(*folders: Path) -> Iterator[None]:
    """To a failed check in the body, adds what the commands and Ray's processes logged since: `folders` hold the commands'."""
    started_s = time.time()
    try:
        yield
    except AssertionError as error:
        said = [path for folder in folders for path in sorted(folder.glob("**/std*.log"))]
        logs = [path for folder in _ray_folders() for path in sorted(folder.glob("session_*/logs/*.[oe][ur][tr]"))]
        for path in [*said, *(path for path in logs if path.stat().st_mtime >= started_s)]:
            lines = path.read_text(errors="replace").splitlines()
            telling = [line for line in lines if _TELLING.search(line)] if path in logs else lines
            if telling:
                error.add_note("\n".join([f"{path}:", *telling[-_MAX_LINES:]]))
        raise


def _ray_folders() -> list[Path]:
    """Where Ray's nodes of this session log: ours says so in its environment, the others in their raylets' command lines."""
    found = {Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found |= {Path(word.partition("=")[2]) for word in process.cmdline() if word.startswith("--temp_dir=")}
    return sorted(found)


def check_finished(out: Path, whole: dict[str, bytes]) -> None:
    """Assert that the dataset is the unbroken run's, and that nothing temporary and no ffmpeg is left."""
    check_same(out, whole)
    leftovers = [str(path) for path in out.rglob(".*") if path.name != ".lock"]
    assert not leftovers, leftovers
    check_no_ffmpeg_left()

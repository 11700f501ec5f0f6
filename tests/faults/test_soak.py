"""Shard, tokenize and pretrain in a loop on one cluster, with random kills, for as long as `--soak-minutes` says: what lives
through all rounds does not grow. One line a round goes to `soak.jsonl` in the working directory."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import stat
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.config import save_config
from jobs.journal import JOURNAL_NAME, read_journal
from tests.conftest import small_pretrain_config
from tests.e2e.training import find_train_worker
from tests.faults.cases import ALWAYS, MODES, TOKEN_MODES, files_of, make_corpus, make_tokenizer
from tests.faults.command import Command
from tests.faults.kills import Nodes, check_finished, run_and_kill

_KINDS = {
    "shard": ("none", "driver", "worker", "raylet"),
    "tokenize": ("none", "driver", "encoder", "decoder", "raylet"),
    "pretrain": ("none", "driver", "worker", "raylet"),
}
"""Stage to what a round kills in it, one of them at a time."""
_STEPS = 12
_END_S = 400.0
"""Until when a command must have ended; the soak has low priority."""


class Project:
    """A folder with all that a person's project has, and Ray's, the temporary and the cached files of its jobs."""

    def __init__(self, folder: Path, nodes: Nodes) -> None:
        self.folder, self._nodes = folder, nodes
        self.corpus = make_corpus(folder / "corpus")
        self.tokenizer = make_tokenizer(folder / "tokenizer")
        self._whole: dict[str, dict[str, bytes]] = {}
        for tokens, (clips, _) in TOKEN_MODES.items():
            for stage, mode in (("shard", clips), ("tokenize", tokens)):
                out = folder / "whole" / mode / "out"
                self._run(*self._words(stage, mode, out), out=out)
                self._whole[mode] = files_of(out)
            self._run(*self._pretrain(tokens, folder / "whole"), out=folder / "whole" / tokens / "model")

    def do_round(self, draw: random.Random) -> dict[str, str]:
        """The stages, with kills, in a folder of its own that is gone afterwards; what was killed, by stage."""
        place = self.folder / "round"
        tokens = draw.choice(sorted(TOKEN_MODES))
        kinds = {stage: draw.choice(kinds) for stage, kinds in _KINDS.items()}
        for stage, mode in (("shard", TOKEN_MODES[tokens][0]), ("tokenize", tokens)):
            self._make_dataset(stage, kinds[stage], draw, mode, place / mode / "out")
        self._train(kinds["pretrain"], draw, tokens, place)
        shutil.rmtree(place)
        return {"mode": tokens, **kinds}

    def _make_dataset(self, stage: str, kind: str, draw: random.Random, mode: str, out: Path) -> None:
        words, whole, address = self._words(stage, mode, out), self._whole[mode], self._nodes.ready()
        if kind == "none":
            self._run(*words, out=out)
        else:
            command = run_and_kill(stage, kind, draw, words, out=out, whole=whole, nodes=self._nodes, address=address)
            self._go_on(kind, command, words, out)
        check_finished(out, whole)

    def _train(self, kind: str, draw: random.Random, tokens: str, place: Path) -> None:
        words, out = self._pretrain(tokens, place), place / tokens / "model"
        command = Command(*words, cwd=out.parent, address=self._nodes.ready())
        if kind != "none":
            step = draw.randint(1, _STEPS - 4)
            while not any(row["step"] >= step for row in read_journal(out / JOURNAL_NAME)):
                assert command.is_running, f"it ended before step {step}:\n{command.said}"
                time.sleep(0.01)
            print(f"pretrain, {kind}: step {step}")
            if kind == "driver":
                command.kill()
            elif kind == "raylet":
                self._nodes.kill_raylet()
            else:
                find_train_worker().kill()
        self._go_on(kind, command, words, out)
        ours, theirs = (_losses(where / tokens / "model") for where in (place, self.folder / "whole"))
        assert ours == theirs, "steps are missing, there twice, or not those of an undisturbed run"

    def _go_on(self, kind: str, command: Command, words: Sequence[object], out: Path) -> None:
        if kind == "raylet":
            self._nodes.replace_worker()
        if kind == "driver":
            self._run(*words, out=out)
        else:
            command.end(timeout_s=_END_S)

    def _run(self, *words: object, out: Path) -> None:
        Command(*words, cwd=out.parent, address=self._nodes.ready()).end(timeout_s=_END_S)

    def _words(self, stage: str, mode: str, out: Path) -> tuple[object, ...]:
        if stage == "shard":
            return ("shard", self.corpus, out, *MODES[mode], *ALWAYS)
        clips, options = TOKEN_MODES[mode]
        folder = out.parent.parent / clips / "out"
        return ("tokenize", folder, out, "--tokenizer", self.tokenizer, *options, *ALWAYS)

    def _pretrain(self, tokens: str, place: Path) -> tuple[object, ...]:
        config = small_pretrain_config(place / tokens / "out", place / tokens / "model")
        config = replace(
            config,
            backbone=replace(config.backbone, grid_height=4, grid_width=4),
            loop=replace(config.loop, steps=_STEPS),
            register_as="",  # versions of a model would be another thing that grows as it should
        )
        return ("pretrain", "debug", "--config", save_config(place / tokens / "config", config))


def _losses(run: Path) -> list[tuple[int, float, str]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_journal(run / JOURNAL_NAME)]


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    """A head, a node that stays and one that is killed and replaced; all files in one folder, which is the nodes' to measure."""
    if not request.config.getoption("--soak-minutes"):
        pytest.skip("takes as long as one likes: make soak")
    with (
        pytest.MonkeyPatch.context() as patch,
        # Sockets lie in it, whose paths must be short.
        tempfile.TemporaryDirectory(prefix="tr", ignore_cleanup_errors=True) as name,
    ):
        folder = Path(name)
        (folder / "tmp").mkdir()
        for variable, value in {
            "RAY_TMPDIR": folder,
            "TMPDIR": folder / "tmp",
            "XDG_CACHE_HOME": folder / "cache",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "RAY_worker_niceness": 0,
        }.items():
            patch.setenv(variable, str(value))
        # Without a dashboard, whose server Ray Train asks, what cleans up after a killed driver would never end.
        own = Nodes(folder, num_cpus=1, steady_cpus=1, include_dashboard=True)
        try:
            yield own
        finally:
            own.stop()


def sample(folder: Path, steady: dict[str, int]) -> dict[str, float]:
    """What there is now: resident MiB and file handles of the processes that stay, and what jobs may have left behind."""
    import ray
    from ray._private.internal_api import node_stats
    from ray._private.state import actors

    figures: dict[str, float] = {}
    for name, pid in steady.items():
        process = psutil.Process(pid)
        figures[f"MiB {name}"] = round(process.memory_info().rss / 2**20, 1)
        figures[f"handles {name}"] = process.num_fds()
    alive = [node for node in ray.nodes() if node["Alive"]]
    stores = [node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False).store_stats for node in alive]
    figures["Ray objects"] = sum(store.num_local_objects for store in stores)
    alive_actors = [one for one in actors().values() if one["State"] != "DEAD"]
    ours = list(_our_processes())
    figures["processes"] = len(ours)
    # Ray Data and Ray Train keep detached actors for their own records, one of a kind in a cluster.
    figures["detached actors"] = sum(one["IsDetached"] for one in alive_actors)
    figures["actors of jobs"] = len(alive_actors) - figures["detached actors"]
    figures["workers of jobs"] = (
        sum(name.startswith("ray::") and "Agent" not in name for name in ours) - figures["detached actors"]
    )
    figures["MiB /dev/shm"] = round(psutil.disk_usage("/dev/shm").used / 2**20, 1)
    sizes = {"Ray's logs": 0, "Ray's folder": 0, "MLflow": 0, "project": 0}
    figures["files project"] = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it went again
            if stat.S_ISREG((status := path.lstat()).st_mode):
                parts = path.relative_to(folder).parts
                in_ray = "Ray's logs" if "logs" in parts else "Ray's folder"
                place = in_ray if parts[0] == "ray" else "MLflow" if parts[0].startswith("ml") else "project"
                sizes[place] += status.st_size
                figures["files project"] += place == "project"
    return figures | {f"MiB {place}": round(size / 2**20, 2) for place, size in sizes.items()}


def _our_processes() -> Iterator[str]:
    """Titles of all processes of this soak, by their environment: who started them may be dead."""
    ours = os.environ["MLFLOW_TRACKING_URI"]
    for process in psutil.process_iter():
        try:
            if process.environ().get("MLFLOW_TRACKING_URI") == ours:
                yield (process.cmdline() or [process.name()])[0]
        except psutil.Error:
            continue


def growth(values: Sequence[float]) -> float:
    """By how much the median of the last third is above that of the third before it; the first one warms up."""
    third = max(1, len(values) // 3)
    return statistics.median(values[-third:]) - statistics.median(values[-2 * third : -third] or values)


_COUNTS = ("Ray objects", "detached actors", "actors of jobs", "processes")
_MAY_GROW_A_ROUND = {
    # Ray's, which remember jobs, nodes, actors and tasks that are gone.
    "MiB head gcs_server": 1.5,
    "MiB head raylet": 1.5,
    "MiB head ray::DashboardAgent": 1.5,
    "MiB head ray-dashboard": 1.5,
    "MiB head": 0.5,
    "MiB node": 1.0,
    "MiB Ray's logs": 2.0,  # each process has its own, and Ray deletes none
    "MiB MLflow": 0.5,  # its runs are the record of what was done
}
"""Begin of a figure's name to what may be added to it by each round; nothing where no name fits. The first that fits."""
_SLACK = {
    "handles head log_monitor": 150.0,  # it opens logs up to 200 and then closes those of the dead
    "handles head gcs_server": 25.0,  # a killed node's go after a while
    "handles": 8.0,
    "MiB head": 5.0,
    "MiB node": 5.0,
    "MiB": 0.5,
    "files": 4.0,  # the cache has both datasets once both were drawn
}
"""Begin of a figure's name to what may be added once, in all rounds together; nothing where no name fits."""


def find_growth(samples: Sequence[dict[str, float]]) -> list[str]:
    """What grew by more than it may between the second and the last third of the rounds, and by how much."""
    rounds = len(samples) / 3
    found = []
    for name in samples[0]:
        per_round, slack = (
            next((amount for begin, amount in table.items() if name.startswith(begin)), 0.0)
            for table in (_MAY_GROW_A_ROUND, _SLACK)
        )
        grown = growth([one[name] for one in samples])
        if grown > slack + per_round * rounds:
            found.append(f"{name}: {grown:g} more, allowed are {slack + per_round * rounds:g}")
    return found


def test_what_counts_as_growth() -> None:
    steady = [{"processes": 10.0, "MiB node raylet": 30.0 + 20.0 * (number % 2)} for number in range(30)]
    assert find_growth(steady) == []
    leaking = [{**one, "processes": 10.0 + number // 9} for number, one in enumerate(steady)]
    assert find_growth(leaking) == ["processes: 1 more, allowed are 0"]
    warming = [{**one, "Ray objects": min(number, 8)} for number, one in enumerate(steady)]
    assert find_growth(warming) == []
    swelling = [{**one, "MiB node raylet": 30.0 + 2 * number} for number, one in enumerate(steady)]
    assert find_growth(swelling) == ["MiB node raylet: 20 more, allowed are 15"]


def test_nothing_grows(nodes: Nodes, request: pytest.FixtureRequest) -> None:
    import ray

    minutes, seed = (request.config.getoption(name) for name in ("--soak-minutes", "--fault-seed"))
    folder = Path(os.environ["RAY_TMPDIR"])
    report = Path("soak.jsonl")
    address = nodes.ready()
    project = Project(folder, nodes)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    samples: list[dict[str, float]] = []
    began_s = time.monotonic()
    try:
        steady = nodes.steady_processes()
        with report.open("w") as lines:
            while time.monotonic() < began_s + 60 * minutes:
                killed = project.do_round(random.Random(f"soak {seed} {len(samples)}"))
                now = sample(folder, steady)
                deadline = time.monotonic() + 60  # for Ray to clean up
                while (
                    any(now[name] > (samples or [now])[0][name] for name in _COUNTS) or now["workers of jobs"]
                ) and time.monotonic() < deadline:
                    time.sleep(1)
                    now = sample(folder, steady)
                samples.append(now)
                row: dict[str, Any] = {"round": len(samples), "minute": round((time.monotonic() - began_s) / 60, 1)}
                lines.write(json.dumps({**row, **killed, **now}) + "\n")
                lines.flush()
    finally:
        ray.shutdown()
    print({name: round(growth([one[name] for one in samples]), 2) for name in samples[0]})
    assert not (grown := find_growth(samples)), grown

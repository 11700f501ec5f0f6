"""kill -9 of a pre-training run: of its driver or of one of its workers, at drawn points; and what the unbroken run left."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import replace
from pathlib import Path

import psutil

from jobs.config import save_config
from jobs.journal import JOURNAL_NAME, read_journal
from jobs.workers import WorkersConfig
from tests.e2e.training import find_train_worker, make_config, make_tokens
from tests.faults.command import Command, run
from tests.faults.points import Watch

POINTS = {"driver": ("starting", "step", "saving", "saved", "time"), "worker": ("step", "saving", "saved", "time")}
"""What is killed to where: as the run's folder appears, after a step, while a checkpoint is written, as soon as it is there, or
at a random time after the first step."""
_STEPS, _SAVE_EVERY_STEPS = 12, 4
_LONGEST_WAIT_S = 1.0
_LEFT_BY_RAY = "PlacementGroupCleaner"
"""What Ray Train 2.60 leaves of a killed driver on a cluster without a dashboard, for good."""


class UnbrokenTraining:
    """A token dataset, a run on it that nothing disturbs, and the command for others like it."""

    def __init__(self, folder: Path, address: str) -> None:
        self._address, self._tokens = address, make_tokens(folder / "tokens")
        run(*self.words(folder), cwd=folder / "logs", address=address)
        self.files = files_of_run(folder / "run")
        assert {f"checkpoints/{step:08d}/model.safetensors" for step in (8, 12)} < self.files.keys(), sorted(self.files)

    def words(self, place: Path) -> tuple[object, ...]:
        """The command that makes `place`/run."""
        workers = WorkersConfig(num_workers=2)
        config = make_config(self._tokens, place / "run", workers, steps=_STEPS, save_every_steps=_SAVE_EVERY_STEPS)
        return ("pretrain", "debug", "--config", save_config(place / "config", replace(config, register_as="")))

    def kill_and_go_on(self, kind: str, draw: random.Random, place: Path) -> None:
        """Kill a run in `place` once; then the same command, or the job by itself, brings it to its end."""
        out, words = place / "run", self.words(place)
        point = draw.choice(POINTS[kind])
        delay_s = draw.uniform(0, _LONGEST_WAIT_S if point == "time" else 0.05)
        step, count = draw.randint(1, _STEPS - 2), draw.randint(1, _STEPS // _SAVE_EVERY_STEPS - 1)
        print(f"pretrain, {kind}: {point} (step {step}, checkpoint {count}), and {delay_s:.3f} s more")
        with Watch(out) as watch:
            command = Command(*words, cwd=place / "killed", address=self._address)
            if point in ("starting", "saving", "saved"):
                seen = watch.wait(point, count if point != "starting" else 1, lambda: command.is_running)
                assert seen is not None, f"ended before it could be killed:\n{command.said}"
            else:
                _wait_for_step(out, step if point == "step" else 1, command)
        time.sleep(delay_s)
        assert command.is_running, f"ended before it could be killed:\n{command.said}"
        if kind == "worker":
            find_train_worker().kill()
            command.end()
            return
        command.kill()
        run(*words, cwd=place / "again", address=self._address)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if _LEFT_BY_RAY in " ".join(process.cmdline()):
                    process.kill()


def files_of_run(run_folder: Path) -> dict[str, bytes]:
    """Checkpoints and model of a run, and the losses of its steps, by name; times, MLflow's ids and where it lies are not in it."""
    paths = [path for name in ("checkpoints", "model") for path in (run_folder / name).rglob("*") if path.is_file()]
    losses = [(row["step"], row["loss"], row["grad_norm"]) for row in read_journal(run_folder / JOURNAL_NAME)]
    here = str(run_folder).encode()
    files = {str(path.relative_to(run_folder)): path.read_bytes().replace(here, b"RUN") for path in paths}
    return files | {"losses": "\n".join(map(str, losses)).encode()}


def _wait_for_step(out: Path, step: int, command: Command) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_journal(out / JOURNAL_NAME)):
        assert command.is_running and time.monotonic() < deadline, f"never came to step {step}:\n{command.said[-6000:]}"
        time.sleep(0.01)

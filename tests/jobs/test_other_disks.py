"""A training run whose workers have another disk than the driver: what each needs of the other goes through the mirror, and
without one the job says so before it trains. One worker, in the driver's process, without Ray."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pickle
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import run_folders, shipper, training
from jobs.checkpoint import Cursor, list_checkpoints, read_tensors, write_checkpoint
from jobs.journal import read_journal
from jobs.loop import Context, LoopConfig, train
from jobs.mirror import Mirror
from jobs.result import JobResult
from jobs.tracking import read_run_id
from jobs.training import BuildTask, Task, TrainingFailed, run_training
from jobs.workers import WorkersConfig
from models.optim import OptimConfig
from pipeline.errors import ConfigError
from tests.jobs.test_loop import CONFIG, OPTIM, Noisy, Steps, losses

LONGER = replace(CONFIG, steps=8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    out: Path
    workers: WorkersConfig
    loop: LoopConfig = LONGER
    optim: OptimConfig = field(default_factory=lambda: OPTIM)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def disk(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The worker's, on which the run's folder is `disk / out.name`."""
    disk = tmp_path / "disk"

    def make_trainer(out: Path, workers: WorkersConfig, settings: dict[str, Any], resources: object) -> Any:
        sent = pickle.loads(pickle.dumps(settings))  # noqa: S301  # our own
        context = Context(run=disk / out.name)
        return SimpleNamespace(fit=lambda: SimpleNamespace(return_value=training._train(sent, context)))

    monkeypatch.setattr(training, "_make_trainer", make_trainer)
    monkeypatch.setattr(training, "_choose_resources", lambda workers: {})
    monkeypatch.setattr(training, "connect", contextlib.nullcontext)
    monkeypatch.setattr(shipper, "_POLL_S", 0.05)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return disk


def build(context: Context) -> Task:
    return Task(objective=Noisy(), batches=Steps(), draw=lambda module, step: None)


class Unbounded(Steps):
    def batch(self, step: int) -> dict[str, Any]:
        batch = super().batch(step)
        return batch | {"x": batch["x"] * math.inf}


def build_unbounded(context: Context) -> Task:
    return replace(build(context), batches=Unbounded())


def run(config: Config, begin: Callable[[], None] | None = None, build: BuildTask = build) -> JobResult:
    def export(checkpoint: Path, folder: Path) -> None:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)

    return run_training(
        "train",
        config.out,
        config,
        build,
        [],
        export,
        dict,
        name="tiny",
        num_parts=4,
        make_objective=Noisy,
        begin=begin,
    )


def make_config(tmp_path: Path, **changes: Any) -> Config:
    return Config(out=tmp_path / "run", workers=WorkersConfig(mirror=str(tmp_path / "mirror")), **changes)


def train_alone(folder: Path, steps: int) -> Path:
    """On one disk, without a job; the last checkpoint."""
    train(Noisy(), Steps(), Context(run=folder), replace(LONGER, steps=steps, schedule_steps=8), OPTIM)
    return list_checkpoints(folder)[-1]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_worker_starts_from_the_checkpoint_that_the_driver_wrote(disk: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    weights, _ = read_tensors(train_alone(tmp_path / "source", 4))

    def begin(folder: Path) -> None:
        write_checkpoint(folder, weights, {}, Cursor())

    result = run(config, functools.partial(begin, config.out))
    begin(tmp_path / "whole")
    whole, fresh = train_alone(tmp_path / "whole", 8), train_alone(tmp_path / "fresh", 8)
    ours = (config.out / "model" / "model.safetensors").read_bytes()
    assert ours == (whole / "model.safetensors").read_bytes() != (fresh / "model.safetensors").read_bytes()
    assert [row["step"] for row in read_journal(config.out / "metrics.jsonl")] == list(range(1, 9))
    assert result.committed == 8


def test_what_the_workers_made_comes_to_the_driver(disk: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, loop=replace(LONGER, keep_checkpoints=1))
    result = run(config)
    whole = train_alone(tmp_path / "whole", 8)
    assert files_of(config.out / "model").items() >= files_of(whole).items()
    kept = [path.name for path in list_checkpoints(disk / "run")]  # the last one, and the best one
    assert [path.name for path in list_checkpoints(config.out)] == kept == Mirror(config.workers.mirror).list()
    rows = list(read_journal(config.out / "metrics.jsonl"))
    assert losses(rows) == losses(list(read_journal(tmp_path / "whole" / "metrics.jsonl")))
    assert result.figures["loss_start"] == rows[0]["loss"]


def test_a_driver_without_its_folder_goes_on_as_the_same_run(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, known = make_config(tmp_path), []

    def die_once_mlflow_knows_the_run(*_: object) -> None:
        deadline_s = time.monotonic() + 60
        while not read_run_id(tmp_path / "mirror"):
            assert time.monotonic() < deadline_s, "no run id in the mirror while it trains"
            time.sleep(0.01)
        known.append(read_run_id(tmp_path / "mirror"))
        raise TrainingFailed

    with monkeypatch.context() as patch, pytest.raises(TrainingFailed):
        patch.setattr(training, "_fit", die_once_mlflow_knows_the_run)
        run(config)
    shutil.rmtree(config.out)
    first = run(config)
    shutil.rmtree(config.out)
    again = run(config)
    assert [again.mlflow_run_id] == [first.mlflow_run_id] == known
    assert again.fingerprint == first.fingerprint and again.committed == 8


def test_a_mirror_is_bound_to_the_settings_of_its_run(disk: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run(config)
    other = replace(config, out=tmp_path / "other", optim=OptimConfig(lr=0.01))
    with pytest.raises(ConfigError, match=r"other holds a run with other settings: optim\.lr = 0\.05 \(now 0\.01\)"):
        run(other)
    (tmp_path / "mirror" / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"mirror holds checkpoints, and no run\.json .*choose another place, or"):
        run(replace(other, out=tmp_path / "third"))
    assert not list_checkpoints(tmp_path / "third")


def test_what_would_fail_again_reaches_the_driver_as_it_is(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"^loss is nan at step 1; its batch: 0-0, 0-1"):
        run(make_config(tmp_path), build=build_unbounded)


def test_without_a_mirror_it_says_so_before_it_trains(disk: Path, tmp_path: Path) -> None:
    config = Config(out=tmp_path / "run", workers=WorkersConfig())
    with pytest.raises(
        ConfigError, match=r"run on \S+ is another folder .* file system that all nodes share, or .*mirror"
    ):
        run(config)
    assert not disk.exists()


def test_without_a_mirror_and_with_an_older_copy_of_the_run_it_says_so_at_the_end(disk: Path, tmp_path: Path) -> None:
    config = Config(out=tmp_path / "run", workers=WorkersConfig())
    training._open_run(disk / "run", config, [])
    with pytest.raises(
        TrainingFailed, match=r"run: the workers did all steps, .* that all nodes share, or give --workers"
    ):
        run(config)


def test_a_worker_that_has_an_older_run_at_the_same_place_is_refused(disk: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    training._open_run(disk / "run", replace(config, loop=CONFIG), [])
    train_alone(disk / "run", 6)
    with pytest.raises(ConfigError, match=r"holds another run than .*disk/run; .* or delete .*disk/run"):
        run(config)
    (disk / "run" / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"disk/run holds checkpoints, and no run\.json .*delete it"):
        run(config)
    assert Mirror(config.workers.mirror).list() == []


def test_a_worker_that_does_not_see_the_mirror_is_refused(tmp_path: Path) -> None:
    elsewhere = Mirror(str(tmp_path / "another disk"))
    trouble = run_folders.agree_on_folder(b"{}", elsewhere, Context(run=tmp_path / "run"))
    assert "another disk" in trouble and "Give a URL, or a folder that all nodes share" in trouble


def test_a_last_checkpoint_that_did_not_reach_the_mirror_comes_with_the_next_start(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, push = make_config(tmp_path), Mirror.push

    def push_but_the_last(self: Mirror, checkpoint: Path) -> None:
        if checkpoint.name == "00000008":
            raise OSError("away")
        push(self, checkpoint)

    with monkeypatch.context() as patch, pytest.raises(TrainingFailed, match="could not copy the last checkpoint to"):
        patch.setattr(Mirror, "push", push_but_the_last)
        run(config)
    assert not (config.out / "model").exists()
    assert run(config).committed == 8
    assert json.loads((config.out / "model" / "state.json").read_text())["step"] == 8


def test_a_mirror_that_is_away_at_the_end_costs_nothing_where_the_disk_is_shared(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.symlink_to(tmp_path)
    config, pull = make_config(tmp_path), Mirror.pull

    def pull_until_trained(self: Mirror, run: Path, max_bytes: Mapping[str, int]) -> None:
        if list_checkpoints(run):
            raise OSError("away")
        pull(self, run, max_bytes)

    monkeypatch.setattr(Mirror, "pull", pull_until_trained)
    assert run(config).committed == 8

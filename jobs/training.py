"""A training run on Ray Train: open or resume the run folder, start the workers, report."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from jobs import loop
from jobs.cluster import connect, count
from jobs.config import CONFIG_NAME, save_config, to_plain
from jobs.folder import lock_folder
from jobs.journal import JOURNAL_NAME, read_journal
from jobs.loop import Batches, Context, LoopConfig, NonFiniteLoss
from jobs.progress import follow
from jobs.result import JobResult
from jobs.tracking import DatasetInput, Tracker
from models.optim import OptimConfig
from pipeline.dataset import config_differences, require_unused
from pipeline.errors import ConfigError, TokenreelError
from pipeline.files import write_atomic
from pipeline.schema import fingerprint

log = logging.getLogger(__name__)
_FAILURE = "failure.json"
_MARKER = "run.json"
_NOT_IDENTITY = ("workers", "out", "register_as", "clips", "tokens", "perceptual", "continue_from")
"""Settings that may change between a run and its resume; inputs count by fingerprint, not by where they lie."""
_NOT_IDENTITY_OF_LOADER = ("cache",)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersConfig:
    """Who trains. None of it changes the order of the data."""

    num_workers: int = 1
    """Data-parallel workers (DDP): one GPU each, or one CPU each."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes GPUs where the cluster has enough for all workers."""
    max_failures: int = 3
    """Times that a died worker is replaced, and the run resumed from its checkpoint, before the job fails."""

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.max_failures < 0:
            raise ConfigError(
                f"workers: num_workers = {self.num_workers} must be 1 or more, max_failures = {self.max_failures} 0 or more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a worker trains, on what, and how it draws pictures of it."""

    objective: nn.Module
    batches: Batches
    draw: Callable[[nn.Module, int], None]


BuildTask = Callable[[Context], Task]


class TrainingFailed(TokenreelError):
    """The workers could not finish; the message says why and where the checkpoint is."""


def run_training(
    job: str,
    out: Path,
    config: Any,
    build: BuildTask,
    inputs: Sequence[DatasetInput],
    conclude: Callable[[Path], dict[str, Any]],
    *,
    name: str,
    register_as: str = "",
    begin: Callable[[], None] | None = None,
) -> JobResult:
    """Train on the cluster until `config.loop.steps`, resuming what stands in `out`, and return the job's result.

    Args:
        config: a config dataclass with `loop`, `optim`, `workers` and `out`; saved as `config.json`.
        build: makes the task on each worker; must be picklable.
        conclude: given the last checkpoint, writes `out/model/` and returns the job's own figures.
        register_as: name in the MLflow model registry; empty registers nothing.
        begin: writes the checkpoint that a run without one starts from; by default it starts from fresh weights.

    Raises:
        ConfigError: `out` holds a run with other settings or other data.
        TrainingFailed: the loss became non-finite, or workers died more often than allowed.
    """
    started_s = time.monotonic()
    with lock_folder(out):
        identity = _open_run(out, config, inputs)
        if begin is not None and not loop.list_checkpoints(out):
            begin()
        tags = {"tokenreel.fingerprint": identity, "tokenreel.out": str(out)}
        with Tracker.open(out, job=job, name=name, params=to_plain(config), tags=tags, inputs=inputs) as tracker:
            if not _is_done(out, config.loop):
                _fit(job, out, config.loop, config.optim, config.workers, build)
            checkpoint = loop.list_checkpoints(out)[-1]
            cursor = loop.read_cursor(checkpoint)
            figures = {**_curve(out), **conclude(checkpoint), "keys_digest": cursor.keys_digest}
            if register_as:
                tracker.register_model(register_as, out / "model")
            summary = {f"final_{key}": float(value) for key, value in figures.items() if isinstance(value, int | float)}
            tracker.finish("FINISHED", summary, [out / CONFIG_NAME])
    return JobResult(
        job=job,
        out=str(out),
        planned=config.loop.steps,
        committed=cursor.step,
        fingerprint=identity,
        mlflow_run_id=tracker.run_id or "",
        elapsed_s=time.monotonic() - started_s,
        figures={**figures, "model": str(out / "model")},
    )


def _open_run(out: Path, config: Any, inputs: Sequence[DatasetInput]) -> str:
    """Create or check the run folder; returns the run's fingerprint."""
    plain = to_plain(config)
    identity = {key: value for key, value in plain.items() if key not in _NOT_IDENTITY}
    if "loader" in identity:
        identity["loader"] = {
            key: value for key, value in identity["loader"].items() if key not in _NOT_IDENTITY_OF_LOADER
        }
    identity["inputs"] = [f"{one.fingerprint} {one.content}".strip() for one in inputs]
    marker = out / _MARKER
    if marker.exists():
        before = json.loads(marker.read_text())
        if differences := list(config_differences(before, identity)):
            words = "; ".join(f"{name} = {old!r} (now {new!r})" for name, old, new in differences)
            raise ConfigError(
                f"{out} holds a run with other settings: {words}. Choose another --out, or delete this one"
            )
    else:
        require_unused(out)
        write_atomic(marker, (json.dumps(identity, indent=2) + "\n").encode())
    save_config(out, config)
    return fingerprint(**identity)


def read_run_fingerprint(run: Path) -> str:
    """The fingerprint that a run's job returned: of its settings and inputs."""
    return fingerprint(**json.loads((run / _MARKER).read_text()))


def _is_done(out: Path, config: LoopConfig) -> bool:
    checkpoints = loop.list_checkpoints(out)
    return bool(checkpoints) and loop.read_cursor(checkpoints[-1]).step >= config.steps


def _fit(job: str, out: Path, config: LoopConfig, optim: OptimConfig, workers: WorkersConfig, build: BuildTask) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    (out / _FAILURE).unlink(missing_ok=True)
    settings = {"build": build, "run": out.resolve(), "loop": config, "optim": optim}
    with connect(), follow(out / JOURNAL_NAME, job, config.steps):
        use_gpu = workers.device == "gpu" or (workers.device == "auto" and count("GPU") >= workers.num_workers)
        if use_gpu and count("GPU") < workers.num_workers:
            raise ConfigError(
                f"workers: {workers.num_workers} GPU workers asked for; the cluster has {count('GPU'):g} GPUs"
            )
        trainer = TorchTrainer(
            _work,
            train_loop_config=settings,
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers.num_workers,
                use_gpu=use_gpu,
                # Fewer CPUs than workers is slow, but it is not a reason to wait for ever.
                resources_per_worker={"CPU": min(1.0, count("CPU") / workers.num_workers), "GPU": int(use_gpu)},
            ),
            # Checkpoints are ours; Ray keeps only its own bookkeeping, and a fresh one for each start.
            run_config=RunConfig(
                name=uuid.uuid4().hex[:8],
                storage_path=str(out.resolve() / "ray"),
                failure_config=FailureConfig(max_failures=workers.max_failures),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray wraps whatever a worker raised
            raise TrainingFailed(
                f"{out}: the workers failed: {_root_cause(error)}. Checkpoints stay in {out / 'checkpoints'}; the same command resumes"
            ) from error
        finally:
            shutil.rmtree(out / "ray", ignore_errors=True)
    if (out / _FAILURE).exists():
        raise TrainingFailed(json.loads((out / _FAILURE).read_text())["error"])


def _work(settings: dict[str, Any]) -> None:
    """Runs on each worker."""
    import ray.train
    import ray.train.torch

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    place = ray.train.get_context()
    context = Context(
        run=settings["run"],
        rank=place.get_world_rank(),
        world_size=place.get_world_size(),
        device=ray.train.torch.get_device(),
        report=lambda step, metrics: ray.train.report({"step": step, **metrics}),
    )
    # The same initial weights on every rank; what a step draws is seeded by the loop.
    loop.seed_everything(settings["loop"].seed, -1, 0)
    task: Task = settings["build"](context)
    try:
        loop.train(task.objective, task.batches, context, settings["loop"], settings["optim"], task.draw)
    except NonFiniteLoss as error:
        # The same step would fail again, so this is told to the driver instead of to Ray, which would retry.
        if context.rank == 0:
            (settings["run"] / _FAILURE).write_text(json.dumps({"error": str(error)}))


def _curve(out: Path) -> dict[str, float]:
    """Mean loss over the first and the last twentieth of the run."""
    losses = [float(row["loss"]) for row in read_journal(out / JOURNAL_NAME) if "loss" in row]
    size = max(1, len(losses) // 20)
    return {"loss_start": _mean(losses[:size]), "loss_end": _mean(losses[-size:])}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _root_cause(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__

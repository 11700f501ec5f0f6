"""A training run on Ray Train: open or resume the run folder, start the workers, report."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from jobs import loop
from jobs.capacity import report_waiting
from jobs.checkpoint import best_checkpoint, list_checkpoints, read_cursor
from jobs.checkpoint_checks import Expected
from jobs.cluster import connect, count
from jobs.config import CONFIG_NAME, save_config, to_plain
from jobs.folder import lock_folder
from jobs.gauges import JobMetrics
from jobs.journal import JOURNAL_NAME, last_row, read_metric
from jobs.loop import Batches, Context, Fractions, LoopConfig, NonFiniteLoss
from jobs.mirror import MARKER_NAME, TOKENIZER_KEY, Mirror
from jobs.progress import follow
from jobs.result import JobResult
from jobs.run_files import DamagedRun, read_object, refuse_links
from jobs.run_folders import agree_on_folder, explain_absence, settle_checkpoints, settle_start
from jobs.stopping import kept_handlers
from jobs.tracking import DatasetInput, Tracker
from jobs.workers import WorkersConfig, usable_workers
from models.optim import OptimConfig
from pipeline.dataset import config_differences, require_unused
from pipeline.errors import ConfigError, TokenreelError
from pipeline.files import write_atomic
from pipeline.order import ORDER_VERSION
from pipeline.schema import fingerprint

log = logging.getLogger(__name__)
_NOT_IDENTITY = {
    "": {"workers", "out", "register_as", "clips", "tokens", "perceptual", "continue_from", "from_run", "test"},
    "loader": {"cache", "keep_list", "splits"},
    "loop": {
        "keep_checkpoints",
        "picture_every_steps",
        "parallel",
        "recompute",
        "compile",
        "fetch_every_steps",
        "peak_tflops",
    },
}
"""Settings, by group, that may change between a run and its resume: they say where and how fast it runs, and what it writes
on the way; inputs count by fingerprint, not by where they lie."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a worker trains, on what, how it draws pictures of it, and what it measures on the validation split."""

    objective: nn.Module
    batches: Batches
    draw: Callable[[nn.Module, int], None]
    validate: Callable[[nn.Module], Fractions] | None = None


BuildTask = Callable[[Context], Task]


class TrainingFailed(TokenreelError):
    """The workers could not finish; the message says why and where the checkpoint is."""


def run_training(
    job: str,
    out: Path,
    config: Any,
    build: BuildTask,
    inputs: Sequence[DatasetInput],
    export: Callable[[Path, Path], None],
    conclude: Callable[[], dict[str, Any]],
    *,
    name: str,
    num_parts: int,
    make_objective: Callable[[], nn.Module],
    tokenizer: str = "",
    register_as: str = "",
    begin: Callable[[], None] | None = None,
) -> JobResult:
    """Train on the cluster until `config.loop.steps`, resuming what stands in `out`, and return the job's result.

    Args:
        config: a config dataclass with `loop`, `optim`, `workers` and `out`; saved as `config.json`.
        build: makes the task on each worker; must be picklable.
        export: writes the model of a checkpoint to a folder: the last one's to `out/model`.
        conclude: called after that; returns the job's own figures.
        num_parts: the equal parts that a step is made of and that workers share, such as its clips.
        make_objective: builds what is trained; its names and shapes are all that is asked for, of no memory.
        tokenizer: fingerprint of the one that made the tokens; empty where there are none.
        register_as: name in the MLflow model registry; empty registers nothing.
        begin: writes the checkpoint that a run without one starts from; by default it starts from fresh weights.

    Raises:
        ConfigError: `out` or the mirror holds a run with other settings or other data, or a worker finds neither of them.
        DamagedRun: `out` or the mirror is damaged, and no older whole checkpoint can take the place.
        TrainingFailed: the loss became non-finite, workers died more often than allowed, or what they trained did not come
            to `out`.
    """
    started_s = time.monotonic()
    workers: WorkersConfig = config.workers
    with lock_folder(out):
        mirror = Mirror(workers.mirror) if workers.mirror else None
        if mirror is not None:
            mirror.pull_identity(out)
        identity = _open_run(out, config, inputs, tokenizer)
        expected = Expected.of(make_objective, config.loop.steps, ema=config.loop.ema_decay > 0)
        settle_checkpoints(out, expected, mirror)
        if begin is not None and not list_checkpoints(out):
            begin()
        if mirror is not None:  # by which workers with another disk know the run, and what it starts from
            mirror.push_identity(out)
            mirror.push_newest(out)

        def keep_mlflow_id() -> None:
            if mirror is not None:
                mirror.push_identity_or_warn(out)

        tags = {"tokenreel.fingerprint": identity, "tokenreel.out": str(out)}
        with Tracker.open(
            out, job=job, name=name, params=to_plain(config), tags=tags, inputs=inputs, identified=keep_mlflow_id
        ) as tracker:
            if not _is_done(out, config.loop):
                _fit(job, out, config.loop, config.optim, workers, mirror, build, num_parts, expected)
            if mirror is not None and not _is_done(out, config.loop):
                settle_checkpoints(out, expected, mirror)  # the workers have another disk
            if not _is_done(out, config.loop):
                raise TrainingFailed(explain_absence(out, mirror))
            checkpoint = list_checkpoints(out)[-1]
            cursor = read_cursor(checkpoint)
            export(checkpoint, out / "model")
            figures = {**_curve(out), **conclude(), "keys_digest": cursor.keys_digest}
            if register_as:
                best, folder = best_checkpoint(out), out / "model"
                if best != checkpoint:
                    folder = out / "best_model"
                    export(best, folder)
                figures["best_step"] = read_cursor(best).step
                tracker.register_model(register_as, out / "model", "final")
                tracker.register_model(register_as, folder, "best")
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


def _open_run(out: Path, config: Any, inputs: Sequence[DatasetInput], tokenizer: str = "") -> str:
    """Create or check the run folder; returns the run's fingerprint."""
    refuse_links(out)
    identity = _identity(to_plain(config))
    identity["order_version"] = ORDER_VERSION
    identity["inputs"] = [f"{one.fingerprint} {one.content}".strip() for one in inputs]
    if tokenizer:
        identity[TOKENIZER_KEY] = tokenizer
    marker = out / MARKER_NAME
    if marker.exists():
        before = read_marker(out)
        # Earlier releases did not note the tokenizer; the fingerprint of the tokens, among the inputs, implies it.
        known = {TOKENIZER_KEY: tokenizer, **_identity(before)} if tokenizer else _identity(before)
        if differences := list(config_differences(known, identity)):
            words = "; ".join(f"{name} = {old!r} (now {new!r})" for name, old, new in differences)
            raise ConfigError(
                f"{out} holds a run with other settings: {words}. Choose another --out (and workers.mirror), or delete this one"
            )
        if tokenizer and TOKENIZER_KEY not in before and not config.workers.mirror:  # a mirror's copy must stay equal
            write_atomic(marker, (json.dumps({**before, TOKENIZER_KEY: tokenizer}, indent=2) + "\n").encode())
    else:
        require_unused(out)
        write_atomic(marker, (json.dumps(identity, indent=2) + "\n").encode())
    save_config(out, config)
    return read_run_fingerprint(out)


def _identity(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config, or of a `run.json` of any release, that a run is bound to."""
    identity = {key: value for key, value in plain.items() if key not in _NOT_IDENTITY[""]}
    for group in _NOT_IDENTITY.keys() & identity.keys():
        if isinstance(identity[group], dict):
            identity[group] = {key: value for key, value in identity[group].items() if key not in _NOT_IDENTITY[group]}
    return identity


def read_marker(run: Path) -> dict[str, Any]:
    """The settings and inputs that a run is bound to, and the fingerprint of its tokens' tokenizer under `TOKENIZER_KEY` where it has one
    and its release noted it.

    Raises:
        DamagedRun: names the file and what to do.
    """
    path = run / MARKER_NAME
    try:
        marker = read_object(path)
        inputs = marker.get("inputs")
        if not (isinstance(inputs, list) and all(isinstance(one, str) for one in inputs)):
            raise DamagedRun(f"{path} is no run's: it has no list of inputs")
        if not isinstance(marker.get(TOKENIZER_KEY, ""), str):
            raise DamagedRun(f"{path} is damaged: {TOKENIZER_KEY} is {marker[TOKENIZER_KEY]!r}")
    except DamagedRun as error:
        raise DamagedRun(
            f"{error}. Without it nothing says which settings and data {run} is of: put back a copy, such as that of "
            f"workers.mirror, or delete {run} and train it again"
        ) from error
    return marker


def read_run_fingerprint(run: Path) -> str:
    """The fingerprint that a run's job returned: of its settings and inputs. Raises as `read_marker`."""
    marker = read_marker(run)
    marker.pop(TOKENIZER_KEY, None)  # implied by the inputs; earlier releases did not note it
    return fingerprint(**marker)


def _is_done(out: Path, config: LoopConfig) -> bool:
    checkpoints = list_checkpoints(out)
    return bool(checkpoints) and read_cursor(checkpoints[-1]).step >= config.steps


def _fit(
    job: str,
    out: Path,
    config: LoopConfig,
    optim: OptimConfig,
    workers: WorkersConfig,
    mirror: Mirror | None,
    build: BuildTask,
    num_parts: int,
    expected: Expected,
) -> None:
    settings = {
        "job": job,
        "build": build,
        "run": out.resolve(),
        "marker": (out / MARKER_NAME).read_bytes(),
        "loop": config,
        "optim": optim,
        "mirror": mirror,
        "num_parts": num_parts,
        "expected": expected,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(connect())
        resources = _choose_resources(workers)  # once: after a preemption the cluster is smaller for a while
        needs = {name: amount * workers.fewest for name, amount in resources.items() if amount}
        before = last_row(out / JOURNAL_NAME)
        stack.enter_context(report_waiting(job, needs, lambda: last_row(out / JOURNAL_NAME) != before))
        stack.enter_context(follow(out / JOURNAL_NAME, job, config.steps))
        for num_preemptions in range(workers.max_preemptions + 1):
            try:
                with kept_handlers():
                    outcome: _Outcome = _make_trainer(out, workers, settings, resources).fit().return_value
            except Exception as error:  # Ray wraps whatever a worker raised
                if DamagedRun.__name__ in str(error):  # a start anew would meet the same file
                    raise DamagedRun(f"{out}: the workers failed: {_root_cause(error)}") from error
                raise TrainingFailed(
                    f"{out}: the workers failed: {_root_cause(error)}. Checkpoints stay in {out / 'checkpoints'}; the same command resumes"
                ) from error
            finally:
                shutil.rmtree(out / "ray", ignore_errors=True)
            if outcome.error is not None:
                raise outcome.error
            if outcome.step >= config.steps:
                return
            log.info("workers were told to stop, and did after step %d (%d so far)", outcome.step, num_preemptions + 1)
    raise TrainingFailed(
        f"{out}: preempted more often than workers.max_preemptions = {workers.max_preemptions}; all {outcome.step} steps "
        "so far are saved, and the same command resumes"
    )


def _choose_resources(workers: WorkersConfig) -> dict[str, float]:
    """What each worker gets of the cluster, as Ray names it."""
    num_gpus = count("GPU")
    use_gpu = workers.device == "gpu" or (workers.device == "auto" and num_gpus >= workers.fewest)
    if use_gpu and num_gpus < workers.fewest:
        raise ConfigError(f"workers: {workers.fewest} GPU workers asked for; the cluster has {num_gpus:g} GPUs")
    # Fewer CPUs than workers is slow, but it is not a reason to wait for ever.
    return {"CPU": min(1.0, count("CPU") / workers.fewest) or 1.0, "GPU": int(use_gpu)}


def _make_trainer(out: Path, workers: WorkersConfig, settings: dict[str, Any], resources: dict[str, float]) -> Any:
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

    from jobs.preemption import PreemptibleTorchConfig

    use_gpu = resources["GPU"] > 0
    is_elastic = workers.min_workers is not None
    return TorchTrainer(
        _work,  # type: ignore[arg-type]  # what it returns becomes the result's return_value
        train_loop_config=settings,
        torch_config=PreemptibleTorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(workers.fewest, workers.num_workers) if is_elastic else workers.num_workers,
            elastic_resize_monitor_interval_s=workers.resize_every_s,
            use_gpu=use_gpu,
            resources_per_worker=resources,
        ),
        # Checkpoints are ours; Ray keeps only its own bookkeeping, and a fresh one for each start.
        run_config=RunConfig(  # type: ignore[arg-type]  # the stub is that of Ray Train v1
            name=uuid.uuid4().hex[:8],
            storage_path=str(out.resolve() / "ray"),
            failure_config=FailureConfig(
                max_failures=workers.max_failures, max_preemption_failures=workers.max_preemptions
            ),
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """What rank 0 tells the driver: the steps done, and why no start could go further, if so."""

    step: int = 0
    error: TokenreelError | None = None


def _work(settings: dict[str, Any]) -> _Outcome:
    """Runs on each worker."""
    import ray.train
    import ray.train.torch

    from jobs.preemption import should_stop

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    place, run = ray.train.get_context(), settings["run"]
    rank = place.get_world_rank()
    world_size = usable_workers(place.get_world_size(), settings["num_parts"])
    if world_size < place.get_world_size():
        _leave_out(rank, world_size)
        if rank >= world_size:
            return _Outcome()
    context = Context(
        run=run,
        rank=rank,
        world_size=world_size,
        device=ray.train.torch.get_device(),
        should_stop=should_stop,
        measured=JobMetrics(settings["job"], run.name).set,
    )
    return _train(settings, context)


def _train(settings: dict[str, Any], context: Context) -> _Outcome:
    """What a worker does where it stands. What would fail again is told to the driver instead of to Ray, which would retry."""
    mirror: Mirror | None = settings["mirror"]
    if error := agree_on_folder(settings["marker"], mirror, context):
        return _Outcome(error=ConfigError(error))
    if mirror is not None:
        settle_start(mirror, context, settings["expected"])
        context = replace(context, saved=mirror.push_or_warn)
    # The same initial weights on every rank; what a step draws is seeded by the loop.
    loop.seed_everything(settings["loop"].seed, -1, 0)
    task: Task = settings["build"](context)
    try:
        cursor = loop.train(
            task.objective, task.batches, context, settings["loop"], settings["optim"], task.draw, task.validate
        )
    except NonFiniteLoss as error:
        return _Outcome(error=TrainingFailed(str(error)))
    except DamagedRun as error:
        return _Outcome(error=error)
    return _Outcome(step=cursor.step)


def _leave_out(rank: int, world_size: int) -> None:
    """Form the process group anew from the ranks below `world_size`; the others have none afterwards."""
    if rank == 0:
        log.info("of %d workers %d work: the batch does not divide by more", dist.get_world_size(), world_size)
    backend, address = dist.get_backend(), os.environ["MASTER_ADDR"]
    port: list[int | None] = [None]
    if rank == 0:
        with socket.create_server((address, 0)) as free:
            port = [free.getsockname()[1]]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    if rank < world_size:
        dist.init_process_group(backend, f"tcp://{address}:{port[0]}", rank=rank, world_size=world_size)


def _curve(out: Path) -> dict[str, float]:
    """Mean loss over the first and the last twentieth of the run."""
    losses = list(read_metric(out / JOURNAL_NAME, "loss"))
    size = max(1, len(losses) // 20)
    return {"loss_start": _mean(losses[:size]), "loss_end": _mean(losses[-size:])}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _root_cause(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__

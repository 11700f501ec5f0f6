"""The training loop of every recipe: a plain function, with no Ray and no MLflow in it.

Exactness: everything a step does is a function of (config, seed, step, rank) and the state before it. So a run that was
killed and resumed has the same losses, bit for bit on a CPU, as one that was not; the price is that a step is seeded
anew (microseconds) and that a loader must compute the batch of any step.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import resource
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.checkpoint import (
    CheckpointSaver,
    Cursor,
    list_checkpoints,
    load_optimizer,
    load_weights,
    read_cursor,
    whole_state,
)
from jobs.journal import Journal, read_metric
from jobs.step import Measured, Step, seed_everything, split
from models.flops import peak_flops
from models.optim import OptimConfig

__all__ = ["Batches", "Context", "LoopConfig", "NonFiniteLoss", "seed_everything", "train"]

log = logging.getLogger(__name__)
Fractions = Mapping[str, tuple[float, float]]
"""Metrics as (part, whole), which are summed before they are divided."""
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long to train, and what to write on the way."""

    steps: int = 1000
    """Optimiser steps of the whole run; the learning-rate schedule spans them."""
    schedule_steps: int | None = None
    """Steps that the learning-rate schedule spans, where a second stage continues this run; by default, `steps`."""
    save_every_steps: int = 100
    """Steps between two checkpoints; the last step always makes one, and so does a preemption."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk, besides the one with the lowest mean loss over the save_every_steps before it, or,
    where there is a validation split, the highest accuracy on it."""
    picture_every_steps: int = 100
    """Steps between two pictures (reconstructions or predictions); 0 draws none."""
    precision: Precision = "fp32"
    """Precision of the forward pass; weights and optimiser state are fp32."""
    micro_batch: int | None = None
    """Most samples that a worker computes at once; it takes its share of the batch in equal parts and adds up their
    gradients, which are summed over workers once. None: all at once."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every worker has all weights. fsdp: weights, gradients and optimiser state are sharded over the workers (FSDP2),
    for a model that one device cannot hold; pictures are left out."""
    recompute: bool = False
    """Keep only what goes into each layer and compute the rest again in the backward pass: less memory, a third more time."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, layer by layer; auto on GPUs only."""
    ema_decay: float = 0.0
    """Decay a step of a running average of the weights, which then becomes the model; 0 keeps none."""
    fetch_every_steps: int | None = None
    """Steps whose metrics are fetched from the device together; a preemption is noticed as late, and a non-finite loss is told
    as late, though no weight changes after it. None: each step on a CPU, 10 on a GPU, where a fetch waits for all work in
    flight."""
    peak_tflops: float | None = None
    """Peak speed of a device, of which the MFU is a share. None: from its data sheet; a CPU has none, and so no MFU."""
    seed: int = 0
    """Seed of initial weights and dropout."""

    @property
    def num_schedule_steps(self) -> int:
        """Steps that the learning-rate schedule spans."""
        return self.schedule_steps or self.steps

    def __post_init__(self) -> None:
        if self.schedule_steps is not None and self.schedule_steps < self.steps:
            raise ValueError(
                f"LoopConfig: schedule_steps is {self.schedule_steps}; allowed: steps = {self.steps} or more, or none"
            )
        for name in ("micro_batch", "fetch_every_steps", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"LoopConfig: {name} is {value}; allowed: more than 0, or none")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"LoopConfig: ema_decay is {self.ema_decay}; allowed: [0, 1)")
        for name, allowed in (("parallel", ("ddp", "fsdp")), ("compile", ("auto", "on", "off"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"LoopConfig: {name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if min(self.steps, self.save_every_steps, self.keep_checkpoints) < 1 or self.picture_every_steps < 0:
            raise ValueError(
                f"LoopConfig: steps = {self.steps}, save_every_steps = {self.save_every_steps}, keep_checkpoints = "
                f"{self.keep_checkpoints} must be 1 or more, picture_every_steps = {self.picture_every_steps} 0 or more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Where a worker stands.

    should_stop: asked by every rank about every step whose metrics are fetched. Once it is true on one of them, all save a
        checkpoint after the last of these steps, and stop.
    saved: called on rank 0, in the background, with the folder of each checkpoint that is whole.
    measured: called on rank 0 with the metrics of each step, its number among them as "step".
    """

    run: Path
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    should_stop: Callable[[], bool] = lambda: False
    saved: Callable[[Path], None] = lambda checkpoint: None
    measured: Callable[[Mapping[str, float]], None] = lambda metrics: None


class Batches(Protocol):
    """A loader: the batch of any step, and how much a step consumes over all workers (`unit` names it in metrics)."""

    unit: str
    units_per_step: int

    def batch(self, step: int) -> Mapping[str, Any]: ...


class NonFiniteLoss(RuntimeError):
    """Loss or gradient of a step is NaN or infinite on some worker; all workers raise it, and the weights are from before."""


def train(
    objective: nn.Module,
    batches: Batches,
    context: Context,
    config: LoopConfig,
    optim: OptimConfig,
    draw: Callable[[nn.Module, int], None] | None = None,
    validate: Callable[[nn.Module], Fractions] | None = None,
) -> Cursor:
    """Train `objective` to `config.steps`, from the newest checkpoint of `context.run` if there is one.

    Returns where it ended: before `config.steps` only if a worker was told to stop, and then no step is lost. Every
    step's metrics go to `metrics.jsonl`, written by rank 0; a resume drops the rows that it will write again.

    Args:
        objective: `forward(part)` returns an `Output` of models/objective.py; the loss is the sum of its losses.
        draw: called on rank 0 with the objective (in eval mode) and the number of steps done, to write pictures.
        validate: called on every rank, with the objective in eval mode, before each checkpoint of the schedule; measures this
            rank's share. Each name is logged as the sum of the parts over the sum of the wholes; checkpoints are compared by
            `val_accuracy`, which must be among them. Not with loop.parallel fsdp.

    Raises:
        NonFiniteLoss: names the step and the keys of its batch.
        DamagedRun: the checkpoint is damaged; nothing was written.
    """
    if validate is not None and config.parallel == "fsdp":
        raise ValueError(
            "loop: parallel is 'fsdp', which cannot validate: ranks would gather weights at different times"
        )
    objective.to(context.device).train()
    checkpoint = next(reversed(list_checkpoints(context.run)), None)
    cursor = Cursor()
    if checkpoint is not None:
        cursor = read_cursor(checkpoint)
        load_weights(checkpoint, objective)
    step = Step(objective, context, config, optim)
    if checkpoint is not None:
        load_optimizer(checkpoint, step.optimizer)
        log.info("rank %d: resumed %s after step %d", context.rank, context.run.name, cursor.step)
    pending: list[_Pending] = []
    losses: deque[float] = deque(maxlen=config.save_every_steps)
    pause: dict[str, float] = {}  # what the checkpoint before held up; the row of its own step is written before it
    with contextlib.ExitStack() as stack:
        journal = saver = None
        if context.rank == 0:
            journal = stack.enter_context(Journal(context.run))
            journal.truncate_after(cursor.step)
            losses.extend(read_metric(journal.path, "loss"))
            saver = stack.enter_context(CheckpointSaver(context.run, config.keep_checkpoints, context.saved))
        ahead = stack.enter_context(contextlib.closing(_prefetch(objective, batches, cursor.step, config, context)))
        for parts, keys, wait_s in ahead:
            begun = time.perf_counter() - wait_s
            measured = step(parts, cursor.step + len(pending))
            pending.append(_Pending(keys=keys, measured=measured, wait_s=wait_s, begun=begun))
            if not _is_due(cursor.step + len(pending), config, context):
                continue
            is_stopping = False
            for metrics in _fetch(pending, cursor.step, batches, context, config):
                digest, is_told = _extend(cursor.keys_digest, pending.pop(0).keys, context)
                is_stopping |= is_told
                losses.append(metrics["loss"])
                cursor = Cursor(step=cursor.step + 1, keys_digest=digest, recent_loss=sum(losses) / len(losses))
                if journal is not None:
                    journal.log(cursor.step, metrics | pause)
                    context.measured({**metrics, "step": cursor.step})
                pause = {}
            if context.rank == 0 and config.parallel == "ddp":
                _draw(objective, cursor.step, config, draw)
            if is_stopping or cursor.step == config.steps or cursor.step % config.save_every_steps == 0:
                if validate is not None and (not is_stopping or cursor.step == config.steps):
                    accuracies = _validate(objective, validate, context)
                    cursor = replace(cursor, val_accuracy=accuracies["val_accuracy"])
                    if journal is not None:
                        journal.log(cursor.step, accuracies)
                begun = time.perf_counter()
                state = whole_state(objective, step.optimizer)
                if saver is not None:
                    saver.save(*state, cursor)
                pause = {"checkpoint_pause_s": time.perf_counter() - begun}
            if is_stopping:
                break
    return cursor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    """A step that was taken, whose numbers were not fetched yet. `begun`: when the wait for its batch began, on the clock of
    `time.perf_counter`."""

    keys: list[str]
    measured: Measured
    wait_s: float
    begun: float


def _prefetch(
    objective: nn.Module, batches: Batches, start: int, config: LoopConfig, context: Context
) -> Generator[tuple[list[dict[str, Any]], list[str], float]]:
    """Micro-batches of the steps from `start` on, each made while the one before is trained on, with the keys of the batch
    and the seconds waited."""

    def make(step: int) -> tuple[list[dict[str, Any]], list[str]]:
        batch = batches.batch(step)
        parts = split(objective, batch, config.micro_batch)
        if context.device.type == "cuda":  # only locked pages are copied to the device without waiting for it
            parts = [{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in part.items()} for part in parts]
        return parts, batch["keys"]

    with ThreadPoolExecutor(1, "loader") as pool:
        ahead = pool.submit(make, start) if start < config.steps else None
        for step in range(start, config.steps):
            waited = time.perf_counter()
            assert ahead is not None
            parts, keys = ahead.result()
            wait_s = time.perf_counter() - waited
            ahead = pool.submit(make, step + 1) if step + 1 < config.steps else None
            yield parts, keys, wait_s


def _is_due(step: int, config: LoopConfig, context: Context) -> bool:
    """Whether numbers are fetched after `step` steps: as often as told, and before anything is written."""
    fetch = config.fetch_every_steps or (1 if context.device.type == "cpu" else 10)
    every = [fetch, config.save_every_steps, config.picture_every_steps]
    return step == config.steps or any(count and step % count == 0 for count in every)


def _fetch(
    pending: list[_Pending], step: int, batches: Batches, context: Context, config: LoopConfig
) -> Iterator[dict[str, float]]:
    """The metrics of each pending step, of which the first is number `step` (from 0); times are means over all of them.

    Raises:
        NonFiniteLoss: names the first step that has one, and its keys; the steps before it were handed out.
    """
    rows = [one.measured.read() for one in pending]
    step_s = (time.perf_counter() - pending[0].begun) / len(pending)
    wait_s = sum(one.wait_s for one in pending) / len(pending)
    peak = config.peak_tflops * 1e12 if config.peak_tflops else peak_flops(context.device, config.precision)
    for number, (one, (metrics, counts)) in enumerate(zip(list(pending), rows, strict=True), step + 1):
        wrong = next((name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])), None)
        if wrong is not None:
            keys = _gather_keys(one.keys, context)
            raise NonFiniteLoss(
                f"{wrong} is {metrics[wrong]} at step {number}; its batch: {', '.join(keys)}. Lower --optim.lr, or look at "
                "these samples; the last checkpoint is from before this step"
            )
        if "flops" in counts:
            flops_per_s = counts.pop("flops") / step_s
            metrics["tflops_per_s"] = flops_per_s / 1e12
            if peak is not None:
                metrics["mfu"] = flops_per_s / (peak * context.world_size)
        metrics |= {f"{name}_per_s": count / step_s for name, count in counts.items()}
        metrics |= {
            "step_s": step_s,
            "data_wait_share": wait_s / step_s,
            f"{batches.unit}_per_s": batches.units_per_step / step_s,
            "peak_memory_bytes": _peak_memory_bytes(context.device),
            "num_workers": context.world_size,
        }
        yield metrics


def _peak_memory_bytes(device: torch.device) -> float:
    """The most that this process had allocated on the device so far; on a CPU, the most that it had resident."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts KiB


def _draw(objective: nn.Module, step: int, config: LoopConfig, draw: Callable[[nn.Module, int], None] | None) -> None:
    every = config.picture_every_steps
    if draw is not None and every and (step == config.steps or step % every == 0):
        objective.eval()
        draw(objective, step)
        objective.train()


@torch.no_grad()
def _validate(objective: nn.Module, validate: Callable[[nn.Module], Fractions], context: Context) -> dict[str, float]:
    objective.eval()
    shares = validate(objective)
    objective.train()
    sums = torch.tensor(list(shares.values()), dtype=torch.float64)
    if context.world_size > 1:
        sums = sums.to(context.device)
        dist.all_reduce(sums)
    return {name: part / whole for name, (part, whole) in zip(shares, sums.tolist(), strict=True)}


def _extend(digest: str, keys: list[str], context: Context) -> tuple[str, bool]:
    """The digest of all keys consumed so far, in the order of the global batch: the same for any number of workers.

    And whether some worker was told to stop, which all of them learn after the same step, as they must.
    """
    # Each key's hash is weighted by its place; the sum wraps, so it does not depend on who adds what first.
    first = context.rank * len(keys)
    hashes = (
        int.from_bytes(hashlib.sha256(f"{first + n}:{key}".encode()).digest()[:8], "little")
        for n, key in enumerate(keys)
    )
    total = sum(hashes) % 2**64
    summed = torch.tensor([total - 2**64 if total >= 2**63 else total, context.should_stop()], device=context.device)
    if context.world_size > 1:
        dist.all_reduce(summed)
    total, num_stopping = summed.tolist()
    return hashlib.sha256(f"{digest}:{total}".encode()).hexdigest()[:16], num_stopping > 0


def _gather_keys(keys: list[str], context: Context) -> list[str]:
    if context.world_size == 1:
        return keys
    gathered: list[Any] = [None] * context.world_size
    dist.all_gather_object(gathered, keys)
    return [key for part in gathered for key in part]

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
import random
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jobs.checkpoint import CheckpointSaver, Cursor, list_checkpoints, load_optimizer, load_weights, read_cursor
from jobs.journal import Journal, read_journal
from models.optim import OptimConfig, build_optimizer, clip_gradients, lr_at

log = logging.getLogger(__name__)


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
    """Newest checkpoints that stay on disk, besides the one with the lowest mean loss over the save_every_steps before it."""
    picture_every_steps: int = 100
    """Steps between two pictures (reconstructions or predictions); 0 draws none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass; weights and optimiser state are fp32."""
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
        if min(self.steps, self.save_every_steps, self.keep_checkpoints) < 1 or self.picture_every_steps < 0:
            raise ValueError(
                f"LoopConfig: steps = {self.steps}, save_every_steps = {self.save_every_steps}, keep_checkpoints = "
                f"{self.keep_checkpoints} must be 1 or more, picture_every_steps = {self.picture_every_steps} 0 or more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Where a worker stands.

    should_stop: asked by every rank in every step. Once it is true on one of them, all save a checkpoint and stop.
    saved: called on rank 0, in the background, with the folder of each checkpoint that is whole.
    """

    run: Path
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    should_stop: Callable[[], bool] = lambda: False
    saved: Callable[[Path], None] = lambda checkpoint: None


class Batches(Protocol):
    """A loader: the batch of any step, and how much a step consumes over all workers (`unit` names it in metrics)."""

    unit: str
    units_per_step: int

    def batch(self, step: int) -> Mapping[str, Any]: ...


class NonFiniteLoss(RuntimeError):
    """The loss of a step is NaN or infinite on some worker; all workers raise it, before the weights change."""


def train(
    objective: nn.Module,
    batches: Batches,
    context: Context,
    config: LoopConfig,
    optim: OptimConfig,
    draw: Callable[[nn.Module, int], None] | None = None,
) -> Cursor:
    """Train `objective` to `config.steps`, from the newest checkpoint of `context.run` if there is one.

    Returns where it ended: before `config.steps` only if a worker was told to stop, and then no step is lost. Every
    step's metrics go to `metrics.jsonl`, written by rank 0; a resume drops the rows that it will write again.

    Args:
        objective: `forward(batch) -> {"losses": {name: scalar}, "metrics": {name: scalar}}`; the loss is their sum.
        draw: called on rank 0 with the objective (in eval mode) and the number of steps done, to write pictures.

    Raises:
        NonFiniteLoss: names the step and the keys of its batch.
    """
    objective.to(context.device).train()
    optimizer = build_optimizer(objective, optim)
    cursor = _restore(objective, optimizer, context)
    model: nn.Module = objective
    if context.world_size > 1:
        ids = [context.device] if context.device.type == "cuda" else None
        # Buffers (codebooks, running statistics) are reduced by their owners, so no broadcast each step.
        model = DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False)
    with contextlib.ExitStack() as stack:
        journal = saver = None
        losses: deque[float] = deque(maxlen=config.save_every_steps)
        if context.rank == 0:
            journal = stack.enter_context(Journal(context.run))
            journal.truncate_after(cursor.step)
            losses.extend(float(row["loss"]) for row in read_journal(journal.path) if "loss" in row)
            saver = stack.enter_context(CheckpointSaver(context.run, config.keep_checkpoints, context.saved))
        steps = stack.enter_context(contextlib.closing(_prefetch(batches, cursor.step, config.steps)))
        pause: dict[str, float] = {}
        for batch, wait_s in steps:
            started = time.perf_counter()
            metrics = _step(model, optimizer, batch, cursor.step, context, config, optim) | pause
            losses.append(metrics["loss"])
            digest, is_stopping = _extend(cursor.keys_digest, batch["keys"], context)
            cursor = Cursor(step=cursor.step + 1, keys_digest=digest, recent_loss=sum(losses) / len(losses))
            step_s = time.perf_counter() - started + wait_s
            metrics |= {
                "step_s": step_s,
                "data_wait_share": wait_s / step_s,
                f"{batches.unit}_per_s": batches.units_per_step / step_s,
                "num_workers": context.world_size,
            }
            if journal is not None:
                journal.log(cursor.step, metrics)
            is_last = cursor.step == config.steps or is_stopping
            if saver is not None:
                _draw(objective, cursor.step, config, draw)
                is_due = is_last or cursor.step % config.save_every_steps == 0
                # The row of this step stands in the journal already, as it must before its checkpoint does.
                pause = {"checkpoint_pause_s": saver.save(objective, optimizer, cursor)} if is_due else {}
            if is_last:
                break
    return cursor


def _restore(objective: nn.Module, optimizer: torch.optim.Optimizer, context: Context) -> Cursor:
    checkpoints = list_checkpoints(context.run)
    if not checkpoints:
        return Cursor()
    load_weights(checkpoints[-1], objective)
    load_optimizer(checkpoints[-1], optimizer)
    cursor = read_cursor(checkpoints[-1])
    log.info("rank %d: resumed %s after step %d", context.rank, context.run.name, cursor.step)
    return cursor


def _prefetch(batches: Batches, start: int, stop: int) -> Generator[tuple[Mapping[str, Any], float]]:
    """Batches of the steps [start, stop), each made while the one before is trained on, with the seconds waited."""
    with ThreadPoolExecutor(1, "loader") as pool:
        ahead = pool.submit(batches.batch, start) if start < stop else None
        for step in range(start, stop):
            waited = time.perf_counter()
            assert ahead is not None
            batch = ahead.result()
            wait_s = time.perf_counter() - waited
            ahead = pool.submit(batches.batch, step + 1) if step + 1 < stop else None
            yield batch, wait_s


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Any],
    step: int,
    context: Context,
    config: LoopConfig,
    optim: OptimConfig,
) -> dict[str, float]:
    seed_everything(config.seed, step, context.rank)
    lr = lr_at(step, config.num_schedule_steps, optim)
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast(context.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        output = model(_to(batch, context.device))
    losses: dict[str, Tensor] = output["losses"]
    loss = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    values = {"loss": loss, **{f"loss_{name}": value for name, value in losses.items()}, **output["metrics"]}
    metrics = _mean_over_workers(values, context)
    if not math.isfinite(metrics["loss"]):
        keys = _gather_keys(batch["keys"], context)
        raise NonFiniteLoss(
            f"loss is {metrics['loss']} at step {step + 1}; its batch: {', '.join(keys)}. Lower --optim.lr, or look at "
            "these samples; the last checkpoint is from before this step"
        )
    metrics["grad_norm"] = float(clip_gradients(model, optim))
    metrics["lr"] = lr
    optimizer.step()
    return metrics


def _draw(objective: nn.Module, step: int, config: LoopConfig, draw: Callable[[nn.Module, int], None] | None) -> None:
    every = config.picture_every_steps
    if draw is not None and every and (step == config.steps or step % every == 0):
        objective.eval()
        draw(objective, step)
        objective.train()


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices) from the three numbers."""
    digest = hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def _to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _mean_over_workers(values: dict[str, Tensor], context: Context) -> dict[str, float]:
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if context.world_size > 1:
        dist.all_reduce(stacked)
        stacked /= context.world_size
    return dict(zip(values, stacked.tolist(), strict=True))


def _extend(digest: str, keys: list[str], context: Context) -> tuple[str, bool]:
    """The digest of all keys consumed so far, in the order of the global batch: the same for any number of workers.

    And whether some worker was told to stop, which all of them learn in the same step, as they must.
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

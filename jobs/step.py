"""One optimiser step of an objective: its micro-batches, its workers, its precision. Nothing here waits for the device.

What a step measured stays on the device until `Measured.read`. That a loss is not finite is seen on the device too: from
then on the fused optimiser changes no weight, so the loop may find out some steps later.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from models.objective import Fraction, HasBlocks, Output, Splits
from models.optim import OptimConfig, build_optimizer, clip_gradients, lr_at, update_ema

if TYPE_CHECKING:
    from jobs.loop import Context, LoopConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The numbers of one step, still on the device: sums over micro-batches and workers."""

    names: tuple[tuple[str, str], ...]
    """(kind, name) of each value; kinds are mean, part, whole (of a fraction) and count."""
    values: Tensor
    grad_norm: Tensor
    lr: float
    num_summed: int
    """Micro-batches of all workers."""

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics and counts by name; waits for the device."""
        *values, grad_norm = torch.cat([self.values, self.grad_norm.view(1)]).tolist()
        sums = dict(zip(self.names, values, strict=True))
        metrics = {name: value / self.num_summed for (kind, name), value in sums.items() if kind == "mean"}
        for (kind, name), value in sums.items():
            if kind == "part" and sums["whole", name]:
                metrics[name] = value / sums["whole", name]
        counts = {name: value for (kind, name), value in sums.items() if kind == "count"}
        return {**metrics, "grad_norm": grad_norm, "lr": self.lr}, counts


class Step:
    """Takes optimiser steps. Its weights must stand in `objective` by now; state of the optimiser is loaded afterwards."""

    def __init__(self, objective: nn.Module, context: Context, config: LoopConfig, optim: OptimConfig) -> None:
        self._objective, self._context, self._config, self._optim = objective, context, config, optim
        self._model = _wrap(objective, context, config)
        self.optimizer = build_optimizer(objective, optim)
        self._is_broken = torch.zeros((), device=context.device)
        if config.precision == "bf16" and context.device.type == "cpu" and _lacks_bf16():
            log.warning(
                "this CPU has no instructions for bf16, which is slower than fp32 here; set --loop.precision fp32"
            )

    def __call__(self, parts: Sequence[dict[str, Any]], step: int) -> Measured:
        """Step `step` (from 0) on the micro-batches of this worker."""
        config, optimizer = self._config, self.optimizer
        lr = lr_at(step, config.num_schedule_steps, self._optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parts = [_to(part, self._context.device) for part in parts]
        if len(parts) > 1 and isinstance(self._objective, Splits):
            with torch.no_grad():
                parts = list(self._objective.look_ahead(parts, functools.partial(self._forward, step)))
        optimizer.zero_grad(set_to_none=True)
        total: dict[tuple[str, str], Tensor] = {}
        for place, part in enumerate(parts):
            with self._reducing(place == len(parts) - 1):
                output: Output = self._forward(step, place, part)
                loss = torch.stack(list(output["losses"].values())).sum()
                (loss / len(parts)).backward()
            for name, value in _flatten(loss, output):
                total[name] = total[name] + value if name in total else value
        values = torch.stack(list(total.values()))
        if self._context.world_size > 1:
            dist.all_reduce(values)
        grad_norm = clip_gradients(self._objective, self._optim)
        is_finite = values[0].isfinite() & grad_norm.isfinite()
        self._is_broken = torch.where(is_finite, self._is_broken, 1.0)
        # The fused kernel leaves weights, moments and step counts alone where this is 1, and nobody waits for it.
        optimizer.found_inf = self._is_broken  # type: ignore[attr-defined]  # read by the fused kernel, not declared
        optimizer.step()
        if config.ema_decay:
            update_ema(optimizer, config.ema_decay)
        num_summed = len(parts) * self._context.world_size
        return Measured(names=tuple(total), values=values, grad_norm=grad_norm, lr=lr, num_summed=num_summed)

    def _forward(self, step: int, place: int, part: dict[str, Any]) -> Any:
        seed_everything(self._config.seed, step, self._context.rank, place)
        with torch.autocast(self._context.device.type, torch.bfloat16, enabled=self._config.precision == "bf16"):
            return self._model(part)

    def _reducing(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are summed over workers once a step, in the backward pass of the last micro-batch."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(is_last)
        elif isinstance(self._model, DistributedDataParallel) and not is_last:
            return self._model.no_sync()
        return contextlib.nullcontext()


def split(objective: nn.Module, batch: Mapping[str, Any], micro_batch: int | None) -> list[dict[str, Any]]:
    """A worker's batch as the fewest micro-batches of equal size, each of `micro_batch` samples at most."""
    rows = len(batch["keys"])
    limit = micro_batch or rows
    num_parts = next(count for count in range(max(1, -(-rows // limit)), rows + 1) if rows % count == 0)
    if isinstance(objective, Splits):
        return objective.split(batch, num_parts)
    tensors = {name: value.chunk(num_parts) for name, value in batch.items() if isinstance(value, Tensor)}
    return [{name: chunks[place] for name, chunks in tensors.items()} for place in range(num_parts)]


def seed_everything(seed: int, step: int, rank: int, place: int = 0) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices) from the numbers; `place` is of a micro-batch."""
    text = f"{seed}:{step}:{rank}" + (f":{place}" if place else "")
    digest = hashlib.sha256(text.encode()).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def _lacks_bf16() -> bool:
    """Whether this CPU only emulates bf16; False where torch does not say: before 2.13, and on other architectures."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found.get("architecture") == "x86_64" and not (found.get("avx512_bf16") or found.get("amx_bf16"))


def _wrap(objective: nn.Module, context: Context, config: LoopConfig) -> nn.Module:
    blocks = objective.blocks if isinstance(objective, HasBlocks) else []
    if not blocks and (config.recompute or config.compile == "on" or config.parallel == "fsdp"):
        raise ValueError(
            f"loop: {type(objective).__name__} has no repeated blocks; recompute, compile on and parallel fsdp need them"
        )
    for block in blocks:
        if config.recompute:
            setattr(block, "forward", functools.partial(checkpoint, block.forward, use_reentrant=False))  # noqa: B010  # mypy refuses to assign to a method
        if config.compile == "on" or (config.compile == "auto" and context.device.type == "cuda"):
            block.compile(dynamic=False)
    if context.world_size == 1:
        return objective
    if config.parallel == "fsdp":
        mesh = dist.init_device_mesh(context.device.type, (context.world_size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        return objective
    ids = [context.device] if context.device.type == "cuda" else None
    # Buffers (codebooks, running statistics) are reduced by their owners, so no broadcast each step.
    return DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False)


def _flatten(loss: Tensor, output: Output) -> list[tuple[tuple[str, str], Tensor]]:
    """The loss first; all as float32 scalars without gradients."""
    found: dict[tuple[str, str], Tensor] = {("mean", "loss"): loss}
    found |= {("mean", f"loss_{name}"): value for name, value in output["losses"].items()}
    for name, value in output["metrics"].items():
        if isinstance(value, Fraction):
            found |= {("part", name): value.part, ("whole", name): value.whole}
        else:
            found["mean", name] = value
    found |= {("count", name): value for name, value in output.get("counts", {}).items()}
    return [(name, value.detach().float()) for name, value in found.items()]


def _to(part: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in part.items()}

"""Collectives with gradients that need no particular backend, and that do nothing in one process.

Shapes: n rows of this worker, W workers, c features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of workers that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this worker, `[0, world_size())`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _SumOverWorkers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every worker's loss depends on the sum, so this worker's share of the gradient comes from all of them.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # An all-reduce and a slice, not a reduce-scatter: gloo has all-reduce on every version of torch we support.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def sum_over_workers(values: Tensor) -> Tensor:
    """`values` summed over all workers, with gradients. Same shape and dtype on every worker."""
    if world_size() == 1:
        return values
    return _SumOverWorkers.apply(values)


def mean_over_workers(value: Tensor) -> Tensor:
    """`value` averaged over all workers, as float32 and without a gradient."""
    mean = value.detach().float()
    if world_size() > 1:
        dist.all_reduce(mean := mean.clone())
        mean /= world_size()
    return mean


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all workers in the order of their ranks, with gradients: (n ...) -> (W*n ...).

    Every worker must bring the same n; the data loader's equal slices guarantee it.
    """
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows)

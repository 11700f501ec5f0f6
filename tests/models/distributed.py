"""Run a function in two processes that form a gloo group, and hand back what each returned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2


def _worker(rank: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    try:
        torch.save(function(rank), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_two_workers(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """`function(rank)` of each rank; it must be a module's own function, and return tensors and plain containers."""
    mp.spawn(_worker, args=(function, str(folder)), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]

"""The optimiser of pre-training: AdamW with its parameter groups, the learning rate as a function, clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

EMA = "ema"
"""Name of the running average of weights, beside AdamW's own, in the state of a parameter."""
MOMENTS = ("exp_avg", "exp_avg_sq", EMA)
"""The optimiser's state that has the shape of its parameter; the rest, step, is a count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule. The defaults are VIMPAC small."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of AdamW's two running averages."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.05
    """Decoupled weight decay; biases and one-dimensional weights (norms) never decay."""
    warmup_share: float = 0.1
    """Share of all updates over which the rate rises linearly to lr."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate moves from lr to final_lr after warm-up; constant stays at lr."""
    final_lr: float = 0.0
    """Rate that the schedule ends at."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global L2 norm; None leaves them."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"OptimConfig: lr is {self.lr}; allowed: > 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"OptimConfig: betas are {self.betas}; allowed: each in [0, 1)")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"OptimConfig: eps is {self.eps}, weight_decay is {self.weight_decay}; allowed: eps > 0, decay >= 0"
            )
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"OptimConfig: warmup_share is {self.warmup_share}; allowed: [0, 1)")
        if self.schedule not in ("linear", "cosine", "constant"):
            raise ValueError(f"OptimConfig: schedule is {self.schedule!r}; allowed: linear, cosine, constant")
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"OptimConfig: final_lr is {self.final_lr}; allowed: [0, lr = {self.lr}]")
        if self.schedule == "constant" and self.final_lr not in (0.0, self.lr):
            raise ValueError(
                f"OptimConfig: final_lr is {self.final_lr} with schedule 'constant', which stays at lr = {self.lr}; "
                "allowed: leave it out, or use schedule 'linear' or 'cosine'"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"OptimConfig: clip_norm is {self.clip_norm}; allowed: > 0, or None for no clipping")


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of update `step` in [0, total_steps): depends on its arguments alone, so resuming needs no state.

    Warm-up has round(warmup_share * total_steps) updates and ends at `lr`; the first update already moves.
    `final_lr` would be reached at `total_steps`, one past the last update; later steps stay there.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"lr_at: step is {step} of {total_steps}; allowed: step >= 0, total_steps >= 1")
    warmup_steps = round(config.warmup_share * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.final_lr + (config.lr - config.final_lr) * left


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters as two AdamW groups: matrices that decay; biases and one-dimensional weights that do not.

    Order follows `named_parameters`, so an optimiser state loads back into the same module. Empty groups are left out.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `module`, as one fused kernel. Set each group's "lr" from `lr_at` before a step.

    A step changes nothing where the optimiser's attribute `found_inf`, a scalar float32 on the device, is 1.
    """
    groups = param_groups(module, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


@torch.no_grad()
def update_ema(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """After a step, move the running average of each weight: ema = decay * ema + (1 - decay) * weight.

    The first average is the weight after its first step. It lies in the optimiser's state, so it is saved, sharded and
    resized as the moments are.
    """
    states = [
        (optimizer.state[p], p) for group in optimizer.param_groups for p in group["params"] if p in optimizer.state
    ]
    for state, parameter in states:
        if EMA not in state:
            state[EMA] = parameter.detach().clone()
    torch._foreach_lerp_([state[EMA] for state, _ in states], [parameter for _, parameter in states], 1 - decay)


def clip_gradients(module: nn.Module, config: OptimConfig) -> Tensor:
    """Scale gradients in place to `clip_norm`; returns the global L2 norm before that, a scalar. May be non-finite."""
    limit = math.inf if config.clip_norm is None else config.clip_norm
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm

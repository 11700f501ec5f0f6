"""Exact save and restore of a training run. A checkpoint exists whole or not at all; nothing in it can run.

    RUN/checkpoints/00000100/       after 100 steps
      model.safetensors             the objective's state: weights and buffers
      optimizer.safetensors         AdamW's moments and step counts, by parameter number
      state.json                    the cursor: next step, digest of consumed keys

Random numbers need no state: the loop seeds every generator from (seed, step, rank) at the start of each step.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.optim import EMA, MOMENTS, param_groups
from pipeline.files import sync_path

_STATE = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """Where a run stands: `step` steps are done, and consumed the keys that `keys_digest` (hex) sums up."""

    step: int = 0
    keys_digest: str = ""


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by name, and the optimiser's state by parameter number. Sharded tensors are gathered: all workers call it."""
    weights = {name: _whole(value.detach()) for name, value in module.state_dict().items()}
    return weights, {name: _whole(value) for name, value in _flatten(optimizer).items()}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def save_checkpoint(
    run: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], cursor: Cursor, keep: int
) -> Path:
    """Write the checkpoint of `cursor.step`, then delete all but the newest `keep`. Returns its folder."""
    final = write_checkpoint(run, weights, moments, cursor)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def write_checkpoint(run: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], cursor: Cursor) -> Path:
    """Write the checkpoint of `cursor.step`, whole or not at all, from plain tensors. Returns its folder."""
    final = run / "checkpoints" / f"{cursor.step:08d}"
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, temporary / "model.safetensors")
    save_file(moments, temporary / "optimizer.safetensors")
    (temporary / _STATE).write_text(json.dumps(asdict(cursor)))
    for path in [*temporary.iterdir(), temporary]:
        sync_path(path)
    if final.exists():  # a step that a resumed run does again
        shutil.rmtree(final)
    temporary.rename(final)
    sync_path(final.parent)
    return final


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("[0-9]*") if (path / _STATE).exists())


def read_cursor(checkpoint: Path) -> Cursor:
    return Cursor(**json.loads((checkpoint / _STATE).read_text()))


def read_tensors(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights by name, and the optimiser's state by parameter number, on the CPU."""
    return load_file(checkpoint / "model.safetensors"), load_file(checkpoint / "optimizer.safetensors")


def load_weights(checkpoint: Path, module: nn.Module) -> None:
    """Load `model.safetensors` into `module`; every name and shape must match."""
    module.load_state_dict(load_file(checkpoint / "model.safetensors"))


def load_ema(checkpoint: Path, module: nn.Module) -> None:
    """Set the parameters of `module` to their running averages, where the checkpoint holds some."""
    averages = load_file(checkpoint / "optimizer.safetensors")
    parameters = [parameter for group in param_groups(module, 0.0) for parameter in group["params"]]
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            if (average := averages.get(f"{number}.{EMA}")) is not None:
                parameter.copy_(average)


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimiser's state; its parameters must be those of the run that saved it, in the same order."""
    flat = load_file(checkpoint / "optimizer.safetensors")
    for number, parameter in enumerate(_parameters(optimizer)):
        state = {}
        for name in ("step", *MOMENTS):
            value = flat.get(f"{number}.{name}")
            if value is None:
                continue
            # Moments take the parameter's memory layout, which the fused kernel walks in step with it.
            like = torch.zeros((), device=parameter.device) if name == "step" else torch.zeros_like(parameter)
            if isinstance(like, DTensor):
                value = distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
            state[name] = like.copy_(value)
        optimizer.state[parameter] = state


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": value.detach().contiguous()
        for number, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

"""Exact save and restore of a training run. A checkpoint exists whole or not at all; nothing in it can run.

    RUN/checkpoints/00000100/       after 100 steps
      model.safetensors             the objective's state: weights and buffers
      optimizer.safetensors         AdamW's moments and step counts, by parameter number
      state.json                    the cursor: next step, digest of consumed keys, recent loss

Random numbers need no state: the loop seeds every generator from (seed, step, rank) at the start of each step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from jobs.run_files import DamagedRun, read_object, regular_size
from models.optim import EMA, MOMENTS, param_groups
from pipeline.files import sync_path

log = logging.getLogger(__name__)
MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
"""What makes a folder a checkpoint; it is written last and taken away first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """Where a run stands: `step` steps are done, and consumed the keys that `keys_digest` (hex) sums up.

    `recent_loss` is the mean loss of the last `save_every_steps` steps; None before the first. `val_accuracy` is that on the
    validation split; None where the run has none, or was told to stop here.
    """

    step: int = 0
    keys_digest: str = ""
    recent_loss: float | None = None
    val_accuracy: float | None = None

    def __post_init__(self) -> None:
        if type(self.step) is not int or self.step < 0:
            raise ValueError(f"step is {self.step!r}; allowed: a whole number from 0 on")
        if not (isinstance(self.keys_digest, str) and re.fullmatch("([0-9a-f]{16})?", self.keys_digest)):
            raise ValueError(f"keys_digest is {self.keys_digest!r}; allowed: 16 hexadecimal digits, or none")
        for name, (low, high) in {"recent_loss": (-math.inf, math.inf), "val_accuracy": (0, 1)}.items():
            value = getattr(self, name)
            if value is not None and not (
                type(value) in (int, float) and math.isfinite(value) and low <= value <= high
            ):
                raise ValueError(f"{name} is {value!r}; allowed: a finite number in [{low}, {high}], or null")


Specs = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype (as safetensors calls it) and shape of tensors, by name."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def specs_of(state: Mapping[str, Tensor]) -> Specs:
    return {name: (_DTYPES[value.dtype], tuple(value.shape)) for name, value in state.items()}


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by name, and the optimiser's state by parameter number. Sharded tensors are gathered: all workers call it."""
    weights = {name: _whole(value.detach()) for name, value in module.state_dict().items()}
    return weights, {name: _whole(value) for name, value in _flatten(optimizer).items()}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


class CheckpointSaver:
    """Saves a run's checkpoints behind its back: training waits for the copy to CPU memory, not for the disk.

    One write is in flight at most: the next `save` waits for it, and leaving the `with` block too. What a write raised
    is raised there. The copies are kept and filled again, so they cost memory (three times the weights for AdamW, four
    with an average of them) once.

    Args:
        keep: newest checkpoints that stay; the best one, by `best_checkpoint`, stays besides.
        saved: called in the background with each checkpoint's folder once it is whole, such as to upload it.
    """

    def __init__(self, run: Path, keep: int, saved: Callable[[Path], None]) -> None:
        self._run, self._keep, self._saved = run, keep, saved
        self._copies: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._write: Future[None] | None = None
        for left in (run / "checkpoints").glob(".*.tmp"):  # by a process that was killed
            shutil.rmtree(left)

    def save(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], cursor: Cursor) -> None:
        """Begin to save what `whole_state` gave as the checkpoint of `cursor.step`; returns once it is copied."""
        self.wait()
        copies = self._copy("model", weights), self._copy("optimizer", moments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._write = self._pool.submit(self._finish, *copies, cursor)

    def wait(self) -> None:
        """Return when nothing is in flight; raises what the write raised."""
        if self._write is not None:
            self._write.result()
            self._write = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The error that ends the run is the one to see.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            self.wait()
        self._pool.shutdown()

    def _copy(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, value in tensors.items():
            copy = self._copies.get(f"{part}.{name}")
            if copy is None:
                # Pages that are locked are copied to at the full speed of the bus, and without waiting for each.
                copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._copies[f"{part}.{name}"] = copy
            copies[name] = copy.copy_(value, non_blocking=True)
        return copies

    def _finish(self, weights: dict[str, Tensor], moments: dict[str, Tensor], cursor: Cursor) -> None:
        folder = write_checkpoint(self._run, weights, moments, cursor)
        for old in set(list_checkpoints(self._run)[: -self._keep]) - {best_checkpoint(self._run)}:
            discard(old)
        self._saved(folder)


def write_checkpoint(run: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], cursor: Cursor) -> Path:
    """Write the checkpoint of `cursor.step`, whole or not at all, from plain tensors. Returns its folder."""
    final = run / "checkpoints" / f"{cursor.step:08d}"
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, temporary / MODEL_NAME)
    save_file(moments, temporary / OPTIMIZER_NAME)
    (temporary / STATE_NAME).write_text(json.dumps(asdict(cursor)))
    for path in [*temporary.iterdir(), temporary]:
        sync_path(path)
    if final.exists():  # a step that a resumed run does again
        discard(final)
    temporary.rename(final)
    sync_path(final.parent)
    return final


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; whoever dies meanwhile leaves no half of it under its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def is_checkpoint_name(name: str) -> bool:
    return re.fullmatch(r"[0-9]{8}|[1-9][0-9]{8,17}", name) is not None


def list_folders(run: Path) -> list[Path]:
    """Folders of a run that have the name of a checkpoint, oldest first, also such as lack a file."""
    found = (path for path in (run / "checkpoints").glob("[0-9]*") if is_checkpoint_name(path.name))
    return sorted(found, key=lambda path: int(path.name))


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [path for path in list_folders(run) if (path / STATE_NAME).exists()]


def best_checkpoint(run: Path) -> Path:
    """The `best_of` a run, which must have a checkpoint; a state that is damaged is passed over, with a warning."""
    readable = []
    for checkpoint in list_checkpoints(run):
        try:
            read_cursor(checkpoint)
            readable.append(checkpoint)
        except DamagedRun as error:
            log.warning("damaged checkpoint: %s", error)
    return best_of(readable)


def best_of(checkpoints: Sequence[Path]) -> Path:
    """The checkpoint with the highest accuracy on the validation split, or, in a run without one, with the lowest recent
    loss; the newest of equals. `checkpoints` are one or more, oldest first."""
    cursors = {checkpoint: read_cursor(checkpoint) for checkpoint in reversed(checkpoints)}
    is_validated = any(cursor.val_accuracy is not None for cursor in cursors.values())

    def badness(checkpoint: Path) -> float:
        cursor = cursors[checkpoint]
        accuracy = None if cursor.val_accuracy is None else -cursor.val_accuracy
        value = accuracy if is_validated else cursor.recent_loss
        return math.inf if value is None else value

    return min(cursors, key=badness)


def read_cursor(checkpoint: Path) -> Cursor:
    """What `state.json` says.

    Raises:
        DamagedRun: it is missing, holds other names or values than a cursor's, or a step that is not its folder's.
    """
    path = checkpoint / STATE_NAME
    plain = read_object(path, max_bytes=2**16)
    names = {one.name for one in fields(Cursor)}
    if unknown := sorted(plain.keys() - names) or sorted({"step", "keys_digest"} - plain.keys()):
        raise DamagedRun(f"{path} is damaged: it has or lacks {unknown[0]!r}; its names are {sorted(names)}")
    try:
        cursor = Cursor(**plain)
    except ValueError as error:
        raise DamagedRun(f"{path} is damaged: {error}") from error
    if cursor.step != int(checkpoint.name):
        raise DamagedRun(f"{path} is damaged: it is of step {cursor.step}, its folder of step {int(checkpoint.name)}")
    return cursor


def check_tensors(path: Path, specs: Specs, *, look_at_values: bool = True, may_lack: bool = False) -> set[str]:
    """The names of the tensors in a safetensors file, which must be those of `specs`, of their dtypes and shapes.

    Without `look_at_values` only the header is read, and compared with the file's size; with it every value must be
    finite. Memory for one tensor at a time, which is no larger than `specs` says.

    Args:
        may_lack: the file may hold only some of them.

    Raises:
        DamagedRun: names the file and the tensor.
    """
    regular_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            others = sorted(names - specs.keys()) or ([] if may_lack else sorted(specs.keys() - names))
            if others:
                where = "holds" if others[0] in names else "lacks"
                raise DamagedRun(
                    f"{path} {where} a tensor {others[0]!r}: it is damaged, or of another network than its run's"
                )
            for name in sorted(names):
                part = file.get_slice(name)
                found = part.get_dtype(), tuple(part.get_shape())
                if found != specs[name]:
                    raise DamagedRun(f"{path}: tensor {name!r} is {found}; that of its run's network is {specs[name]}")
            for name in sorted(names) if look_at_values else ():
                value = file.get_tensor(name)
                if not value.is_floating_point() or not value.numel():
                    continue
                if not torch.isfinite(torch.stack(torch.aminmax(value))).all():  # NaN is passed on by both
                    raise DamagedRun(f"{path}: tensor {name!r} holds NaN or infinity, which no finite step makes")
    except (SafetensorError, OSError) as error:
        raise DamagedRun(f"{path} is damaged: {error}") from error
    return names


def read_tensors(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights by name, and the optimiser's state by parameter number, on the CPU; of a checkpoint that is whole."""
    return load_file(checkpoint / MODEL_NAME), load_file(checkpoint / OPTIMIZER_NAME)


def load_weights(checkpoint: Path, module: nn.Module) -> None:
    """Load `model.safetensors` into `module`; every name and shape must match.

    Raises:
        DamagedRun: they do not, or a value is not finite.
    """
    check_tensors(checkpoint / MODEL_NAME, specs_of(module.state_dict()))
    module.load_state_dict(load_file(checkpoint / MODEL_NAME))


def load_ema(checkpoint: Path, module: nn.Module) -> None:
    """Set the parameters of `module` to their running averages, where the checkpoint holds some."""
    averages = load_file(checkpoint / OPTIMIZER_NAME)
    parameters = [parameter for group in param_groups(module, 0.0) for parameter in group["params"]]
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            if (average := averages.get(f"{number}.{EMA}")) is not None:
                parameter.copy_(average)


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimiser's state; its parameters must be those of the run that saved it, in the same order."""
    flat = load_file(checkpoint / OPTIMIZER_NAME)
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

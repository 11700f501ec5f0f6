"""Which checkpoints of a run are whole: what their files hold is what the run's own job could have written.

A checkpoint is renamed into place whole, so a damaged one is the work of a disk, a copy that was broken off, or a hand. It
is never loaded: an older whole one is used instead, and a warning names both.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from jobs.checkpoint import (
    MODEL_NAME,
    OPTIMIZER_NAME,
    STATE_NAME,
    Specs,
    check_tensors,
    list_folders,
    read_cursor,
    specs_of,
)
from jobs.run_files import DamagedRun, refuse_links
from models.optim import EMA, MOMENTS, param_groups

log = logging.getLogger(__name__)
_HEADER_BYTES = 100 * 2**20  # the most that the format itself allows
_ASIDE = "damaged-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What the checkpoints of a run hold."""

    num_steps: int
    """Of the whole run; no checkpoint is of a later step."""
    weights: Specs
    moments: Specs
    """Everything that the optimiser's state may hold."""

    @classmethod
    def of(cls, make: Callable[[], nn.Module], num_steps: int, *, ema: bool) -> Expected:
        """Of a run that trains what `make` builds, with or without a running average of the weights; takes no memory.

        Raises:
            DamagedRun: what `make` builds is too large for any computer, so no run's config names it.
        """
        try:
            with torch.device("meta"):
                module = make()
        except RuntimeError as error:
            raise DamagedRun(f"the run's config describes a network that cannot be: {error}") from error
        parameters = [parameter for group in param_groups(module, 0.0) for parameter in group["params"]]
        moments: dict[str, tuple[str, tuple[int, ...]]] = {}
        for number, parameter in enumerate(parameters):
            moments[f"{number}.step"] = ("F32", ())
            for name in MOMENTS:
                if ema or name != EMA:
                    moments[f"{number}.{name}"] = ("F32", tuple(parameter.shape))
        return cls(num_steps=num_steps, weights=specs_of(module.state_dict()), moments=moments)

    def max_bytes(self) -> dict[str, int]:
        """The most that each file of a checkpoint can have."""
        sizes = {MODEL_NAME: self.weights, OPTIMIZER_NAME: self.moments}
        return {name: _HEADER_BYTES + _num_bytes(specs) for name, specs in sizes.items()} | {STATE_NAME: 2**16}


def _num_bytes(specs: Specs) -> int:
    return sum(8 * torch.Size(shape).numel() for _, shape in specs.values())


def find_damage(checkpoint: Path, expected: Expected, *, look_at_values: bool = True) -> str:
    """What is wrong with a checkpoint, naming the file; empty where it is whole.

    Args:
        look_at_values: also read every value, which must be finite; without it, the files' headers and sizes alone.
    """
    try:
        cursor = read_cursor(checkpoint)
        if cursor.step > expected.num_steps:
            raise DamagedRun(f"{checkpoint / STATE_NAME}: step {cursor.step} of a run of {expected.num_steps} steps")
        check_tensors(checkpoint / MODEL_NAME, expected.weights, look_at_values=look_at_values)
        moments = checkpoint / OPTIMIZER_NAME
        found = check_tensors(moments, expected.moments, look_at_values=look_at_values, may_lack=True)
        # A run starts without moments; once a parameter has some, it has all.
        whole = {
            name for name in expected.moments if name.partition(".")[0] in {one.partition(".")[0] for one in found}
        }
        if found != whole or (cursor.step > 0 and not found and expected.moments):
            missing = next(iter(sorted(whole - found)), "all of it")
            raise DamagedRun(f"{moments} lacks state of the optimiser: {missing}")
    except DamagedRun as error:
        return str(error)
    return ""


def whole_checkpoints(run: Path, expected: Expected) -> list[Path]:
    """The whole checkpoints of `run`, oldest first; a warning names each other one. Changes nothing.

    Raises:
        DamagedRun: a link in the run, or no checkpoint is whole.
    """
    refuse_links(run)
    troubles = {path: find_damage(path, expected) for path in list_folders(run)}
    whole = [path for path, trouble in troubles.items() if not trouble]
    found = list(filter(None, troubles.values()))
    if not whole:
        raise DamagedRun(
            f"{run} has no whole checkpoint: {'; '.join(found) or 'none at all'}. Train it again: a job that finds no whole "
            "one says how"
        )
    for trouble in found:
        log.warning("damaged checkpoint: %s. The newest whole one of %s is %s", trouble, run, whole[-1])
    return whole


def set_damaged_aside(run: Path, expected: Expected) -> dict[Path, str]:
    """Rename each damaged checkpoint of `run` to `damaged-NAME`, so that nothing loads it; what they are now called, each with
    its trouble. The values of the newest whole one are read, of those before it the headers.

    Raises:
        DamagedRun: a link in the run.
    """
    refuse_links(run)
    found, is_newest = {}, True
    for path in reversed(list_folders(run)):
        trouble = find_damage(path, expected, look_at_values=is_newest)
        if not trouble:
            is_newest = False
            continue
        aside = path.with_name(f"{_ASIDE}{path.name}")
        shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
        path.rename(aside)
        found[aside] = trouble
    return found


def require_whole(run: Path) -> None:
    """Raise `DamagedRun` where `run` has damaged checkpoints that were set aside, and no other."""
    aside = sorted((run / "checkpoints").glob(f"{_ASIDE}*"))
    if aside and not list_folders(run):
        raise DamagedRun(
            f"{run} has no whole checkpoint left; set aside as damaged: {', '.join(map(str, aside))}. Put back a copy of one "
            f"under its own name, or delete {run / 'checkpoints'} and {run / 'metrics.jsonl'} to train from the first step again"
        )

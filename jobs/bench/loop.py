"""`tokenreel bench loop`: what tracking and checkpoints cost the steps of a training run."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.checkpoint import list_checkpoints, read_cursor, read_tensors, write_checkpoint
from jobs.journal import JOURNAL_NAME, read_journal
from jobs.loop import Context, LoopConfig, train
from jobs.pretrain import NUM_VIEWS, PretrainConfig
from jobs.recipes import find_recipe
from jobs.result import JobResult
from jobs.tracking import Tracker
from models.vimpac import VimpacBackbone, VimpacConfig, VimpacObjective
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)

_ATTACH_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchLoopConfig:
    """Train a recipe's model on made-up tokens, with tracking and without in turn, and report the difference a step.

    On a CPU with one thread, which is what a worker on one CPU has.

    "With" is all that a run has: the journal, the system sampler, and the thread that copies both to MLflow
    (MLFLOW_TRACKING_URI, or mlflow.db here). They share the process with the steps, which they do not in a job on Ray,
    where MLflow is the driver's. Then train once more with frequent checkpoints, and report what they held up.
    """

    recipe: str = "debug"
    """Whose model and optimiser; its data are not needed."""
    batch_size: int = 4
    """Videos a step."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    steps: int = 40
    """Steps a round."""
    warmup_steps: int = 5
    """Steps at the start of each round that are not counted."""
    rounds: int = 5
    """Times that each of the two runs, after one that is not counted."""
    save_every_steps: int = 5
    """Steps between two checkpoints in the round about them."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.rounds, self.save_every_steps) < 1 or not 0 <= self.warmup_steps < self.steps - 1:
            raise ConfigError(f"bench loop: counts must be 1 or more, and warmup_steps 0 to steps - 2, got {self}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device = {self.device!r}; allowed: auto, cpu, cuda")


class _MadeUp:
    """The same random tokens at every step: nothing to wait for."""

    unit = "tokens"

    def __init__(self, backbone: VimpacConfig, batch_size: int) -> None:
        shape = (batch_size, NUM_VIEWS, *backbone.shape)
        self.units_per_step = batch_size * NUM_VIEWS * backbone.num_frames * backbone.grid_height * backbone.grid_width
        self._tokens = torch.randint(backbone.codebook_size, shape, generator=torch.Generator().manual_seed(0))
        self._keys = [f"{n:05d}" for n in range(batch_size)]

    def batch(self, step: int) -> Mapping[str, Any]:
        seeds = torch.arange(self._tokens.shape[0] * NUM_VIEWS).view(-1, NUM_VIEWS) + step * self._tokens.shape[0]
        return {"tokens": self._tokens, "seeds": seeds, "keys": self._keys}


def run(config: BenchLoopConfig) -> JobResult:
    """Medians over rounds, with their range, as figures."""
    started_s = time.monotonic()
    recipe = find_recipe(config.recipe)
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device.replace("auto", "cpu")
    overheads, cpu_overheads, steps_s = [], [], []
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tokenreel-bench-") as scratch:
        folder = Path(scratch)
        for number in range(config.rounds + 1):
            # Each goes first in half of the rounds, so a machine that slows down favours neither.
            order = (False, True) if number % 2 else (True, False)
            seconds = {is_on: _round(folder / f"{number}-{is_on}", config, recipe, device, is_on) for is_on in order}
            if number:
                overheads.append(seconds[True][0] / seconds[False][0] - 1)
                cpu_overheads.append(seconds[True][1] / seconds[False][1] - 1)
                steps_s.append(seconds[False][0])
                words = "round %d: %.1f ms a step, %+.2f %% with, of CPU time %+.2f %%"
                log.info(words, number, 1e3 * steps_s[-1], 100 * overheads[-1], 100 * cpu_overheads[-1])
        checkpoints = _measure_checkpoints(folder / "saving", config, recipe, device)
    torch.set_num_threads(num_threads)
    figures = {
        "device": device,
        "step_ms": round(1e3 * statistics.median(steps_s), 2),
        "overhead_share": round(statistics.median(overheads), 4),
        "overhead_share_range": [round(min(overheads), 4), round(max(overheads), 4)],
        # Of all threads: what other work on the machine does not change, and what tracking costs if no core is idle.
        "cpu_overhead_share": round(statistics.median(cpu_overheads), 4),
        "cpu_overhead_share_range": [round(min(cpu_overheads), 4), round(max(cpu_overheads), 4)],
        **checkpoints,
    }
    return JobResult(
        job="bench loop",
        out="",
        planned=config.rounds,
        committed=config.rounds,
        elapsed_s=time.monotonic() - started_s,
        figures=figures,
    )


def _round(
    folder: Path, config: BenchLoopConfig, recipe: PretrainConfig, device: str, is_tracked: bool
) -> tuple[float, float]:
    """Mean seconds from one step's end to the next one's, by the clock and of CPU time.

    Only rank 0 keeps a journal, so "without" is a rank 1.
    """
    ends: list[tuple[float, float]] = []

    def note_end() -> bool:
        ends.append((time.perf_counter(), time.process_time()))
        return False

    tracker = Tracker.open(folder, job="bench loop", name="bench loop") if is_tracked else None
    with tracker or nullcontext():
        if tracker is not None:
            _wait_for_mlflow(tracker)
        context = Context(run=folder, rank=int(not is_tracked), device=torch.device(device), should_stop=note_end)
        _train(context, config, recipe, save_every_steps=config.steps)
    first, last = ends[config.warmup_steps], ends[-1]
    num_steps = len(ends) - 1 - config.warmup_steps
    return (last[0] - first[0]) / num_steps, (last[1] - first[1]) / num_steps


def _wait_for_mlflow(tracker: Tracker) -> None:
    """MLflow is imported once a run, which takes seconds of the interpreter: no part of what a step costs."""
    deadline_s = time.monotonic() + _ATTACH_S
    while tracker.run_id is None:
        if time.monotonic() > deadline_s:
            raise ConfigError(f"MLflow did not take a run within {_ATTACH_S:g} s; see MLFLOW_TRACKING_URI")
        time.sleep(0.05)


def _train(context: Context, config: BenchLoopConfig, recipe: PretrainConfig, save_every_steps: int) -> nn.Module:
    objective = VimpacObjective(VimpacBackbone(recipe.backbone), recipe.objective)
    loop = LoopConfig(steps=config.steps, save_every_steps=save_every_steps, picture_every_steps=0)
    loop = replace(loop, precision=recipe.loop.precision)
    train(objective, _MadeUp(recipe.backbone, config.batch_size), context, loop, recipe.optim)
    return objective


def _measure_checkpoints(folder: Path, config: BenchLoopConfig, recipe: PretrainConfig, device: str) -> dict[str, Any]:
    """How long each checkpoint held up the steps, and how long writing it takes, which is behind them."""
    context = Context(run=folder, device=torch.device(device))
    _train(context, config, recipe, config.save_every_steps)
    rows = [row for row in read_journal(folder / JOURNAL_NAME) if "checkpoint_pause_s" in row]
    pauses = [row["checkpoint_pause_s"] for row in rows]
    newest = list_checkpoints(folder)[-1]
    weights, moments = read_tensors(newest)
    started = time.perf_counter()
    write_checkpoint(folder, weights, moments, replace(read_cursor(newest), step=config.steps + 1))
    write_s = time.perf_counter() - started
    return {
        "checkpoint_mb": round(sum(file.stat().st_size for file in newest.iterdir()) / 1e6, 1),
        # The first one also makes the buffers.
        "checkpoint_first_pause_ms": round(1e3 * pauses[0], 2) if pauses else None,
        "checkpoint_pause_ms": round(1e3 * statistics.median(pauses[1:]), 2) if pauses[1:] else None,
        "checkpoint_write_ms": round(1e3 * write_s, 1),
    }

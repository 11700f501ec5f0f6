"""The first losses of the debug recipe's model and of the tokenizer, on synthetic data: a change of them is a change of
the method, and needs a reason. `make golden` writes them anew.

Other processors, libraries and thread counts round differently. What that does to these figures was measured (see
docs/decisions.md): five steps at a small learning rate, in fp32 and without dropout, keep it ten times below the band, and
a mistake in the method is far above it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import jobs.step
import models.optim
import models.vimpac
from jobs.journal import read_journal
from jobs.loop import Context, LoopConfig, seed_everything, train
from jobs.recipes import debug
from models.optim import OptimConfig
from models.tokenizers.vqvae import Vqvae, VqvaeConfig, VqvaeObjective, VqvaeObjectiveConfig
from models.vimpac import VimpacBackbone, VimpacObjective

GOLDEN = Path(__file__).with_name("losses.json")
LOOP = LoopConfig(steps=5, save_every_steps=5, picture_every_steps=0)
# The decay is strong, since five steps at this rate would hardly show a usual one.
OPTIM = OptimConfig(lr=1e-4, weight_decay=10.0, warmup_share=0.4)
BAND = 1e-4
"""Largest relative difference of a figure from the golden one."""
Figures = dict[str, list[float]]


class TokenClips:
    """Clips in which each position mostly repeats what stood there before, so that there is something to learn."""

    unit, units_per_step = "tokens", 1

    def batch(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng(step)
        start = rng.integers(0, 512, (2, 1, 1, 16, 16)) // 64 * 64
        tokens = np.broadcast_to(start, (2, 2, 5, 16, 16)) + (rng.random((2, 2, 5, 16, 16)) < 0.1)
        seeds = torch.from_numpy(rng.integers(0, 2**62, (2, 2)))
        return {"tokens": torch.from_numpy(tokens.astype(np.int64)), "seeds": seeds, "keys": [f"{step}"] * 2}


class Gradients:
    """Frames of smooth colour gradients."""

    unit, units_per_step = "frames", 1

    def batch(self, step: int) -> dict[str, Any]:
        corners = np.random.default_rng(step).integers(0, 256, (8, 2, 2, 3))
        ramp = np.arange(64) / 63
        along = np.stack([1 - ramp, ramp])
        frames = np.einsum("bijc,ih,jw->bhwc", corners, along, along).round().astype(np.uint8)
        return {"frames": torch.from_numpy(frames), "keys": [f"{step}"] * 8}


def vimpac_figures(folder: Path, change: Callable[[nn.Module], None] = lambda module: None) -> Figures:
    recipe = debug()
    seed_everything(0, -1, 0)
    # Dropout draws from a generator that is not the same in every build of torch.
    backbone = VimpacBackbone(replace(recipe.backbone, dropout=0.0))
    return run_loop(folder, VimpacObjective(backbone, recipe.objective), TokenClips(), change)


def vqvae_figures(folder: Path, change: Callable[[nn.Module], None] = lambda module: None) -> Figures:
    seed_everything(0, -1, 0)
    objective = VqvaeObjective(Vqvae(VqvaeConfig(channels=32, codebook_size=64)), VqvaeObjectiveConfig())
    return run_loop(folder, objective, Gradients(), change)


def run_loop(folder: Path, objective: nn.Module, batches: Any, change: Callable[[nn.Module], None]) -> Figures:
    """The loss of each step, and after the last one the L2 norms of all vectors and of all other weights."""
    change(objective)
    train(objective, batches, Context(run=folder), LOOP, OPTIM)
    losses = [float(row["loss"]) for row in read_journal(folder / "metrics.jsonl")]
    squares = [(p.ndim < 2, float(p.detach().double().square().sum())) for p in objective.parameters()]
    norms = [math.sqrt(sum(value for is_vector, value in squares if is_vector == kind)) for kind in (True, False)]
    return {"losses": losses, "norms": norms}


FIGURES = {"vimpac": vimpac_figures, "vqvae": vqvae_figures}


def largest_difference(figures: Figures, golden: Figures) -> float:
    """The largest relative one of all figures."""
    pairs = [pair for name in golden for pair in zip(figures[name], golden[name], strict=True)]
    return max(abs(value - wanted) / abs(wanted) for value, wanted in pairs)


@pytest.mark.parametrize("name", FIGURES)
def test_losses_are_the_golden_ones(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    figures = FIGURES[name](tmp_path)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--update-golden"):
        rounded = {kind: [float(f"{value:.8g}") for value in values] for kind, values in figures.items()}
        GOLDEN.write_text(json.dumps({**golden, name: rounded}, indent=1) + "\n")
        return
    assert largest_difference(figures, golden[name]) < BAND


def decay_vectors_too(patch: pytest.MonkeyPatch) -> None:
    def groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": list(module.parameters()), "weight_decay": weight_decay}]

    patch.setattr(models.optim, "param_groups", groups)


def decay_through_the_gradient(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.optim, "AdamW", torch.optim.Adam)


def shift_masks(patch: pytest.MonkeyPatch) -> None:
    draw = models.vimpac.block_masks
    patch.setattr(models.vimpac, "block_masks", lambda *args: draw(*args).roll(1, -1))


def schedule_one_step_early(patch: pytest.MonkeyPatch) -> None:
    lr_at = jobs.step.lr_at
    patch.setattr(jobs.step, "lr_at", lambda step, *args: lr_at(step + 1, *args))


def swap_rows_and_columns(patch: pytest.MonkeyPatch) -> None:
    forward = VimpacBackbone.forward

    def transposed(self: VimpacBackbone, tokens: torch.Tensor, **options: Any) -> Any:
        self.position_h, self.position_w = self.position_w, self.position_h
        return forward(self, tokens, **options)

    patch.setattr(VimpacBackbone, "forward", transposed)


@pytest.mark.parametrize(
    "make",
    [decay_vectors_too, decay_through_the_gradient, shift_masks, schedule_one_step_early, swap_rows_and_columns],
)
def test_a_mistake_is_seen(
    make: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(monkeypatch)
    assert largest_difference(vimpac_figures(tmp_path), json.loads(GOLDEN.read_text())["vimpac"]) > 4 * BAND

"""The first losses of the debug recipe's model and of the tokenizer, on synthetic data: a change of them is a change of
the method, and needs a reason. `make golden` writes them anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.journal import read_journal
from jobs.loop import Context, LoopConfig, seed_everything, train
from jobs.recipes import debug
from models.optim import OptimConfig
from models.tokenizers.vqvae import Vqvae, VqvaeConfig, VqvaeObjective, VqvaeObjectiveConfig
from models.vimpac import VimpacBackbone, VimpacObjective

GOLDEN = Path(__file__).with_name("losses.json")
LOOP = LoopConfig(steps=20, save_every_steps=20, picture_every_steps=0)


class TokenClips:
    """Clips in which each position mostly repeats what stood there before, so that there is something to learn."""

    unit, units_per_step = "tokens", 1

    def batch(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng(step)
        start = rng.integers(0, 512, (4, 1, 1, 16, 16)) // 64 * 64
        tokens = np.broadcast_to(start, (4, 2, 5, 16, 16)) + (rng.random((4, 2, 5, 16, 16)) < 0.1)
        seeds = torch.from_numpy(rng.integers(0, 2**62, (4, 2)))
        return {"tokens": torch.from_numpy(tokens.astype(np.int64)), "seeds": seeds, "keys": [f"{step}"] * 4}


class Gradients:
    """Frames of smooth colour gradients."""

    unit, units_per_step = "frames", 1

    def batch(self, step: int) -> dict[str, Any]:
        corners = torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(step)) * 255
        frames = torch.nn.functional.interpolate(corners, (64, 64), mode="bilinear").permute(0, 2, 3, 1)
        return {"frames": frames.to(torch.uint8), "keys": [f"{step}"] * 8}


def vimpac_losses(folder: Path) -> list[float]:
    recipe = debug()
    seed_everything(0, -1, 0)
    objective = VimpacObjective(VimpacBackbone(recipe.backbone), recipe.objective)
    return run_loop(folder, objective, TokenClips(), replace(recipe.optim, warmup_share=0.1))


def vqvae_losses(folder: Path) -> list[float]:
    seed_everything(0, -1, 0)
    objective = VqvaeObjective(Vqvae(VqvaeConfig(channels=32, codebook_size=64)), VqvaeObjectiveConfig())
    return run_loop(folder, objective, Gradients(), OptimConfig(lr=1e-3))


def run_loop(folder: Path, objective: torch.nn.Module, batches: Any, optim: OptimConfig) -> list[float]:
    train(objective, batches, Context(run=folder), LOOP, optim)
    return [float(row["loss"]) for row in read_journal(folder / "metrics.jsonl")]


@pytest.mark.parametrize("name", ["vimpac", "vqvae"])
def test_losses_are_the_golden_ones(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    losses = {"vimpac": vimpac_losses, "vqvae": vqvae_losses}[name](tmp_path)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(json.dumps({**golden, name: [round(loss, 6) for loss in losses]}, indent=1) + "\n")
        return
    # Kernels of other CPUs round otherwise, which twenty steps amplify: a looser band towards the end.
    assert losses[:5] == pytest.approx(golden[name][:5], rel=1e-4)
    assert losses == pytest.approx(golden[name], rel=2e-2)

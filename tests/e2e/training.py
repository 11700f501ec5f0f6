"""A pre-training run without videos, for tests of what happens around the steps: tokens of a known order, a tiny model."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import psutil

from jobs.pretrain import PretrainConfig
from jobs.recipes import debug
from jobs.workers import WorkersConfig
from tests.pipeline.datasets import GRID, make_token_dataset

CODEBOOK_SIZE = 64


def make_tokens(folder: Path, fingerprint: str = "t" * 32) -> Path:
    """32 samples of 8 frames in 4 shards, of the tokenizer `fingerprint`."""
    tokenizer = {"codebook_size": CODEBOOK_SIZE, "fingerprint": fingerprint}
    return make_token_dataset(folder, [[8] * 8] * 4, extra={"tokenizer": tokenizer})


def make_config(tokens: Path, out: Path, workers: WorkersConfig, *, layers: int = 2, **loop: int) -> PretrainConfig:
    """The debug recipe on `tokens`; dropout is off, since its seed depends on the rank, and no picture is drawn."""
    recipe = debug()
    small = {"hidden": 32, "heads": 4, "head_dim": 8, "mlp": 64, "codebook_size": CODEBOOK_SIZE, "dropout": 0.0}
    return replace(
        recipe,
        tokens=str(tokens),
        out=out,
        backbone=replace(recipe.backbone, layers=layers, grid_height=GRID[0], grid_width=GRID[1], **small),
        objective=replace(recipe.objective, head_hidden=32, head_out=16),
        optim=replace(recipe.optim, lr=1e-4),  # small, as steps magnify what rounding began
        loader=replace(recipe.loader, batch_size=4),
        loop=replace(recipe.loop, picture_every_steps=0, **loop),
        workers=workers,
    )


def find_train_worker() -> psutil.Process:
    """A Ray Train worker of this session's cluster; there may be others on the machine."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if "RayTrainWorker" in " ".join(process.cmdline()):
                return process
    raise AssertionError("no Ray Train worker is running")

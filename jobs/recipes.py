"""Recipes by name: functions that return complete pre-training configs. A variant is `dataclasses.replace` of one."""

from __future__ import annotations

from collections.abc import Callable

import tyro

from jobs.loop import LoopConfig
from jobs.pretrain import PretrainConfig
from jobs.training import WorkersConfig
from models.optim import OptimConfig
from models.vimpac import SIZES, VimpacConfig, VimpacObjectiveConfig
from pipeline.errors import ConfigError
from pipeline.loader import LoaderConfig


def debug() -> PretrainConfig:
    """VIMPAC's architecture, masks and losses in a size that two CPU cores train in minutes."""
    return PretrainConfig(
        tokens=tyro.MISSING,
        out=tyro.MISSING,
        recipe="debug",
        backbone=VimpacConfig(layers=2, hidden=96, heads=4, head_dim=24, mlp=384, codebook_size=512, dropout=0.0),
        objective=VimpacObjectiveConfig(head_hidden=256, head_out=64),
        optim=OptimConfig(lr=4e-3),
        loader=LoaderConfig(batch_size=8),
        loop=LoopConfig(steps=300, save_every_steps=50, picture_every_steps=100),
        workers=WorkersConfig(num_workers=2),
    )


def vimpac_small() -> PretrainConfig:
    """VIMPAC small as published: 10 epochs of HowTo100M, 12 K updates of 1,024 videos at 5 x 128 px."""
    return PretrainConfig(
        tokens=tyro.MISSING,
        out=tyro.MISSING,
        recipe="vimpac-small",
        backbone=SIZES["small"],
        objective=VimpacObjectiveConfig(num_blocks=5, head_layers=2, head_hidden=2048),
        optim=OptimConfig(lr=1e-3, warmup_share=0.1),
        loader=LoaderConfig(batch_size=1024),
        loop=LoopConfig(steps=12_000, save_every_steps=500, picture_every_steps=1000, precision="bf16"),
        workers=WorkersConfig(num_workers=8),
    )


RECIPES: dict[str, Callable[[], PretrainConfig]] = {"debug": debug, "vimpac-small": vimpac_small}


def find_recipe(name: str) -> PretrainConfig:
    """The config of a recipe, with `tokens` and `out` still missing.

    Raises:
        ConfigError: no such recipe; names the ones there are.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r}: no such recipe; allowed: {', '.join(RECIPES)}")
    return RECIPES[name]()

"""Recipes of fine-tuning by name, as those of pre-training in `jobs/recipes.py`. `docs/recipes.md` says what is the paper's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import tyro

from jobs.finetune import FinetuneConfig, MultiClipConfig
from jobs.loop import LoopConfig
from jobs.workers import WorkersConfig
from models.optim import OptimConfig
from models.vimpac import SIZES, VimpacConfig
from pipeline.errors import ConfigError
from pipeline.labelled import LabelledConfig
from pipeline.views import ViewChoice

Recipe = Callable[[], FinetuneConfig]


def debug() -> FinetuneConfig:
    """The network of the pre-training recipe debug, in a size that two CPU cores train in minutes."""
    return FinetuneConfig(
        tokens=tyro.MISSING,
        out=tyro.MISSING,
        recipe="debug",
        backbone=VimpacConfig(layers=2, hidden=96, heads=4, head_dim=24, mlp=384, codebook_size=512, dropout=0.0),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01),
        loader=LabelledConfig(batch_size=16),
        loop=LoopConfig(steps=200, save_every_steps=50, picture_every_steps=100),
        workers=WorkersConfig(num_workers=2),
        test=MultiClipConfig(num_clips=3),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _DataSet:
    """What the paper sets by data set; `directed`: classes that a mirrored video, or its edges, would change."""

    title: str
    epochs: float
    fps: float
    directed: bool = False


_DATA_SETS = {
    "ssv2": _DataSet(title="Something-Something V2", epochs=22, fps=4.0, directed=True),
    "diving48": _DataSet(title="Diving48 V2", epochs=50, fps=4.0),
    "ucf101": _DataSet(title="UCF101", epochs=50, fps=2.0),
    "hmdb51": _DataSet(title="HMDB51", epochs=50, fps=4.0),
    "k400": _DataSet(title="Kinetics-400", epochs=30, fps=2.0),
}
_LR = {"small": 1e-4, "base": 1e-4, "large": 5e-5}


def _recipe(name: str, data: _DataSet, size: str) -> Recipe:
    def make() -> FinetuneConfig:
        crops = ViewChoice(resized=False, flip=False)
        return FinetuneConfig(
            tokens=tyro.MISSING,
            out=tyro.MISSING,
            recipe=name,
            epochs=data.epochs,
            backbone=replace(SIZES[size], num_frames=10, grid_height=32, grid_width=32),
            optim=OptimConfig(lr=_LR[size], betas=(0.9, 0.999), weight_decay=0.01, warmup_share=0.1),
            loader=LabelledConfig(batch_size=128, fps=data.fps, views=ViewChoice(flip=not data.directed)),
            loop=LoopConfig(save_every_steps=500, picture_every_steps=1000, precision="bf16"),
            workers=WorkersConfig(num_workers=8),
            test=MultiClipConfig(num_clips=10, views=replace(crops, crops=("center",)) if data.directed else crops),
        )

    make.__doc__ = (
        f"{data.title}, VIMPAC {size}: {data.epochs:g} epochs at 10 x 256 px, {data.fps:g} fps, LR {_LR[size]:g}"
    )
    return make


RECIPES: dict[str, Recipe] = {"debug": debug} | {
    name: _recipe(name, data, size)
    for key, data in _DATA_SETS.items()
    for size, name in (
        ("small", f"finetune-{key}"),
        ("base", f"finetune-{key}-base"),
        ("large", f"finetune-{key}-large"),
    )
}


def find_recipe(name: str) -> FinetuneConfig:
    """The config of a recipe, with `tokens` and `out` still missing.

    Raises:
        ConfigError: no such recipe; names the ones there are.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r}: no such recipe; allowed: {', '.join(RECIPES)}")
    return RECIPES[name]()

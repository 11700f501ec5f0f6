"""Recipes by name: functions that return complete pre-training configs. A variant is `dataclasses.replace` of one.

`docs/recipes.md` says what each is and which of its numbers are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tyro

from jobs.loop import LoopConfig
from jobs.pretrain import PretrainConfig
from jobs.workers import WorkersConfig
from models.optim import OptimConfig
from models.vimpac import SIZES, VimpacConfig, VimpacObjectiveConfig
from pipeline.errors import ConfigError
from pipeline.loader import LoaderConfig

Recipe = Callable[[], PretrainConfig]


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


# HowTo100M has 1,238,791 training videos, and an epoch is one pair of clips of each: 1,238,791 / 1,024 = 1,209.8 updates.
# 10 epochs are 12,098 updates and 100 are 120,976; the paper writes, and these recipes run, 12 K and 120 K.


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


def vimpac_base() -> PretrainConfig:
    """VIMPAC base, the paper's 12 x 768 of the scale ablation; its training as small's.

    The paper states the network (12 layers of 768, 12 heads of 64, MLP of 3,072) and, as of all ablations, 10 epochs at
    5 x 128 px. Taken over from small: LR 1e-3, warm-up 0.1, batch 1,024, 5 mask blocks, a contrastive head of 2 layers
    of 2,048. Nothing is taken over from large, which trains ten times as long.
    """
    return replace(vimpac_small(), recipe="vimpac-base", backbone=SIZES["base"])


def vimpac_large() -> PretrainConfig:
    """VIMPAC Large-Half, stage one of two: 90 of 100 epochs, 108 K of 120 K updates, at 5 x 128 px."""
    return PretrainConfig(
        tokens=tyro.MISSING,
        out=tyro.MISSING,
        recipe="vimpac-large",
        backbone=SIZES["large"],
        objective=VimpacObjectiveConfig(num_blocks=5, head_layers=3, head_hidden=4096),
        optim=OptimConfig(lr=3e-4, warmup_share=0.05),  # 0.05 x 120 K = 6,000 updates
        loader=LoaderConfig(batch_size=1024),
        loop=LoopConfig(
            steps=108_000,  # 90 / 100 x 120 K
            schedule_steps=120_000,
            save_every_steps=500,
            picture_every_steps=2000,
            precision="bf16",
        ),
        workers=WorkersConfig(num_workers=64),
    )


def vimpac_large_stage2() -> PretrainConfig:
    """VIMPAC Large-Half, stage two: the last 10 epochs, 12 K updates, at 5 x 256 px; needs --continue-from."""
    large = vimpac_large()
    return replace(
        large,
        recipe="vimpac-large-stage2",
        backbone=replace(large.backbone, grid_height=32, grid_width=32),
        objective=replace(large.objective, num_blocks=6),
        loop=replace(large.loop, steps=120_000, schedule_steps=None),  # begins at 108 K, where stage one ended
        continue_from=tyro.MISSING,
    )


def variant(doc: str, base: Recipe, **parts: dict[str, Any]) -> Recipe:
    """The recipe `base` with fields of its parts replaced, such as `backbone={"norm": "pre"}`; `doc` is its help line."""

    def make() -> PretrainConfig:
        config = base()
        changed = {part: replace(getattr(config, part), **fields) for part, fields in parts.items()}
        return replace(config, **changed)

    make.__doc__ = doc
    return make


_256_PX = {"grid_height": 32, "grid_width": 32}

vimpac_small_mp = variant("ablation: small by masked prediction alone", vimpac_small, objective={"alpha": 0.0})
vimpac_small_mp_256 = variant(
    "ablation: masked prediction alone, at 256 px", vimpac_small_mp, backbone=_256_PX, objective={"num_blocks": 6}
)

RECIPES: dict[str, Recipe] = {
    "debug": debug,
    "vimpac-small": vimpac_small,
    "vimpac-base": vimpac_base,
    "vimpac-large": vimpac_large,
    "vimpac-large-stage2": vimpac_large_stage2,
    # Pre-training tasks. Small has both.
    "vimpac-small-mp": vimpac_small_mp,
    "vimpac-small-cl": variant("ablation: small by contrast alone", vimpac_small, objective={"mlm_weight": 0.0}),
    # Masks, of masked prediction alone; the i.i.d. share is what the blocks hide on average.
    "vimpac-small-mp-iid": variant(
        "ablation: each token hidden on its own", vimpac_small_mp, objective={"mask": "iid", "iid_fraction": 0.145}
    ),
    "vimpac-small-mp-256": vimpac_small_mp_256,
    "vimpac-small-mp-256-iid": variant(
        "ablation: each token hidden on its own, at 256 px",
        vimpac_small_mp_256,
        objective={"mask": "iid", "iid_fraction": 0.152},
    ),
    # Attention layouts. Small has T,H|W.
    "vimpac-small-txhxw": variant("ablation: joint attention TxHxW", vimpac_small, backbone={"layout": "TxHxW"}),
    "vimpac-small-t-hxw": variant("ablation: attention T, then HxW", vimpac_small, backbone={"layout": "T,HxW"}),
    "vimpac-small-t-h-w": variant("ablation: attention T, then H, then W", vimpac_small, backbone={"layout": "T,H,W"}),
    "vimpac-small-preln": variant("ablation: LayerNorm before each sublayer", vimpac_small, backbone={"norm": "pre"}),
    # Sizes: heads of 64 and an MLP of four times the width, as in small. The paper's 12 x 768 is vimpac-base.
    "vimpac-6x768": variant(
        "ablation: 6 layers of 768", vimpac_small, backbone={"hidden": 768, "heads": 12, "mlp": 3072}
    ),
    "vimpac-12x512": variant("ablation: 12 layers of 512", vimpac_small, backbone={"layers": 12}),
    "vimpac-24x1024-half": variant(
        "ablation: the network of large, trained as small",
        vimpac_small,
        backbone={"layers": 24, "hidden": 1024, "heads": 16, "head_dim": 32, "mlp": 2048},
    ),
    # Inputs. Small has 5 frames of 128 px and 5 blocks; the blocks of each are the paper's.
    "vimpac-small-10x128": variant(
        "ablation: 10 frames of 128 px", vimpac_small, backbone={"num_frames": 10}, objective={"num_blocks": 6}
    ),
    "vimpac-small-5x256": variant(
        "ablation: 5 frames of 256 px", vimpac_small, backbone=_256_PX, objective={"num_blocks": 6}
    ),
    "vimpac-small-10x256": variant(
        "ablation: 10 frames of 256 px",
        vimpac_small,
        backbone={"num_frames": 10, **_256_PX},
        objective={"num_blocks": 7},
    ),
}


def find_recipe(name: str) -> PretrainConfig:
    """The config of a recipe, with `tokens` and `out` still missing.

    Raises:
        ConfigError: no such recipe; names the ones there are.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r}: no such recipe; allowed: {', '.join(RECIPES)}")
    return replace(RECIPES[name](), recipe=name)

"""The arms of the ablations: each differs from the base arm in one thing, as in the paper's tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from models.masking import block_masks
from models.vimpac import VimpacConfig, VimpacObjectiveConfig

BASE = "masked"
"""Masked prediction with five blocks: the paper's own ablations of masks and its strongest single task."""
NONE = "none"
CORPUS_SHARES = (8, 4, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to pre-train.

    objective: None for no pre-training at all.
    tokenizer: place of its steps in those that `prepare` trained.
    corpus_share: of the training clips, that pre-training sees.
    length: of pre-training, in the budget's steps.
    """

    name: str
    backbone: VimpacConfig
    objective: VimpacObjectiveConfig | None
    tokenizer: int = 0
    corpus_share: float = 1.0
    length: int = 1


def make_arms(backbone: VimpacConfig, objective: VimpacObjectiveConfig, num_tokenizers: int) -> dict[str, Arm]:
    """All arms by name.

    Args:
        backbone, objective: of the base arm; its weights of the losses are replaced.
        num_tokenizers: how many there are; each but the first one makes an arm.
    """
    masked = replace(objective, mlm_weight=1.0, alpha=0.0)
    base = Arm(name=BASE, backbone=backbone, objective=masked)
    share = mean_block_share(backbone.shape, masked.num_blocks)
    wide = replace(
        backbone, hidden=backbone.hidden * 3 // 2, head_dim=backbone.head_dim * 3 // 2, mlp=backbone.mlp * 3 // 2
    )
    arms = [
        replace(base, name=NONE, objective=None),
        replace(base, name="contrastive", objective=replace(objective, mlm_weight=0.0, alpha=1.0)),
        base,
        replace(base, name="both", objective=replace(objective, mlm_weight=1.0, alpha=1.0)),
        replace(base, name="iid", objective=replace(masked, mask="iid", iid_fraction=share)),
        replace(base, name="blocks-4", objective=replace(masked, num_blocks=masked.num_blocks - 1)),
        replace(base, name="blocks-6", objective=replace(masked, num_blocks=masked.num_blocks + 1)),
        replace(base, name="wider", backbone=wide),
        replace(base, name="deeper", backbone=replace(backbone, layers=2 * backbone.layers)),
        *(replace(base, name=f"tokenizer-{place}", tokenizer=place) for place in range(1, num_tokenizers)),
        *(replace(base, name=f"corpus-1/{parts}", corpus_share=1 / parts) for parts in CORPUS_SHARES),
        replace(base, name="longer", length=4),
    ]
    return {arm.name: arm for arm in arms}


TABLES: Mapping[str, tuple[str, ...]] = {
    "Pre-training tasks": (NONE, "contrastive", BASE, "both"),
    "Masks, at an equal share": (BASE, "iid"),
    "Blocks": ("blocks-4", BASE, "blocks-6"),
    "Size of the network": (BASE, "wider", "deeper"),
    "Quality of the tokenizer": ("tokenizer-1", BASE),
    "Size of the corpus": (NONE, *(f"corpus-1/{parts}" for parts in CORPUS_SHARES), BASE),
    "Length of pre-training": (NONE, BASE, "longer"),
}
"""Which arms stand together in the table and in the plot."""


def mean_block_share(shape: tuple[int, int, int], num_blocks: int) -> float:
    """Share of positions that block masks hide on average, so that i.i.d. masks can hide as many."""
    return float(block_masks(torch.arange(4096), shape, num_blocks).float().mean())

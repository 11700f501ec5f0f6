"""Shapes and settings of VIMPAC: the backbone, the paper's sizes, and what is trained.

Source: Tan et al., "VIMPAC: Video Pre-Training via Masked Token Prediction and Contrastive Learning", arXiv 2106.11250.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from models.layers import Lines

Layout = Literal["TxHxW", "T,HxW", "T,H,W", "T,H|W"]

ATTENTIONS: Mapping[Layout, tuple[tuple[Lines, ...], ...]] = MappingProxyType(
    {
        "TxHxW": (("thw",),),
        "T,HxW": (("t",), ("hw",)),
        "T,H,W": (("t",), ("h",), ("w",)),
        "T,H|W": (("t",), ("h", "w")),
    }
)
"""Kinds of lines of each layout: attentions that follow one another, and within one those that stand side by side."""

MAX_LAYERS = 1000  # a config of somebody else's must not keep its reader building layers for ever
NUM_SPECIAL = 5  # rows of the token table after the codes; PAD and MASK are two of them


@dataclass(frozen=True, kw_only=True, slots=True)
class VimpacConfig:
    """Shape of the backbone. The defaults are VIMPAC small at 5 frames of 128 px."""

    layers: int = 6
    """Transformer layers."""
    hidden: int = 512
    """Width d."""
    heads: int = 8
    """Attention heads of a layer; even for layout T,H|W, which gives H and W half of them each."""
    head_dim: int = 64
    """Width of a head; heads x head_dim may differ from d ("half" models)."""
    mlp: int = 2048
    """Width inside the MLP."""
    num_frames: int = 5
    """Frames t of a clip."""
    grid_height: int = 16
    """Tokens h down a frame."""
    grid_width: int = 16
    """Tokens w across a frame."""
    codebook_size: int = 8192
    """Codes of the tokenizer; PAD is codebook_size + 1, MASK is codebook_size + 4."""
    dropout: float = 0.1
    """On embeddings, attention weights and each sublayer's output."""
    layout: Layout = "T,H|W"
    """Lines along which attention runs, one after the other; | is side by side."""
    norm: Literal["post", "pre"] = "post"
    """LayerNorm after each residual (post, the paper) or before each sublayer (pre, with one more at the end)."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "head_dim", "mlp", "num_frames", "grid_height", "grid_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"VimpacConfig: {name} is {getattr(self, name)}; allowed: >= 1")
        if self.layers > MAX_LAYERS:
            raise ValueError(f"VimpacConfig: layers is {self.layers}; allowed: <= {MAX_LAYERS}")
        if not 1 <= self.codebook_size <= 2**16 - NUM_SPECIAL:
            raise ValueError(
                f"VimpacConfig: codebook_size is {self.codebook_size}; allowed: [1, {2**16 - NUM_SPECIAL}], as tokens "
                "are stored in 16 bits"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"VimpacConfig: dropout is {self.dropout}; allowed: [0, 1)")
        if self.layout not in ATTENTIONS:
            raise ValueError(f"VimpacConfig: layout is {self.layout!r}; allowed: {', '.join(ATTENTIONS)}")
        if self.norm not in ("post", "pre"):
            raise ValueError(f"VimpacConfig: norm is {self.norm!r}; allowed: post, pre")
        if self.layout == "T,H|W" and self.heads % 2:
            raise ValueError(
                f"VimpacConfig: heads is {self.heads} with layout 'T,H|W', which gives H and W half of them each; "
                "allowed: an even number"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(t, h, w) of a clip."""
        return self.num_frames, self.grid_height, self.grid_width

    @property
    def pad_id(self) -> int:
        """Token of a position that no frame filled."""
        return self.codebook_size + 1

    @property
    def mask_id(self) -> int:
        """Token of a position the model must predict."""
        return self.codebook_size + 4


SIZES: Mapping[str, VimpacConfig] = MappingProxyType(
    {
        "small": VimpacConfig(),
        "base": VimpacConfig(layers=12, hidden=768, heads=12, mlp=3072),
        "large": VimpacConfig(layers=24, hidden=1024, heads=16, head_dim=32, mlp=2048),
    }
)
"""The paper's models by name; "large" is its Large-Half. 29,442,048, 119,748,096 and 210,106,368 parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VimpacObjectiveConfig:
    """What is trained. The defaults are VIMPAC small; `mlm_weight=0` and `alpha=0` are its ablations."""

    mask: Literal["block", "iid"] = "block"
    """block, or iid for the ablation."""
    num_blocks: int = 5
    """Boxes of a block mask: 5 at 128 px and 6 at 256 px in the paper."""
    iid_fraction: float = 0.145
    """Hidden share of an iid mask; the default is the expected share of 5 blocks."""
    mlm_weight: float = 1.0
    """Weight of masked prediction; 0 leaves it and its head out."""
    alpha: float = 1.0
    """Weight of the contrastive loss; 0 leaves it and its head out."""
    temperature: float = 0.2
    """Temperature of the contrastive loss."""
    negatives: Literal["step", "micro_batch"] = "step"
    """Clips that the contrastive loss compares: those of all workers in the whole step, or in one micro-batch. The paper's
    are of a micro-batch, so their number depends on its GPUs. With one micro-batch both are the same; with several, step
    costs one more forward pass."""
    head_layers: int = 2
    """Linear layers of the contrastive head."""
    head_hidden: int = 2048
    """Width between them."""
    head_out: int = 256
    """Width of what is compared."""

    def __post_init__(self) -> None:
        if self.mask not in ("block", "iid"):
            raise ValueError(f"VimpacObjectiveConfig: mask is {self.mask!r}; allowed: block, iid")
        for name in ("num_blocks", "head_layers", "head_hidden", "head_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"VimpacObjectiveConfig: {name} is {getattr(self, name)}; allowed: >= 1")
        if self.head_layers > MAX_LAYERS:
            raise ValueError(f"VimpacObjectiveConfig: head_layers is {self.head_layers}; allowed: <= {MAX_LAYERS}")
        if self.negatives not in ("step", "micro_batch"):
            raise ValueError(f"VimpacObjectiveConfig: negatives is {self.negatives!r}; allowed: step, micro_batch")
        if not 0 < self.iid_fraction <= 1:
            raise ValueError(f"VimpacObjectiveConfig: iid_fraction is {self.iid_fraction}; allowed: (0, 1]")
        if self.mlm_weight < 0 or self.alpha < 0 or self.mlm_weight == self.alpha == 0:
            raise ValueError(
                f"VimpacObjectiveConfig: mlm_weight is {self.mlm_weight}, alpha is {self.alpha}; allowed: >= 0 and one "
                "of them > 0 (for 'no pre-training', evaluate an untrained backbone)"
            )
        if self.temperature <= 0:
            raise ValueError(f"VimpacObjectiveConfig: temperature is {self.temperature}; allowed: > 0")

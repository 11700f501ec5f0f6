"""VIMPAC: masked token prediction and contrast between two clips, on the codes of a frame tokenizer.

Shapes: b videos; v clips of a video (views); n = b*v clips; t h w token grid; s = 1 + t*h*w positions, CLS first;
d width; m masked positions of all clips; c codes.

Source: Tan et al., "VIMPAC: Video Pre-Training via Masked Token Prediction and Contrastive Learning", arXiv 2106.11250.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.contrastive import ContrastiveHead, contrastive_loss
from models.distributed import mean_over_workers
from models.layers import LineAttention, Lines, Mlp, init_normal
from models.masking import block_masks, iid_masks

Layout = Literal["TxHxW", "T,HxW", "T,H,W", "T,H|W"]

_ATTENTIONS: dict[Layout, tuple[tuple[Lines, ...], ...]] = {
    "TxHxW": (("thw",),),
    "T,HxW": (("t",), ("hw",)),
    "T,H,W": (("t",), ("h",), ("w",)),
    "T,H|W": (("t",), ("h", "w")),
}
_NORM_EPS = 1e-12
_INIT_STD = 0.02
_NUM_SPECIAL = 5  # rows of the token table after the codes; PAD and MASK are two of them


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
        if not 1 <= self.codebook_size <= 2**16 - _NUM_SPECIAL:
            raise ValueError(
                f"VimpacConfig: codebook_size is {self.codebook_size}; allowed: [1, {2**16 - _NUM_SPECIAL}], as tokens "
                "are stored in 16 bits"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"VimpacConfig: dropout is {self.dropout}; allowed: [0, 1)")
        if self.layout not in _ATTENTIONS:
            raise ValueError(f"VimpacConfig: layout is {self.layout!r}; allowed: {', '.join(_ATTENTIONS)}")
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


class VimpacFeatures(NamedTuple):
    """cls: (n d). tokens: (n t h w d). layers: (cls, tokens) after each layer if asked for, else empty."""

    cls: Tensor
    tokens: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...] = ()


class _Sublayer(nn.Module):
    """A residual branch with its LayerNorm on the side the config names."""

    def __init__(self, branch: nn.Module, config: VimpacConfig) -> None:
        super().__init__()
        self.branch = branch
        self.norm = nn.LayerNorm(config.hidden, eps=_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.pre = config.norm == "pre"

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        if self.pre:
            return x + self.dropout(self.branch(self.norm(x), *args))
        return self.norm(x + self.dropout(self.branch(x, *args)))


class _Layer(nn.Module):
    """The layout's attentions, then the MLP: (n s d), PAD (n t h w) -> (n s d)."""

    def __init__(self, config: VimpacConfig) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            _Sublayer(LineAttention(config.hidden, config.heads, config.head_dim, lines, config.dropout), config)
            for lines in _ATTENTIONS[config.layout]
        )
        self.mlp = _Sublayer(Mlp(config.hidden, config.mlp), config)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        for attention in self.attentions:
            x = attention(x, pad)
        return self.mlp(x)


class VimpacBackbone(nn.Module):
    """Transformer over the codes of one clip with a CLS that sees every line.

    What PAD positions hold, and how many frames of PAD follow, does not change any other output.
    Source: sections 3.1 and 3.3; parameter counts of `SIZES` are exact.
    """

    def __init__(self, config: VimpacConfig) -> None:
        super().__init__()
        d = config.hidden
        self.config = config
        self.token = nn.Embedding(config.codebook_size + _NUM_SPECIAL, d)
        self.cls = nn.Parameter(torch.empty(1, d))
        self.position_cls = nn.Parameter(torch.empty(1, d))
        self.position_t = nn.Parameter(torch.empty(config.num_frames, d))
        self.position_h = nn.Parameter(torch.empty(config.grid_height, d))
        self.position_w = nn.Parameter(torch.empty(config.grid_width, d))
        self.norm = nn.LayerNorm(d, eps=_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        # Post-LN ends each layer with a norm already.
        self.final_norm = nn.LayerNorm(d, eps=_NORM_EPS) if config.norm == "pre" else nn.Identity()
        self.apply(init_normal)
        for parameter in (self.cls, self.position_cls):
            nn.init.normal_(parameter, std=_INIT_STD)
        for parameter in (self.position_t, self.position_h, self.position_w):
            nn.init.normal_(parameter, std=_INIT_STD / math.sqrt(3))  # the sum of three has the std of one table

    def forward(self, tokens: Tensor, *, intermediates: bool = False) -> VimpacFeatures:
        """Features of clips; finite even for a clip of PAD alone.

        Args:
            tokens: (n t h w) int64, in [0, codebook_size) or PAD or MASK, with (t, h, w) = config.shape.
            intermediates: also return what each layer put out, for probes.
        """
        config = self.config
        if tuple(tokens.shape[1:]) != config.shape:
            raise ValueError(
                f"VimpacBackbone: tokens are {tuple(tokens.shape)}; allowed: (n, {', '.join(map(str, config.shape))})"
            )
        pad = tokens == config.pad_id
        position = self.position_t[:, None, None] + self.position_h[:, None] + self.position_w
        x = rearrange(self.token(tokens) + position, "n t h w d -> n (t h w) d")
        cls = (self.cls + self.position_cls).expand(x.shape[0], 1, -1)
        x = self.dropout(self.norm(torch.cat([cls, x], dim=1)))
        outputs = []
        for layer in self.layers:
            x = layer(x, pad)
            if intermediates:
                outputs.append(self._split(x))
        return VimpacFeatures(*self._split(self.final_norm(x)), tuple(outputs))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, 0], x[:, 1:].unflatten(1, self.config.shape)


class MlmHead(nn.Module):
    """Scores of the codes at given positions: (m d), token table (rows d) -> logits (m c)."""

    def __init__(self, config: VimpacConfig) -> None:
        super().__init__()
        self.transform = nn.Sequential(
            nn.Linear(config.hidden, config.hidden), nn.GELU(), nn.LayerNorm(config.hidden, eps=_NORM_EPS)
        )
        self.bias = nn.Parameter(torch.zeros(config.codebook_size))
        self.apply(init_normal)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        # The decoder is the token table itself; its special rows are not predictions.
        return F.linear(self.transform(x), table[: len(self.bias)], self.bias)


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
        if not 0 < self.iid_fraction <= 1:
            raise ValueError(f"VimpacObjectiveConfig: iid_fraction is {self.iid_fraction}; allowed: (0, 1]")
        if self.mlm_weight < 0 or self.alpha < 0 or self.mlm_weight == self.alpha == 0:
            raise ValueError(
                f"VimpacObjectiveConfig: mlm_weight is {self.mlm_weight}, alpha is {self.alpha}; allowed: >= 0 and one "
                "of them > 0 (for 'no pre-training', evaluate an untrained backbone)"
            )
        if self.temperature <= 0:
            raise ValueError(f"VimpacObjectiveConfig: temperature is {self.temperature}; allowed: > 0")


class VimpacObjective(nn.Module):
    """Pre-training loss of VIMPAC over a batch of token clips.

    In eval mode no collective is started, so workers may evaluate different numbers of batches; the contrastive loss
    then compares within the worker.
    """

    def __init__(self, backbone: VimpacBackbone, config: VimpacObjectiveConfig) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        d = backbone.config.hidden
        self.mlm_head = MlmHead(backbone.config) if config.mlm_weight else None
        self.contrastive_head = (
            ContrastiveHead(d, config.head_layers, config.head_hidden, config.head_out).apply(init_normal)
            if config.alpha
            else None
        )

    def forward(self, batch: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Losses and metrics of one micro-batch.

        Args:
            batch: "tokens" (b v t h w) int64 with PAD where a video is too short; "seeds" (b v) int64, from which the
                masks are drawn. v is 2 where contrast is on, else any.
        Returns:
            "losses": scalars with their weights applied, so the total is their sum: "mlm", "contrastive".
            "metrics": detached scalars: masked_share (of positions that are not PAD), masked_token_accuracy,
            contrastive_accuracy. The mean of the workers' losses, and so the gradient that DDP makes, is that of the whole batch.
        """
        tokens, views = batch["tokens"], batch["tokens"].shape[1]
        if self.contrastive_head is not None and views != 2:
            raise ValueError(
                f"VimpacObjective: {views} clips a video with alpha {self.config.alpha}; allowed: 2, or alpha 0"
            )
        tokens = rearrange(tokens, "b v t h w -> (b v) t h w")
        mask = self.draw_masks(tokens, rearrange(batch["seeds"], "b v -> (b v)"))
        cls, hidden, _ = self.backbone(tokens.masked_fill(mask, self.backbone.config.mask_id))
        num_masked = mask.sum()
        num_tokens = (tokens != self.backbone.config.pad_id).sum()
        losses: dict[str, Tensor] = {}
        metrics = {"masked_share": num_masked / num_tokens.clamp(min=1)}
        if self.mlm_head is not None:
            # All-PAD clips or an unlucky draw can leave nothing to predict: the loss is then 0, with zero gradients.
            logits = self.mlm_head(hidden[mask], self.backbone.token.weight).float()
            targets = tokens[mask]
            # Over the mean count, so that the mean of the workers' losses is that over all masked positions: the same for
            # any number of workers.
            count = mean_over_workers(num_masked) if self.training else num_masked
            mlm = F.cross_entropy(logits, targets, reduction="sum") / count.clamp(min=1e-9)
            losses["mlm"] = self.config.mlm_weight * mlm
            metrics["masked_token_accuracy"] = (logits.argmax(-1) == targets).sum() / num_masked.clamp(min=1)
        if self.contrastive_head is not None:
            a, b = rearrange(self.contrastive_head(cls), "(b v) o -> v b o", v=2)
            contrast = contrastive_loss(a, b, self.config.temperature, gather=self.training)
            losses["contrastive"] = self.config.alpha * contrast.loss
            metrics["contrastive_accuracy"] = contrast.accuracy
        return {"losses": losses, "metrics": metrics}

    def draw_masks(self, tokens: Tensor, seeds: Tensor) -> Tensor:
        """Positions to hide, never PAD: tokens (n t h w) int64, seeds (n) int64 -> (n t h w) bool."""
        if self.config.mask == "block":
            mask = block_masks(seeds, self.backbone.config.shape, self.config.num_blocks)
        else:
            mask = iid_masks(seeds, self.backbone.config.shape, self.config.iid_fraction)
        return mask & (tokens != self.backbone.config.pad_id)

    @torch.no_grad()
    def predict(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """`tokens` with the masked positions replaced by the likeliest codes, for pictures.

        Runs in the mode the module is in: call `eval()` first for predictions without dropout.

        Args:
            tokens: (n t h w) int64. mask: (n t h w) bool.
        Returns:
            (n t h w) int64.
        Errors: ValueError if masked prediction is off.
        """
        if self.mlm_head is None:
            raise ValueError("predict: mlm_weight is 0, so there is no prediction head; allowed: mlm_weight > 0")
        hidden = self.backbone(tokens.masked_fill(mask, self.backbone.config.mask_id)).tokens
        out = tokens.clone()
        out[mask] = self.mlm_head(hidden[mask], self.backbone.token.weight).argmax(-1)
        return out

"""VIMPAC: masked token prediction and contrast between two clips, on the codes of a frame tokenizer.

Shapes: b videos; v clips of a video (views); n = b*v clips; t h w token grid; s = 1 + t*h*w positions, CLS first;
d width; m masked positions of all clips; c codes.

Source: Tan et al., "VIMPAC: Video Pre-Training via Masked Token Prediction and Contrastive Learning", arXiv 2106.11250.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.contrastive import Contrast, ContrastiveHead, contrastive_loss
from models.distributed import mean_over_workers, world_size
from models.flops import training_flops
from models.layers import LineAttention, Mlp, init_normal
from models.masking import block_masks, iid_masks
from models.objective import Fraction, Output
from models.vimpac_config import ATTENTIONS, NUM_SPECIAL, SIZES, Layout, VimpacConfig, VimpacObjectiveConfig

__all__ = [
    "SIZES",
    "Layout",
    "MlmHead",
    "VimpacBackbone",
    "VimpacConfig",
    "VimpacFeatures",
    "VimpacObjective",
    "VimpacObjectiveConfig",
]

_NORM_EPS = 1e-12
_INIT_STD = 0.02


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

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if self.pre:
            return x + self.dropout(self.branch(self.norm(x), *args))
        return self.norm(x + self.dropout(self.branch(x, *args)))


class _Layer(nn.Module):
    """The layout's attentions, then the MLP: (n s d), PAD (n t h w) or None -> (n s d)."""

    def __init__(self, config: VimpacConfig) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            _Sublayer(LineAttention(config.hidden, config.heads, config.head_dim, lines, config.dropout), config)
            for lines in ATTENTIONS[config.layout]
        )
        self.mlp = _Sublayer(Mlp(config.hidden, config.mlp), config)
        self.shape = config.shape

    def forward(self, x: Tensor, pad: Tensor | None) -> Tensor:
        for attention in self.attentions:
            x = attention(x, self.shape, pad)
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
        self.token = nn.Embedding(config.codebook_size + NUM_SPECIAL, d)
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

    def forward(self, tokens: Tensor, *, padded: bool | None = None, intermediates: bool = False) -> VimpacFeatures:
        """Features of clips; finite even for a clip of PAD alone.

        Args:
            tokens: (n t h w) int64, in [0, codebook_size) or PAD or MASK, with (t, h, w) = config.shape.
            padded: whether some token is PAD; attention without a mask is faster. None looks, which on a GPU waits for
                all work before.
            intermediates: also return what each layer put out, for probes.
        """
        config = self.config
        if tuple(tokens.shape[1:]) != config.shape:
            raise ValueError(
                f"VimpacBackbone: tokens are {tuple(tokens.shape)}; allowed: (n, {', '.join(map(str, config.shape))})"
            )
        is_pad = tokens == config.pad_id
        pad = is_pad if (bool(is_pad.any()) if padded is None else padded) else None
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

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's layers."""
        return list(self.backbone.layers)

    def split(self, batch: Mapping[str, Any], num_parts: int) -> list[dict[str, Any]]:
        """A batch as micro-batches of equal size, with the masks of its seeds; a batch of one part is split too.

        Args:
            batch: "tokens" (b v t h w) int64 with PAD where a video is too short; "seeds" (b v) int64. v is 2 where
                contrast is on, else any. On the host, or the reading of counts waits for the device.
        Returns:
            for each part: "tokens"; "masked" (m) int64, hidden positions of its flattened tokens; "num_tokens" that are
            not PAD; "mean_masked", hidden positions of this worker's parts on average.
        """
        tokens, views = batch["tokens"], batch["tokens"].shape[1]
        if self.contrastive_head is not None and views != 2:
            raise ValueError(
                f"VimpacObjective: {views} clips a video with alpha {self.config.alpha}; allowed: 2, or alpha 0"
            )
        clips = rearrange(tokens, "b v t h w -> (b v) t h w")
        masks = self.draw_masks(clips, rearrange(batch["seeds"], "b v -> (b v)")).view_as(tokens)
        mean_masked = int(masks.sum()) / num_parts
        return [
            {
                "tokens": part,
                "masked": mask.flatten().nonzero().flatten(),
                "num_tokens": int((part != self.backbone.config.pad_id).sum()),
                "mean_masked": mean_masked,
            }
            for part, mask in zip(tokens.chunk(num_parts), masks.chunk(num_parts), strict=True)
        ]

    def look_ahead(
        self, parts: Sequence[dict[str, Any]], run: Callable[[int, dict[str, Any]], Any]
    ) -> Sequence[dict[str, Any]]:
        """With `negatives` step, the CLS of all micro-batches, at the cost of one more forward pass of each.

        A micro-batch then has the contrastive loss of the whole step, in which its own CLS alone has gradients
        (GradCache, Gao et al., arXiv 2101.06983, in the form of one loss a part).
        """
        if len(parts) == 1 or self.contrastive_head is None or self.config.negatives == "micro_batch":
            return parts
        cls = torch.stack([run(place, {**part, "cls_only": True}) for place, part in enumerate(parts)])
        return [{**part, "step_cls": cls, "place": place} for place, part in enumerate(parts)]

    def forward(self, part: Mapping[str, Any]) -> Any:
        """Losses and metrics of one micro-batch of `split`, or of a whole batch.

        Returns:
            an `Output`; its losses are "mlm" and "contrastive". The mean of "mlm" over micro-batches and workers, and so
            the gradient that DDP makes, is that over all masked positions of the step, in training. Metrics: masked_share
            (of positions that are not PAD), masked_token_accuracy, the same in the first and in the last frame of clips,
            contrastive_accuracy. With "cls_only", the CLS (n d) instead.
        """
        if "masked" not in part:
            [part] = self.split(part, 1)
        config, tokens, masked = self.backbone.config, part["tokens"], part["masked"]
        padded = part["num_tokens"] < tokens.numel()
        hidden_tokens = tokens.flatten().index_fill(0, masked, config.mask_id).view(-1, *config.shape)
        cls, hidden, _ = self.backbone(hidden_tokens, padded=padded)
        if part.get("cls_only"):
            return cls
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor | Fraction] = {
            "masked_share": Fraction(_scalar(len(masked), cls), _scalar(part["num_tokens"], cls))
        }
        if self.mlm_head is not None:
            logits = self.mlm_head(hidden.flatten(0, 3).index_select(0, masked), self.backbone.token.weight).float()
            targets = tokens.flatten()[masked]
            # Over the mean count of all parts of all workers, so that the mean of their losses is the mean over all masked
            # positions. Nothing to predict, in clips of PAD alone, is a loss of 0 with zero gradients.
            count = _scalar(part["mean_masked"], cls)
            count = (mean_over_workers(count) if self.training else count).clamp(min=1e-9)
            mlm = F.cross_entropy(logits, targets, reduction="sum") / count
            losses["mlm"] = self.config.mlm_weight * mlm
            metrics |= self._accuracies(logits.detach().argmax(-1) == targets, masked)
        num_compared = 0
        if self.contrastive_head is not None:
            contrast, num_compared = self._contrast(cls, part)
            losses["contrastive"] = self.config.alpha * contrast.loss
            metrics["contrastive_accuracy"] = contrast.accuracy
        flops = training_flops(config, self.config, len(hidden_tokens), len(masked), num_compared)
        counts = {"clips": _scalar(len(hidden_tokens), cls), "flops": _scalar(flops, cls)}
        return Output(losses=losses, metrics=metrics, counts=counts)

    def _accuracies(self, hits: Tensor, masked: Tensor) -> dict[str, Tensor | Fraction]:
        t, h, w = self.backbone.config.shape
        frame = masked // (h * w) % t
        where = {"": frame >= 0, "_first_frame": frame == 0, "_last_frame": frame == t - 1}
        return {f"masked_token_accuracy{name}": Fraction((hits & at).sum(), at.sum()) for name, at in where.items()}

    def _contrast(self, cls: Tensor, part: Mapping[str, Any]) -> tuple[Contrast, int]:
        """The contrastive loss, and how many clips each clip is compared with."""
        assert self.contrastive_head is not None
        place = part.get("place", 0)
        if "step_cls" in part:
            all_cls = list(part["step_cls"].unbind())
            # The loop averages over micro-batches, and each CLS has gradients in one of them.
            all_cls[place] = all_cls[place] + len(all_cls) * (cls - cls.detach())
            cls = torch.cat(all_cls)
        # Statistics of the batch are the same in every micro-batch, so they are taken up once.
        projected = self.contrastive_head(cls, update_statistics=place == 0)
        a, b = rearrange(projected, "(b v) o -> v b o", v=2)
        num_compared = len(projected) * (world_size() if self.training else 1)
        return contrastive_loss(a, b, self.config.temperature, gather=self.training), num_compared

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


def _scalar(value: float, like: Tensor) -> Tensor:
    """`value` on the device of `like`, written there instead of copied, so that nobody waits."""
    return torch.full((), value, device=like.device, dtype=torch.float32)

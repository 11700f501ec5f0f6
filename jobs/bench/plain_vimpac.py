"""VIMPAC written down straightforwardly, as what `tokenreel bench train` compares with: the same function, no care for speed.

Layout T,H|W, post-LN. Three separate sets of attention (T, H, W) with a softmax written out, logits at every position,
masks by loops in Python, AdamW without a fused kernel, a metric read in every step.

Shapes: n clips; t h w token grid; s = 1 + t*h*w positions, CLS first; d width; l positions of a line; m heads; e head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from models.contrastive import contrastive_loss
from models.masking import uniforms
from models.vimpac import VimpacObjective

_LINES = {"t": "(n h w) {} d", "h": "(n t w) {} d", "w": "(n t h) {} d"}


class _LineSet(nn.Module):
    """Attention inside every line of one kind; CLS is part of each line, and its outputs are averaged."""

    def __init__(self, width: int, heads: int, head_dim: int, axis: str, dropout: float) -> None:
        super().__init__()
        self.heads, self.axis, self.dropout = heads, axis, dropout
        self.query, self.key, self.value = (nn.Linear(width, heads * head_dim) for _ in range(3))

    def forward(self, x: Tensor, shape: tuple[int, int, int]) -> Tensor:
        q, k, v = (self._lines(project(x), shape) for project in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        out = rearrange(F.dropout(weights, self.dropout, self.training) @ v, "n m l e -> n l (m e)")
        cls = rearrange(out[:, 0], "(n lines) d -> n lines d", n=len(x)).mean(1, keepdim=True)
        t, h, w = shape
        pattern = _LINES[self.axis].format(self.axis)
        return torch.cat([cls, rearrange(out[:, 1:], f"{pattern} -> n (t h w) d", t=t, h=h, w=w)], dim=1)

    def _lines(self, x: Tensor, shape: tuple[int, int, int]) -> Tensor:
        t, h, w = shape
        pattern = _LINES[self.axis].format(self.axis)
        lines = rearrange(x[:, 1:], f"n (t h w) d -> {pattern}", t=t, h=h, w=w)
        cls = repeat(x[:, 0], "n d -> (n lines) 1 d", lines=len(lines) // len(x))
        return rearrange(torch.cat([cls, lines], dim=1), "n l (m e) -> n m l e", m=self.heads)


class _PlainLayer(nn.Module):
    """The attention T, then H beside W, then the MLP, with the weights of one of our layers."""

    def __init__(self, layer: Any, width: int) -> None:
        super().__init__()
        self.dropout = layer.mlp.dropout
        self.sets = nn.ModuleList()
        for sublayer in layer.attentions:
            ours = sublayer.branch
            share = ours.heads // len(ours.lines)
            head_dim = ours.qkv.out_features // 3 // ours.heads
            stacked = ours.qkv.weight.view(3, len(ours.lines), share * head_dim, width)
            biases = ours.qkv.bias.view(3, len(ours.lines), share * head_dim)
            for place, axis in enumerate(ours.lines):
                one = _LineSet(width, share, head_dim, axis, ours.dropout)
                for kind, linear in enumerate((one.query, one.key, one.value)):
                    linear.weight.data.copy_(stacked[kind, place])
                    linear.bias.data.copy_(biases[kind, place])
                self.sets.append(one)
        self.outs = nn.ModuleList(sublayer.branch.out for sublayer in layer.attentions)
        self.norms = nn.ModuleList(sublayer.norm for sublayer in layer.attentions)
        self.mlp, self.mlp_norm = layer.mlp.branch, layer.mlp.norm

    def forward(self, x: Tensor, shape: tuple[int, int, int]) -> Tensor:
        x = self.norms[0](x + self.dropout(self.outs[0](self.sets[0](x, shape))))
        both = torch.cat([self.sets[1](x, shape), self.sets[2](x, shape)], dim=-1)
        x = self.norms[1](x + self.dropout(self.outs[1](both)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class PlainVimpac(nn.Module):
    """The same losses as `objective`, which gives its weights away to this. Clips must hold no PAD, layout is T,H|W."""

    def __init__(self, objective: VimpacObjective) -> None:
        super().__init__()
        config = objective.backbone.config
        assert config.layout == "T,H|W" and config.norm == "post"
        self.config, self.task = config, objective.config
        self.embedding = objective.backbone
        self.layers = nn.ModuleList(_PlainLayer(layer, config.hidden) for layer in objective.backbone.layers)
        self.embedding.layers = nn.ModuleList()  # what is left of it: tables and the first norm
        self.mlm_head, self.contrastive_head = objective.mlm_head, objective.contrastive_head

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of "tokens" (b 2 t h w) int64 and "seeds" (b 2) int64."""
        tokens = rearrange(batch["tokens"], "b v t h w -> (b v) t h w")
        mask = loop_masks(batch["seeds"].flatten().tolist(), self.config.shape, self.task.num_blocks).to(tokens.device)
        parts = self.embedding
        position = parts.position_t[:, None, None] + parts.position_h[:, None] + parts.position_w
        x = parts.token(torch.where(mask, self.config.mask_id, tokens)) + position
        cls = repeat(parts.cls + parts.position_cls, "1 d -> n 1 d", n=len(x))
        x = parts.dropout(parts.norm(torch.cat([cls, rearrange(x, "n t h w d -> n (t h w) d")], dim=1)))
        for layer in self.layers:
            x = layer(x, self.config.shape)
        assert self.mlm_head is not None and self.contrastive_head is not None
        logits = self.mlm_head(x[:, 1:], parts.token.weight)
        targets = tokens.masked_fill(~mask, -100)
        mlm = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        a, b = rearrange(self.contrastive_head(x[:, 0]), "(b v) o -> v b o", v=2)
        return mlm + contrastive_loss(a, b, self.task.temperature).loss


def loop_masks(seeds: list[int], shape: tuple[int, int, int], num_blocks: int) -> Tensor:
    """`models.masking.block_masks`, one box at a time: (n t h w) bool."""
    longest = (max(1, 2 * shape[0] // 3), max(1, shape[1] // 2), max(1, shape[2] // 2))
    masks = torch.zeros(len(seeds), *shape, dtype=torch.bool)
    for mask, seed in zip(masks, seeds, strict=True):
        draws = uniforms(torch.tensor([seed]), num_blocks * 6).view(num_blocks, 2, 3).tolist()
        for sizes, corners in draws:
            extents = [1 + int(draw * limit) for draw, limit in zip(sizes, longest, strict=True)]
            starts = [
                int(draw * (size - extent + 1)) for draw, size, extent in zip(corners, shape, extents, strict=True)
            ]
            t, h, w = (slice(start, start + extent) for start, extent in zip(starts, extents, strict=True))
            mask[t, h, w] = True
    return masks

"""The parts of a video transformer: attention along the lines of a token grid with a shared CLS, and the MLP.

Shapes: n clips; t h w token grid; s = 1 + t*h*w positions, CLS first; d width; m heads; e head width; l line length.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Lines = Literal["t", "h", "w", "hw", "thw"]
_MAX_SHORT_LINE = 33  # positions, CLS with them: 32 tokens a side at 256 px

# For each kind of line: the axes that tell lines apart, and the axes that run along one.
_AXES: dict[Lines, tuple[str, str]] = {
    "t": ("h w", "t"),
    "h": ("t w", "h"),
    "w": ("t h", "w"),
    "hw": ("t", "h w"),
    "thw": ("", "t h w"),
}


def line_shape(lines: Lines, shape: tuple[int, int, int]) -> tuple[int, int]:
    """How many lines a grid of (t, h, w) has, and how many tokens each; CLS comes on top."""
    sizes = dict(zip("thw", shape, strict=True))
    length = math.prod(sizes[axis] for axis in _AXES[lines][1].split())
    return math.prod(shape) // length, length


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention: (n m l e) each, allowed keys as bool (n 1 1 l) or None -> (n m l e).

    On a CPU torch has one fused kernel, for long lines without dropout; short ones are faster written out in bf16
    (two to three times) and with dropout (docs/benchmarks.md).
    """
    is_short = q.shape[2] <= _MAX_SHORT_LINE and (dropout > 0 or q.dtype != torch.float32)
    if q.device.type == "cpu" and is_short:
        scores = q @ k.transpose(-1, -2) * q.shape[3] ** -0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        return F.dropout(scores.softmax(-1), dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)


def attend_lines(
    qkv: Tensor, pad: Tensor | None, lines: Lines, shape: tuple[int, int, int], dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention inside every line of the grid; CLS takes part in each line, and its outputs are averaged over them.

    A line of PAD alone leaves CLS only itself to look at, which says nothing of the clip; such lines do not count in
    the average, so a clip's result does not depend on how far it was padded. Without PAD this is the plain mean.

    Args:
        qkv: (3 n m s e) queries, keys, values.
        pad: (n t h w) bool; True is never attended to. None: no PAD, which needs no mask and so has faster kernels.
        lines: the axes a line runs along.
        shape: (t, h, w).
        dropout: probability that an attention weight is dropped.
    Returns:
        CLS (n m e) and tokens (n t h w m e). Finite for any `pad`, because CLS is a key of every line.
    """
    t, h, w = shape
    across, along = _AXES[lines]
    num_lines, _ = line_shape(lines, shape)
    # Split and not slices: the gradient is then one concatenation, not two zero-filled copies and their sum. Lines are
    # merged after CLS is joined to them, so that moving the axes and joining are one copy.
    cls, tokens = qkv.split([1, t * h * w], dim=3)
    tokens = rearrange(tokens, f"c n m (t h w) e -> c n {across} m ({along}) e", t=t, h=h, w=w)
    cls = cls.view(*cls.shape[:2], *[1] * len(across.split()), *cls.shape[2:])
    joined = torch.cat([cls.expand(*tokens.shape[:-2], 1, -1), tokens], dim=-2)
    q, k, v = joined.flatten(1, -4).unbind()
    allowed = None
    if pad is not None:
        allowed = F.pad(~rearrange(pad, f"n t h w -> (n {across}) 1 1 ({along})"), (1, 0), value=True)
    out = attend(q, k, v, allowed, dropout)
    cls, tokens = out.split([1, out.shape[2] - 1], dim=2)
    if allowed is None:
        weights = cls.new_full((len(qkv[0]), 1, num_lines), 1 / num_lines)
    else:
        counts = rearrange(allowed[..., 1:].any(-1), "(n lines) 1 1 -> n 1 lines", lines=num_lines).to(out.dtype)
        weights = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    cls = weights @ rearrange(cls, "(n lines) m 1 e -> n lines (m e)", lines=num_lines)
    tokens = rearrange(tokens, f"(n {across}) m ({along}) e -> n t h w m e", t=t, h=h, w=w)
    return rearrange(cls, "n 1 (m e) -> n m e", m=q.shape[1]), tokens


class LineAttention(nn.Module):
    """Multi-head attention whose heads are split evenly over one or more kinds of lines, then projected together.

    `("h", "w")` is the parallel H|W of VIMPAC: half of the heads see columns, half see rows, each with half the width.

    Args:
        width: d.
        heads, head_dim: m and e; m*e may differ from d ("half" models).
        lines: kinds of lines; must divide `heads`.
        dropout: probability on attention weights.
    Source: VIMPAC (arXiv 2106.11250), section 3.3.
    """

    def __init__(self, width: int, heads: int, head_dim: int, lines: tuple[Lines, ...], dropout: float) -> None:
        super().__init__()
        if heads % len(lines):
            raise ValueError(f"LineAttention: heads is {heads}; allowed: a multiple of {len(lines)} for lines {lines}")
        self.heads, self.lines, self.dropout = heads, lines, dropout
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor, shape: tuple[int, int, int], pad: Tensor | None) -> Tensor:
        """(n s d) of a grid of shape (t, h, w), and PAD as (n t h w) bool or None -> (n s d)."""
        dropout = self.dropout if self.training else 0.0
        qkv = rearrange(self.qkv(x), "n s (c m e) -> c n m s e", c=3, m=self.heads)
        parts = qkv.chunk(len(self.lines), dim=2)
        mixed = [attend_lines(part, pad, lines, shape, dropout) for part, lines in zip(parts, self.lines, strict=True)]
        cls = torch.cat([cls for cls, _ in mixed], dim=-2).flatten(1)
        tokens = rearrange(torch.cat([tokens for _, tokens in mixed], dim=-2), "n t h w m e -> n (t h w) (m e)")
        return self.out(torch.cat([cls[:, None], tokens], dim=1))


class Mlp(nn.Sequential):
    """Linear, exact GELU, Linear: (... d) -> (... d)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def init_normal(module: nn.Module) -> None:
    """Set one module's own weights as BERT does: N(0, 0.02) for matrices, 0 for biases, 1 for norm weights."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)

"""Attention along lines against a loop over lines."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from models.layers import LineAttention, Lines, attend, attend_lines

SHAPE = (3, 2, 4)
AXES = {"t": (0,), "h": (1,), "w": (2,), "hw": (1, 2), "thw": (0, 1, 2)}


def naive(qkv: torch.Tensor, pad: torch.Tensor, lines: Lines) -> tuple[torch.Tensor, torch.Tensor]:
    """One line, one head, one clip at a time; CLS averaged over the lines that hold a token."""
    _, n, m, _, e = qkv.shape
    cls_qkv, grid = qkv[:, :, :, 0], qkv[:, :, :, 1:].reshape(3, n, m, *SHAPE, e)
    cls_out, out = torch.zeros(n, m, e), torch.zeros(n, *SHAPE, m, e)
    across = [axis for axis in range(3) if axis not in AXES[lines]]
    for clip, head in itertools.product(range(n), range(m)):
        votes = []
        for fixed in itertools.product(*(range(SHAPE[axis]) for axis in across)):
            cells = [
                cell
                for cell in itertools.product(*map(range, SHAPE))
                if all(cell[axis] == at for axis, at in zip(across, fixed, strict=True))
            ]
            q, k, v = (
                torch.stack([cls_qkv[i, clip, head], *(grid[i, clip, head][cell] for cell in cells)]) for i in range(3)
            )
            hidden = torch.tensor([False, *(bool(pad[clip][cell]) for cell in cells)])
            weights = (q @ k.T / e**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
            result = weights @ v
            for cell, row in zip(cells, result[1:], strict=True):
                out[(clip, *cell)][head] = row
            if not hidden[1:].all():
                votes.append(result[0])
        if votes:
            cls_out[clip, head] = torch.stack(votes).mean(0)
    return cls_out, out


@pytest.mark.parametrize("lines", AXES)
@pytest.mark.parametrize("padded", [False, True])
def test_lines_against_a_loop(lines: Lines, padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 3, 2, 1 + 24, 5, generator=generator)
    pad = torch.zeros(3, *SHAPE, dtype=torch.bool)
    if padded:
        pad[0, 2:] = True
        pad[1] = torch.rand(SHAPE, generator=generator) < 0.5
        pad[2] = True
    cls, tokens = attend_lines(qkv, pad, lines, SHAPE, 0.0)
    expected_cls, expected_tokens = naive(qkv, pad, lines)
    torch.testing.assert_close(cls, expected_cls)
    torch.testing.assert_close(tokens, expected_tokens)


def test_parallel_lines_are_two_half_attentions() -> None:
    torch.manual_seed(0)
    attention = LineAttention(12, 4, 3, ("h", "w"), 0.0)
    x, pad = torch.randn(2, 25, 12), torch.zeros(2, *SHAPE, dtype=torch.bool)
    qkv = attention.qkv(x).view(2, 25, 3, 4, 3).permute(2, 0, 3, 1, 4)
    halves = [naive(qkv[:, :, :2], pad, "h"), naive(qkv[:, :, 2:], pad, "w")]
    cls = torch.cat([cls for cls, _ in halves], -2).flatten(1)
    tokens = torch.cat([tokens for _, tokens in halves], -2).reshape(2, 24, 12)
    expected = attention.out(torch.cat([cls[:, None], tokens], 1))
    torch.testing.assert_close(attention(x, SHAPE, pad), expected)
    torch.testing.assert_close(attention(x, SHAPE, None), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_short_lines_written_out_are_the_attention_of_torch(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 5, 2, 17, 8, generator=generator).bfloat16()
    allowed = torch.rand(5, 1, 1, 17, generator=generator) < 0.5 if masked else None
    if allowed is not None:
        allowed[..., 0] = True
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=allowed)
    torch.testing.assert_close(attend(q, k, v, allowed, 0.0).float(), expected, rtol=0.02, atol=0.02)
    q, k, v = q.float(), k.float(), v.float()
    torch.testing.assert_close(attend(q, k, v, allowed, 1e-12), expected)
    # Dropout keeps the mean: over many draws it is what it is without.
    torch.manual_seed(0)
    draws = torch.stack([attend(q, k, v, allowed, 0.3) for _ in range(2000)])
    torch.testing.assert_close(draws.mean(0), expected, rtol=0, atol=0.06)
    assert draws.std(0).mean() > 0.1


def test_heads_must_split() -> None:
    with pytest.raises(ValueError, match="heads is 3; allowed: a multiple of 2"):
        LineAttention(12, 3, 4, ("h", "w"), 0.0)

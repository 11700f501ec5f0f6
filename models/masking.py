"""Which positions of a token clip are hidden: block masks and i.i.d. masks, drawn from one seed per clip alone.

Shapes: n clips; t h w tokens of one clip; k blocks of one mask.

A mask is a pure function of (seed, shape, settings). No generator state exists, so a mask is the same on any device, in
any batch, on any worker and after any resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_DRAWS_PER_BLOCK = 6  # three sizes, three corners


def _signed(value: int) -> int:
    """The int64 with the bits of the uint64 `value`."""
    return value - (1 << 64) if value >> 63 else value


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift: `>>` on int64 copies the sign bit, so the copies are cleared."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix(values: Tensor) -> Tensor:
    """The splitmix64 finaliser on the bits of int64 `values`; products wrap modulo 2**64."""
    values = (values ^ _shift_right(values, 30)) * _signed(_MIX_1)
    values = (values ^ _shift_right(values, 27)) * _signed(_MIX_2)
    return values ^ _shift_right(values, 31)


def uniforms(seeds: Tensor, count: int) -> Tensor:
    """The first `count` draws of each seed's own stream, in [0, 1): bit-identical on every device.

    Args:
        seeds: (n,) int64; any values, neighbours are as good as random ones.
        count: draws per seed, >= 0.
    Returns:
        (n, count) float64 with 53 random bits each.
    Source: splitmix64 (Steele, Lea, Flood 2014), read as a counter: draw i is mix(mix(seed) + (i + 1) * golden).
    """
    if seeds.ndim != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"uniforms: seeds are {seeds.dtype} of shape {tuple(seeds.shape)}; allowed: int64 (n,)")
    counters = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64) * _signed(_GOLDEN)
    bits = _mix(_mix(seeds)[:, None] + counters)
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def _check_shape(shape: tuple[int, int, int]) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"mask: shape is {shape}; allowed: three sizes (t, h, w), each >= 1")


def block_masks(seeds: Tensor, shape: tuple[int, int, int], num_blocks: int) -> Tensor:
    """Union of `num_blocks` random boxes per clip; True means hidden. A clip's mask depends on its own seed alone.

    A box has dt ~ U{1..floor(2t/3)}, dh ~ U{1..floor(h/2)}, dw ~ U{1..floor(w/2)} (at least 1 on a clip too small
    for that) and a corner uniform over the positions where it fits. The paper's text rounds up for t; only floor
    gives the masked shares of its table.

    Args:
        seeds: (n,) int64.
        shape: (t, h, w) tokens of a clip.
        num_blocks: boxes per clip, >= 1; they may overlap.
    Returns:
        (n, t, h, w) bool.
    Source: VIMPAC (arXiv 2106.11250), section 3.2 and the table of masked shares in its appendix.
    """
    _check_shape(shape)
    if num_blocks < 1:
        raise ValueError(f"block_masks: num_blocks is {num_blocks}; allowed: >= 1")
    draws = uniforms(seeds, num_blocks * _DRAWS_PER_BLOCK).view(len(seeds), num_blocks, 2, 3)
    size = torch.tensor(shape, device=seeds.device)
    longest = torch.tensor([max(1, 2 * shape[0] // 3), max(1, shape[1] // 2), max(1, shape[2] // 2)]).to(seeds.device)
    extent = 1 + (draws[:, :, 0] * longest).long()  # (n k 3)
    start = (draws[:, :, 1] * (size - extent + 1)).long()
    end = start + extent
    along = [torch.arange(length, device=seeds.device) for length in shape]
    inside = [(i >= start[:, :, axis, None]) & (i < end[:, :, axis, None]) for axis, i in enumerate(along)]
    mask = torch.zeros(len(seeds), *shape, dtype=torch.bool, device=seeds.device)
    for k in range(num_blocks):  # one box at a time: k times less memory than all boxes at once
        in_t, in_h, in_w = (axis[:, k] for axis in inside)
        mask |= in_t[:, :, None, None] & in_h[:, None, :, None] & in_w[:, None, None, :]
    return mask


def iid_masks(seeds: Tensor, shape: tuple[int, int, int], fraction: float) -> Tensor:
    """Each position hidden on its own with probability `fraction`; True means hidden. The ablation of block masks.

    Args:
        seeds: (n,) int64.
        shape: (t, h, w) tokens of a clip.
        fraction: expected hidden share, [0, 1].
    Returns:
        (n, t, h, w) bool.
    """
    _check_shape(shape)
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"iid_masks: fraction is {fraction}; allowed: [0, 1]")
    t, h, w = shape
    return (uniforms(seeds, t * h * w) < fraction).view(len(seeds), t, h, w)

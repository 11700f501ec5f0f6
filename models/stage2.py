"""Weights and Adam moments on another grid, with positions resized: for a second stage of pre-training, and for fine-tuning.

Shapes: h w token grid; d width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.optim import MOMENTS, param_groups


def resize_positions(
    state: Mapping[str, Tensor], grid: tuple[int, int], *, num_frames: int | None = None
) -> dict[str, Tensor]:
    """`state` with each `position_h` and `position_w` interpolated linearly to `grid`; all else is the same tensor.

    An embedding stands at the centre of its token: of n along an axis, number i is at (i + 1/2) / n of the picture.
    What lies beyond the outermost old centre takes that end's value, so ends are kept when a grid grows. A size that
    does not change keeps its values exactly. Interpolation is a weighted mean with weights >= 0, so a second moment
    stays >= 0.

    Args:
        state: name -> weights, or name -> one kind of moments. Positions are (h d) and (w d).
        grid: (h, w) of the new grid, each >= 1.
        num_frames: also interpolate each `position_t` to this many frames, by the same convention; None leaves it.
    Source: VIMPAC (arXiv 2106.11250): stage two interpolates positions and optimiser state; the convention is ours.
    """
    if min(*grid, 1 if num_frames is None else num_frames) < 1:
        raise ValueError(
            f"resize_positions: grid is {grid}, num_frames is {num_frames}; allowed: sizes (h, w) and frames, each >= 1"
        )
    sizes = {"position_h": grid[0], "position_w": grid[1]} | ({} if num_frames is None else {"position_t": num_frames})
    resized = dict(state)
    for name, value in state.items():
        size = sizes.get(name.rpartition(".")[2], 0)
        if size and size != len(value):
            resized[name] = _interpolate(value, size)
    return resized


def _interpolate(positions: Tensor, size: int) -> Tensor:
    """(n d) -> (size d)."""
    row = rearrange(positions.float(), "n d -> 1 d n")
    resized = F.interpolate(row, size, mode="linear", align_corners=False)
    return rearrange(resized, "1 d n -> n d").to(positions.dtype).contiguous()


def resize_moments(state: Mapping[str, Tensor], module: nn.Module, grid: tuple[int, int]) -> dict[str, Tensor]:
    """An AdamW state by parameter number (`3.exp_avg`), with the moments of positions resized as the positions are.

    Args:
        state: as a checkpoint holds it; numbers count the parameters of `param_groups(module)`.
        module: has the names and order of parameters; its sizes and values play no part, so it may be on `meta`.
        grid: (h, w) of the new grid.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    ordered = [names[id(parameter)] for group in param_groups(module, 0.0) for parameter in group["params"]]
    resized = dict(state)
    for kind in MOMENTS:
        keys = {name: f"{number}.{kind}" for number, name in enumerate(ordered) if f"{number}.{kind}" in state}
        for name, value in resize_positions({name: state[key] for name, key in keys.items()}, grid).items():
            resized[keys[name]] = value
    return resized

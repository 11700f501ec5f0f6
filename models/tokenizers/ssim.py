"""SSIM: how alike two pictures are in structure, beside PSNR the usual figure for reconstructions.

Shapes: b pictures; H W pixels; c colours.

Source: Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity",
IEEE Transactions on Image Processing 13(4), 2004: eq. 13 with the windows and constants of section III.C.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW_PX = 11
_SIGMA_PX = 1.5
_C1 = (0.01 * 255) ** 2
_C2 = (0.03 * 255) ** 2
_LUMA = (0.299, 0.587, 0.114)  # of R, G, B: ITU-R BT.601


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Mean SSIM of each pair of pictures, on their luma: (b) float64, 1 where they are equal, at least -1.

    Local means, variances and covariances are weighted by an 11 x 11 Gaussian of 1.5 px, at every place where that
    window lies within the picture: there is no padding, and no reduction of large pictures beforehand.

    Args:
        first, second: (b H W c) uint8, RGB, sides of at least 11 px.
    Errors: ValueError naming the shapes or dtypes that do not fit.
    """
    if first.shape != second.shape or first.ndim != 4 or first.shape[-1] != 3 or min(first.shape[1:3]) < WINDOW_PX:
        raise ValueError(
            f"ssim: pictures are of shapes {tuple(first.shape)} and {tuple(second.shape)}; allowed: two times the same "
            f"(b, H, W, 3), H and W at least {WINDOW_PX}"
        )
    if first.dtype != torch.uint8 or second.dtype != torch.uint8:
        raise ValueError(f"ssim: pictures are {first.dtype} and {second.dtype}; allowed: uint8")
    x, y = _luma(first), _luma(second)
    local = _smooth(torch.cat([x, y, x * x, y * y, x * y], dim=1))
    mean_x, mean_y, square_x, square_y, product = local.unbind(1)
    variances = square_x - mean_x**2 + square_y - mean_y**2
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return (luminance * (2 * covariance + _C2) / (variances + _C2)).mean((1, 2))


def _luma(pictures: Tensor) -> Tensor:
    """(b H W c) uint8 -> (b 1 H W) float64, [0, 255]."""
    return (pictures.double() @ torch.tensor(_LUMA, dtype=torch.float64, device=pictures.device))[:, None]


def _smooth(maps: Tensor) -> Tensor:
    """Gaussian means of the maps (b n H W), each on its own, where the window fits: (b n H-10 W-10)."""
    offsets = torch.arange(WINDOW_PX, dtype=maps.dtype, device=maps.device) - WINDOW_PX // 2
    weights = torch.exp(-0.5 * (offsets / _SIGMA_PX) ** 2)
    weights /= weights.sum()
    alone = maps.flatten(0, 1)[:, None]
    alone = F.conv2d(F.conv2d(alone, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return alone.view(*maps.shape[:2], *alone.shape[2:])

"""SSIM against the definition, window by window, and against SciPy's filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import correlate, zoom
from torch import Tensor

from models.tokenizers.ssim import ssim


def make_pair(kind: str) -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(0)
    coarse = random.uniform(0, 255, (2, 5, 6, 3))
    first = np.clip(zoom(coarse, (1, 6, 6, 1), order=1), 0, 255)
    second = {
        "noise": first + random.normal(0, 20, first.shape),
        "darker": first * 0.7,
        "inverted": 255 - first,
        "flat": np.full_like(first, 128.0),
    }[kind]
    return tuple(torch.from_numpy(np.clip(x, 0, 255).round().astype(np.uint8)) for x in (first, second))  # type: ignore[return-value]


def luma(pictures: Tensor) -> NDArray[np.float64]:
    red, green, blue = np.moveaxis(pictures.numpy().astype(np.float64), -1, 0)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def gaussian_window() -> NDArray[np.float64]:
    across, down = np.meshgrid(np.arange(-5, 6), np.arange(-5, 6))
    window = np.exp(-(across**2 + down**2) / (2 * 1.5**2))
    return window / window.sum()


def by_windows(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The definition: each window's weighted means, deviations from them, and the formula of the paper."""
    weights, values = gaussian_window(), []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 6.5025, 58.5225
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return float(np.mean(values))


def by_scipy(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return correlate(values, gaussian_window())[5:-5, 5:-5]

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y, cov = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2, smooth(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + 6.5025) * (2 * cov + 58.5225)
    return float((top / ((mean_x**2 + mean_y**2 + 6.5025) * (var_x + var_y + 58.5225))).mean())


@pytest.mark.parametrize("kind", ["noise", "darker", "inverted", "flat"])
def test_equals_the_definition(kind: str) -> None:
    first, second = make_pair(kind)
    found = ssim(first, second)
    assert found.dtype == torch.float64 and found.shape == (2,)
    for value, x, y in zip(found.tolist(), luma(first), luma(second), strict=True):
        assert value == pytest.approx(by_windows(x, y), abs=1e-9)
        assert value == pytest.approx(by_scipy(x, y), abs=1e-9)
    torch.testing.assert_close(ssim(second, first), found)
    assert (found < 0.95).all()


def test_flat_pictures_by_hand() -> None:
    """Nothing varies, so only the means and the first constant count."""
    black, white = torch.zeros(1, 11, 11, 3, dtype=torch.uint8), torch.full((1, 11, 11, 3), 255, dtype=torch.uint8)
    assert ssim(black, black).item() == ssim(white, white).item() == 1.0
    assert ssim(black, white).item() == pytest.approx(6.5025 / (255**2 + 6.5025))


def test_wrong_pictures_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 10, 11, 3\).*at least 11"):
        ssim(*[torch.zeros(1, 10, 11, 3, dtype=torch.uint8)] * 2)
    with pytest.raises(ValueError, match="allowed: two times the same"):
        ssim(torch.zeros(1, 11, 11, 3, dtype=torch.uint8), torch.zeros(2, 11, 11, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"float32 and torch\.float32; allowed: uint8"):
        ssim(*[torch.zeros(1, 11, 11, 3)] * 2)

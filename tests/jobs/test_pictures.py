from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.pictures import overlay_mask, save_png_grid

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)


def test_overlay_mask_touches_masked_patches_only() -> None:
    mask = np.zeros((5, 2, 3), bool)
    mask[1, 0, 2] = True
    shown = overlay_mask(FRAMES, mask)
    changed = (shown != FRAMES).any(axis=-1)
    assert changed[1, :8, 16:].mean() > 0.9
    changed[1, :8, 16:] = False
    assert not changed.any()
    assert shown[1, :8, 16:].mean() < 100 < FRAMES[1, :8, 16:].mean()


def test_overlay_mask_repeats_over_tubelets() -> None:
    frames = np.repeat(FRAMES[:1], 4, axis=0)
    shown = overlay_mask(frames, np.array([[[True]], [[False]]]))
    assert (shown[2:] == frames[2:]).all() and (shown[:2] != frames[:2]).any()
    with pytest.raises(ValueError, match="must divide 5"):
        overlay_mask(FRAMES, np.ones((2, 1, 1), bool))


def test_png_grid(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "reconstructions_00000100.png"
    save_png_grid(path, [[FRAMES, FRAMES], [FRAMES[:3, :8], FRAMES]], ["original", "reconstruction"])
    assert Image.open(path).width > 5 * 24 * 5
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="labels"):
        save_png_grid(path, [[FRAMES]], ["a", "b"])
    with pytest.raises(ValueError, match="uint8"):
        save_png_grid(path, [[FRAMES.astype(float)]], ["a"])

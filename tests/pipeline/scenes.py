"""Made scenes, cut into codes by a made tokenizer: copies whose every difference a test knows, in milliseconds."""

from __future__ import annotations

import numpy as np

CODEBOOK_SIZE = 128
FPS = 4.0
_SIDE_PX = 64
_BLOBS = 14


def make_codes(
    scene: int,
    *,
    start_s: float = 0.0,
    num_frames: int = 32,
    crop: float = 0.0,
    brighter: float = 0.0,
    noise: float = 0.0,
    movers: int = _BLOBS,
) -> np.ndarray:
    """uint16 (t 16 16): blobs that wander in their own way over a picture of 64 px, as codes of 4 x 4 px.

    Args:
        scene: which blobs, on which ways.
        start_s: where in the scene the sample begins.
        crop: share that is missing at each side.
        noise: standard deviation of what is added to each pixel, of 1; drawn anew for each frame.
        movers: how many of the blobs move.
    """
    rng = np.random.default_rng(scene)
    centre, swing = rng.random((_BLOBS, 2)), 0.25 * rng.random((_BLOBS, 2))
    pace, phase = 0.3 + 1.2 * rng.random((_BLOBS, 2)), 2 * np.pi * rng.random((_BLOBS, 2))
    width, height = 0.06 + 0.1 * rng.random(_BLOBS), 0.4 + 0.6 * rng.random(_BLOBS)
    swing[movers:] = 0
    time_s = start_s + np.arange(num_frames)[:, None, None] / FPS
    place = centre + swing * (np.sin(pace * time_s + phase) + np.sin(1.7 * pace * time_s))
    axis = crop + (1 - 2 * crop) * (np.arange(_SIDE_PX) + 0.5) / _SIDE_PX
    rows = np.exp(-((axis[None, None] - place[:, :, :1]) ** 2) / (2 * width[None, :, None] ** 2))
    columns = np.exp(-((axis[None, None] - place[:, :, 1:]) ** 2) / (2 * width[None, :, None] ** 2))
    picture = np.einsum("tnh,tnw,n->thw", rows, columns, height) / 1.5 + brighter
    picture = picture + noise * np.random.default_rng(round(1000 * start_s) + scene).standard_normal(picture.shape)
    return _encode(picture)


def _encode(picture: np.ndarray) -> np.ndarray:
    """16 levels of brightness times 8 directions of the slope, of each 4 x 4 px."""
    patches = picture.reshape(len(picture), 16, 4, 16, 4)
    level = np.clip(patches.mean((2, 4)) * 16, 0, 15).astype(int)
    down = patches[:, :, 2:].mean((2, 4)) - patches[:, :, :2].mean((2, 4))
    right = patches[..., 2:].mean((2, 4)) - patches[..., :2].mean((2, 4))
    direction = np.floor(np.arctan2(down, right) / np.pi * 4).astype(int) % 8
    return (level * 8 + direction).astype(np.uint16)

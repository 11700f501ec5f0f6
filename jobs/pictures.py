"""Frames as pictures: masks drawn over them, strips side by side, and PNG files for MLflow.

Axes: t frames, h height, w width, c channels (RGB or 1 grey); gh gw a mask's grid, which covers the whole frame.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.files import write_atomic


def overlay_mask(frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of `frames` whose masked patches are dark, almost grey and hatched; the others are untouched.

    Args:
        frames: uint8 (t h w c).
        mask: bool (t gh gw), True where hidden; its t may also divide the frames' t (one mask a tubelet).

    Raises:
        ValueError: shapes that do not fit.
    """
    check_frames(frames)
    t, h, w, _ = frames.shape
    if mask.ndim != 3 or mask.shape[0] == 0 or t % mask.shape[0] or mask.shape[1] > h or mask.shape[2] > w:
        raise ValueError(f"mask (t gh gw) is {mask.shape}; for frames {frames.shape} its t must divide {t}")
    gh, gw = mask.shape[1:]
    rows, columns = np.arange(h) * gh // h, np.arange(w) * gw // w
    hidden = np.repeat(mask.astype(bool), t // mask.shape[0], axis=0)[:, rows][:, :, columns]
    period = max(4, min(h // gh, w // gw) // 2)
    y, x = np.mgrid[:h, :w]
    hatch = (x + y) % period < max(1, period // 4)
    grey = frames.mean(axis=-1, keepdims=True) * 0.22 + 22
    dim = np.where(hatch[None, :, :, None], 118.0, grey * 0.8 + frames * 0.08)
    return np.where(hidden[..., None], dim, frames).astype(np.uint8)


def save_png_grid(path: Path, rows_of_strips: Sequence[Sequence[np.ndarray]], labels: Sequence[str]) -> None:
    """Save a labelled PNG, by rename: a row a clip, in it a line of frames for each strip.

    Args:
        path: `out/pictures/NAME_STEP.png` for MLflow; its folder is made.
        rows_of_strips: for each clip its strips, uint8 (t h w c); sizes may differ.
        labels: one name for each strip of a row, such as original, masked, predicted.

    Raises:
        ValueError: frames are not uint8 (t h w c), or a row has another number of strips than there are labels.
        OSError: the file cannot be written.
    """
    if not rows_of_strips or any(len(row) != len(labels) for row in rows_of_strips):
        raise ValueError(
            f"rows have {[len(row) for row in rows_of_strips]} strips, {len(labels)} labels: {list(labels)}"
        )
    font = ImageFont.load_default(13)
    margin, gap, row_gap = 14, 3, 16
    left = margin + int(max((font.getlength(label) for label in labels), default=0)) + 12
    lines = [[stack_frames(strip, _zoom(strip), gap) for strip in row] for row in rows_of_strips]
    width = left + max(image.width for row in lines for image in row) + margin
    height = 2 * margin - row_gap + sum(sum(image.height + gap for image in row) - gap + row_gap for row in lines)
    canvas = Image.new("RGB", (width, height), "#16181d")
    draw, y = ImageDraw.Draw(canvas), margin
    for row in lines:
        for label, image in zip(labels, row, strict=True):
            draw.text((left - 12, y + image.height // 2), label, "#c9ced6", font=font, anchor="rm")
            canvas.paste(image, (left, y), image)
            y += image.height + gap
        y += row_gap - gap
    save_picture(path, np.asarray(canvas))


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Save uint8 (h w 3) as a PNG, whole or not at all; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def check_frames(frames: np.ndarray) -> None:
    """Raise `ValueError` unless `frames` is uint8 (t h w c) with c 1 or 3."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in (1, 3) or 0 in frames.shape:
        raise ValueError(
            f"frames must be uint8 (t h w c) with c 1 or 3 and no empty axis, not {frames.dtype} {frames.shape}"
        )


def stack_frames(frames: np.ndarray, zoom: int, gap: int) -> Image.Image:
    """Frames side by side with transparent gaps, enlarged by whole pixels."""
    t, h, w, _ = frames.shape
    pixels = np.zeros((h * zoom, t * (w * zoom + gap) - gap, 4), np.uint8)
    for index, frame in enumerate(np.broadcast_to(frames, (t, h, w, 3))):
        x = index * (w * zoom + gap)
        pixels[:, x : x + w * zoom, :3] = frame.repeat(zoom, 0).repeat(zoom, 1)
        pixels[:, x : x + w * zoom, 3] = 255
    return Image.fromarray(pixels, "RGBA")


def _zoom(frames: np.ndarray) -> int:
    """A whole factor that brings small frames to about 128 pixels."""
    check_frames(frames)
    return max(1, 128 // max(frames.shape[1:3]))

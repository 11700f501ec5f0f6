"""A pre-trained backbone as the embed stage and evaluation use it: windows of tokens in, one vector each out.

Shapes: n windows; t h w token grid; d width of the backbone.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.model_folder import load_model
from models.vimpac import VimpacBackbone
from pipeline.embedding import EmbedSettings
from pipeline.errors import ConfigError
from pipeline.schema import fingerprint

_WIDTHS = {"cls": 1, "mean": 1, "cls-mean-drift": 3}


class WindowEmbedder:
    """Windows uint16 (n t h w) to float32 (n width); safe to call from several threads. See `pipeline.embedding.Embed`.

    Args:
        backbone: or the folder of a model that `write_model` wrote.
        device: to compute on; None: where the backbone is.

    Raises:
        ConfigError: the backbone has fewer layers than `settings.layer`, or the folder holds no model.
    """

    def __init__(
        self, backbone: VimpacBackbone | Path, settings: EmbedSettings, device: str | torch.device | None = None
    ) -> None:
        if isinstance(backbone, Path):
            backbone = load_model(backbone).backbone
        if settings.layer is not None and settings.layer > backbone.config.layers:
            raise ConfigError(
                f"layer = {settings.layer}: the model has {backbone.config.layers}; allowed: 1 to {backbone.config.layers}"
            )
        self._device = torch.device(device or next(backbone.parameters()).device)
        self._backbone, self._settings = backbone.eval().to(self._device), settings
        self.window, self.pad = backbone.config.shape, backbone.config.pad_id
        self.width = _WIDTHS[settings.pool] * backbone.config.hidden

    @torch.inference_mode()
    def __call__(self, windows: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(windows.astype(np.int64))
        padded = bool((tokens == self.pad).any())  # looked for on the host, so that no device is waited for
        layer, is_half = self._settings.layer, self._settings.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=is_half):
            features = self._backbone(tokens.to(self._device), padded=padded, intermediates=layer is not None)
        cls, grid = features.layers[layer - 1] if layer is not None else (features.cls, features.tokens)
        lengths = (tokens != self.pad).any(-1).any(-1).sum(1)
        pooled = _pool(self._settings.pool, cls.float(), grid.float(), lengths.to(self._device))
        found: np.ndarray = pooled.cpu().numpy()
        return found

    def all(self, windows: np.ndarray) -> np.ndarray:
        """float32 (n width) of any number of windows, `batch_windows` at a time."""
        size = self._settings.batch_windows
        parts = [self(windows[first : first + size]) for first in range(0, len(windows), size)]
        return np.concatenate(parts) if parts else np.empty((0, self.width), np.float32)


def _pool(pool: str, cls: Tensor, grid: Tensor, lengths: Tensor) -> Tensor:
    """(n width) from CLS (n d), tokens (n t h w d) and how many frames of each window are not PAD (n)."""
    if pool == "cls":
        return cls
    num_frames = grid.shape[1]
    is_frame = (torch.arange(num_frames, device=grid.device) < lengths.clamp(min=1)[:, None]).float()
    weights = (is_frame / is_frame.sum(1, keepdim=True))[..., None]  # n t 1
    frames = grid.mean(dim=(2, 3))
    mean = (frames * weights).sum(1)
    if pool == "mean":
        return mean
    times = torch.linspace(-1, 1, num_frames, device=grid.device)[:, None]
    return torch.cat([cls, mean, (frames * weights * times).sum(1)], dim=1)


def find_model(folder: Path) -> Path:
    """The model in `folder`, or in the `model/` of a run.

    Raises:
        ConfigError: there is none.
    """
    for candidate in (folder / "model", folder):
        if (candidate / "model.safetensors").exists():
            return candidate
    raise ConfigError(f"{folder} holds no pre-trained model; give the --out of a finished `tokenreel pretrain`")


def describe_backbone(backbone: VimpacBackbone) -> dict[str, Any]:
    """What tells a backbone from any other, as plain JSON: the fingerprint of its shape and weights, and its window."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    identity = fingerprint(backbone=asdict(backbone.config), weights=digest.hexdigest())
    return {"fingerprint": identity, "window": list(backbone.config.shape)}

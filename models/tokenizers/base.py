"""What every frame tokenizer can do, and how one is saved, named and loaded.

Shapes: b frames; H W pixels; h w codes of one frame, h = H / patch; c colours.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# kind in config.json -> module and class. Imported on use, so that one tokenizer does not load all.
_KINDS = {"vqvae": ("models.tokenizers.vqvae", "Vqvae"), "dvae": ("models.tokenizers.dvae", "Dvae")}


class Tokenizer(nn.Module, ABC):
    """Turns frames into codes and back. A subclass is built from its config dataclass, `config_class`, alone.

    kind: the name in config.json. preprocessing: what happens to pixels before the network, in words; part of the
    fingerprint, so a change of it changes the fingerprint even where weights stay.
    """

    kind: ClassVar[str]
    preprocessing: ClassVar[str]
    config_class: ClassVar[type]
    config: Any

    @property
    @abstractmethod
    def codebook_size(self) -> int:
        """Number of codes; every code is in [0, codebook_size)."""

    @property
    @abstractmethod
    def patch(self) -> int:
        """Pixels along each side of the square that one code stands for."""

    @abstractmethod
    def encode(self, frames: Tensor) -> Tensor:
        """Codes of frames, without gradients, in the mode of the module: call `eval()` first.

        Args:
            frames: (b H W c) uint8, RGB, [0, 255]; H and W multiples of `patch`.
        Returns:
            (b h w) uint16.
        Errors: ValueError naming the shape or dtype that does not fit.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures of codes, without gradients: (b h w) of any integer dtype -> (b H W c) uint8, RGB."""

    def fingerprint(self) -> str:
        """Hex digest (32 characters) of weights, architecture and preprocessing; equal after saving and loading."""
        digest = hashlib.sha256(_description(self).encode())
        for name, value in sorted(self.state_dict().items()):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is made if missing.

        The config is written last and by renaming, so a folder that has one is complete.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS_FILE)
        text = json.dumps({**json.loads(_description(self)), "fingerprint": self.fingerprint()}, indent=2)
        part = folder / (CONFIG_FILE + ".part")
        part.write_text(text + "\n")
        part.replace(folder / CONFIG_FILE)

    def check_frames(self, frames: Tensor) -> None:
        """Raise ValueError unless `frames` are (b H W 3) uint8 with sides that are multiples of `patch`."""
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(
                f"{self.kind}: frames are {frames.dtype} of shape {tuple(frames.shape)}; allowed: uint8 (b, H, W, 3)"
            )
        height, width = frames.shape[1:3]
        if height % self.patch or width % self.patch or not (height and width):
            raise ValueError(f"{self.kind}: frames are {height}x{width} px; allowed: multiples of {self.patch} px")


def _description(tokenizer: Tokenizer) -> str:
    parts = {"kind": tokenizer.kind, "config": asdict(tokenizer.config), "preprocessing": tokenizer.preprocessing}
    return json.dumps(parts, sort_keys=True)


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu") -> Tokenizer:
    """The tokenizer that `save` wrote into `folder`, in eval mode on `device`, checked against its own fingerprint.

    Reads JSON and safetensors; nothing is unpickled.

    Errors: FileNotFoundError or ValueError naming the file, what is wrong with it and what to do.
    """
    config_path, weights_path = Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(
                f"load_tokenizer: {path} is missing; a tokenizer folder holds {CONFIG_FILE} and {WEIGHTS_FILE}: "
                "give the folder that training a tokenizer wrote, or train one"
            )
    try:
        saved = json.loads(config_path.read_text())
        kind, preprocessing, fingerprint = saved["kind"], saved["preprocessing"], saved["fingerprint"]
        fields = dict(saved["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"load_tokenizer: {config_path} is not a tokenizer config ({type(error).__name__}: {error}); "
            "write it again with Tokenizer.save"
        ) from error
    if kind not in _KINDS:
        raise ValueError(f"load_tokenizer: {config_path} has kind {kind!r}; allowed: {', '.join(_KINDS)}")
    module, name = _KINDS[kind]
    tokenizer_class = getattr(importlib.import_module(module), name)
    try:
        tokenizer = tokenizer_class(tokenizer_class.config_class(**fields))
        tokenizer.load_state_dict(load_file(weights_path))
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"load_tokenizer: {weights_path} and {config_path} do not make a {kind} tokenizer ({error}); "
            "copy both again from where they were trained, or train anew"
        ) from error
    assert isinstance(tokenizer, Tokenizer)
    found = tokenizer.fingerprint()
    if preprocessing != tokenizer.preprocessing or fingerprint != found:
        raise ValueError(
            f"load_tokenizer: {weights_path} has fingerprint {found}, {config_path} says {fingerprint}; "
            "the files were changed or come from two tokenizers, or this version preprocesses otherwise: "
            "copy both again from where they were trained"
        )
    return tokenizer.to(device).eval()

"""What every frame tokenizer can do, and how one is saved, named and loaded.

Shapes: b frames; H W pixels; h w codes of one frame, h = H / patch; c colours.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

Precision = Literal["fp32", "bf16", "fp16"]
"""What the large convolutions of an encoder multiply in."""
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LATER = {"later": True}
"""Metadata of a config field that tokenizers saved before it do not have: at its default it is left out of the
fingerprint, so they keep theirs."""

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
    precision: Precision = "fp32"
    _fingerprint_before_cast = ""

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
    def features(self, pixels: Tensor) -> Tensor:
        """What the last layer of the encoder reads, with gradients: (b c H W) float in [0, 1] -> (b d h w)."""

    @abstractmethod
    def cast_encoder(self, dtype: torch.dtype) -> None:
        """Cast, in place, the weights whose rounding decides few codes; the encoder's input and output stay float32."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures of codes, without gradients: (b h w) of any integer dtype -> (b H W c) uint8, RGB."""

    def place(self, device: str | torch.device, precision: Precision = "fp32") -> None:
        """Make it ready to encode: eval mode, on `device`, in `precision`, weights laid out as convolutions read them."""
        self.set_precision(precision)
        self.to(device).eval()
        for weight in self.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def set_precision(self, precision: Precision) -> None:
        """Encode in `precision` from now on. Codes may change, so it belongs to the identity of tokens.

        The weights are cast in place, so a cast tokenizer cannot be saved or cast again; its fingerprint stays that of
        the weights it was cast from. Decoding stays in float32.
        """
        if precision not in _DTYPES:
            raise ValueError(f"set_precision: precision is {precision!r}; allowed: {', '.join(get_args(Precision))}")
        if precision == self.precision:
            return
        if self.precision != "fp32":
            raise ValueError(
                f"set_precision: the weights are cast to {self.precision} already, {precision} was asked for; "
                "load the tokenizer again"
            )
        self._fingerprint_before_cast = self.fingerprint()
        self.cast_encoder(_DTYPES[precision])
        self.precision = precision

    @contextmanager
    def exact_float32(self) -> Iterator[None]:
        """In precision fp32, keeps cuDNN from rounding the inputs of convolutions to TF32, which it does by default."""
        cudnn = torch.backends.cudnn
        if self.precision != "fp32":
            yield
            return
        with cudnn.flags(
            enabled=cudnn.enabled,
            benchmark=cudnn.benchmark,
            deterministic=cudnn.deterministic,
            allow_tf32=False,
        ):
            yield

    def fingerprint(self) -> str:
        """Hex digest (32 characters) of weights, architecture and preprocessing; equal after saving and loading."""
        if self._fingerprint_before_cast:
            return self._fingerprint_before_cast
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
        if self.precision != "fp32":
            raise ValueError(
                f"save: the weights are cast to {self.precision}; allowed: fp32. Load the tokenizer again and save that"
            )
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
    config = {
        field.name: getattr(tokenizer.config, field.name)
        for field in fields(tokenizer.config)
        if "later" not in field.metadata or getattr(tokenizer.config, field.name) != field.default
    }
    parts = {"kind": tokenizer.kind, "config": config, "preprocessing": tokenizer.preprocessing}
    return json.dumps(parts, sort_keys=True)


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu", precision: Precision = "fp32") -> Tokenizer:
    """The tokenizer that `save` wrote into `folder`, in eval mode on `device`, checked against its own fingerprint.

    It encodes in `precision`, see `Tokenizer.set_precision`. On a CPU without the instructions for it bf16 is slower
    than fp32, and fp16 is slower on most.
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
        settings = dict(saved["config"])
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
        tokenizer = tokenizer_class(tokenizer_class.config_class(**settings))
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
    tokenizer.place(device, precision)
    return tokenizer

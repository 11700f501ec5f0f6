"""Files like the published ones of the DALL-E dVAE, small: whole modules of classes that only the package dall_e has."""

from __future__ import annotations

import math
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.tokenizers.dvae import DvaeConfig

SMALL = DvaeConfig(hidden=8, blocks_per_group=2, codebook_size=24, decoder_init=12)


def make_weights(config: DvaeConfig = SMALL, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights of encoder and decoder under their published names, large enough that codes differ."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for kernels, first, factors, stem, head in (
        ((3, 3, 3, 1), config.hidden, (1, 2, 4, 8), (config.hidden, 3, 7), config.codebook_size),
        ((1, 3, 3, 3), config.decoder_init, (8, 4, 2, 1), (config.decoder_init, config.codebook_size, 1), 6),
    ):
        convs = {"blocks.input": stem}
        width = first
        for group, factor in enumerate(factors, 1):
            for block in range(1, config.blocks_per_group + 1):
                name, wide = f"blocks.group_{group}.block_{block}", factor * config.hidden
                if width != wide:
                    convs[f"{name}.id_path"] = (wide, width, 1)
                ins, outs = (width, wide // 4, wide // 4, wide // 4), (wide // 4, wide // 4, wide // 4, wide)
                for place in range(4):
                    convs[f"{name}.res_path.conv_{place + 1}"] = (outs[place], ins[place], kernels[place])
                width = wide
        convs["blocks.output.conv"] = (head, width, 1)
        weights = {}
        for name, (n_out, n_in, kernel) in convs.items():
            scale = 3 / math.sqrt(n_in * kernel**2)
            weights[f"{name}.w"] = torch.randn(n_out, n_in, kernel, kernel, generator=generator) * scale
            weights[f"{name}.b"] = torch.randn(n_out, generator=generator) * 0.3
        # Without the mean over inputs, grey frames and positive features alone do not decide every code.
        for name in ("blocks.input.w", "blocks.output.conv.w"):
            weights[name] -= weights[name].mean((1, 2, 3), keepdim=True)
        sides.append(weights)
    return sides[0], sides[1]


def define_package(patch: pytest.MonkeyPatch) -> None:
    """Importable modules dall_e.encoder, .decoder and .utils with empty module classes."""
    for module, names in {
        "dall_e": (),
        "dall_e.encoder": ("Encoder", "EncoderBlock"),
        "dall_e.decoder": ("Decoder", "DecoderBlock"),
        "dall_e.utils": ("Conv2d",),
    }.items():
        made = types.ModuleType(module)
        for name in names:
            setattr(made, name, type(name, (nn.Module,), {"__module__": module}))
        patch.setitem(sys.modules, module, made)


def make_module(weights: dict[str, Tensor], side: str = "encoder") -> nn.Module:
    """The whole module of weights, with the attributes and parts without weights that the published ones have."""
    package = sys.modules
    root: Any = getattr(package[f"dall_e.{side}"], side.capitalize())()
    root.n_hid, root.device, root.requires_grad, root.use_mixed_precision = 8, torch.device("cpu"), False, True
    for name, value in weights.items():
        parent: Any = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in parent._modules:
                if part.startswith("block_"):
                    child = getattr(package[f"dall_e.{side}"], f"{side.capitalize()}Block")()
                    child.post_gain, child.id_path = 1 / 64, nn.Identity()
                elif "conv" in part or part == "id_path" or path == ["blocks", "input"] == [*path[:1], part]:
                    child = package["dall_e.utils"].Conv2d()  # type: ignore[attr-defined]
                    child.kw, child.use_float16, child.device = value.shape[-1], part != "conv", torch.device("cpu")
                else:
                    child = nn.Sequential(OrderedDict())
                if part.startswith("conv"):
                    parent.add_module(part.replace("conv", "relu"), nn.ReLU())
                parent._modules[part] = child
            if part == "id_path" and isinstance(parent.id_path, nn.Identity):
                parent.id_path = package["dall_e.utils"].Conv2d()  # type: ignore[attr-defined]
            parent = parent._modules[part]
        parent.register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=False))
    rescale = nn.MaxPool2d(kernel_size=2) if side == "encoder" else nn.Upsample(scale_factor=2, mode="nearest")
    for group in (1, 2, 3):
        root.blocks._modules[f"group_{group}"].add_module("pool" if side == "encoder" else "upsample", rescale)
    return root


def save_pair(
    folder: Path, patch: pytest.MonkeyPatch, config: DvaeConfig = SMALL, *, seed: int = 0, **options: Any
) -> tuple[Path, Path]:
    """encoder.pkl and decoder.pkl in `folder`; the package dall_e is gone again afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with patch.context() as inner:
        define_package(inner)
        for side, weights in zip(("encoder", "decoder"), make_weights(config, seed), strict=True):
            paths.append(folder / f"{side}.pkl")
            torch.save(make_module(weights, side), paths[-1], **options)
    return paths[0], paths[1]

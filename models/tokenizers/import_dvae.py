"""The names and shapes of the published DALL-E dVAE, mapped to `models.tokenizers.dvae`."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from models.tokenizers.dvae import NUM_GROUPS, Dvae, DvaeConfig
from models.tokenizers.inert_pickle import some_of
from models.tokenizers.published import PublishedFileError


def build_published(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> Dvae:
    """The tokenizer of published weights, in float32 and eval mode; its sizes are read from their shapes.

    Args:
        encoder, decoder: what `read_published` read from encoder.pkl and decoder.pkl.
    Errors: PublishedFileError naming the file and the tensor that is missing, unknown, of another shape or not finite.
    """
    config = _infer_config(encoder, decoder)
    with torch.device("meta"):  # shapes only: a file with mad shapes costs no memory
        tokenizer = Dvae(config)
    expected = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for which, given, names in (
        ("encoder.pkl", encoder, _encoder_names(config)),
        ("decoder.pkl", decoder, _decoder_names(config)),
    ):
        missing, unknown = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
        if missing or unknown:
            raise PublishedFileError(
                f"{which}: {len(missing)} tensors are missing ({some_of(missing)}) and {len(unknown)} are unknown "
                f"({some_of(unknown)}); a dVAE of {config.blocks_per_group} blocks a group has {len(names)}"
            )
        for published, ours in names.items():
            value = given[published].float()
            if ours == "decoder.codes.weight":
                bias = given["blocks.input.b"].float()
                if value.ndim != 4 or bias.shape != value.shape[:1]:
                    raise PublishedFileError(
                        f"{which}: {published} has shape {tuple(value.shape)}, its bias {tuple(bias.shape)}; "
                        "allowed: a 1x1 convolution and its bias"
                    )
                value = value.flatten(1).T + bias
            elif not ours:
                continue
            if tuple(value.shape) != expected[ours]:
                raise PublishedFileError(
                    f"{which}: {published} has shape {tuple(value.shape)}; allowed: {expected[ours]}"
                )
            if not value.isfinite().all():
                raise PublishedFileError(
                    f"{which}: {published} has numbers that are not finite; download the file again"
                )
            weights[ours] = value.contiguous()
    tokenizer.load_state_dict(weights, assign=True)
    return tokenizer.requires_grad_(False).eval()


def _infer_config(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> DvaeConfig:
    for which, given, kernel in (("encoder.pkl", encoder, 7), ("decoder.pkl", decoder, 1)):
        shape = tuple(given["blocks.input.w"].shape) if "blocks.input.w" in given else None
        if shape is None or len(shape) != 4 or shape[2:] != (kernel, kernel):
            raise PublishedFileError(
                f"{which}: blocks.input.w has shape {shape}; allowed: a convolution of {kernel}x{kernel}. "
                "Give the encoder first, then the decoder"
            )
    pattern = re.compile(r"blocks\.group_1\.block_\d+\.res_path\.conv_1\.w")
    try:
        return DvaeConfig(
            hidden=encoder["blocks.input.w"].shape[0],
            blocks_per_group=sum(bool(pattern.fullmatch(name)) for name in encoder),
            codebook_size=decoder["blocks.input.w"].shape[1],
            decoder_init=decoder["blocks.input.w"].shape[0],
        )
    except ValueError as error:
        raise PublishedFileError(f"encoder.pkl and decoder.pkl are no dVAE: {error}") from error


def _encoder_names(config: DvaeConfig) -> dict[str, str]:
    """Published name -> ours."""
    names = {
        **_conv_names("blocks.input", "encoder.stem"),
        **_conv_names("blocks.output.conv", "encoder.head"),
    }
    for group in range(NUM_GROUPS):
        for block in range(config.blocks_per_group):
            names |= _block_names("encoder", group, block, config, block == 0 and group > 0)
    return names


def _decoder_names(config: DvaeConfig) -> dict[str, str]:
    """Published name -> ours; the bias of the first layer is added to the codes and has no name of its own."""
    names = {
        "blocks.input.w": "decoder.codes.weight",
        "blocks.input.b": "",
        **_conv_names("blocks.output.conv", "decoder.head"),
    }
    for group in range(NUM_GROUPS):
        for block in range(config.blocks_per_group):
            changes = group > 0 or config.decoder_init != 8 * config.hidden
            names |= _block_names("decoder", group, block, config, block == 0 and changes)
    return names


def _block_names(side: str, group: int, block: int, config: DvaeConfig, has_skip: bool) -> dict[str, str]:
    published = f"blocks.group_{group + 1}.block_{block + 1}"
    ours = f"{side}.blocks.{group * config.blocks_per_group + block}"
    names: dict[str, str] = {}
    for place in range(4):
        names |= _conv_names(f"{published}.res_path.conv_{place + 1}", f"{ours}.convs.{place}")
    return names | (_conv_names(f"{published}.id_path", f"{ours}.skip") if has_skip else {})


def _conv_names(published: str, ours: str) -> dict[str, str]:
    return {f"{published}.w": f"{ours}.weight", f"{published}.b": f"{ours}.bias"}

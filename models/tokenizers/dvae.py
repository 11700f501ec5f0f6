"""dVAE: the frame tokenizer of DALL-E, for its published weights; VIMPAC and VIOLETv2 train on its codes.

Shapes: b frames; H W pixels; c colours; h w codes of a frame, h = H / 8; k codes.

Source: Ramesh et al., "Zero-Shot Text-to-Image Generation", arXiv 2102.12092 (appendix A.2 and A.3); layer sizes from
the package DALL-E 0.1. `tokenreel import-dvae` makes this tokenizer from the published files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.tokenizers.base import Tokenizer

NUM_GROUPS = 4
"""Groups of residual blocks; the resolution halves (encoder) or doubles (decoder) between two of them."""
_EPS = 0.1  # of the logit-Laplace: pixels in [0, 1] are mapped to [eps, 1 - eps], where the logit is finite


@dataclass(frozen=True, kw_only=True, slots=True)
class DvaeConfig:
    """Architecture. The defaults are those of the published weights."""

    hidden: int = 256
    """Width at full resolution; 2, 4 and 8 times that where the resolution is halved, and halved again."""
    blocks_per_group: int = 2
    """Residual blocks at each of the four widths, in the encoder and in the decoder."""
    codebook_size: int = 8192
    """Codes k."""
    decoder_init: int = 128
    """Width of the vector that the decoder reads for a code."""

    def __post_init__(self) -> None:
        if self.hidden < 4 or self.hidden % 4:
            raise ValueError(f"DvaeConfig: hidden is {self.hidden}; allowed: a multiple of 4, >= 4")
        for name in ("blocks_per_group", "decoder_init"):
            if getattr(self, name) < 1:
                raise ValueError(f"DvaeConfig: {name} is {getattr(self, name)}; allowed: >= 1")
        if not 2 <= self.codebook_size <= 2**16 - 5:
            raise ValueError(
                f"DvaeConfig: codebook_size is {self.codebook_size}; allowed: [2, 65531], as codes and the special "
                "tokens after them are stored in 16 bits"
            )


class _Block(nn.Module):
    """skip(x) + gain * (four times ReLU and convolution)(x); the inner width is a quarter of the outer."""

    def __init__(self, wide_in: int, wide_out: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        narrow = wide_out // 4
        widths = (wide_in, narrow, narrow, narrow, wide_out)
        self.gain = gain
        self.skip = nn.Identity() if wide_in == wide_out else nn.Conv2d(wide_in, wide_out, 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel, padding=kernel // 2)
            for a, b, kernel in zip(widths[:-1], widths[1:], kernels, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x.to(next(self.convs.parameters()).dtype))
        for place, conv in enumerate(self.convs):
            y = conv(F.relu_(y) if place else y)
        return self.skip(x).add_(y.to(x.dtype), alpha=self.gain)


def _blocks(first: int, widths: list[int], kernels: tuple[int, int, int, int], per_group: int) -> nn.ModuleList:
    """One block after the other, `per_group` of each of `widths`; the first reads `first` channels."""
    outs = [width for width in widths for _ in range(per_group)]
    gain = 1 / len(outs) ** 2
    return nn.ModuleList(_Block(a, b, kernels, gain) for a, b in zip([first, *outs[:-1]], outs, strict=True))


class DvaeEncoder(nn.Module):
    """(b c H W) mapped pixels -> (b k h w) float32 logits of the codes."""

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        widths = [config.hidden * 2**group for group in range(NUM_GROUPS)]
        self.per_group = config.blocks_per_group
        self.stem = nn.Conv2d(3, config.hidden, 7, padding=3)
        self.blocks = _blocks(config.hidden, widths, (3, 3, 3, 1), config.blocks_per_group)
        self.head = nn.Conv2d(widths[-1], config.codebook_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        # As published: under autocast the head alone stays in float32, for near ties among k logits decide the code.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.float())

    def features(self, x: Tensor) -> Tensor:
        """What the head reads: (b d h w)."""
        x = self.stem(x)
        for place, block in enumerate(self.blocks):
            if place and place % self.per_group == 0:
                x = F.max_pool2d(x, 2)
            x = block(x)
        return F.relu(x)

    def cast(self, dtype: torch.dtype) -> None:
        """Let the convolutions that the gain of 1 / blocks^2 follows compute in `dtype`, four fifths of all multiplications.

        What reads or writes the sum over blocks without that gain stays in float32: stem, skips, the sum and the head.
        """
        for block in self.blocks:
            assert isinstance(block, _Block)
            block.convs.to(dtype)


class DvaeDecoder(nn.Module):
    """(b h w) int64 codes -> (b c H W) float32 logit means of mapped pixels.

    The published head has 2 c channels; the last c are scales of the logit-Laplace, which only its loss reads.
    """

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        widths = [config.hidden * 2**group for group in reversed(range(NUM_GROUPS))]
        self.per_group = config.blocks_per_group
        # Published as a 1x1 convolution of one-hot codes; a row here is that code's column plus the bias.
        self.codes = nn.Embedding(config.codebook_size, config.decoder_init)
        self.blocks = _blocks(config.decoder_init, widths, (1, 3, 3, 3), config.blocks_per_group)
        self.head = nn.Conv2d(config.hidden, 2 * 3, 1)

    def forward(self, codes: Tensor) -> Tensor:
        x = rearrange(self.codes(codes), "b h w d -> b d h w")
        for place, block in enumerate(self.blocks):
            if place and place % self.per_group == 0:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = block(x)
        return self.head(F.relu(x)).float()[:, :3]


class Dvae(Tokenizer):
    """Encoder and decoder of the dVAE. Fully convolutional: any frame size that is a multiple of 8 px."""

    kind: ClassVar[str] = "dvae"
    preprocessing: ClassVar[str] = "0.8 * (x / 255) + 0.1"
    config_class: ClassVar[type] = DvaeConfig

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = DvaeEncoder(config)
        self.decoder = DvaeDecoder(config)

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def patch(self) -> int:
        return 2 ** (NUM_GROUPS - 1)

    def normalize(self, frames: Tensor) -> Tensor:
        """(b H W c) uint8 -> (b c H W) float32 in [0.1, 0.9], channels last in memory."""
        self.check_frames(frames)
        return (1 - 2 * _EPS) * (rearrange(frames, "b H W c -> b c H W").float() / 255.0) + _EPS

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """See `Tokenizer.encode`: the code with the largest logit."""
        with self.exact_float32():
            return self.encoder(self.normalize(frames)).argmax(1).to(torch.uint16)

    def features(self, pixels: Tensor) -> Tensor:
        """See `Tokenizer.features`."""
        return self.encoder.features((1 - 2 * _EPS) * pixels + _EPS)

    def cast_encoder(self, dtype: torch.dtype) -> None:
        self.encoder.cast(dtype)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """See `Tokenizer.decode`: the mode of the pixels' distribution."""
        x = (torch.sigmoid(self.decoder(codes.long())) - _EPS) / (1 - 2 * _EPS)
        return rearrange((x.clamp(0, 1) * 255.0).round().to(torch.uint8), "b c H W -> b H W c")

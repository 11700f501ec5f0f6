"""VQ-VAE: a small convolutional tokenizer of frames that is trained on the corpus itself.

Shapes: b frames; H W pixels; c colours; h w codes of a frame; r = b*h*w rows; k codes; d code width.

Source: van den Oord et al., "Neural Discrete Representation Learning", arXiv 1711.00937 (loss: eq. 3; EMA codebook:
appendix A.1); Dhariwal et al., "Jukebox", arXiv 2005.00341 (restart of unused codes); Yu et al., "Vector-quantized
Image Modeling with Improved VQGAN", arXiv 2110.04627 (section 3.2: codes and outputs of length 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.distributed import gather_rows, rank, sum_over_workers, world_size
from models.masking import uniforms
from models.tokenizers.base import LATER, Tokenizer

_COUNT_EPS = 1e-5
_MIN_MSE = 1e-10  # keeps the PSNR of an exact reconstruction finite


@dataclass(frozen=True, kw_only=True, slots=True)
class VqvaeConfig:
    """Architecture and codebook. The defaults train on a laptop's CPU in minutes."""

    channels: int = 128
    """Width at one code per patch; half of it at twice that resolution."""
    res_blocks: int = 1
    """Residual blocks at each of the two resolutions, in the encoder and in the decoder."""
    codebook_size: int = 512
    """Codes k."""
    code_dim: int = 16
    """Width d of a code."""
    patch: int = 8
    """Pixels along each side of a code's square; 8 turns 128 px into 16 codes."""
    codebook: Literal["ema", "gradient"] = field(default="ema", metadata=LATER)
    """How codes learn: as moving averages of the encoder's outputs, or by a loss of their own."""
    distance: Literal["euclidean", "cosine"] = field(default="euclidean", metadata=LATER)
    """cosine scales codes and the encoder's outputs to length 1, so that only their direction counts."""
    ema_decay: float = 0.9
    """How slowly the running use of codes, and with `ema` the codes themselves, follow the encoder's outputs."""
    restart_below: float = 0.3
    """A code whose running use falls below this share of an even use is moved onto an encoder output; 0 never restarts."""
    restart_every: int = 5
    """Updates between two looks for such codes."""

    def __post_init__(self) -> None:
        for name in ("res_blocks", "code_dim", "restart_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"VqvaeConfig: {name} is {getattr(self, name)}; allowed: >= 1")
        if self.channels < 2 or self.channels % 2:
            raise ValueError(f"VqvaeConfig: channels is {self.channels}; allowed: an even number >= 2")
        if not 2 <= self.codebook_size <= 2**16 - 5:
            raise ValueError(
                f"VqvaeConfig: codebook_size is {self.codebook_size}; allowed: [2, 65531], as codes and the special "
                "tokens after them are stored in 16 bits"
            )
        if self.patch not in (4, 8, 16):
            raise ValueError(f"VqvaeConfig: patch is {self.patch}; allowed: 4, 8, 16")
        for name, allowed in (("codebook", ("ema", "gradient")), ("distance", ("euclidean", "cosine"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"VqvaeConfig: {name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"VqvaeConfig: ema_decay is {self.ema_decay}; allowed: [0, 1)")
        if not 0 <= self.restart_below < 1:
            raise ValueError(f"VqvaeConfig: restart_below is {self.restart_below}; allowed: [0, 1)")


class Quantized(NamedTuple):
    """Of a batch: vectors (b d h w), with a gradient only to a codebook that learns by one; counts (k) uses, by all
    workers in training."""

    vectors: Tensor
    counts: Tensor


class Codebook(nn.Module):
    """Code vectors that follow the encoder, by moving averages or by a loss; the same on every worker after every update.

    All state lies in buffers and one parameter, so a checkpoint is exact. The draws behind the first codebook and the
    restarts depend on the number of updates alone.
    """

    codes: Tensor
    uses: Tensor
    sums: Tensor
    updates: Tensor

    def __init__(self, config: VqvaeConfig) -> None:
        super().__init__()
        k, d = config.codebook_size, config.code_dim
        self.config = config
        self.by_gradient, self.unit_length = config.codebook == "gradient", config.distance == "cosine"
        if self.by_gradient:
            self.codes = nn.Parameter(torch.zeros(k, d))
        else:
            self.register_buffer("codes", torch.zeros(k, d))
            self.register_buffer("sums", torch.zeros(k, d))
        self.register_buffer("uses", torch.zeros(k))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def scale(self, vectors: Tensor) -> Tensor:
        """Vectors (... d) as distances are taken between them: of length 1 with cosine distance, else as they are."""
        return F.normalize(vectors, dim=-1) if self.unit_length else vectors

    def vectors_of(self, codes: Tensor) -> Tensor:
        """What the decoder reads for codes (b h w): (b d h w), with a gradient to a codebook that learns by one."""
        return rearrange(F.embedding(codes, self.scale(self.codes)), "b h w d -> b d h w")

    def forward(self, z: Tensor) -> Quantized:
        """Nearest codes of encoder outputs (b d h w), in float32; in training the codebook then moves towards them."""
        with torch.autocast(z.device.type, enabled=False):
            with torch.no_grad():
                rows = self.scale(rearrange(z.float(), "b d h w -> (b h w) d"))
                if self.training and self.updates == 0:
                    self._start(rows)
                elif self.training and self.by_gradient:
                    self._restart_if_due(rows)  # before the codes are used: autograd will need them as they were then
                codes = self.nearest(rows)
                counts = torch.bincount(codes, minlength=len(self.codes)).float()
            vectors = self.vectors_of(codes.view(z.shape[0], *z.shape[2:]))
            if self.training:
                with torch.no_grad():
                    counts = self._follow(rows, codes, counts)
                    self.updates += 1
                    if not self.by_gradient:
                        self._restart_if_due(rows)
            return Quantized(vectors, counts)

    def nearest(self, rows: Tensor) -> Tensor:
        """Code with the least distance to each row, which `scale` was applied to: (r d) float32 -> (r) int64."""
        codes = self.scale(self.codes)
        # |z - e|^2 without |z|^2, which does not change which code is nearest.
        return torch.addmm(codes.square().sum(1), rows, codes.T, alpha=-2).argmin(1)

    def _start(self, rows: Tensor) -> None:
        """Lay the codes onto encoder outputs of the first batch, each as if used evenly once."""
        self.codes.copy_(self._draw(rows))
        self.uses.fill_(len(rows) * world_size() / len(self.codes))
        if not self.by_gradient:
            self.sums.copy_(self.codes * self.uses[:, None])

    def _follow(self, rows: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
        """One step of the running use, and of codes that are averages, by all workers; returns their counts (k)."""
        if self.by_gradient:
            counts = sum_over_workers(counts)
            self.uses.lerp_(counts, 1 - self.config.ema_decay)
            return counts
        sums = torch.zeros_like(self.sums).index_add_(0, codes, rows)
        totals = sum_over_workers(torch.cat([sums, counts[:, None]], dim=1))
        sums, counts = totals[:, :-1], totals[:, -1]
        self.uses.lerp_(counts, 1 - self.config.ema_decay)
        self.sums.lerp_(sums, 1 - self.config.ema_decay)
        # A code that nobody uses keeps its place: both averages shrink alike, and the ratio stays, until they are so small
        # that the clamp would draw it to the origin.
        means = self.scale(self.sums / self.uses.clamp(min=_COUNT_EPS)[:, None])
        self.codes.copy_(torch.where(self.uses[:, None] > _COUNT_EPS, means, self.codes))
        return counts

    def _restart_if_due(self, rows: Tensor) -> None:
        """Move codes that are hardly used onto encoder outputs of this batch, and give them an even use to prove."""
        if not self.config.restart_below or self.updates % self.config.restart_every:
            return
        even = self.uses.mean()
        dead = self.uses < self.config.restart_below * even
        fresh = self._draw(rows)
        self.codes.copy_(torch.where(dead[:, None], fresh, self.codes))
        self.uses.copy_(torch.where(dead, even, self.uses))
        if not self.by_gradient:
            self.sums.copy_(torch.where(dead[:, None], fresh * even, self.sums))

    def _draw(self, rows: Tensor) -> Tensor:
        """k rows drawn evenly from all workers, the same on every worker: (r d) -> (k d)."""
        k, workers = len(self.codes), world_size()
        share = -(-k // workers)
        draws = uniforms(self.updates.view(1) * workers + rank(), share)[0]
        drawn = gather_rows(rows[(draws * len(rows)).long()])
        # Interleaved, so that every worker's rows are used evenly where fewer than all are needed.
        return rearrange(drawn, "(workers share) d -> (share workers) d", workers=workers)[:k]


class _ResBlock(nn.Module):
    """x + Conv1x1(ReLU(Conv3x3(ReLU(x)))): (b c h w) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.relu(self.spread(F.relu(x))))


class Vqvae(Tokenizer):
    """Convolutional encoder, codebook, mirrored decoder. Fully convolutional: any frame size that is whole patches."""

    kind: ClassVar[str] = "vqvae"
    preprocessing: ClassVar[str] = "x / 127.5 - 1"
    config_class: ClassVar[type] = VqvaeConfig

    def __init__(self, config: VqvaeConfig) -> None:
        super().__init__()
        self.config = config
        wide, narrow, stride = config.channels, config.channels // 2, config.patch // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(3, narrow, stride + 2, stride=stride, padding=1),
            *(_ResBlock(narrow) for _ in range(config.res_blocks)),
            nn.Conv2d(narrow, wide, 4, stride=2, padding=1),
            *(_ResBlock(wide) for _ in range(config.res_blocks)),
            nn.ReLU(),
            nn.Conv2d(wide, config.code_dim, 1),
        )
        self.codebook = Codebook(config)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_dim, wide, 3, padding=1),
            *(_ResBlock(wide) for _ in range(config.res_blocks)),
            nn.ReLU(),
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1),
            *(_ResBlock(narrow) for _ in range(config.res_blocks)),
            nn.ReLU(),
            nn.ConvTranspose2d(narrow, 3, stride + 2, stride=stride, padding=1),
        )

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def patch(self) -> int:
        return self.config.patch

    def normalize(self, frames: Tensor) -> Tensor:
        """(b H W c) uint8 -> (b c H W) float32 in [-1, 1]."""
        self.check_frames(frames)
        return rearrange(frames, "b H W c -> b c H W").float() / 127.5 - 1.0

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """See `Tokenizer.encode`. Never moves the codebook."""
        with self.exact_float32():
            x = self.normalize(frames).to(next(self.encoder.parameters()).dtype)
            z = self.encoder[-1](self.encoder[:-1](x).float()).float()
        codes = self.codebook.nearest(self.codebook.scale(rearrange(z, "b d h w -> (b h w) d")))
        return codes.view(z.shape[0], *z.shape[2:]).to(torch.uint16)

    def features(self, pixels: Tensor) -> Tensor:
        """See `Tokenizer.features`."""
        features: Tensor = self.encoder[:-1](2.0 * pixels - 1.0)
        return features

    def cast_encoder(self, dtype: torch.dtype) -> None:
        # The last layer stays in float32, as near ties between codes decide.
        self.encoder[:-1].to(dtype)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """See `Tokenizer.decode`."""
        x = (self.decoder(self.codebook.vectors_of(codes.long())).float() + 1.0) * 127.5
        return rearrange(x.round().clamp(0, 255).to(torch.uint8), "b c H W -> b H W c")


@dataclass(frozen=True, kw_only=True, slots=True)
class VqvaeObjectiveConfig:
    """Loss weights."""

    beta: float = 0.25
    """Weight of the commitment loss, which keeps the encoder near its codes."""
    l1_weight: float = 0.1
    """Weight of the mean absolute error beside the mean squared error; it keeps edges sharper."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual loss, the distance between features of picture and reconstruction; needs --perceptual."""

    def __post_init__(self) -> None:
        for name in ("beta", "l1_weight", "perceptual_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"VqvaeObjectiveConfig: {name} is {getattr(self, name)}; allowed: >= 0")


def feature_distance(network: Tokenizer, first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance, in [0, 4], between the features of length 1 that `network` sees at each place.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924, eq. 1, with
    one layer and no learned weights.

    Args:
        first, second: (b c H W) in [-1, 1]; gradients reach the first alone.
    """
    ours = network.features((first + 1.0) / 2.0).float()
    with torch.no_grad():
        theirs = network.features((second + 1.0) / 2.0).float()
    return (F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)).square().sum(1).mean()


class VqvaeObjective(nn.Module):
    """Reconstruction and commitment, and with codes that learn by gradient their own loss; else they move by averages,
    in training mode only.

    Args:
        perceptual: another tokenizer, whose features the perceptual loss compares; on the device that trains. Its
            weights stay as they are, and are no part of a checkpoint.
    """

    def __init__(self, tokenizer: Vqvae, config: VqvaeObjectiveConfig, perceptual: Tokenizer | None = None) -> None:
        super().__init__()
        if (perceptual is None) == (config.perceptual_weight > 0):
            raise ValueError(
                f"VqvaeObjective: perceptual_weight is {config.perceptual_weight} with "
                f"{'no' if perceptual is None else 'a'} tokenizer for its features; allowed: both or neither"
            )
        self.tokenizer, self.config = tokenizer, config
        self._perceptual = () if perceptual is None else (perceptual.requires_grad_(False),)  # hidden from `nn.Module`

    def forward(self, batch: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Losses and metrics of one micro-batch.

        Args:
            batch: "frames" (b H W c) uint8, RGB.
        Returns:
            "losses": scalars with their weights applied: "reconstruction", "commitment" (pixels in [-1, 1]), and
            "codebook" with codes that learn by gradient: the three terms of eq. 3, as means. "perceptual" where asked.
            "metrics": detached scalars: psnr (dB, of clamped pixels, over the batch), perplexity (exp of the entropy of
            code use, 1 to k), codes_used (share of the k codes that occur). The last two are over the batches of all
            workers in training, over this worker's in eval mode, where no collective is started.
        """
        frames = self.tokenizer.normalize(batch["frames"])
        z = self.tokenizer.encoder(frames)
        codebook = self.tokenizer.codebook
        if codebook.unit_length:
            z = F.normalize(z.float(), dim=1)
        quantized = codebook(z)
        # Straight through: the decoder sees the codes, the encoder gets the decoder's gradient.
        x = self.tokenizer.decoder(z + (quantized.vectors - z).detach()).float()
        reconstruction = F.mse_loss(x, frames) + self.config.l1_weight * F.l1_loss(x, frames)
        commitment = self.config.beta * F.mse_loss(z.float(), quantized.vectors.detach())
        losses = {"reconstruction": reconstruction, "commitment": commitment}
        if codebook.by_gradient:
            losses["codebook"] = F.mse_loss(quantized.vectors, z.detach().float())
        for network in self._perceptual:
            distance = feature_distance(network, x, frames)
            losses["perceptual"] = self.config.perceptual_weight * distance
        mse = F.mse_loss(x.detach().clamp(-1, 1), frames)
        share = quantized.counts / quantized.counts.sum()
        return {
            "losses": losses,
            "metrics": {
                "psnr": 10 * torch.log10(4.0 / mse.clamp(min=_MIN_MSE)),
                "perplexity": torch.special.entr(share).sum().exp(),
                "codes_used": (share > 0).float().mean(),
            },
        }

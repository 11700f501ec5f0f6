"""VQ-VAE: a small convolutional tokenizer of frames that is trained on the corpus itself.

Shapes: b frames; H W pixels; c colours; h w codes of a frame; r = b*h*w rows; k codes; d code width.

Source: van den Oord et al., "Neural Discrete Representation Learning", arXiv 1711.00937 (loss: eq. 3; EMA codebook:
appendix A.1); Dhariwal et al., "Jukebox", arXiv 2005.00341 (restart of unused codes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.distributed import gather_rows, rank, sum_over_workers, world_size
from models.masking import uniforms
from models.tokenizers.base import Tokenizer

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
    ema_decay: float = 0.9
    """How slowly codes follow the encoder's outputs."""
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
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"VqvaeConfig: ema_decay is {self.ema_decay}; allowed: [0, 1)")
        if not 0 <= self.restart_below < 1:
            raise ValueError(f"VqvaeConfig: restart_below is {self.restart_below}; allowed: [0, 1)")


class Quantized(NamedTuple):
    """Of a batch: vectors (b d h w), no gradient; counts (k) uses, by all workers in training."""

    vectors: Tensor
    counts: Tensor


class Codebook(nn.Module):
    """Code vectors that follow the encoder by moving averages; the same on every worker after every update.

    All state lies in buffers, so a checkpoint is exact. The draws behind the first codebook and the restarts depend on
    the number of updates alone.
    """

    codes: Tensor
    uses: Tensor
    sums: Tensor
    updates: Tensor

    def __init__(self, config: VqvaeConfig) -> None:
        super().__init__()
        k, d = config.codebook_size, config.code_dim
        self.config = config
        self.register_buffer("codes", torch.zeros(k, d))
        self.register_buffer("uses", torch.zeros(k))
        self.register_buffer("sums", torch.zeros(k, d))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> Quantized:
        """Nearest codes of encoder outputs (b d h w), in float32; in training the codebook then moves towards them."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            rows = rearrange(z.float(), "b d h w -> (b h w) d")
            if self.training and self.updates == 0:
                self._start(rows)
            codes = self.nearest(rows)
            vectors = rearrange(F.embedding(codes, self.codes), "(b h w) d -> b d h w", b=z.shape[0], h=z.shape[2])
            counts = torch.bincount(codes, minlength=len(self.codes)).float()
            if self.training:
                counts = self._follow(rows, codes, counts)
                self.updates += 1
                if self.config.restart_below and self.updates % self.config.restart_every == 0:
                    self._restart(rows)
            return Quantized(vectors, counts)

    def nearest(self, rows: Tensor) -> Tensor:
        """Code with the least Euclidean distance to each row: (r d) float32 -> (r) int64."""
        # |z - e|^2 without |z|^2, which does not change which code is nearest.
        return torch.addmm(self.codes.square().sum(1), rows, self.codes.T, alpha=-2).argmin(1)

    def _start(self, rows: Tensor) -> None:
        """Lay the codes onto encoder outputs of the first batch, each as if used evenly once."""
        self.codes.copy_(self._draw(rows))
        self.uses.fill_(len(rows) * world_size() / len(self.codes))
        self.sums.copy_(self.codes * self.uses[:, None])

    def _follow(self, rows: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
        """One EMA step with the statistics of all workers; returns their counts (k)."""
        sums = torch.zeros_like(self.sums).index_add_(0, codes, rows)
        totals = sum_over_workers(torch.cat([sums, counts[:, None]], dim=1))
        sums, counts = totals[:, :-1], totals[:, -1]
        self.uses.lerp_(counts, 1 - self.config.ema_decay)
        self.sums.lerp_(sums, 1 - self.config.ema_decay)
        # A code that nobody uses keeps its place: both averages shrink alike, and the ratio stays.
        self.codes.copy_(self.sums / self.uses.clamp(min=_COUNT_EPS)[:, None])
        return counts

    def _restart(self, rows: Tensor) -> None:
        """Move codes that are hardly used onto encoder outputs of this batch, and give them an even use to prove."""
        even = self.uses.mean()
        dead = self.uses < self.config.restart_below * even
        fresh = self._draw(rows)
        self.codes.copy_(torch.where(dead[:, None], fresh, self.codes))
        self.uses.copy_(torch.where(dead, even, self.uses))
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
        """See `Tokenizer.encode`. Never moves the codebook; the network runs in float32 unless under autocast."""
        z = self.encoder(self.normalize(frames)).float()
        codes = self.codebook.nearest(rearrange(z, "b d h w -> (b h w) d"))
        return codes.view(z.shape[0], *z.shape[2:]).to(torch.uint16)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """See `Tokenizer.decode`."""
        vectors = rearrange(F.embedding(codes.long(), self.codebook.codes), "b h w d -> b d h w")
        x = (self.decoder(vectors).float() + 1.0) * 127.5
        return rearrange(x.round().clamp(0, 255).to(torch.uint8), "b c H W -> b H W c")


@dataclass(frozen=True, kw_only=True, slots=True)
class VqvaeObjectiveConfig:
    """Loss weights."""

    beta: float = 0.25
    """Weight of the commitment loss, which keeps the encoder near its codes."""
    l1_weight: float = 0.1
    """Weight of the mean absolute error beside the mean squared error; it keeps edges sharper."""

    def __post_init__(self) -> None:
        if self.beta < 0 or self.l1_weight < 0:
            raise ValueError(
                f"VqvaeObjectiveConfig: beta is {self.beta}, l1_weight is {self.l1_weight}; allowed: both >= 0"
            )


class VqvaeObjective(nn.Module):
    """Reconstruction and commitment. The codebook itself has no loss: it moves by averages, in training mode only."""

    def __init__(self, tokenizer: Vqvae, config: VqvaeObjectiveConfig) -> None:
        super().__init__()
        self.tokenizer, self.config = tokenizer, config

    def forward(self, batch: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Losses and metrics of one micro-batch.

        Args:
            batch: "frames" (b H W c) uint8, RGB.
        Returns:
            "losses": scalars with their weights applied: "reconstruction", "commitment" (pixels in [-1, 1]).
            "metrics": detached scalars: psnr (dB, of clamped pixels, over the batch), perplexity (exp of the entropy of
            code use, 1 to k), codes_used (share of the k codes that occur). The last two are over the batches of all
            workers in training, over this worker's in eval mode, where no collective is started.
        """
        frames = self.tokenizer.normalize(batch["frames"])
        z = self.tokenizer.encoder(frames)
        quantized = self.tokenizer.codebook(z)
        # Straight through: the decoder sees the codes, the encoder gets the decoder's gradient.
        x = self.tokenizer.decoder(z + (quantized.vectors - z).detach()).float()
        reconstruction = F.mse_loss(x, frames) + self.config.l1_weight * F.l1_loss(x, frames)
        commitment = self.config.beta * F.mse_loss(z.float(), quantized.vectors)
        mse = F.mse_loss(x.detach().clamp(-1, 1), frames)
        share = quantized.counts / quantized.counts.sum()
        return {
            "losses": {"reconstruction": reconstruction, "commitment": commitment},
            "metrics": {
                "psnr": 10 * torch.log10(4.0 / mse.clamp(min=_MIN_MSE)),
                "perplexity": torch.special.entr(share).sum().exp(),
                "codes_used": (share > 0).float().mean(),
            },
        }

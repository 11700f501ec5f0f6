"""`tokenreel bench tokenize`: frames a second of a tokenizer's encoder by precision and resolution, and what each precision costs.

`measure` needs torch, einops, numpy and safetensors alone, so a bare GPU machine runs it.
"""

from __future__ import annotations

import importlib
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from jobs import cost
from jobs.cost import EncodeSpeed, Measured
from models.tokenizers.base import Precision, Tokenizer, load_tokenizer
from models.tokenizers.dvae import Dvae, DvaeConfig
from models.tokenizers.vqvae import Vqvae, VqvaeConfig
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from jobs.result import JobResult

log = logging.getLogger(__name__)

PUBLISHED = "published"
"""Name in the table of the encoder of the package DALL-E."""
Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchTokenizeConfig:
    """Time encoding on the GPU where there is one, else on the CPU, and compare the codes with those of fp32.

    Each figure is the median of several rounds, in which the precisions take turns. A frame's way to the device and its
    codes' way back count; decoding video does not.
    """

    tokenizer: Path | None = None
    """Folder of a tokenizer, or of the run that trained or imported it; without one, a dVAE of the published size and
    the default VQ-VAE, both with random weights: their speed is right, their codes have more near ties than trained ones."""
    clips: Path | None = None
    """Clip dataset to take frames from, one a clip; without one, frames of a zoom into the Mandelbrot set."""
    sizes_px: tuple[int, ...] = (128, 256)
    """Sides of the frames."""
    precisions: tuple[Precision, ...] = get_args(Precision)
    """Precisions beside fp32, which is always measured."""
    num_frames: int = 16
    """Frames a round encodes."""
    batch_frames: int = 8
    """Frames that are encoded together."""
    repeats: int = 3
    """Rounds, after one that only warms up."""
    published: bool = False
    """Time the published package DALL-E 0.1 too, with the same weights; only for a dVAE."""
    save: Path | None = None
    """File of measured speeds to write these into, by device; `tokenreel plan --speeds` predicts from it."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "batch_frames", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be 1 or more")
        if not self.sizes_px or any(size < 8 or size % 8 for size in self.sizes_px):
            raise ConfigError(f"sizes_px = {self.sizes_px}: must be multiples of 8 px, at least one")
        if wrong := set(self.precisions) - set(get_args(Precision)):
            raise ConfigError(f"precisions = {sorted(wrong)}: allowed are {', '.join(get_args(Precision))}")


def run(config: BenchTokenizeConfig) -> JobResult:
    """A table with one row for each tokenizer, size and precision; see `measure`."""
    from jobs.result import JobResult

    started_s = time.monotonic()
    figures = measure(config)
    return JobResult(
        job="bench tokenize",
        out="",
        planned=len(figures["table"]),
        committed=len(figures["table"]),
        elapsed_s=time.monotonic() - started_s,
        figures=figures,
    )


def measure(config: BenchTokenizeConfig) -> dict[str, Any]:
    """Device, and `table`: rows of tokenizer, its config, size_px, precision, frames_per_s, times_fp32, codes_changed_share and, for
    weights that were given, psnr_db of the reconstructions and psnr_loss_db against those of fp32.

    Raises:
        ConfigError: there is no tokenizer or no frame where the config says, or the published package cannot be had.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = config.tokenizer
    if folder is not None and not (folder / "model.safetensors").exists():
        folder = folder / "model"
    kinds = ["dvae", "vqvae"] if folder is None else [""]
    if config.published and folder is not None and _load(folder, "", device, "fp32").kind != "dvae":
        raise ConfigError(f"published: the package encodes with a dVAE; {folder} holds another tokenizer")
    table: list[dict[str, Any]] = []
    speeds: list[EncodeSpeed] = []
    for size_px in config.sizes_px:
        frames = _clip_frames(config.clips, size_px, config.num_frames) if config.clips else None
        if frames is None:
            frames = zoom_frames(config.num_frames, size_px)
        for kind in kinds:
            for row in _measure_one(config, folder, kind, frames, device):
                log.info("bench tokenize: %s", row)
                table.append(row)
                if row["precision"] != PUBLISHED:
                    same = {name: row[name] for name in ("size_px", "precision", "frames_per_s")}
                    speeds.append(EncodeSpeed(tokenizer=row["config"], num_threads=torch.get_num_threads(), **same))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cost.cpu_name()
    if config.save is not None:
        cost.save(config.save, Measured(encode={name: speeds}))
    return {
        "device": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "weights": "random" if folder is None else str(folder),
        "frames": "zoom" if config.clips is None else str(config.clips),
        "batch_frames": config.batch_frames,
        "table": table,
    }


def _measure_one(
    config: BenchTokenizeConfig, folder: Path | None, kind: str, frames: Tensor, device: torch.device
) -> list[dict[str, Any]]:
    precisions: list[Precision] = ["fp32", *(one for one in dict.fromkeys(config.precisions) if one != "fp32")]
    tokenizers = {one: _load(folder, kind, device, one, frames) for one in precisions}
    exact = tokenizers["fp32"]
    encoders: dict[str, Encode] = {one: tokenizer.encode for one, tokenizer in tokenizers.items()}
    if config.published and isinstance(exact, Dvae):
        encoders[PUBLISHED] = _published_encoder(exact, device)
    codes: dict[str, Tensor] = {}
    taken_s: dict[str, list[float]] = {name: [] for name in encoders}
    with torch.inference_mode():
        for turn in range(config.repeats + 1):
            for name, encode in encoders.items():
                started_s = time.perf_counter()
                parts = [encode(part.to(device)).cpu() for part in frames.split(config.batch_frames)]
                if turn:
                    taken_s[name].append(time.perf_counter() - started_s)
                codes[name] = torch.cat(parts).long()
        psnr_db = {}
        if folder is not None:
            psnr_db = {
                name: _psnr_db(exact, found, frames, device, config.batch_frames) for name, found in codes.items()
            }
    rows = []
    for name, times in taken_s.items():
        row = {
            "tokenizer": exact.kind,
            "config": repr(exact.config),
            "size_px": frames.shape[1],
            "precision": name,
            "frames_per_s": _round(len(frames) / statistics.median(times)),
            "times_fp32": round(statistics.median(taken_s["fp32"]) / statistics.median(times), 2),
            "codes_changed_share": round((codes[name] != codes["fp32"]).float().mean().item(), 6),
        }
        if folder is not None:
            row |= {"psnr_db": round(psnr_db[name], 3), "psnr_loss_db": round(psnr_db["fp32"] - psnr_db[name], 4)}
        rows.append(row)
    return rows


def _load(
    folder: Path | None, kind: str, device: torch.device, precision: Precision, frames: Tensor | None = None
) -> Tokenizer:
    if folder is not None:
        try:
            return load_tokenizer(folder, device, precision)
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(f"tokenizer = {folder}: {error}") from error
    tokenizer = _random_tokenizer(kind, frames)
    tokenizer.place(device, precision)
    return tokenizer


def _random_tokenizer(kind: str, frames: Tensor | None) -> Tokenizer:
    """A tokenizer with the same random weights each time; a VQ-VAE's codes lie on outputs for some of `frames`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "dvae":
            return Dvae(DvaeConfig()).eval()
        tokenizer = Vqvae(VqvaeConfig())
    assert frames is not None
    with torch.no_grad():
        tokenizer.codebook(tokenizer.encoder(tokenizer.normalize(frames[:8])))
    return tokenizer.eval()


def _published_encoder(tokenizer: Dvae, device: torch.device) -> Encode:
    """The package's own encoder, used as its README does, with the weights of `tokenizer`."""
    try:
        package: Any = importlib.import_module("dall_e")
    except ImportError as error:
        raise ConfigError(
            f"published: the package cannot be imported ({error}); pip install --no-deps DALL-E==0.1, and attrs and requests"
        ) from error
    config = tokenizer.config
    encoder = package.Encoder(
        n_hid=config.hidden, n_blk_per_group=config.blocks_per_group, vocab_size=config.codebook_size, device=device
    ).eval()
    with torch.no_grad():
        # Both list their layers in the order in which a frame passes them, skips first.
        for theirs, ours in zip(encoder.parameters(), tokenizer.encoder.parameters(), strict=True):
            theirs.copy_(ours)

    def encode(frames: Tensor) -> Tensor:
        x = frames.permute(0, 3, 1, 2).contiguous().float() / 255
        codes: Tensor = encoder(package.map_pixels(x)).argmax(1)
        return codes

    return encode


def _psnr_db(tokenizer: Tokenizer, codes: Tensor, frames: Tensor, device: torch.device, batch_frames: int) -> float:
    squared = 0.0
    for some_codes, some_frames in zip(codes.split(batch_frames), frames.split(batch_frames), strict=True):
        errors = tokenizer.decode(some_codes.to(device)).cpu().float() - some_frames.float()
        squared += errors.double().square().sum().item()
    return 10 * math.log10(255.0**2 * frames.numel() / max(squared, 1e-6))


def _clip_frames(clips: Path, size_px: int, num_frames: int) -> Tensor:
    """One frame each of clips of the training split: (b H W c) uint8."""
    from pipeline.decode import FrameConfig
    from pipeline.frames import FrameLoader, FrameLoaderConfig

    loader_config = FrameLoaderConfig(frames=FrameConfig(size_px=size_px), batch_size=num_frames, frames_per_clip=1)
    frames: Tensor = FrameLoader(clips, loader_config, rank=0, world_size=1).batch(0)["frames"]
    return frames


def zoom_frames(num_frames: int, size_px: int) -> Tensor:
    """Frames of a zoom into the Mandelbrot set, each 0.8 times as wide as the one before: (b H W c) uint8.

    Unlike noise they have flat areas, edges and detail at every scale, and unlike video they need nothing but torch.
    """
    place = torch.linspace(-1, 1, size_px, dtype=torch.float64)
    widths = 1.6 * 0.8 ** torch.arange(num_frames, dtype=torch.float64).remainder(64)
    centre = torch.complex(*torch.tensor([-0.743643887037151, 0.131825904205330], dtype=torch.float64))
    c = centre + widths[:, None, None] * torch.complex(*torch.meshgrid(place, place, indexing="xy"))
    z, steps = torch.zeros_like(c), torch.zeros(c.shape, dtype=torch.float64)
    for _ in range(100):
        inside = z.real.square() + z.imag.square() < 16
        steps += inside
        z = torch.where(inside, z * z + c, z)
    phases = torch.tensor([0.0, 2.1, 4.2], dtype=torch.float64)
    return ((0.5 - 0.5 * torch.cos(steps[..., None] * 0.2 + phases)) * 255).round().to(torch.uint8)


def _round(value: float) -> float:
    """Three digits that count."""
    return float(f"{value:.3g}")

"""`tokenreel train-tokenizer`: a clip dataset to a VQ-VAE frame tokenizer."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import nn

from jobs.checkpoint import load_ema, load_weights
from jobs.loop import Context, LoopConfig
from jobs.pictures import save_png_grid
from jobs.result import JobResult
from jobs.tracking import DatasetInput
from jobs.training import Task, run_training
from jobs.workers import WorkersConfig
from models.optim import OptimConfig
from models.tokenizers.base import Tokenizer, load_tokenizer
from models.tokenizers.ssim import WINDOW_PX, ssim
from models.tokenizers.vqvae import Vqvae, VqvaeConfig, VqvaeObjective, VqvaeObjectiveConfig
from pipeline.dataset import read_index, read_meta
from pipeline.errors import ConfigError
from pipeline.frames import FrameLoader, FrameLoaderConfig
from pipeline.schema import Split

_PICTURE_FRAMES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTokenizerConfig:
    """Train a VQ-VAE that turns frames into codes (128 px to 16 x 16 by default).

    Run the same command again after a crash: it continues from its last checkpoint with the same losses.
    """

    clips: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CLIPS")]
    """Clip dataset, made by `tokenreel shard`."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the run; the tokenizer ends up in its model/."""
    tokenizer: VqvaeConfig = field(default_factory=VqvaeConfig)
    objective: VqvaeObjectiveConfig = field(default_factory=VqvaeObjectiveConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0))
    loader: FrameLoaderConfig = field(default_factory=FrameLoaderConfig)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=20_000, save_every_steps=500, picture_every_steps=500)
    )
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    perceptual: Path | None = None
    """Folder of another tokenizer (a dVAE, or the model/ of an earlier run), whose features --objective.perceptual-weight
    compares reconstructions by."""
    eval_frames: int = 512
    """Frames, of the validation split where there is one, that the final figures are measured on."""

    def __post_init__(self) -> None:
        if (self.perceptual is None) == (self.objective.perceptual_weight > 0):
            raise ConfigError(
                f"perceptual = {self.perceptual} and objective.perceptual_weight = {self.objective.perceptual_weight}: "
                "the weight needs a tokenizer for its features, and the tokenizer a weight of more than 0"
            )
        if self.loop.recompute or self.loop.compile == "on" or self.loop.parallel == "fsdp":
            raise ConfigError(
                f"loop.recompute = {self.loop.recompute}, loop.compile = {self.loop.compile}, loop.parallel = "
                f"{self.loop.parallel}: a VQ-VAE has no repeated layers for them; leave them out"
            )


def run(config: TrainTokenizerConfig) -> JobResult:
    meta = read_meta(config.clips, kind="clips", complete=True)
    FrameLoader(config.clips, config.loader, rank=0, world_size=config.workers.fewest)  # fails here, not on workers
    uri = str(config.clips.resolve())
    inputs = [DatasetInput(name=config.clips.name, fingerprint=meta.fingerprint, uri=uri, content=meta.content)]
    if (network := _load_perceptual(config)) is not None:
        assert config.perceptual is not None
        folder = config.perceptual.resolve()
        config = replace(config, perceptual=folder)
        fingerprint = network.fingerprint()
        inputs.append(DatasetInput(name=folder.name, fingerprint=fingerprint, uri=str(folder), context="perceptual"))
    return run_training(
        "train-tokenizer",
        config.out,
        config,
        functools.partial(_build, replace(config, clips=config.clips.resolve())),
        inputs,
        functools.partial(_export, config),
        functools.partial(_conclude, config),
        name=f"train-tokenizer {config.out.name}",
        num_parts=config.loader.batch_size // config.loader.frames_per_clip,
        make_objective=functools.partial(_make_objective, config),
    )


def _build(config: TrainTokenizerConfig, context: Context) -> Task:
    batches = FrameLoader(config.clips, config.loader, rank=context.rank, world_size=context.world_size)
    network = _load_perceptual(config, context.device)
    objective = VqvaeObjective(Vqvae(config.tokenizer), config.objective, network)
    fixed = batches.batch(0)["frames"][:: max(1, config.loader.frames_per_clip)][:_PICTURE_FRAMES]

    def draw(module: nn.Module, step: int) -> None:
        assert isinstance(module, VqvaeObjective)
        frames = fixed.to(context.device)
        decoded = module.tokenizer.decode(module.tokenizer.encode(frames))
        strips = [fixed.numpy(), decoded.cpu().numpy()]
        save_png_grid(
            context.run / "pictures" / f"reconstructions_{step:08d}.png", [strips], ["original", "reconstruction"]
        )

    return Task(objective=objective, batches=batches, draw=draw)


def _load_perceptual(config: TrainTokenizerConfig, device: str | torch.device = "cpu") -> Tokenizer | None:
    if config.perceptual is None:
        return None
    try:
        network = load_tokenizer(config.perceptual, device)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"perceptual = {config.perceptual}: {error}") from error
    if config.loader.frames.size_px % network.patch:
        raise ConfigError(
            f"perceptual = {config.perceptual}: its patch of {network.patch} px does not divide loader.frames.size_px = "
            f"{config.loader.frames.size_px}"
        )
    return network


def _make_objective(config: TrainTokenizerConfig) -> VqvaeObjective:
    """What is trained, for the sake of its weights alone: without the network of the perceptual loss."""
    return VqvaeObjective(Vqvae(config.tokenizer), VqvaeObjectiveConfig())


def _export(config: TrainTokenizerConfig, checkpoint: Path, folder: Path) -> None:
    objective = _make_objective(config)
    load_weights(checkpoint, objective)
    if config.loop.ema_decay:
        load_ema(checkpoint, objective)
    objective.tokenizer.eval().save(folder)


def _conclude(config: TrainTokenizerConfig) -> dict[str, Any]:
    """Measure the tokenizer, on frames that it was not trained on where the dataset has some."""
    tokenizer = load_tokenizer(config.out / "model")
    assert isinstance(tokenizer, Vqvae)
    split: Split = "val" if "val" in read_index(config.clips, ["split"])["split"].to_pylist() else "train"
    return {"tokenizer_fingerprint": tokenizer.fingerprint(), "eval_split": split, **_measure(tokenizer, config, split)}


def _measure(tokenizer: Vqvae, config: TrainTokenizerConfig, split: Split) -> dict[str, float]:
    """PSNR over all pixels, mean SSIM on luma (null for frames smaller than its window), and how codes are used."""
    per_clip = config.loader.frames_per_clip
    loader_config = replace(config.loader, split=split, batch_size=per_clip * 4)
    loader = FrameLoader(config.clips, loader_config, rank=0, world_size=1)
    squared, count = 0.0, 0
    alike: list[torch.Tensor] = []
    uses = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    for step in range(max(1, config.eval_frames // loader_config.batch_size)):
        frames = loader.batch(step)["frames"]
        codes = tokenizer.encode(frames)
        decoded = tokenizer.decode(codes)
        errors = (decoded.float() - frames.float()) / 255.0
        squared, count = squared + float(errors.square().sum()), count + errors.numel()
        if config.loader.frames.size_px >= WINDOW_PX:
            alike.append(ssim(frames, decoded))
        uses += torch.bincount(codes.flatten().long(), minlength=tokenizer.codebook_size)
    share = (uses / uses.sum()).numpy()
    entropy = -float(np.sum(share[share > 0] * np.log(share[share > 0])))
    return {
        "psnr_db": 10 * float(np.log10(count / max(squared, 1e-12))),
        "ssim": float(torch.cat(alike).mean()) if alike else math.nan,
        "codebook_perplexity": float(np.exp(entropy)),
        "codebook_used_share": float((share > 0).mean()),
    }

"""train-tokenizer's parts that need no cluster: its final figures, and the tokenizer behind the perceptual loss."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.loop import Context
from jobs.train_tokenizer import TrainTokenizerConfig, _build, _measure, run
from models.tokenizers.ssim import ssim
from models.tokenizers.vqvae import Vqvae, VqvaeConfig, VqvaeObjectiveConfig
from pipeline.decode import FrameConfig
from pipeline.errors import ConfigError
from pipeline.frames import FrameLoader, FrameLoaderConfig
from tests.corpora import make_clip
from tests.pipeline.datasets import make_clip_dataset

TINY = VqvaeConfig(channels=8, codebook_size=16, code_dim=4)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainTokenizerConfig:
    folder = tmp_path_factory.mktemp("train-tokenizer")
    (folder / "corpus").mkdir()
    for n in range(2):
        make_clip(folder / "corpus" / f"{n}.mp4", seconds=2, size="64x48", seed=n)
    clips = make_clip_dataset(folder / "corpus", folder / "clips", [["0.mp4", "1.mp4"]])
    loader = FrameLoaderConfig(frames=FrameConfig(fps=5, size_px=32), batch_size=8, frames_per_clip=4)
    return TrainTokenizerConfig(clips=clips, out=folder / "run", tokenizer=TINY, loader=loader, eval_frames=32)


def make_tokenizer(config: TrainTokenizerConfig) -> Vqvae:
    torch.manual_seed(0)
    tokenizer = Vqvae(TINY)
    frames = FrameLoader(config.clips, config.loader, rank=0, world_size=1).batch(0)["frames"]
    with torch.no_grad():
        tokenizer.codebook(tokenizer.encoder(tokenizer.normalize(frames)))
    return tokenizer.eval()


def test_final_figures(config: TrainTokenizerConfig) -> None:
    tokenizer = make_tokenizer(config)
    found = _measure(tokenizer, config, "train")
    loader = FrameLoader(config.clips, replace(config.loader, batch_size=16), rank=0, world_size=1)
    frames = torch.cat([loader.batch(step)["frames"] for step in range(2)])
    codes = tokenizer.encode(frames)
    decoded = tokenizer.decode(codes)
    error = np.mean((decoded.numpy() / 255 - frames.numpy() / 255) ** 2)
    share = np.bincount(codes.numpy().ravel(), minlength=16) / codes.numel()
    assert found["psnr_db"] == pytest.approx(-10 * math.log10(error), abs=1e-3)
    assert found["ssim"] == pytest.approx(ssim(frames, decoded).mean().item(), abs=1e-9)
    assert found["codebook_used_share"] == (share > 0).mean()
    assert found["codebook_perplexity"] == pytest.approx(np.exp(-sum(p * np.log(p) for p in share if p)))
    small = replace(config, loader=replace(config.loader, frames=FrameConfig(fps=5, size_px=8)))
    assert math.isnan(_measure(tokenizer, small, "train")["ssim"])  # its window is 11 px wide


def test_perceptual_loss_reaches_the_workers(config: TrainTokenizerConfig, tmp_path: Path) -> None:
    make_tokenizer(config).save(tmp_path / "network")
    asked = replace(
        config,
        objective=VqvaeObjectiveConfig(perceptual_weight=0.5),
        perceptual=tmp_path / "network",
        out=tmp_path / "run",
    )
    task = _build(asked, Context(run=tmp_path))
    losses = task.objective(task.batches.batch(0))["losses"]
    assert losses["perceptual"] > 0
    with pytest.raises(
        ConfigError, match=r"perceptual = None and objective\.perceptual_weight = 0\.5: the weight needs"
    ):
        replace(asked, perceptual=None)
    with pytest.raises(ConfigError, match=r"perceptual_weight = 0\.0: .* the tokenizer a weight of more than 0"):
        replace(config, perceptual=tmp_path / "network")
    with pytest.raises(ConfigError, match=r"perceptual = .*config\.json is missing"):
        run(replace(asked, perceptual=tmp_path))
    Vqvae(replace(TINY, patch=16)).save(tmp_path / "coarse")
    frames = replace(asked.loader, frames=FrameConfig(size_px=40))
    with pytest.raises(ConfigError, match=r"patch of 16 px does not divide loader\.frames\.size_px = 40"):
        run(replace(asked, loader=frames, perceptual=tmp_path / "coarse"))


@pytest.mark.parametrize("setting", [{"recompute": True}, {"compile": "on"}, {"parallel": "fsdp"}])
def test_what_works_on_repeated_layers_is_refused(setting: dict[str, Any], config: TrainTokenizerConfig) -> None:
    with pytest.raises(ConfigError, match="a VQ-VAE has no repeated layers"):
        replace(config, loop=replace(config.loop, **setting))

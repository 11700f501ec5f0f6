"""`tokenreel tokenize`: a clip dataset and a tokenizer to a token dataset."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from jobs.cluster import connect, count
from jobs.config import save_config, to_plain
from jobs.data_job import DataJob
from jobs.result import JobResult
from jobs.tracking import DatasetInput
from models.tokenizers.base import load_tokenizer
from pipeline.dataset import read_meta
from pipeline.errors import ConfigError
from pipeline.tokenizing import Encode, TokenizeSettings, describe_tokens

log = logging.getLogger(__name__)
TOKENIZER_FOLDER = "tokenizer"
"""Where a token dataset keeps a copy of its tokenizer, so that its tokens can be shown without anything else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeConfig:
    """Turn clips into tokens (uint16, t x h x w), written once and read by windows.

    Run the same command again after a crash: finished shards stay, the others are made, byte for byte the same.
    """

    clips: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CLIPS")]
    """Clip dataset, made by `tokenreel shard`."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write the token dataset to."""
    tokenizer: Path
    """Folder of a tokenizer, or of the run that trained or imported it."""
    settings: Annotated[TokenizeSettings, tyro.conf.arg(name="")] = field(default_factory=TokenizeSettings)
    num_encoders: int = 0
    """Encoders, one GPU each, or one CPU each where there is none; 0 takes every GPU, or every second CPU."""
    max_reject_fraction: float = 0.1
    """More rejects than this share of the planned clips make the exit code 3."""

    def __post_init__(self) -> None:
        if self.num_encoders < 0 or not 0 <= self.max_reject_fraction <= 1:
            raise ConfigError(
                f"num_encoders = {self.num_encoders} must be 0 or more, max_reject_fraction = {self.max_reject_fraction} in [0, 1]"
            )


def run(config: TokenizeConfig) -> JobResult:
    clips = read_meta(config.clips, kind="clips", complete=True)
    folder = find_tokenizer(config.tokenizer)
    tokenizer = load_tokenizer(folder)
    if config.settings.frames.size_px % tokenizer.patch:
        raise ConfigError(
            f"frames.size_px = {config.settings.frames.size_px} is no multiple of the tokenizer's patch of {tokenizer.patch} px"
        )
    identity: dict[str, Any] = {
        "fingerprint": tokenizer.fingerprint(),
        "codebook_size": tokenizer.codebook_size,
        "patch": tokenizer.patch,
    }
    meta = describe_tokens(clips, to_plain(config.settings), identity)
    meta.extra["clips"] = os.path.relpath(config.clips.resolve(), config.out.resolve())
    inputs = [
        DatasetInput(name=config.clips.name, fingerprint=clips.fingerprint, uri=str(config.clips.resolve())),
        DatasetInput(
            name=config.tokenizer.name,
            fingerprint=identity["fingerprint"],
            uri=str(config.tokenizer.resolve()),
            context="tokenizer",
        ),
    ]
    with DataJob.open("tokenize", config.out, meta, to_plain(config), inputs) as job:
        save_config(config.out, config)
        shutil.copytree(folder, config.out / TOKENIZER_FOLDER, dirs_exist_ok=True)
        if job.todo:
            from pipeline.stages import run_tokenize

            with connect(), job.progress("clips") as on_shard:
                num_encoders, resources = _place_encoders(config.num_encoders)
                make_encode = functools.partial(
                    _make_encode, folder.resolve(), "cuda" if "num_gpus" in resources else "cpu"
                )
                run_tokenize(
                    config.clips.resolve(), config.out.resolve(), job.meta, config.settings, make_encode, job.todo, on_shard,
                    num_encoders, resources,
                )  # fmt: skip
        result = job.finish([], config.max_reject_fraction)
    side = config.settings.frames.size_px // tokenizer.patch
    result.figures["tokens"] = result.figures["frames"] * side * side
    return result


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer in `folder`, or in the `model/` of a run."""
    for candidate in (folder / "model", folder):
        if (candidate / "model.safetensors").exists():
            return candidate
    raise ConfigError(
        f"--tokenizer {folder}: no tokenizer there; give the folder that `tokenreel train-tokenizer` or `tokenreel import-dvae` wrote"
    )


def _place_encoders(wanted: int) -> tuple[int, dict[str, float]]:
    """How many encoders, and the Ray resources of each. Decoding needs a CPU that no encoder holds."""
    gpus, cpus = int(count("GPU")), int(count("CPU"))
    if gpus:
        return wanted or gpus, {"num_gpus": 1, "num_cpus": 0}
    encoders = wanted or max(1, cpus // 2)
    return encoders, {"num_cpus": 1 if encoders < cpus else 0}


def _make_encode(folder: Path, device: str) -> Encode:
    tokenizer = load_tokenizer(folder, device)

    def encode(frames: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return tokenizer.encode(torch.from_numpy(frames).to(device)).cpu().numpy()

    return encode

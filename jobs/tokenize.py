"""`tokenreel tokenize`: a clip dataset and a tokenizer to a token dataset."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from jobs.cluster import connect, count
from jobs.config import to_plain
from jobs.data_job import DataJob, RejectPolicy
from jobs.folder import lock_folder, work_folder
from jobs.result import JobResult
from jobs.tracking import DatasetInput
from models.tokenizers.base import Precision, Tokenizer, load_tokenizer
from pipeline.dataset import Place, committed_shards, read_index, read_meta
from pipeline.errors import ConfigError
from pipeline.quality import keep_mask
from pipeline.schema import SCORES
from pipeline.storage import Store
from pipeline.tokenizing import Encode, TokenizeSettings, describe_tokens

log = logging.getLogger(__name__)
TOKENIZER_FOLDER = "tokenizer"
"""Where a token dataset keeps a copy of its tokenizer, so that its tokens can be shown without anything else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeConfig:
    """Turn clips into tokens (uint16, t x h x w), written once and read by windows.

    Run the same command again after a crash: finished shards stay, the others are made, byte for byte the same.
    """

    clips: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CLIPS")]
    """Clip dataset, made by `tokenreel shard`; a path, or s3://, gs://, abfs://."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write the token dataset to; a path that all nodes share, or s3://, gs://, abfs://."""
    tokenizer: Path
    """Folder of a tokenizer, or of the run that trained or imported it."""
    settings: Annotated[TokenizeSettings, tyro.conf.arg(name="")] = field(default_factory=TokenizeSettings)
    num_encoders: int = 0
    """Encoders, one GPU each, or one CPU each where there is none; 0 takes every GPU, or every second CPU."""
    rejects: Annotated[RejectPolicy, tyro.conf.arg(name="")] = field(default_factory=RejectPolicy)

    def __post_init__(self) -> None:
        if self.num_encoders < 0:
            raise ConfigError(f"num_encoders = {self.num_encoders}: must be 0 or more")


def run(config: TokenizeConfig) -> JobResult:
    source, out = Store.at(config.clips), Store.at(config.out)
    clips = read_meta(source, kind="clips", complete=True)
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
    if config.settings.keep.given():  # a threshold on clips that were never scored would filter all of them
        keep_mask(read_index(source, [f"score_{name}" for name in SCORES]), config.settings.keep)
    both_local = source.is_local and out.is_local
    meta.extra["clips"] = os.path.relpath(source.path().resolve(), out.path().resolve()) if both_local else source.url
    inputs = [
        DatasetInput(name=source.name, fingerprint=clips.fingerprint, uri=source.url),
        DatasetInput(
            name=config.tokenizer.name,
            fingerprint=identity["fingerprint"],
            uri=str(config.tokenizer.resolve()),
            context="tokenizer",
        ),
    ]
    contents = {shard: info.content for shard, info in committed_shards(source, clips.fingerprint).items()}
    with (
        lock_folder(work_folder(out)),
        DataJob.open("tokenize", out, meta, config, inputs, policy=config.rejects, parent_contents=contents) as job,
    ):
        for path in folder.iterdir():
            out.write(f"{TOKENIZER_FOLDER}/{path.name}", path.read_bytes())
        if job.todo:
            from pipeline.stages import run_tokenize

            with connect(), job.progress() as on_shard:
                num_encoders, resources = _place_encoders(config.num_encoders)
                make_encode = functools.partial(
                    _make_encode,
                    folder.resolve(),
                    "cuda" if "num_gpus" in resources else "cpu",
                    config.settings.precision,
                )
                run_tokenize(
                    source, out, job.meta, config.settings, make_encode, job.todo, on_shard, num_encoders, resources
                )
        result = job.finish()
    side = config.settings.frames.size_px // tokenizer.patch
    result.figures["tokens"] = result.figures.get("frames", 0) * side * side
    return result


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer in `folder`, or in the `model/` of a run."""
    for candidate in (folder / "model", folder):
        if (candidate / "model.safetensors").exists():
            return candidate
    raise ConfigError(
        f"--tokenizer {folder}: no tokenizer there; give the folder that `tokenreel train-tokenizer` or `tokenreel import-dvae` wrote"
    )


def load_dataset_tokenizer(place: Place, device: torch.device) -> Tokenizer:
    """The tokenizer that made a token dataset, from the copy that stands in it."""
    store = Store.at(place)
    if store.is_local:
        return load_tokenizer(store.path(TOKENIZER_FOLDER), device)
    return load_tokenizer(_fetch_tokenizer(store).name, device)


@functools.cache
def _fetch_tokenizer(store: Store) -> tempfile.TemporaryDirectory[str]:
    """The tokenizer's files of a remote dataset; once a process, and gone with it."""
    folder = tempfile.TemporaryDirectory(prefix="tokenreel-tokenizer-")
    for entry in store.list(TOKENIZER_FOLDER):
        (Path(folder.name) / Path(entry.name).name).write_bytes(store.read(entry.name))
    return folder


def _place_encoders(wanted: int) -> tuple[int, dict[str, float]]:
    """How many encoders, and the Ray resources of each. Decoding needs a CPU that no encoder holds."""
    gpus, cpus = int(count("GPU")), int(count("CPU"))
    if gpus:
        return wanted or gpus, {"num_gpus": 1, "num_cpus": 0}
    encoders = wanted or max(1, cpus // 2)
    return encoders, {"num_cpus": 1 if encoders < cpus else 0}


def _make_encode(folder: Path, device: str, precision: Precision) -> Encode:
    tokenizer = load_tokenizer(folder, device, precision)

    def encode(frames: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return tokenizer.encode(torch.from_numpy(frames).to(device)).cpu().numpy()

    return encode

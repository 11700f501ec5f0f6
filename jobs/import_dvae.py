"""`tokenreel import-dvae`: the published files of the DALL-E dVAE to a tokenizer."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.folder import lock_folder
from jobs.result import JobResult
from models.tokenizers.base import CONFIG_FILE, load_tokenizer
from models.tokenizers.import_dvae import build_published
from models.tokenizers.published import PublishedFileError, read_published
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportDvaeConfig:
    """Turn the published encoder.pkl and decoder.pkl of the DALL-E dVAE into a tokenizer (128 px to 16 x 16 codes).

    The files are pickles, which can run code when they are loaded. Nothing in them is run here.
    """

    encoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")]
    """The published encoder.pkl."""
    decoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DECODER")]
    """The published decoder.pkl."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write to; the tokenizer ends up in its model/."""


def run(config: ImportDvaeConfig) -> JobResult:
    """Write OUT/model, or confirm the one that is there; one of other weights is never replaced.

    Raises:
        ConfigError: a file is missing or is not what was published, or OUT holds another tokenizer.
    """
    started = time.monotonic()
    try:
        tokenizer = build_published(read_published(config.encoder), read_published(config.decoder))
    except (FileNotFoundError, PublishedFileError) as error:
        raise ConfigError(f"import-dvae: {error}") from error
    fingerprint = tokenizer.fingerprint()
    folder = config.out / "model"
    with lock_folder(config.out):
        if (folder / CONFIG_FILE).exists():
            _check_same(folder, fingerprint)
        else:
            tokenizer.save(folder)
    return JobResult(
        job="import-dvae",
        out=str(config.out),
        fingerprint=fingerprint,
        elapsed_s=time.monotonic() - started,
        figures={
            "tokenizer": asdict(tokenizer.config),
            "patch_px": tokenizer.patch,
            "parameters": sum(value.numel() for value in tokenizer.parameters()),
        },
    )


def _check_same(folder: Path, fingerprint: str) -> None:
    try:
        found = load_tokenizer(folder).fingerprint()
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"import-dvae: {folder} is damaged; remove it and run again ({error})") from error
    if found != fingerprint:
        raise ConfigError(
            f"import-dvae: {folder} holds a tokenizer with fingerprint {found}, the given files make {fingerprint}; "
            "choose another folder"
        )

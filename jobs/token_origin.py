"""What a token dataset was made from: its settings, its tokenizer, and the frames of its clips."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.config import from_plain
from models.tokenizers.base import CONFIG_FILE, WEIGHTS_FILE, Precision, Tokenizer, load_tokenizer
from pipeline.dataset import DatasetMeta, Place
from pipeline.schema import SCHEMA_VERSION, Reject
from pipeline.shards import read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clip
from pipeline.untrusted import open_member

TOKENIZER_FOLDER = "tokenizer"
"""Where a token dataset keeps a copy of its tokenizer, so that its tokens can be shown without anything else."""


def settings_of(meta: DatasetMeta) -> TokenizeSettings:
    """The settings that are part of a token dataset's identity; limits, which are not, have their defaults."""
    plain = {name: value for name, value in meta.config.items() if name != "tokenizer"}
    settings = from_plain(plain, TokenizeSettings, "dataset.json")
    if meta.schema_version == SCHEMA_VERSION:
        return settings
    return replace(settings, frames=replace(settings.frames, pick="nearest"))  # format 3 knew no other rule


@contextlib.contextmanager
def _kept_tokenizer(store: Store) -> Iterator[Path]:
    """A local folder with the tokenizer that a token dataset keeps, for the body."""
    if store.is_local:
        yield store.path(TOKENIZER_FOLDER)
        return
    with tempfile.TemporaryDirectory(prefix="tokenreel-") as folder:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with open_member(store, f"{TOKENIZER_FOLDER}/{name}") as source, Path(folder, name).open("wb") as copy:
                shutil.copyfileobj(source, copy)
        yield Path(folder)


def load_kept_tokenizer(place: Place, device: str | torch.device = "cpu", precision: Precision = "fp32") -> Tokenizer:
    """The tokenizer that a token dataset keeps; arguments and errors are those of `load_tokenizer`."""
    with _kept_tokenizer(Store.at(place)) as folder:
        return load_tokenizer(folder, device, precision)


def original_frames(clips: Store, meta: DatasetMeta, row: Mapping[str, Any]) -> np.ndarray | Reject:
    """All frames of one sample, uint8 (t h w c), as tokenizing saw them, or why they cannot be decoded.

    Args:
        clips: see `pipeline.dataset.find_parent`.
        meta: of the token dataset.
        row: index row of the sample, with its `shard`.
    """
    settings = settings_of(meta)
    # A token shard is made of the clip shard of the same number, and names each clip by its payload.
    for clip in read_shard_rows(clips, row["shard"]):
        if clip["sha256"] == row["clip_sha256"]:
            return decode_clip(clips, clip, settings, settings.view(row["view"]))
    return Reject(path=row["source"], key=row["key"], stage="tokenize", reject_class="corrupt", reason="no such clip")

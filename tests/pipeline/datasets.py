"""Small datasets for tests, made by the code that makes real ones, with contents of which a test knows every value."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset import DatasetMeta, create_or_resume, finish
from pipeline.ledger import Ledger
from pipeline.schema import SCORES, VideoRef
from pipeline.sharding import ShardSettings, write_clip_shard
from pipeline.shards import ShardWriter, tar_name
from pipeline.storage import Store

GRID = (2, 3)
PAD = 60_000


def describe(kind: str = "tokens", num_shards: int = 1, **changes: Any) -> DatasetMeta:
    values = {
        "kind": kind,
        "fingerprint": "f" * 32,
        "config": {"frames": {"fps": 2.0}, "batch_frames": 4},
        "parent_fingerprint": "p" * 32,
        "inputs_digest": "i" * 32,
        "num_shards": num_shards,
        "extra": {"tokenizer": {"fingerprint": "t" * 32, "codebook_size": 2**16, "patch": 16}}
        if kind == "tokens"
        else {},
    }
    return DatasetMeta(**{**values, **changes})


def make_row(key: str, num_frames: int = 3, **changes: Any) -> dict[str, Any]:
    """An index row of a token dataset; the key begins with the video's id, hex digits."""
    row = {
        "key": key,
        "video_id": key.partition("-")[0],
        "source": f"{key}.mp4",
        "start_s": 0.0,
        "end_s": num_frames / 2,
        "num_frames": num_frames,
        "height": GRID[0],
        "width": GRID[1],
        "fps": 2.0,
        "caption": None,
        "label": None,
        "split": "train",
        "extra": None,
        **{f"score_{name}": None for name in SCORES},
        "clip_key": key,
        "view": "",
        "clip_sha256": "c" * 64,
    }
    return {**row, **changes}


def shard_path(folder: Path, shard: int, split: str = "train") -> Path:
    """Where the tar of a split of a shard lies in a local dataset."""
    return folder / tar_name(shard, split)


def make_codes(sample: int, num_frames: int) -> np.ndarray:
    """(t h w) codes that say whose they are: the first of each frame is the sample, the second the frame."""
    codes = np.full((num_frames, *GRID), 7, np.uint16)
    codes[:, 0, 0] = sample
    codes[:, 0, 1] = np.arange(num_frames)
    return codes


def add_codes(writer: ShardWriter, row: dict[str, Any], codes: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, codes, allow_pickle=False)
    writer.add(row, "tokens.npy", buffer.getvalue(), buffer.tell() - codes.nbytes)


def open_writer(place: Store | Path | str, shard: int = 0, kind: str = "tokens") -> ShardWriter:
    """A writer of a shard of the dataset that `describe` describes."""
    return ShardWriter(Store.at(place), kind, "f" * 32, shard)


def make_token_dataset(
    folder: Path, shards: Sequence[Sequence[int]], *, splits: Sequence[str] = (), **meta: Any
) -> Path:
    """A finished token dataset whose shard i holds samples of `shards[i]` frames; sample n has key `n`."""
    described = create_or_resume(folder, describe(num_shards=len(shards), **meta))
    sample = 0
    for shard, lengths in enumerate(shards):
        writer = ShardWriter(Store.at(folder), "tokens", described.fingerprint, shard)
        for num_frames in lengths:
            split = splits[sample] if splits else "train"
            add_codes(writer, make_row(f"{sample:05d}", num_frames, split=split), make_codes(sample, num_frames))
            sample += 1
        writer.commit(len(lengths), [])
    finish(folder, described, Ledger())
    return folder


def make_clip_dataset(corpus: Path, folder: Path, shards: Sequence[Sequence[VideoRef | str]]) -> Path:
    """A finished clip dataset that holds the videos `shards[i]` of `corpus` in shard i, as they are."""
    meta = create_or_resume(folder, describe("clips", len(shards), fingerprint="a" * 32, parent_fingerprint=""))
    settings = ShardSettings()
    for shard, videos in enumerate(shards):
        refs = [VideoRef(path=video) if isinstance(video, str) else video for video in videos]
        write_clip_shard(Store.at(folder), meta.fingerprint, shard, Store.at(corpus), refs, settings)
    finish(folder, meta, Ledger())
    return folder

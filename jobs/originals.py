"""The frames that tokens were made from, where their clip dataset is still at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.dataset import DatasetMeta
from pipeline.decode import FrameConfig
from pipeline.schema import Reject
from pipeline.shards import read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import Decoded, TokenizeSettings, decode_clip


def original_frames(clips: Store, meta: DatasetMeta, row: Mapping[str, Any]) -> Decoded:
    """All frames of one sample, uint8 (t h w c), as tokenizing saw them, or why they cannot be decoded.

    Args:
        clips: see `pipeline.dataset.find_parent`.
        meta: of the token dataset.
        row: index row of the sample, with its `shard`.
    """
    # A token shard is made of the clip shard of the same number, and names each clip by its payload.
    for clip in read_shard_rows(clips, row["shard"]):
        if clip["sha256"] == row["clip_sha256"]:
            settings = TokenizeSettings(frames=replace(FrameConfig(), **meta.config["frames"]))
            return decode_clip(clips, clip, settings)
    return Reject(path=row["source"], key=row["key"], stage="tokenize", reject_class="corrupt", reason="no such clip")

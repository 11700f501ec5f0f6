"""The videos of a shard plan: where each lies and how large it is, and the rows of some of them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.plan_file import read_plan_shards
from pipeline.schema import VideoRef
from pipeline.spill import is_new


def read_videos(plan: Path) -> tuple[np.ndarray, np.ndarray]:
    """(shard, size in bytes) of each video of `plan.parquet`, in its order; all sizes 1 where one is not known."""
    shards, sizes, last = [], [], None
    with pq.ParquetFile(plan) as parquet:
        for batch in parquet.iter_batches(columns=["shard", "path", "size_bytes"]):
            table = pa.Table.from_batches([batch])
            first = is_new(table["path"])
            if len(first):
                first[0] = table["path"][0].as_py() != last
                last = table["path"][-1].as_py()
            shards.append(table["shard"].to_numpy()[first])
            sizes.append(table["size_bytes"].cast(pa.float64()).to_numpy()[first])
    size = np.concatenate(sizes) if sizes else np.zeros(0)
    return np.concatenate(shards) if shards else np.zeros(0, int), np.ones(len(size)) if np.isnan(size).any() else size


def read_refs(plan: Path, shards: np.ndarray, videos: Iterable[int]) -> dict[int, list[VideoRef]]:
    """The rows of these videos, by their number in `shards`, which is `read_videos`'s."""
    wanted: dict[int, dict[int, int]] = defaultdict(dict)
    for video in videos:
        shard = int(shards[video])
        wanted[shard][int(video - np.searchsorted(shards, shard))] = int(video)
    found = {}
    for shard, refs in read_plan_shards(plan, sorted(wanted)):
        for place, (_, rows) in enumerate(itertools.groupby(refs, key=lambda ref: ref.path)):
            if place in wanted[shard]:
                found[wanted[shard][place]] = list(rows)
    return found

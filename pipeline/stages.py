"""The Ray part of shard and tokenize. What happens to one shard is plain code elsewhere; here is only who does it."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from pipeline.dataset import DatasetMeta
from pipeline.ledger import Ledger, OnShard
from pipeline.schema import VideoRef
from pipeline.sharding import ShardPlan, ShardSettings, write_clip_shard
from pipeline.tokenizing import Decoded, Encode, TokenizeSettings, decode_clip, read_clip_rows, write_token_shard


def run_shard(
    plan: ShardPlan, out: Path, meta: DatasetMeta, settings: ShardSettings, todo: list[int], on_shard: OnShard
) -> None:
    """Write the shards `todo` of `plan`, one Ray Data item each, on all CPUs of the cluster.

    A killed worker's shard is done again by Ray; nothing of its first try can be seen.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the job shows its own, with reject counts
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would report that, and its execution plan, as news
    items = [{"shard": shard, "refs": json.dumps([asdict(ref) for ref in plan.items[shard]])} for shard in todo]

    def write(item: dict[str, Any]) -> dict[str, Any]:
        refs = [VideoRef(**ref) for ref in json.loads(item["refs"])]
        ledger = write_clip_shard(out, meta, item["shard"], plan_root, refs, settings)
        return {"shard": item["shard"], "ledger": json.dumps(ledger.to_json())}

    plan_root = plan.root  # so that the closure carries the folder's name, not the whole plan
    # One block an item: a block is what Ray schedules, retries and reports.
    for row in ray.data.from_items(items, override_num_blocks=len(items)).map(write, num_cpus=1).iter_rows():
        on_shard(int(row["shard"]), Ledger.from_json(json.loads(row["ledger"])))


def run_tokenize(
    clips: Path,
    out: Path,
    meta: DatasetMeta,
    settings: TokenizeSettings,
    make_encode: Callable[[], Encode],
    todo: list[int],
    on_shard: OnShard,
    num_encoders: int,
    encoder_resources: dict[str, float],
) -> None:
    """Write the token shards `todo`: `num_encoders` actors encode, and fan decoding out to all CPUs.

    Each actor works on two shards at a time, so the decoding of the next one starts before this one ends.
    """
    encoder_class = ray.remote(_Encoder).options(
        max_concurrency=2, max_restarts=-1, max_task_retries=-1, **encoder_resources
    )
    encoders: list[Any] = [
        encoder_class.remote(clips, out, meta, settings, make_encode) for _ in range(min(num_encoders, len(todo)))
    ]
    waiting = deque(todo)
    running: dict[ray.ObjectRef, tuple[int, Any]] = {}

    def start_next(encoder: Any) -> None:
        if waiting:
            shard = waiting.popleft()
            running[encoder.write_shard.remote(shard)] = (shard, encoder)

    for encoder in [*encoders, *encoders]:
        start_next(encoder)
    while running:
        done = ray.wait(list(running))[0][0]
        shard, encoder = running.pop(done)
        on_shard(shard, Ledger.from_json(ray.get(done)))
        start_next(encoder)


_DECODE_WINDOW = 8
"""Clips of one shard that are decoded ahead of the encoder; bounds the frames that wait in the object store."""


class _Encoder:
    """Owns a tokenizer and the shards it is asked to write."""

    def __init__(
        self, clips: Path, out: Path, meta: DatasetMeta, settings: TokenizeSettings, make_encode: Callable[[], Encode]
    ) -> None:
        self._clips, self._out, self._meta, self._settings = clips, out, meta, settings
        self._encode = make_encode()
        self._device = threading.Lock()

    def write_shard(self, shard: int) -> dict[str, Any]:
        rows = read_clip_rows(self._clips, shard)
        decoded = self._decode_ahead(rows)
        return write_token_shard(
            self._out, self._meta, shard, rows, decoded, self._encode_alone, self._settings
        ).to_json()

    def _encode_alone(self, frames: np.ndarray) -> np.ndarray:
        with self._device:
            return self._encode(frames)

    def _decode_ahead(self, rows: list[dict[str, Any]]) -> Iterator[Decoded]:
        window: deque[ray.ObjectRef] = deque()
        for row in rows:
            window.append(_decode_task.remote(self._clips, row, self._settings))
            if len(window) > _DECODE_WINDOW:
                yield ray.get(window.popleft())
        while window:
            yield ray.get(window.popleft())


@ray.remote(num_cpus=1, max_retries=5)
def _decode_task(clips: Path, row: dict[str, Any], settings: TokenizeSettings) -> Decoded:
    return decode_clip(clips, row, settings)

"""The Ray part of shard and tokenize. What happens to one shard is plain code elsewhere; here is only who does it."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import ray

from pipeline.dataset import DatasetMeta
from pipeline.errors import TokenreelError
from pipeline.schema import VideoRef
from pipeline.sharding import ShardSettings, write_clip_shard
from pipeline.shards import Written, read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import Decoded, Encode, TokenizeSettings, decode_clip, write_token_shard

OnShard = Callable[[Written], None]
"""Told of each committed shard. An error that it raises ends the stage."""


def run_shard(
    corpus: Store,
    out: Store,
    meta: DatasetMeta,
    settings: ShardSettings,
    items: Iterator[tuple[int, list[VideoRef]]],
    retry: Collection[str],
    on_shard: OnShard,
) -> None:
    """Write the shards of `items`, (number, inputs), one task each, on all CPUs of the cluster.

    A killed worker's shard is done again by Ray, on another node where its node is lost; nothing of its first try can
    be seen. Twice as many tasks are queued as there are CPUs, so the driver's memory does not grow with the plan, and a
    cluster that can grow sees that there is more to do.
    """
    arguments = ray.put((corpus, out, meta.fingerprint, settings, tuple(retry)))
    running: set[ray.ObjectRef] = set()
    try:
        while True:
            room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(running)
            running.update(_shard_task.remote(arguments, *item) for item in itertools.islice(items, max(0, room)))
            if not running:
                return
            done = ray.wait(list(running))[0][0]
            running.discard(done)
            on_shard(_get(done))
    finally:
        for task in running:
            ray.cancel(task, force=True)


def _get(task: ray.ObjectRef) -> Written:
    """What a task returns. Its error is the one it raised, not Ray's picture of the worker's stack in place of a message."""
    try:
        written: Written = ray.get(task)
        return written
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TokenreelError | OSError):
            raise error.cause from error
        raise


@ray.remote(num_cpus=1, max_retries=5)
def _shard_task(
    arguments: tuple[Store, Store, str, ShardSettings, tuple[str, ...]], shard: int, refs: list[VideoRef]
) -> Written:
    corpus, out, fingerprint, settings, retry = arguments
    return write_clip_shard(out, fingerprint, shard, corpus, refs, settings, retry)


def run_tokenize(
    clips: Store,
    out: Store,
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
    running: dict[ray.ObjectRef, Any] = {}

    def start_next(encoder: Any) -> None:
        if waiting:
            running[encoder.write_shard.remote(waiting.popleft())] = encoder

    for encoder in [*encoders, *encoders]:
        start_next(encoder)
    while running:
        done = ray.wait(list(running))[0][0]
        encoder = running.pop(done)
        on_shard(_get(done))
        start_next(encoder)


_DECODE_WINDOW = 8
"""Clips of one shard that are decoded ahead of the encoder; bounds the frames that wait in the object store."""


class _Encoder:
    """Owns a tokenizer and the shards it is asked to write."""

    def __init__(
        self, clips: Store, out: Store, meta: DatasetMeta, settings: TokenizeSettings, make_encode: Callable[[], Encode]
    ) -> None:
        self._clips, self._out, self._meta, self._settings = clips, out, meta, settings
        self._encode = make_encode()
        self._device = threading.Lock()

    def write_shard(self, shard: int) -> Written:
        decoded = self._decode_ahead(read_shard_rows(self._clips, shard))
        return write_token_shard(
            self._clips, self._out, self._meta.fingerprint, shard, decoded, self._encode_alone, self._settings
        )

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
def _decode_task(clips: Store, row: dict[str, Any], settings: TokenizeSettings) -> Decoded:
    return decode_clip(clips, row, settings)

"""The Ray part of shard, tokenize and embed. What happens to one shard is plain code elsewhere; here is only who does it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import ray
from ray.util.metrics import Counter as MetricCounter
from ray.util.metrics import Gauge

from pipeline import ffmpeg
from pipeline.dataset import DatasetMeta
from pipeline.embedding import Embed, EmbedSettings, write_embedding_shard
from pipeline.encoding import Encode, Piece
from pipeline.errors import TokenreelError
from pipeline.schema import VideoRef
from pipeline.sharding import ShardSettings, write_clip_shard
from pipeline.shards import Written, read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clips, group_rows, write_token_shard
from pipeline.worker import BusyClock, EncoderUse, collected_warnings

log = logging.getLogger(__name__)
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
    arguments = ray.put((corpus, out, meta.fingerprint, meta.decoder, settings, tuple(retry)))
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
    with raised_by_workers():
        written: Written = ray.get(task)
        return written


@contextlib.contextmanager
def raised_by_workers() -> Iterator[None]:
    """Lets the error of a task that is waited for in the body be the one it raised, not Ray's picture of the worker's stack in
    place of a message."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TokenreelError | OSError):
            raise error.cause from error
        raise


@ray.remote(num_cpus=1, max_retries=5)
def _shard_task(
    arguments: tuple[Store, Store, str, str, ShardSettings, tuple[str, ...]], shard: int, refs: list[VideoRef]
) -> Written:
    corpus, out, fingerprint, decoder, settings, retry = arguments
    ffmpeg.require_identity(decoder)
    with collected_warnings() as warnings:
        written = write_clip_shard(out, fingerprint, shard, corpus, refs, settings, retry)
    return written._replace(warnings=tuple(warnings))


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
) -> EncoderUse:
    """Write the token shards `todo`: `num_encoders` actors encode, and fan decoding out to all CPUs.

    Each actor works on two shards at a time, so the decoding of the next one starts before this one ends.

    Args:
        encoder_resources: of one encoder, as Ray names them. One with GPUs encodes two batches at a time: while the codes
            of one come back, the GPU has the other.

    Returns:
        how busy the encoders were, all together.
    """
    num_encoders = min(num_encoders, len(todo))
    cpus = ray.cluster_resources().get("CPU", 1.0)
    groups_ahead = 1 + math.ceil(cpus / num_encoders)
    arguments = (clips, out, meta, settings, make_encode, _batches_at_a_time(encoder_resources))
    encoders = [_actor_class(_Encoder, encoder_resources).remote(*arguments, groups_ahead) for _ in range(num_encoders)]
    return _write_shards(encoders, todo, on_shard)


def run_embed(
    tokens: Store,
    out: Store,
    meta: DatasetMeta,
    settings: EmbedSettings,
    make_embed: Callable[[], Embed],
    todo: list[int],
    on_shard: OnShard,
    num_encoders: int,
    encoder_resources: dict[str, float],
) -> EncoderUse:
    """Write the embedding shards `todo` with `num_encoders` actors; arguments and result are those of `run_tokenize`.

    Each actor works on two shards at a time, so that tokens of one are read while the other's are embedded.
    """
    arguments = (tokens, out, meta.fingerprint, settings, make_embed, _batches_at_a_time(encoder_resources))
    actor = _actor_class(_Embedder, encoder_resources)
    return _write_shards([actor.remote(*arguments) for _ in range(min(num_encoders, len(todo)))], todo, on_shard)


def _actor_class(kind: type[Any], resources: dict[str, float]) -> Any:
    return ray.remote(kind).options(
        max_concurrency=_OPEN_SHARDS + 1,  # one thread answers while the others work
        max_restarts=-1,
        max_task_retries=_MAX_RETRIES,
        scheduling_strategy="SPREAD",
        **resources,
    )


def _batches_at_a_time(resources: dict[str, float]) -> int:
    return 2 if "num_gpus" in resources else 1


def _write_shards(encoders: list[Any], todo: list[int], on_shard: OnShard) -> EncoderUse:
    """Have actors with `write_shard` and `use` write these shards, and return how busy they were."""
    waiting = deque(todo)
    running: dict[ray.ObjectRef, tuple[Any, int]] = {}
    times_lost: Counter[int] = Counter()

    def start_next(encoder: Any) -> None:
        if waiting:
            shard = waiting.popleft()
            running[encoder.write_shard.remote(shard)] = (encoder, shard)

    for encoder in encoders * _OPEN_SHARDS:
        start_next(encoder)
    while running:
        done = ray.wait(list(running))[0][0]
        encoder, shard = running.pop(done)
        try:
            on_shard(_get(done))
        except ray.exceptions.ActorUnavailableError:
            # Its node is lost, and until Ray knows that, half a minute later, every retry of its own fails at once.
            times_lost[shard] += 1
            if times_lost[shard] > _MAX_TIMES_LOST:
                raise
            log.warning("shard %06d: its encoder cannot be reached; it is made again", shard)
            time.sleep(min(2 ** times_lost[shard], 16))
            waiting.appendleft(shard)
        start_next(encoder)
    return sum((_use(encoder) for encoder in encoders), EncoderUse())


def _use(encoder: Any) -> EncoderUse:
    try:
        use: EncoderUse = ray.get(encoder.use.remote(), timeout=10)
        return use
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return EncoderUse()


ENCODER_METRICS = {
    "tokenreel_encoder_busy_share": "Share of the time since its first batch in which an encoder encoded.",
    "tokenreel_encoder_frames": "Frames that an encoder encoded.",
}
"""Name to description of what each encoder exports; see `jobs/gauges.py`."""
_OPEN_SHARDS = 2
_MAX_RETRIES = 5
"""Times that a shard, or a group of clips, whose process died is tried again."""
_MAX_TIMES_LOST = 8
"""Times that a shard may lose its encoder's node: the waits in between add up to a minute and a half."""


class _Encoder:
    """Owns a tokenizer and the shards it is asked to write."""

    def __init__(
        self,
        clips: Store,
        out: Store,
        meta: DatasetMeta,
        settings: TokenizeSettings,
        make_encode: Callable[[], Encode],
        batches_at_a_time: int,
        groups_ahead: int,
    ) -> None:
        self._clips, self._out, self._meta, self._settings = clips, out, meta, settings
        self._encode, self._groups_ahead = make_encode(), groups_ahead
        self._turns, self._clock = threading.Semaphore(batches_at_a_time), BusyClock()
        busy, frames = ENCODER_METRICS.items()
        self._busy_share, self._num_frames = Gauge(*busy), MetricCounter(*frames)

    def write_shard(self, shard: int) -> Written:
        rows = read_shard_rows(self._clips, shard)
        with collected_warnings() as warnings:
            written = write_token_shard(
                self._clips,
                self._out,
                self._meta.fingerprint,
                shard,
                rows,
                self._decode_ahead(rows),
                self._encode_in_turn,
                self._settings,
            )
        return written._replace(warnings=tuple(warnings))

    def use(self) -> EncoderUse:
        return self._clock.use()

    def _encode_in_turn(self, frames: np.ndarray) -> np.ndarray:
        with self._turns, self._clock:
            codes = self._encode(frames)
        self._busy_share.set(1 - self._clock.use().wait_share)
        self._num_frames.inc(len(frames))
        return codes

    def _decode_ahead(self, rows: list[dict[str, Any]]) -> Iterator[Piece]:
        groups = group_rows(rows, self._settings)
        window = deque(self._decode(group) for group in itertools.islice(groups, self._groups_ahead))
        while window:
            for pieces in window.popleft():
                yield from ray.get(pieces)
            window.extend(self._decode(group) for group in itertools.islice(groups, 1))

    def _decode(self, rows: list[dict[str, Any]]) -> Any:
        return _decode_task.remote(self._clips, rows, self._settings, self._meta.decoder)


class _Embedder:
    """Owns a model and the shards it is asked to write."""

    def __init__(
        self,
        tokens: Store,
        out: Store,
        fingerprint: str,
        settings: EmbedSettings,
        make_embed: Callable[[], Embed],
        batches_at_a_time: int,
    ) -> None:
        self._tokens, self._out, self._fingerprint, self._settings = tokens, out, fingerprint, settings
        self._embed = make_embed()
        self._turns, self._clock = threading.Semaphore(batches_at_a_time), BusyClock()
        self.window, self.pad, self.width = self._embed.window, self._embed.pad, self._embed.width

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        with self._turns, self._clock:
            return self._embed(windows)

    def write_shard(self, shard: int) -> Written:
        with collected_warnings() as warnings:
            written = write_embedding_shard(self._tokens, self._out, self._fingerprint, shard, self, self._settings)
        return written._replace(warnings=tuple(warnings))

    def use(self) -> EncoderUse:
        return self._clock.use()


# It streams, so that a clip of a day is never held whole. A limit to how far it may run ahead of its reader would hold
# its CPU while it waits, and groups that wait for each other's readers would then wait for ever; Ray moves what nobody has
# read yet to disk instead.
@ray.remote(num_cpus=1, max_retries=_MAX_RETRIES, num_returns="streaming")
def _decode_task(
    clips: Store, rows: list[dict[str, Any]], settings: TokenizeSettings, decoder: str
) -> Iterator[list[Piece]]:
    ffmpeg.require_identity(decoder)
    # Below the encoders, which share these CPUs: the time that a decoder loses is made up for while others wait.
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    yield from decode_clips(clips, rows, settings)

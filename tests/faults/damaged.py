"""Sharding and then tokenizing a corpus of damaged videos in two processes, as Ray's workers do, and what that costs.

Nothing of Ray, MLflow or torch is imported here, so that the processes start fast.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import psutil

from pipeline.dataset import create_or_resume, finish, read_meta
from pipeline.decode import FrameConfig
from pipeline.ffmpeg import FfmpegLimits
from pipeline.ledger import Ledger
from pipeline.plan_file import read_plan_shards
from pipeline.planning import plan_shards
from pipeline.sharding import ShardSettings, describe_clips, write_clip_shard
from pipeline.shards import read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clips, describe_tokens, write_token_shard

_TOKENIZE = TokenizeSettings(frames=FrameConfig(fps=4, size_px=32), limits=FfmpegLimits(timeout_s=20))


@dataclass(frozen=True)
class Cost:
    """Of one shard: wall seconds, seconds of CPU time with all ffmpegs, and peak resident bytes of the worker so far and of
    the largest ffmpeg so far."""

    elapsed_s: float
    cpu_s: float
    worker_bytes: int
    ffmpeg_bytes: int


class Workers:
    """Two processes; a context manager."""

    def __init__(self) -> None:
        self._mark = f"tokenreel-{os.getpid()}-{time.time_ns()}"
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(2, context, initializer=_mark, initargs=(self._mark,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, corpus: Path, out: Path, settings: ShardSettings) -> tuple[list[Cost], int]:
        """Shard `corpus` to `out`, and tokenize that to `tokens` beside it; what each shard cost, and the number of planned
        clips. No process that they started is left."""
        costs, planned = self._shard(corpus, out, settings)
        costs += self._tokenize(out, out.with_name("tokens"))
        left = [process.info["name"] for process in psutil.process_iter(["name"]) if _is_marked(process, self._mark)]
        assert not left, f"left behind: {left}"
        return costs, planned

    def _shard(self, corpus: Path, out: Path, settings: ShardSettings) -> tuple[list[Cost], int]:
        (work := out.with_name("plan")).mkdir()
        plan = plan_shards(corpus, settings, work)
        meta = create_or_resume(out, describe_clips(plan, asdict(settings)), plan=plan.path, plan_rejects=plan.rejects)
        shards = range(plan.num_shards)
        tasks = [
            self._pool.submit(_write, corpus, out, meta.fingerprint, plan.path, shard, settings) for shard in shards
        ]
        costs = [task.result() for task in tasks]
        return costs, finish(out, meta, plan.ledger)[1].planned

    def _tokenize(self, clips: Path, out: Path) -> list[Cost]:
        described = describe_tokens(
            read_meta(clips), asdict(_TOKENIZE), {"fingerprint": "t" * 32, "codebook_size": 4, "patch": 16}
        )
        meta = create_or_resume(out, described)
        tasks = [self._pool.submit(_encode, clips, out, meta.fingerprint, shard) for shard in range(meta.num_shards)]
        costs = [task.result() for task in tasks]
        finish(out, meta, Ledger())
        return costs


def _mark(mark: str) -> None:
    """For what a worker starts: its own environment is the one that it was started with."""
    os.environ["TOKENREEL_FAULTS"] = mark


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("TOKENREEL_FAULTS") == mark
    except psutil.Error:
        return False


def _write(corpus: Path, out: Path, fingerprint: str, plan: Path, shard: int, settings: ShardSettings) -> Cost:
    started = _used_s()
    ((_, refs),) = read_plan_shards(plan, [shard])
    write_clip_shard(Store.at(out), fingerprint, shard, Store.at(corpus), refs, settings)
    return _cost(started)


def _encode(clips: Path, out: Path, fingerprint: str, shard: int) -> Cost:
    started = _used_s()
    rows = read_shard_rows(Store.at(clips), shard)
    pieces = (piece for group in decode_clips(Store.at(clips), rows, _TOKENIZE) for piece in group)
    write_token_shard(Store.at(clips), Store.at(out), fingerprint, shard, rows, pieces, _brightness, _TOKENIZE)
    return _cost(started)


def _brightness(frames: np.ndarray) -> np.ndarray:
    """Codes uint16 (b 2 2), 0 to 3, of frames uint8 (b 32 32 3): the stage needs some encoder, and a network costs more."""
    return (frames.reshape(len(frames), 2, 16, 2, 16, 3).mean((2, 4, 5)) / 64).astype(np.uint16)


def _used_s() -> tuple[float, float]:
    """Wall clock, and CPU time of this process and of those that it started and that have ended."""
    return time.monotonic(), sum(os.times()[:4])


def _cost(started: tuple[float, float]) -> Cost:
    elapsed_s, cpu_s = (now - then for now, then in zip(_used_s(), started, strict=True))
    # Not our own ru_maxrss: it begins at the size of the process that started this one, here the whole test suite.
    own_kib = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return Cost(elapsed_s, cpu_s, int(own_kib) * 1024, largest_child)

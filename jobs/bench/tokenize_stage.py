"""`tokenreel bench tokenize-stage`: the whole tokenize stage against decoding alone and encoding alone."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jobs.cluster import place_models
from jobs.frame_encoder import FrameEncoder
from jobs.result import JobResult
from jobs.tokenize import find_tokenizer
from models.tokenizers.base import load_tokenizer
from pipeline.dataset import create_or_resume, read_meta
from pipeline.encoding import Encode
from pipeline.errors import ConfigError
from pipeline.shards import Written
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, describe_tokens
from pipeline.worker import EncoderUse

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchTokenizeStageConfig:
    """Frames a second of the tokenize stage on a Ray of this machine's own, with the encoder left out, with the frames left
    out, and whole, in turn. Start and end of the stage count in each; the figures are medians.

    With GPUs, or with --num-encoders on CPUs, decoding and encoding have processors of their own, and the limit is the
    slower of the two. Where encoders and decoders share the CPUs (the default without GPUs) the limit is what it takes to do
    one after the other: 1 / (1 / decode + 1 / encode).
    """

    clips: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CLIPS")]
    """Clip dataset with at least twice as many shards as there are encoders."""
    tokenizer: Path
    """Folder of a tokenizer, or of the run that trained or imported it."""
    settings: Annotated[TokenizeSettings, tyro.conf.arg(name="")] = field(default_factory=TokenizeSettings)
    num_encoders: int = 0
    """Encoders on CPUs that decoding may not use; 0: on every GPU or, without one, as many as CPUs, which they share."""
    repeats: int = 3
    """Rounds, after one that only warms up."""

    def __post_init__(self) -> None:
        if self.repeats < 1 or not 0 <= self.num_encoders < len(os.sched_getaffinity(0)):
            raise ConfigError(
                f"repeats = {self.repeats} must be 1 or more, num_encoders = {self.num_encoders} less than the number of CPUs"
            )


def run(config: BenchTokenizeStageConfig) -> JobResult:
    """Frames a second of each, their ratios, and how long encoders waited."""
    started_s = time.monotonic()
    folder = find_tokenizer(config.tokenizer).resolve()
    with _ray(config.num_encoders) as (num_encoders, resources):
        device = "cuda" if "num_gpus" in resources else "cpu"
        encode = functools.partial(FrameEncoder, folder, device, config.settings.precision)
        stage = functools.partial(_run_stage, config, folder, num_encoders=num_encoders, resources=resources)
        num_frames, _, _ = stage(functools.partial(_no_encode, load_tokenizer(folder).patch))
        ways: dict[str, Callable[[], tuple[float, EncoderUse]]] = {
            "decode": lambda: stage(functools.partial(_no_encode, load_tokenizer(folder).patch))[1:],
            "encode": lambda: _encode_alone(config, encode, num_frames, num_encoders, resources),
            "stage": lambda: stage(encode)[1:],
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        waits: list[float] = []
        for turn in range(config.repeats + 1):
            for name, way in ways.items():
                taken_s, use = way()
                log.info("bench tokenize-stage: %s %d: %.2f s", name, turn, taken_s)
                if turn:
                    times[name].append(taken_s)
                if turn and name == "stage":
                    waits.append(use.wait_share)
    rounds = list(zip(times["decode"], times["encode"], times["stage"], strict=True))
    shares_cpus = device == "cpu" and not config.num_encoders
    figures: dict[str, Any] = {
        "device": device,
        "num_encoders": num_encoders,
        "frames": num_frames,
        **{f"{name}_frames_per_s": round(num_frames / statistics.median(taken), 1) for name, taken in times.items()},
        "of_slower": [round(max(decode, encode) / whole, 3) for decode, encode, whole in rounds],
        "of_limit": [
            round((decode + encode if shares_cpus else max(decode, encode)) / whole, 3)
            for decode, encode, whole in rounds
        ],
        "encoder_wait_share": [round(wait, 4) for wait in waits],
    }
    figures["of_limit_median"] = statistics.median(figures["of_limit"])
    return JobResult(
        job="bench tokenize-stage",
        out=str(config.clips),
        planned=num_frames,
        committed=num_frames,
        elapsed_s=time.monotonic() - started_s,
        figures=figures,
    )


@contextlib.contextmanager
def _ray(wanted: int) -> Iterator[tuple[int, dict[str, float]]]:
    """A Ray on which decoding cannot take the CPUs of `wanted` encoders; how many there are, and their resources."""
    import ray

    cpus = len(os.sched_getaffinity(0))
    with contextlib.chdir(Path(__file__).resolve().parents[2]):  # as jobs.cluster does, and says why
        ray.init(address="local", num_cpus=cpus - wanted, include_dashboard=False, log_to_driver=False)
    try:
        yield place_models(wanted)
    finally:
        ray.shutdown()


def _run_stage(
    config: BenchTokenizeStageConfig,
    folder: Path,
    make_encode: Callable[[], Encode],
    *,
    num_encoders: int,
    resources: dict[str, float],
) -> tuple[int, float, EncoderUse]:
    """(frames, seconds, use of the encoders) of the stage with some encoder; what it writes is dropped."""
    from jobs.config import to_plain
    from pipeline.stages import run_tokenize

    clips = read_meta(config.clips, kind="clips", complete=True)
    written: list[Written] = []
    with tempfile.TemporaryDirectory(prefix="tokenreel-bench-") as out:
        identity = {"fingerprint": folder.name, "codebook_size": 2**16, "patch": 8}
        meta = create_or_resume(out, describe_tokens(clips, to_plain(config.settings), identity))
        started_s = time.perf_counter()
        use = run_tokenize(
            Store.at(config.clips),
            Store.at(out),
            meta,
            config.settings,
            make_encode,
            list(range(meta.num_shards)),
            written.append,
            num_encoders,
            resources,
        )
        taken_s = time.perf_counter() - started_s
    return sum(one.info.totals["frames"] for one in written), taken_s, use


def _no_encode(patch: int) -> Encode:
    return lambda frames: np.zeros((len(frames), frames.shape[1] // patch, frames.shape[2] // patch), np.uint16)


def _encode_alone(
    config: BenchTokenizeStageConfig,
    make_encode: Callable[[], Encode],
    num_frames: int,
    num_encoders: int,
    resources: dict[str, float],
) -> tuple[float, EncoderUse]:
    """As many frames as the stage has, of noise, in full batches that are at hand, by as many encoders at a time."""
    import ray

    def encode_noise(sizes_px: list[int], num_batches: int) -> None:
        encode = make_encode()
        rng = np.random.default_rng(0)
        shapes = [(config.settings.batch_frames, size, size, 3) for size in sizes_px]
        frames = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
        for number in range(num_batches):
            encode(frames[number % len(frames)])

    sizes_px = [view.crop.size_px for view in config.settings.all_views()]
    num_batches = num_frames // config.settings.batch_frames
    started_s = time.perf_counter()
    shares = [num_batches // num_encoders + (n < num_batches % num_encoders) for n in range(num_encoders)]
    task = ray.remote(encode_noise).options(**resources)
    ray.get([task.remote(sizes_px, share) for share in shares])
    return time.perf_counter() - started_s, EncoderUse()

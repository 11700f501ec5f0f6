"""`tokenreel bench decode`: ours against bare ffmpeg, and what fast decoding gains and costs."""

from __future__ import annotations

import itertools
import logging
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jobs.result import JobResult
from pipeline.decode import FrameConfig, decode_frames
from pipeline.errors import BadVideo, ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import probe
from pipeline.scoring import SCALE_FLAGS

log = logging.getLogger(__name__)

_LIMITS = FfmpegLimits()
_MADE_S = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchDecodeConfig:
    """Decode videos by three means in turn, exact, fast and with bare `ffmpeg -threads 1`, and report medians of ratios.

    One process a CPU in each. Then decode once more and compare: PSNR of fast against exact frames and, with a tokenizer,
    the share of their tokens that differ.
    """

    videos: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEOS")] = None
    """Folder of videos; without one, one of 480 lines in H.264 is made for each CPU."""
    tokenizer: Path | None = None
    """Folder of a tokenizer."""
    fps: float = 2.0
    """Frames per second that are decoded."""
    size_px: int = 128
    """Side of the square crop in pixels."""
    repeats: int = 5
    """Times that each means runs, after one that is not counted."""

    def __post_init__(self) -> None:
        FrameConfig(fps=self.fps, size_px=self.size_px)
        if self.repeats < 1:
            raise ConfigError(f"repeats = {self.repeats}: must be 1 or more")


def run(config: BenchDecodeConfig) -> JobResult:
    """Times, ratios and differences as figures; videos that cannot be decoded are named, counted and left out."""
    started_s = time.monotonic()
    exact = FrameConfig(fps=config.fps, size_px=config.size_px)
    fast = replace(exact, decode="fast")
    with tempfile.TemporaryDirectory(prefix="tokenreel-bench-") as folder:
        files = sorted(config.videos.iterdir()) if config.videos else _make_videos(Path(folder))
        videos = [(path, duration_s) for path in files if (duration_s := _duration(path, exact)) is not None]
        if not videos:
            raise ConfigError(f"videos = {config.videos}: no file in it can be decoded; give a folder of videos")
        means: dict[str, Callable[[tuple[Path, float]], Any]] = {
            "bare": lambda video: _bare_ffmpeg(video[0], video[1], exact),
            "exact": lambda video: len(_decode(video, exact)),
            "fast": lambda video: len(_decode(video, fast)),
        }
        times = _alternate(means, videos, config.repeats)
        figures = _compare(videos, exact, fast, config.tokenizer)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "videos": len(videos),
        "video_s": round(sum(duration_s for _, duration_s in videos), 1),
        "unreadable": len(files) - len(videos),
        "parallel": _parallel(),
        **{f"{name}_s": round(value, 3) for name, value in seconds.items()},
        "exact_against_bare": _ratio(times["bare"], times["exact"]),
        "fast_speed_up": _ratio(times["exact"], times["fast"]),
        **figures,
    }
    log.info("bench decode: %s", result)
    return JobResult(
        job="bench decode",
        out=str(config.videos or ""),
        planned=len(files),
        committed=len(videos),
        rejected=len(files) - len(videos),
        elapsed_s=time.monotonic() - started_s,
        figures=result,
    )


def _parallel() -> int:
    return len(os.sched_getaffinity(0))


def _alternate(
    means: dict[str, Callable[[tuple[Path, float]], Any]], videos: list[tuple[Path, float]], repeats: int
) -> dict[str, list[float]]:
    """Seconds that each means takes for all videos, `repeats` times, in turn, so that a slow minute meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in means}
    with ThreadPoolExecutor(_parallel()) as pool:
        for turn in range(repeats + 1):
            for name, work in means.items():
                started_s = time.perf_counter()
                list(pool.map(work, videos))
                if turn:
                    times[name].append(time.perf_counter() - started_s)
    return times


def _ratio(times: list[float], by: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(times, by, strict=True)), 3)


def _compare(
    videos: list[tuple[Path, float]], exact: FrameConfig, fast: FrameConfig, tokenizer: Path | None
) -> dict[str, float]:
    """PSNR over all frames in dB, the share of frames that are equal, and the share of tokens that differ."""
    encode = _encoder(tokenizer) if tokenizer else None
    squares = values = equal = frames = changed = tokens = 0
    for video in videos:
        a, b = _decode(video, exact), _decode(video, fast)
        for x, y in zip(a, b, strict=False):  # a video's last frame may be among those left out
            error = int(np.sum((x.astype(np.int32) - y) ** 2))
            squares, values = squares + error, values + x.size
            equal, frames = equal + (error == 0), frames + 1
        if encode:
            for start in range(0, min(len(a), len(b)), 32):
                stop = min(start + 32, len(a), len(b))
                x, y = encode(a[start:stop]), encode(b[start:stop])
                changed, tokens = changed + int(np.sum(x != y)), tokens + x.size
    figures = {"frames": frames, "equal_frames": round(equal / frames, 4)}
    if squares:
        figures["psnr_db"] = round(float(10 * np.log10(255**2 * values / squares)), 2)
    if tokens:
        figures["tokens_changed"] = round(changed / tokens, 4)
    return figures


def _encoder(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    from models.tokenizers.base import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error

    def encode(frames: np.ndarray) -> np.ndarray:
        codes: np.ndarray = tokenizer.encode(torch.from_numpy(frames.copy())).numpy()
        return codes

    return encode


def _decode(video: tuple[Path, float], frames: FrameConfig) -> np.ndarray:
    path, duration_s = video
    with path.open("rb") as file:
        return decode_frames(file, duration_s, frames, _LIMITS)


def _duration(path: Path, frames: FrameConfig) -> float | None:
    try:
        with path.open("rb") as file:
            duration_s = probe(file, _LIMITS).duration_s
            decode_frames(file, duration_s, frames, _LIMITS)
            return duration_s
    except (BadVideo, OSError) as error:
        log.warning("bench decode: %s is left out: %s", path.name, error)
        return None


def _bare_ffmpeg(path: Path, duration_s: float, frames: FrameConfig) -> None:
    side = frames.size_px
    at_end = "pass" if duration_s * frames.fps < 1 else "round"
    scale = f"scale={side}:{side}:force_original_aspect_ratio=increase:flags={SCALE_FLAGS}"
    words = ["ffmpeg", "-v", "error", "-nostdin", "-y", "-threads", "1", "-filter_threads", "1", "-i", f"file:{path}"]
    words += ["-map", "0:V:0", "-vf", f"fps={frames.fps}:eof_action={at_end},{scale},crop={side}:{side}"]
    done = subprocess.run([*words, "-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1"], check=True, capture_output=True)
    assert done.stdout


def _make_videos(folder: Path) -> list[Path]:
    """A moving pattern with a little noise, 854 x 480 at 24 fps, encoded as people do: x264, medium, crf 23."""
    paths = [folder / f"{n}.mp4" for n in range(_parallel())]
    for seed, path in zip(itertools.count(1), paths):
        picture = f"testsrc2=size=854x480:rate=24:duration={_MADE_S},rotate=t/9,noise=alls=6:allf=t:all_seed={seed}"
        words = ["ffmpeg", "-v", "error", "-nostdin", "-f", "lavfi", "-i", picture, "-pix_fmt", "yuv420p"]
        subprocess.run([*words, "-c:v", "libx264", "-crf", "23", f"file:{path}"], check=True)
    return paths

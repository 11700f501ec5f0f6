"""`tokenreel bench decode`: ours against bare ffmpeg, and what fast decoding gains and costs."""

from __future__ import annotations

import itertools
import logging
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jobs import cost
from jobs.cost import DecodeSpeed, Measured
from jobs.result import JobResult
from pipeline.decode import FrameConfig, decode_frames
from pipeline.errors import BadVideo, ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import VideoInfo, probe
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
    """Folder of videos; without one, H.264 videos of --lines are made, one for each CPU."""
    lines: tuple[int, ...] = (480,)
    """Heights of the videos that are made, in pixels."""
    tokenizer: Path | None = None
    """Folder of a tokenizer."""
    fps: float = 2.0
    """Frames per second that are decoded."""
    size_px: int = 128
    """Side of the square crop in pixels."""
    repeats: int = 5
    """Times that each means runs, after one that is not counted."""
    save: Path | None = None
    """File of measured speeds to write exact decoding's into, by resolution; `tokenreel plan --speeds` predicts from it."""

    def __post_init__(self) -> None:
        FrameConfig(fps=self.fps, size_px=self.size_px)
        if self.repeats < 1:
            raise ConfigError(f"repeats = {self.repeats}: must be 1 or more")
        if not self.lines or any(lines < 16 or lines % 2 for lines in self.lines):
            raise ConfigError(f"lines = {self.lines}: must be even numbers of 16 px or more, at least one")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Video:
    path: Path
    info: VideoInfo

    @property
    def short_side_px(self) -> int:
        return min(self.info.width, self.info.height)


def run(config: BenchDecodeConfig) -> JobResult:
    """Times, ratios and differences as figures; videos that cannot be decoded are named, counted and left out."""
    started_s = time.monotonic()
    exact = FrameConfig(fps=config.fps, size_px=config.size_px)
    fast = replace(exact, decode="fast")
    with tempfile.TemporaryDirectory(prefix="tokenreel-bench-") as folder:
        files = sorted(config.videos.iterdir()) if config.videos else _make_videos(Path(folder), config.lines)
        videos = [video for path in files if (video := _open(path, exact)) is not None]
        if not videos:
            raise ConfigError(f"videos = {config.videos}: no file in it can be decoded; give a folder of videos")
        taken_s: dict[_Video, list[float]] = {video: [] for video in videos}

        def decode_exact(video: _Video) -> None:
            begun_s = time.perf_counter()
            _decode(video, exact)
            taken_s[video].append(time.perf_counter() - begun_s)

        means: dict[str, Callable[[_Video], Any]] = {
            "bare": lambda video: _bare_ffmpeg(video, exact),
            "exact": decode_exact,
            "fast": lambda video: _decode(video, fast),
        }
        times = _alternate(means, videos, config.repeats)
        start_s = _measure_start(Path(folder), exact)
        figures = _compare(videos, exact, fast, config.tokenizer)
    speeds = _speeds(taken_s, start_s)
    if config.save is not None:
        cost.save(config.save, Measured(decode={cost.cpu_name(): speeds}, start_s={cost.cpu_name(): start_s}))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "videos": len(videos),
        "video_s": round(sum(video.info.duration_s for video in videos), 1),
        "unreadable": len(files) - len(videos),
        "parallel": _parallel(),
        **{f"{name}_s": round(value, 3) for name, value in seconds.items()},
        "exact_against_bare": _ratio(times["bare"], times["exact"]),
        "fast_speed_up": _ratio(times["exact"], times["fast"]),
        "source_frames_per_s": {one.short_side_px: one.frames_per_s for one in speeds},
        "start_s": start_s,
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


def _alternate(means: dict[str, Callable[[_Video], Any]], videos: list[_Video], repeats: int) -> dict[str, list[float]]:
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


def _speeds(taken_s: dict[_Video, list[float]], start_s: float) -> list[DecodeSpeed]:
    """Frames of the video a second of one CPU, by resolution, all CPUs being at work."""
    frames, seconds = defaultdict[int, int](int), defaultdict[int, float](float)
    for video, times in taken_s.items():
        frames[video.short_side_px] += round(video.info.duration_s * video.info.fps)
        # A short video may take no longer than its start.
        seconds[video.short_side_px] += max(1e-3, statistics.median(times[1:]) - start_s)
    return [
        DecodeSpeed(short_side_px=side, frames_per_s=round(count / seconds[side], 1))
        for side, count in sorted(frames.items())
    ]


def _measure_start(folder: Path, frames: FrameConfig) -> float:
    """Seconds that a clip of two tiny frames takes."""
    path = folder / "start.mp4"
    words = ["ffmpeg", "-v", "error", "-nostdin", "-f", "lavfi", "-i", "testsrc2=size=32x32:rate=2:duration=1"]
    subprocess.run([*words, "-c:v", "libx264", "-pix_fmt", "yuv420p", f"file:{path}"], check=True)
    video, times = _open(path, frames), []
    assert video is not None
    for _ in range(5):
        begun_s = time.perf_counter()
        _decode(video, frames)
        times.append(time.perf_counter() - begun_s)
    return round(statistics.median(times), 4)


def _ratio(times: list[float], by: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(times, by, strict=True)), 3)


def _compare(videos: list[_Video], exact: FrameConfig, fast: FrameConfig, tokenizer: Path | None) -> dict[str, float]:
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


def _decode(video: _Video, frames: FrameConfig) -> np.ndarray:
    with video.path.open("rb") as file:
        return decode_frames(file, video.info.duration_s, frames, _LIMITS)


def _open(path: Path, frames: FrameConfig) -> _Video | None:
    try:
        with path.open("rb") as file:
            video = _Video(path=path, info=probe(file, _LIMITS))
        _decode(video, frames)
        return video
    except (BadVideo, OSError) as error:
        log.warning("bench decode: %s is left out: %s", path.name, error)
        return None


def _bare_ffmpeg(video: _Video, frames: FrameConfig) -> None:
    side = frames.size_px
    at_end = "pass" if video.info.duration_s * frames.fps < 1 else "round"
    scale = f"scale={side}:{side}:force_original_aspect_ratio=increase:flags={SCALE_FLAGS}"
    words = ["ffmpeg", "-v", "error", "-nostdin", "-y", "-threads", "1", "-filter_threads", "1"]
    words += ["-i", f"file:{video.path}", "-map", "0:V:0"]
    words += ["-vf", f"fps={frames.fps}:eof_action={at_end},{scale},crop={side}:{side}"]
    done = subprocess.run([*words, "-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1"], check=True, capture_output=True)
    assert done.stdout


def _make_videos(folder: Path, all_lines: Sequence[int]) -> list[Path]:
    """Moving patterns with a little noise, 16:9 at 24 fps, encoded as people do: x264, medium, crf 23."""
    paths = []
    for lines, seed in itertools.product(all_lines, range(1, _parallel() + 1)):
        size = f"{round(lines * 8 / 9) * 2}x{lines}"
        picture = f"testsrc2=size={size}:rate=24:duration={_MADE_S},rotate=t/9,noise=alls=6:allf=t:all_seed={seed}"
        paths.append(folder / f"{lines}-{seed}.mp4")
        words = ["ffmpeg", "-v", "error", "-nostdin", "-f", "lavfi", "-i", picture, "-pix_fmt", "yuv420p"]
        subprocess.run([*words, "-c:v", "libx264", "-crf", "23", f"file:{paths[-1]}"], check=True)
    return paths

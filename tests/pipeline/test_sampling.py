"""Which frames are picked, against the times that ffprobe lists, for timestamps drawn at random."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipeline.clips import ClipConfig
from pipeline.cutting import cut_video
from pipeline.decode import FrameConfig, decode_frames
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import probe
from pipeline.sharding import ShardSettings
from pipeline.transcode import TranscodeConfig
from tests.numbered import encode, read, show

LIMITS = FfmpegLimits()
_SUFFIXES = {"mp4": ("-c:v", "libx264", "-bf", "0"), "mkv": ("-c:v", "libx264", "-bf", "2"), "nut": ("-c:v", "ffv1")}


def write_at(path: Path, times_ms: list[int], *words: str) -> Path:
    """A video whose frame n, numbered so, begins at `times_ms[n]`."""
    begins = "+".join(f"eq(N\\,{number})*{time_ms}" for number, time_ms in enumerate(times_ms))
    timed = ["-vf", f"settb=1/1000,setpts={begins}", "-fps_mode", "passthrough", "-enc_time_base", "1:1000"]
    return encode(path, range(len(times_ms)), *_SUFFIXES[path.suffix[1:]], *timed, *words)


def wanted(path: Path, fps: float, start_s: float) -> list[int]:
    """By ffprobe's list of packets: for each k the last frame that begins by start_s + k / fps + 1 ms."""
    words = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_packets", "-of", "json", str(path)]
    packets = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)["packets"]
    packets.sort(key=lambda packet: float(packet["pts_time"]))
    first_s = float(packets[0]["pts_time"])
    begins_s = [float(packet["pts_time"]) - first_s for packet in packets]
    end_s = begins_s[-1] + float(packets[-1]["duration_time"])
    frames, k = [], 0
    while start_s + k / fps + 1e-3 < end_s or not k:
        frames.append(sum(begin_s <= start_s + k / fps + 1e-3 + 1e-7 for begin_s in begins_s) - 1)
        k += 1
    return frames


def shown(path: Path, **config: float | str) -> list[int | None]:
    with path.open("rb") as source:
        frames = decode_frames(source, probe(source, LIMITS).duration_s, FrameConfig(size_px=96, **config), LIMITS)
    return [read(frame)[0] for frame in frames]


@pytest.mark.parametrize("suffix", _SUFFIXES)
@pytest.mark.parametrize("seed", range(2))
def test_random_times(tmp_path: Path, suffix: str, seed: int) -> None:
    rng = random.Random(f"{suffix} {seed}")
    times_ms = list(np.cumsum([0] + [rng.choice([5, 17, 33, 40, 42, 100, 700, 2500]) for _ in range(39)]))
    path = write_at(tmp_path / f"c.{suffix}", times_ms)
    last_s = times_ms[-1] / 1000
    for fps, start_s in (
        (25.0, 0.0),
        (rng.uniform(0.5, 2.0), rng.uniform(0, last_s)),
        (rng.uniform(3, 60), last_s / 3),
    ):
        assert shown(path, fps=fps, start_s=start_s) == wanted(path, fps, start_s), (fps, start_s)


@pytest.mark.parametrize("fps", [24, 25, 30, 30000 / 1001])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_every_frame_at_the_own_rate(tmp_path: Path, suffix: str, fps: float) -> None:
    path = encode(tmp_path / f"c.{suffix}", range(50), fps=fps)
    assert shown(path, fps=fps) == list(range(50))


def test_a_picture_that_stands_still_is_there_at_each_instant(tmp_path: Path) -> None:
    """Frame 3 is on screen from 0.12 to 6.12 s, whenever a clip begins."""
    path = write_at(tmp_path / "c.mp4", [0, 40, 80, 120, *range(6120, 7120, 40)])
    for start_s in (0.5, 3.0, 5.99):
        assert shown(path, fps=2, start_s=start_s)[0] == 3
    assert shown(path, fps=1, start_s=5.5) == [3, 13]  # at 5.5 and 6.5 s


def test_nearest_is_what_ffmpeg_does_by_itself(tmp_path: Path) -> None:
    path = encode(tmp_path / "c.mp4", range(100))
    words = ["ffmpeg", "-v", "error", "-i", str(path), "-vf", "fps=2", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    raw = subprocess.run(words, capture_output=True, check=True).stdout
    by_itself = [read(frame)[0] for frame in np.frombuffer(raw, np.uint8).reshape(-1, 96, 96, 3)]
    assert shown(path, fps=2, pick="nearest") == by_itself
    assert shown(path, fps=2) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert by_itself != shown(path, fps=2)


@pytest.mark.parametrize("mode", ["whole", "window", "shots"])
def test_a_transcoded_clip_of_another_rate_shows_the_same(tmp_path: Path, mode: str) -> None:
    path = encode(tmp_path / "c.mp4", range(50), "-c:v", "libx264", "-qp", "18")
    settings = ShardSettings(
        storage="transcode",
        clips=ClipConfig(mode=mode, window_s=1.0, cut_threshold=0.99),  # type: ignore[arg-type]
        transcode=TranscodeConfig(fps=5),
    )
    seen: list[int | None] = []
    with path.open("rb") as source:
        for cut in cut_video(source, probe(source, LIMITS), None, settings):
            assert cut.clip is not None, cut.error
            (tmp_path / "clip.mp4").write_bytes(cut.clip.read())
            seen += show(tmp_path / "clip.mp4")
    assert seen == list(range(0, 50, 5))

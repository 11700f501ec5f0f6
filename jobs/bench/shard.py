"""`tokenreel bench shard`: sharding against copying the same bytes, bare ffmpeg processes, and other writers."""

from __future__ import annotations

import io
import logging
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jobs.cluster import connect, count
from jobs.config import to_plain
from jobs.result import JobResult
from pipeline.clips import ClipConfig
from pipeline.dataset import create_or_resume
from pipeline.errors import ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.plan_file import read_plan_shards
from pipeline.planning import plan_shards
from pipeline.probe import probe
from pipeline.quality import QualityConfig
from pipeline.scoring import SCALE_FLAGS, Watch, frame_rate
from pipeline.sharding import ShardSettings, describe_clips
from pipeline.storage import Store
from pipeline.timeline import at_rate
from pipeline.transcode import TranscodeConfig, encoder_words

log = logging.getLogger(__name__)

Case = Literal["copy", "remux", "transcode", "score"]
_CASES: tuple[Case, ...] = ("copy", "remux", "transcode", "score")
_CHUNK_BYTES = 2**20
_SHORT_SIDE_PX = TranscodeConfig().short_side_px


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchShardConfig:
    """Time `shard` on its Ray workers against what the machine allows, in turn, and report the median of the ratios.

    copy, remux: against copying the same bytes with the same reads and writes, one process a CPU, each file of output
    flushed to the disk once; copy also against Ray Data's and webdataset's own writers, which check, hash and flush
    nothing. transcode, score: against bare `ffmpeg -threads 1` processes doing the same work, one a CPU.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = Path("bench-shard")
    """Where to work: on the disk to be measured. The videos made stay there for the next run."""
    videos: Path | None = None
    """Folder of videos to use; by default some are made."""
    num_videos: int = 16
    """Videos that are made."""
    video_bytes: int = 64 * 2**20
    """Size of each, about, for copy and remux."""
    decoded_video_bytes: int = 8 * 2**20
    """Size of each, about, for transcode and score: 8 Mbit/s, so a second a mebibyte."""
    cases: tuple[Case, ...] = _CASES
    """What to time."""
    repeats: int = 5
    """Times that each side runs, after one that is not counted."""

    def __post_init__(self) -> None:
        if min(self.num_videos, self.video_bytes, self.decoded_video_bytes, self.repeats) < 1:
            raise ConfigError("num_videos, video_bytes, decoded_video_bytes and repeats must be 1 or more")


def run(config: BenchShardConfig) -> JobResult:
    started_s = time.monotonic()
    figures: dict[str, object] = {}
    with connect():
        workers = max(1, int(count("CPU")))
        for case in config.cases:
            size = config.video_bytes if case in ("copy", "remux") else config.decoded_video_bytes
            figures[case] = _measure(config, case, config.videos or _make_videos(config, size), workers)
            log.info(f"bench shard: {case} {figures[case]}")
    return JobResult(
        job="bench shard", out=str(config.folder), elapsed_s=time.monotonic() - started_s,
        figures={"workers": workers, **figures},
    )  # fmt: skip


def _measure(config: BenchShardConfig, case: Case, videos: Path, workers: int) -> dict[str, float | list[float]]:
    """Seconds and ratios (the other side's seconds over ours) of one case."""
    files = [videos / entry.name for entry in sorted(Store.at(videos).walk(), key=lambda entry: entry.name)]
    if not files:
        raise ConfigError(f"--videos {videos}: no file there")
    sides: dict[str, Callable[[Path], None]] = {"ours": lambda out: _shard(case, videos, out, workers)}
    if case in ("copy", "remux"):
        sides["limit"] = lambda out: _each(workers, files, lambda part, n: _copy(part, out / f"{n}", case))
    else:
        commands = [_bare_command(path, config.folder / "out" / f"{n}.mp4", case) for n, path in enumerate(files)]
        sides["limit"] = lambda _: _each(
            len(files), files, lambda _, n: subprocess.run(commands[n], check=True), workers
        )
    if case == "copy":
        sides["ray_data"] = lambda out: _ray_data(files, out, workers)
        sides["webdataset"] = lambda out: _each(workers, files, lambda part, n: _webdataset(part, out / f"{n}.tar"))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(config.repeats + 1):
        for name, side in sides.items():
            out = config.folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            os.sync()  # so that nobody pays for what another left to be written
            begun_s = time.perf_counter()
            side(out)
            if repeat:
                seconds[name].append(time.perf_counter() - begun_s)
    shutil.rmtree(config.folder / "out")
    ratios = {
        f"{name}_over_ours": [theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)]
        for name in sides
        if name != "ours"
    }
    return {
        "videos": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        **{f"{name}_s": round(statistics.median(values), 3) for name, values in seconds.items()},
        **{name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "limit_over_ours_range": [round(end(ratios["limit_over_ours"]), 3) for end in (min, max)],
        "ours_mb_per_s": round(sum(f.stat().st_size for f in files) / 1e6 / statistics.median(seconds["ours"]), 1),
    }


def _shard(case: Case, videos: Path, out: Path, workers: int) -> None:
    """Plan and write a clip dataset: what `tokenreel shard` does between Ray's start and its report."""
    from pipeline.stages import run_shard

    count = sum(1 for _ in Store.at(videos).walk())
    settings = ShardSettings(
        clips=ClipConfig(),
        storage="copy" if case == "score" else case,
        quality=QualityConfig(score=case == "score"),
        videos_per_shard=-(-count // workers) if case in ("copy", "remux") else 1,
    )
    scratch = out / ".plan"
    scratch.mkdir()
    plan = plan_shards(str(videos), settings, scratch)
    store = Store.at(out / "clips")
    meta = create_or_resume(store, describe_clips(plan, to_plain(settings)), plan=plan.path)
    committed = []
    run_shard(
        Store.at(plan.root), store, meta, settings, read_plan_shards(plan.path, range(plan.num_shards)), (),
        lambda written: committed.append(written.info.ledger.committed),
    )  # fmt: skip
    assert sum(committed) == count, f"{sum(committed)} of {count} videos were committed"


def _each(
    parts: int, files: Sequence[Path], work: Callable[[Sequence[Path], int], object], workers: int | None = None
) -> None:
    """`work(files, number)` on `parts` equal parts at a time; each spends its time in the kernel or in a process."""
    with ThreadPoolExecutor(workers or parts) as pool:
        list(pool.map(lambda n: work(files[n::parts], n), range(parts)))


def _copy(files: Sequence[Path], out: Path, case: Case) -> None:
    """Copy with the reads and writes of sharding: once into one output; remux also goes through a file of its own, which
    is moved within itself to bring its index to the front."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    scratch = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else out.parent) / f"bench-{os.getpid()}-{out.name}"
    with out.open("wb", buffering=0) as target:
        for path in files:
            source = path
            if case == "remux":
                _pour(path, None, buffer)  # the hash's read
                with scratch.open("wb", buffering=0) as file:
                    _pour(path, file, buffer)
                with scratch.open("r+b", buffering=0) as file:
                    _pour(scratch, file, buffer)
                source = scratch
            _pour(source, target, buffer)
        os.fsync(target.fileno())
    scratch.unlink(missing_ok=True)


def _pour(path: Path, target: io.FileIO | None, buffer: memoryview) -> None:
    with path.open("rb", buffering=0) as source:
        while size := source.readinto(buffer):
            if target is not None:
                target.write(buffer[:size])


def _bare_command(video: Path, out: Path, case: Case) -> list[str]:
    """ffmpeg by hand, with the filters that sharding uses, for a video that needs no check."""
    words = [
        "ffmpeg",
        "-v",
        "error",
        "-nostdin",
        "-y",
        "-filter_complex_threads",
        "1",
        "-threads",
        "1",
        "-i",
        str(video),
    ]
    if case == "transcode":
        words += ["-an", "-vf", f"scale=-2:{_SHORT_SIDE_PX}:flags={SCALE_FLAGS}", "-movflags", "+faststart"]
        return [*words, *encoder_words(TranscodeConfig()), str(out)]
    with video.open("rb") as file:
        info = probe(file, FfmpegLimits())
    graph = f"[0:{info.stream}]{at_rate(frame_rate(info), info.start_s)}[frames];{Watch(info, info.duration_s, 0.5).graph('frames')}"
    raw = ["-f", "rawvideo", os.devnull]
    return [*words, "-filter_complex", graph, "-map", "[thumbs]", *raw, "-map", "[squares]", *raw]


def _ray_data(files: Sequence[Path], out: Path, workers: int) -> None:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = ray.data.read_binary_files([str(path) for path in files], include_paths=True, override_num_blocks=workers)
    rows.map(lambda row: {"__key__": Path(row["path"]).stem, "mp4": row["bytes"]}).write_webdataset(str(out))


def _webdataset(files: Sequence[Path], out: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(out)) as writer:
        for path in files:
            writer.write({"__key__": path.stem, "mp4": path.read_bytes()})


def _make_videos(config: BenchShardConfig, video_bytes: int) -> Path:
    """Videos of about `video_bytes` each whose bytes differ: one noisy second, repeated, under different titles."""
    folder = config.folder / f"videos-{config.num_videos}-{video_bytes}"
    if folder.exists():
        return folder
    making = config.folder / ".making"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    seed = making / "seed.mp4"
    picture = "mandelbrot=size=1280x720:rate=30,noise=alls=12:allf=t"
    code = ["-t", "4", "-c:v", "libx264", "-preset", "veryfast", "-b:v", "8M", "-pix_fmt", "yuv420p"]
    subprocess.run(["ffmpeg", "-v", "error", "-nostdin", "-f", "lavfi", "-i", picture, *code, str(seed)], check=True)
    loops = max(0, round(video_bytes / seed.stat().st_size) - 1)
    for number in range(config.num_videos):
        words = ["ffmpeg", "-v", "error", "-nostdin", "-stream_loop", str(loops), "-i", str(seed), "-c", "copy"]
        words += ["-metadata", f"title={number}", str(making / f"{number:04d}.mp4")]
        subprocess.run(words, check=True)
    seed.unlink()
    making.rename(folder)
    return folder

"""Damaged videos: none ends a job, each is a sample or a reject with its class, nothing outside of the corpus is read,
and time, memory and processes stay bounded."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pytest

from pipeline.clips import ClipConfig
from pipeline.dataset import create_or_resume, finish, read_index, read_rejects
from pipeline.ffmpeg import FfmpegLimits
from pipeline.plan_file import read_plan_shards
from pipeline.planning import plan_shards
from pipeline.quality import QualityConfig
from pipeline.schema import REJECT_CLASSES, SCORES
from pipeline.sharding import ShardSettings, describe_clips, write_clip_shard
from pipeline.storage import Store
from pipeline.transcode import TranscodeConfig
from pipeline.verify import verify
from tests.corpora import make_clip
from tests.faults.mutate import make_pieces, mutate

_LIMITS = FfmpegLimits(timeout_s=20)
_SMALL = TranscodeConfig(short_side_px=48)
_SCORE = QualityConfig(score=True)
_SETTINGS = {
    "copy": ShardSettings(quality=_SCORE, videos_per_shard=8, limits=_LIMITS),
    "remux": ShardSettings(
        storage="remux", clips=ClipConfig(mode="window", window_s=0.5), videos_per_shard=8, limits=_LIMITS
    ),
    "transcode": ShardSettings(
        storage="transcode",
        transcode=_SMALL,
        clips=ClipConfig(mode="window", window_s=0.5),
        videos_per_shard=8,
        limits=_LIMITS,
    ),
    "shots": ShardSettings(
        storage="transcode",
        transcode=_SMALL,
        clips=ClipConfig(mode="shots"),
        quality=_SCORE,
        videos_per_shard=8,
        limits=_LIMITS,
    ),
}
_MAX_WORKER_BYTES = 700 * 2**20
_MAX_FFMPEG_BYTES = 700 * 2**20
"""Resident; what an 8K picture takes in the decoder and twice in filters. The address space is limited anyway."""
_MAX_FILE_S = 60.0


@dataclass(frozen=True)
class Cost:
    """Of one shard: wall seconds, and peak resident bytes of the worker so far and of the largest ffmpeg so far."""

    elapsed_s: float
    worker_bytes: int
    ffmpeg_bytes: int


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_pieces(tmp_path_factory.mktemp("pieces") / "clips")


class Canary:
    """What no video may lead to: a file whose access time tells, and a port that counts who knocks."""

    def __init__(self, folder: Path, video: Path) -> None:
        self._file = folder / "outside.mp4"
        self._file.write_bytes(video.read_bytes())
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.knocks = 0
        threading.Thread(target=self._count, daemon=True).start()
        port = self._socket.getsockname()[1]
        self.addresses = (
            str(self._file), f"file:{self._file}", f"file://{self._file}", "../outside.mp4", "../../outside.mp4",
            f"http://127.0.0.1:{port}/x.mp4", f"tcp://127.0.0.1:{port}", f"concat:{self._file}", f"subfile,,start,0,end,0,,:{self._file}",
        )  # fmt: skip
        self._forget()
        self._file.read_bytes()
        assert self.was_read, "this file system does not note who reads; the test could not see it"
        self._forget()

    def _forget(self) -> None:
        os.utime(self._file, ns=(0, time.time_ns()))

    @property
    def was_read(self) -> bool:
        return self._file.stat().st_atime_ns != 0

    def _count(self) -> None:
        while True:
            try:
                self._socket.accept()[0].close()
            except OSError:
                return
            self.knocks += 1

    def close(self) -> None:
        self._socket.close()


@pytest.mark.timeout(3600)
def test_damaged_videos(damaged: tuple[str, int, int], pieces: list[Path], tmp_path: Path) -> None:
    mode, first, number = damaged
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    with closing(Canary(tmp_path, pieces[0])) as canary:
        whole = [piece.read_bytes() for piece in pieces]
        names = {}
        for seed in range(first, first + number):
            draw = random.Random(f"{mode} {seed}")
            place = draw.randrange(len(pieces))
            data, what = mutate(whole[place], whole, canary.addresses, draw)
            name = f"seed{seed:06d}{pieces[place].suffix}"
            (corpus / name).write_bytes(data)
            names[name] = what
        started_s = time.monotonic()
        costs, planned = _shard(corpus, tmp_path / "out", _SETTINGS[mode])
        elapsed_s = time.monotonic() - started_s
        assert not canary.was_read and canary.knocks == 0
    rejects, sources = list(read_rejects(tmp_path / "out")), set(read_index(tmp_path / "out")["source"].to_pylist())
    lost = sorted(names.keys() - sources - {one.path for one in rejects})
    assert not lost, f"neither sample nor reject: {lost}"
    strange = [
        one for one in rejects if one.reject_class not in (*REJECT_CLASSES, "too-short", *SCORES) or not one.reason
    ]
    assert not strange
    assert list(verify(tmp_path / "out")) == []
    counts = dict(Counter(one.reject_class for one in rejects).most_common())
    print(
        f"{mode}: {number} damaged videos from seed {first} on in {elapsed_s:.0f} s; {len(sources)} gave samples, {planned} clips "
        f"planned, rejects {counts}; a shard of {_SETTINGS[mode].videos_per_shard} took {max(c.elapsed_s for c in costs):.1f} s at most, a worker "
        f"{max(c.worker_bytes for c in costs) / 2**20:.0f} MiB, an ffmpeg {max(c.ffmpeg_bytes for c in costs) / 2**20:.0f} MiB"
    )
    assert max(cost.elapsed_s for cost in costs) < _MAX_FILE_S
    assert max(cost.worker_bytes for cost in costs) < _MAX_WORKER_BYTES
    assert max(cost.ffmpeg_bytes for cost in costs) < _MAX_FFMPEG_BYTES


def test_a_hole_of_half_an_hour_costs_little(tmp_path: Path) -> None:
    """One wrong timestamp promises thousands of clips that hold nothing; each would be a process and a reject."""
    (corpus := tmp_path / "corpus").mkdir()
    jump = "setpts=if(gt(N\\,5)\\,PTS+2000/TB\\,PTS)"
    make_clip(
        corpus / "hole.mkv", seconds=2001, size="64x48", extra=["-vf", jump, "-fps_mode", "vfr", "-frames:v", "9"]
    )
    costs, planned = _shard(corpus, tmp_path / "out", _SETTINGS["transcode"])
    rejects = list(read_rejects(tmp_path / "out"))
    assert planned == 1 + 1 + 32 + 1 == len(read_index(tmp_path / "out")) + len(rejects)
    assert "32 clips in a row failed; what is left, [17, 2000" in rejects[-1].reason
    assert list(verify(tmp_path / "out")) == []
    assert costs[0].elapsed_s < _MAX_FILE_S


def _shard(corpus: Path, out: Path, settings: ShardSettings) -> tuple[list[Cost], int]:
    """Shard `corpus` in two processes, as Ray's workers do; what each shard cost, and the number of planned clips."""
    (work := out.with_name("plan")).mkdir()
    plan = plan_shards(corpus, settings, work)
    meta = create_or_resume(out, describe_clips(plan, asdict(settings)), plan=plan.path, plan_rejects=plan.rejects)
    mark = f"tokenreel-{os.getpid()}-{time.time_ns()}"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=_mark, initargs=(mark,)) as pool:
        tasks = [
            pool.submit(_write, corpus, out, meta.fingerprint, plan.path, shard, settings)
            for shard in range(plan.num_shards)
        ]
        costs = [task.result() for task in tasks]
        left = [process.info["name"] for process in psutil.process_iter(["name"]) if _is_marked(process, mark)]
        assert not left, f"left behind: {left}"
    return costs, finish(out, meta, plan.ledger)[1].planned


def _mark(mark: str) -> None:
    os.environ["TOKENREEL_FAULTS"] = mark


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("TOKENREEL_FAULTS") == mark
    except psutil.Error:
        return False


def _write(corpus: Path, out: Path, fingerprint: str, plan: Path, shard: int, settings: ShardSettings) -> Cost:
    started_s = time.monotonic()
    ((_, refs),) = read_plan_shards(plan, [shard])
    write_clip_shard(Store.at(out), fingerprint, shard, Store.at(corpus), refs, settings)
    # Not our own ru_maxrss: it begins at the size of the process that started this one, here the whole test suite.
    own_kib = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return Cost(time.monotonic() - started_s, int(own_kib) * 1024, largest_child)

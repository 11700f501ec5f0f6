"""Damaged videos, sharded and tokenized: none ends a job, each is a sample or a reject with its class (none of them our own
defect, `internal`), the books balance, nothing outside of the corpus is read, and time, memory and processes stay bounded."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.clips import ClipConfig
from pipeline.dataset import read_index, read_rejects
from pipeline.ffmpeg import FfmpegLimits
from pipeline.quality import QualityConfig
from pipeline.schema import REJECT_CLASSES, SCORES
from pipeline.sharding import ShardSettings
from pipeline.transcode import TranscodeConfig
from pipeline.verify import verify
from tests.corpora import make_clip
from tests.faults.damaged import Workers
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


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers() as started:
        yield started


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
def test_damaged_videos(damaged: tuple[str, int, int], pieces: list[Path], workers: Workers, tmp_path: Path) -> None:
    mode, first, number = damaged
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    with closing(Canary(tmp_path, pieces[0])) as canary:
        whole = [piece.read_bytes() for piece in pieces]
        names = {}
        for seed in range(first, first + number):
            draw = random.Random(f"{mode}, then tokenized, {seed}")
            place = draw.randrange(len(pieces))
            data, what = mutate(whole[place], whole, canary.addresses, draw)
            name = f"seed{seed:06d}{pieces[place].suffix}"
            (corpus / name).write_bytes(data)
            names[name] = what
        started_s = time.monotonic()
        costs, planned = workers.run(corpus, tmp_path / "out", _SETTINGS[mode])
        elapsed_s = time.monotonic() - started_s
        assert not canary.was_read and canary.knocks == 0
    clips, tokens = (tmp_path / name for name in ("out", "tokens"))
    rejects, sources = list(read_rejects(clips)), set(read_index(clips)["source"].to_pylist())
    lost = sorted(names.keys() - sources - {one.path for one in rejects})
    assert not lost, f"neither sample nor reject: {lost}"
    undecoded = list(read_rejects(tokens))
    keys = {*read_index(tokens)["clip_key"].to_pylist(), *(one.key for one in undecoded)}
    assert keys == set(read_index(clips)["key"].to_pylist()), "a clip is neither tokens nor a reject"
    allowed = {*REJECT_CLASSES, "too-short", *SCORES} - {"internal"}
    strange = [one for one in [*rejects, *undecoded] if one.reject_class not in allowed or not one.reason]
    assert not strange, [(one.path, names[one.path], one) for one in strange]
    assert list(verify(clips)) == [] and list(verify(tokens, clips)) == []
    counts, late = (dict(Counter(one.reject_class for one in some).most_common()) for some in (rejects, undecoded))
    print(
        f"{mode}: {number} damaged videos from seed {first} on in {elapsed_s:.0f} s, {sum(c.cpu_s for c in costs) / number:.2f} s of CPU "
        f"time each; {len(sources)} gave samples, {planned} clips planned, rejects {counts}, of tokenize {late}; a shard of "
        f"{_SETTINGS[mode].videos_per_shard} took {max(c.elapsed_s for c in costs):.1f} s at most, a worker "
        f"{max(c.worker_bytes for c in costs) / 2**20:.0f} MiB, an ffmpeg {max(c.ffmpeg_bytes for c in costs) / 2**20:.0f} MiB"
    )
    assert max(cost.elapsed_s for cost in costs) < _MAX_FILE_S
    assert max(cost.worker_bytes for cost in costs) < _MAX_WORKER_BYTES
    assert max(cost.ffmpeg_bytes for cost in costs) < _MAX_FFMPEG_BYTES


@pytest.mark.parametrize("container", ["mkv", "mp4"])
def test_a_hole_of_half_an_hour_costs_little(workers: Workers, tmp_path: Path, container: str) -> None:
    """One wrong timestamp promises thousands of clips of one picture; each would be a process."""
    (corpus := tmp_path / "corpus").mkdir()
    jump = "setpts=if(gt(N\\,5)\\,PTS+2000/TB\\,PTS)"
    make_clip(
        corpus / f"hole.{container}",
        seconds=2001,
        size="64x48",
        extra=["-vf", jump, "-fps_mode", "vfr", "-frames:v", "9"],
    )
    costs, planned = workers.run(corpus, tmp_path / "out", _SETTINGS["transcode"])
    rejects = list(read_rejects(tmp_path / "out"))
    assert planned == 1 and [one.reject_class for one in rejects] == ["unsupported"]
    assert "stays for 2000 s" in rejects[0].reason
    assert list(verify(tmp_path / "out")) == []
    assert costs[0].elapsed_s < _MAX_FILE_S

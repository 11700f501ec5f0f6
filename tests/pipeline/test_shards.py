"""One shard: what is written is what any reader gets, half a shard never counts, and memory does not grow with it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import shards, tar_writer
from pipeline.dataset import committed_shards, create_or_resume, finish, read_index, read_rejects
from pipeline.errors import DatasetError, TransientIO
from pipeline.ledger import Ledger
from pipeline.schema import CLIP_SCHEMA, SCORES, Reject
from pipeline.shards import ShardInfo, ShardWriter, read_payload, read_shard_info, read_shard_rows, write_rejects
from pipeline.storage import Store
from pipeline.verify import verify
from tests.pipeline.datasets import (
    add_codes,
    describe,
    make_codes,
    make_row,
    make_token_dataset,
    open_writer,
    shard_path,
)

REJECT = Reject(path="bad.mp4", stage="shard", reject_class="corrupt", reason="cut off", stderr="moov atom not found")


def make_clip_row(key: str, **changes: Any) -> dict[str, Any]:
    row = {name: None for name in CLIP_SCHEMA.names if name not in ("offset", "size", "sha256")}
    row.pop("json_offset")
    row.pop("json_size")
    known = {
        "key": key, "video_id": key.partition("-")[0], "source": f"{key}.mp4", "start_s": 0.0, "end_s": 1.5, "num_frames": 3,
        "height": 4, "width": 6, "fps": 2.0, "codec": "h264", "ext": "mp4", "split": "train",
    }  # fmt: skip
    return {**row, **known, **changes}


def stream(tar: Path) -> list[dict[str, Any]]:
    """Samples as plain WebDataset yields them, undecoded."""
    return list(webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_or_resume(tmp_path / "d", describe())
    return tmp_path / "d"


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    path = tmp_path / "payload"
    path.write_bytes(bytes(range(256)) * 20)
    return path


class TestRoundTrip:
    @settings(deadline=None, max_examples=15)
    @given(
        members=st.lists(st.binary(max_size=1500), max_size=6),
        captions=st.lists(st.none() | st.text(st.characters(codec="utf-8"), max_size=20), min_size=6, max_size=6),
    )
    def test_any_bytes(self, tmp_path_factory: pytest.TempPathFactory, members: list[Any], captions: list[Any]) -> None:
        """Sizes around the blocks of a tar, empty members, every character in a caption."""
        folder = tmp_path_factory.mktemp("any") / "d"
        meta = create_or_resume(folder, describe("clips"))
        writer = open_writer(folder, kind="clips")
        for n, data in enumerate(members):
            row = make_clip_row(f"{n}-0", ext="bin", caption=captions[n])
            if n % 2:
                writer.add(row, "bin", data)
            else:
                with open_file(data) as file:
                    writer.add_file(file, "bin", lambda digest, row=row: row)
        writer.commit(len(members), [])
        finish(folder, meta, Ledger())
        assert list(verify(folder)) == []
        rows = read_index(folder).to_pylist()
        samples = stream(shard_path(folder, 0)) if members else []
        assert [sample["bin"] for sample in samples] == members
        assert [json.loads(sample["json"]).get("caption") for sample in samples] == captions[: len(members)]
        assert [row["caption"] for row in rows] == captions[: len(members)]
        assert [read_payload(Store.at(folder), row) for row in rows] == members

    def test_one_split_a_tar(self, tmp_path: Path) -> None:
        """Whatever split was likely while a payload was copied: the tars are the same, and each holds its own."""
        splits = ["train", "val", "val", "test", "train", "val"]
        made = []
        for likely in ("train", "val", "own"):
            folder = tmp_path / likely
            meta = create_or_resume(folder, describe("clips"))
            writer = open_writer(folder, kind="clips")
            for n, split in enumerate(splits):
                row = make_clip_row(f"{n}-0", ext="bin", split=split)
                with open_file(bytes([n]) * 700 * n) as file:
                    guess = split if likely == "own" else likely
                    writer.add_file(file, "bin", lambda digest, row=row: row, split=guess)
            writer.commit(len(splits), [])
            finish(folder, meta, Ledger())
            assert list(verify(folder)) == []
            made.append({path.name: path.read_bytes() for path in (folder / "shards").iterdir()})
        assert made[0] == made[1] == made[2]
        for split in ("train", "val", "test"):
            lines = (folder / "splits" / f"{split}.txt").read_text().splitlines()
            assert lines == [f"shards/{split}-000000.tar"]
            found = {sample["__key__"]: sample["bin"] for sample in stream(folder / lines[0])}
            assert found == {f"{n}-0": bytes([n]) * 700 * n for n, one in enumerate(splits) if one == split}
        assert [read_payload(Store.at(folder), row)[:1] for row in read_index(folder).to_pylist()] == [
            bytes([n])[: n > 0] for n in range(6)
        ]

    def test_a_shard_made_again_loses_nothing(self, folder: Path) -> None:
        """A repair on a day when a disk is away: the shard that is there stays, whatever is wrong with it."""
        writer = open_writer(folder)
        for n in range(2):
            add_codes(writer, make_row(f"{n}-0"), make_codes(n, 3))
        writer.commit(2, [])
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        reject = Reject(path="a.mp4", stage="shard", reject_class="unreadable", reason="gone for a moment")
        writer = open_writer(folder)
        add_codes(writer, make_row("0-0"), make_codes(0, 3))
        with pytest.raises(
            DatasetError, match=r"made again with 1 samples; .* counts 2, and stays.*a\.mp4: unreadable: gone"
        ):
            writer.commit(2, [reject])
        writer.abort()
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        writer = open_writer(folder)
        add_codes(writer, make_row("0-0"), make_codes(0, 3))
        assert writer.commit(2, [reject], parent_content="another parent").ledger.committed == 1

    def test_a_split_that_is_gone(self, folder: Path) -> None:
        """A shard that is made again leaves no tar of a split that it has no more."""
        for split in ("val", "train"):
            writer = open_writer(folder)
            add_codes(writer, make_row("0-0", split=split), make_codes(0, 3))
            writer.commit(1, [])
            assert [path.name for path in (folder / "shards").iterdir()] == [f"{split}-000000.tar"]
        with pytest.raises(DatasetError, match="a sample of split 'dev'; allowed: train, val, test"):
            add_codes(open_writer(folder, 1), make_row("1-0", split="dev"), make_codes(0, 3))

    def test_the_tar_is_the_one_that_tarfile_writes(self, folder: Path) -> None:
        writer = open_writer(folder)
        for n in range(5):
            add_codes(writer, make_row(f"{n}-000", caption="ü"), make_codes(n, 40 * n + 1))
        writer.commit(5, [])
        ours = shard_path(folder, 0).read_bytes()
        buffer = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(ours)) as old,
            tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new,
        ):
            for member in old:
                info = tarfile.TarInfo(member.name)
                info.size, info.mode = member.size, 0o644
                new.addfile(info, old.extractfile(member))
        assert ours == buffer.getvalue()

    def test_payload_behind_a_header(self, folder: Path) -> None:
        writer = open_writer(folder)
        writer.add(make_row("0-0"), "bin", b"headpayload", 4)
        writer.commit(1, [])
        (row,) = read_shard_rows(Store.at(folder), 0)
        assert read_payload(Store.at(folder), row) == b"payload"
        assert (row["sha256"], row["shard"]) == (hashlib.sha256(b"payload").hexdigest(), 0)
        (sample,) = stream(shard_path(folder, 0))
        assert sample["bin"] == b"headpayload"

    def test_what_the_json_says(self, folder: Path) -> None:
        """The index row without its place; other columns of a manifest as they are; nothing that is not known."""
        writer = open_writer(folder)
        row = make_row("0-0", caption="c", extra='{"license": "CC0", "n": 1}', score_motion=0.5)
        add_codes(writer, row, make_codes(0, 3))
        writer.commit(1, [])
        said = json.loads(stream(shard_path(folder, 0))[0]["json"])
        known = {name: value for name, value in row.items() if value is not None}
        assert said == {**known, "extra": {"license": "CC0", "n": 1}}
        assert "label" not in said and "offset" not in said and "sha256" not in said
        assert sum(f"score_{name}" in said for name in SCORES) == 1

    def test_equal_bytes_in_every_run(self, tmp_path: Path) -> None:
        one, two = (make_token_dataset(tmp_path / name, [[3, 1], [2]]) for name in ("one", "two"))
        for path in sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file()):
            assert (one / path).read_bytes() == (two / path).read_bytes(), path
        with tarfile.open(one / "shards" / "train-000000.tar") as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}

    def test_rows_are_sorted_by_key(self, folder: Path) -> None:
        writer = open_writer(folder)
        for key in ("b-1", "a-9", "b-0"):
            add_codes(writer, make_row(key), make_codes(ord(key[0]), 2))
        writer.commit(3, [])
        rows = read_shard_rows(Store.at(folder), 0)
        assert [row["key"] for row in rows] == ["a-9", "b-0", "b-1"]
        assert [sample["__key__"] for sample in stream(shard_path(folder, 0))] == ["b-1", "a-9", "b-0"]
        for row in rows:
            assert read_payload(Store.at(folder), row) == make_codes(ord(row["key"][0]), 2).tobytes()


def open_file(data: bytes) -> IO[bytes]:
    file = os.fdopen(os.memfd_create("payload"), "wb+")
    file.write(data)
    file.flush()
    return file


class TestAddFile:
    def test_the_hash_comes_before_the_name(self, folder: Path, payload: Path) -> None:
        """A copied video's key is its hash, and the video is read once."""
        writer = open_writer(folder, kind="clips")
        with payload.open("rb") as file:
            file.seek(77)  # a position that somebody else uses
            digest = writer.add_file(file, "mp4", lambda digest: make_clip_row(f"{digest[:16]}-0"))
            assert file.tell() == 77
        writer.commit(1, [])
        assert digest == hashlib.sha256(payload.read_bytes()).hexdigest()
        (sample,) = stream(shard_path(folder, 0))
        assert sample["__key__"] == f"{digest[:16]}-0" and sample["mp4"] == payload.read_bytes()

    def test_every_byte_is_read_once(self, folder: Path, payload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[tuple[int, int]] = []
        real = os.preadv

        def preadv(fd: int, buffers: Any, offset: int) -> int:
            count = real(fd, [buffers[0][:1000]], offset)  # short reads are usual
            read.append((offset, count))
            return count

        monkeypatch.setattr(shards.os, "preadv", preadv)
        writer = open_writer(folder, kind="clips")
        with payload.open("rb") as file:
            writer.add_file(file, "mp4", lambda digest: make_clip_row("0-0"))
        assert read == [(n, min(1000, 5120 - n)) for n in range(0, 5120, 1000)]
        writer.abort()

    def test_a_part_of_a_file(self, folder: Path, payload: Path) -> None:
        writer = open_writer(folder, kind="clips")
        with payload.open("rb") as file:
            writer.add_file(file, "mp4", lambda digest: make_clip_row("0-0"), 100, 50)
            writer.add_file(file, "mp4", lambda digest: make_clip_row("1-0"), 5000)
        writer.commit(2, [])
        rows = read_shard_rows(Store.at(folder), 0)
        data = payload.read_bytes()
        assert [read_payload(Store.at(folder), row) for row in rows] == [data[100:150], data[5000:]]

    @pytest.mark.parametrize("fails", ["read", "short", "describe"])
    def test_a_failure_leaves_the_shard_as_it_was(
        self, folder: Path, payload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
    ) -> None:
        def add(writer: ShardWriter, name: str) -> None:
            with payload.open("rb") as file:
                writer.add_file(file, "mp4", lambda digest: make_clip_row(name))

        unbroken = open_writer(tmp_path / "unbroken", kind="clips")
        writer = open_writer(folder, kind="clips")
        for one in (unbroken, writer):
            add(one, "0-0")
        real, reads = os.preadv, iter(range(100))

        def preadv(fd: int, buffers: Any, offset: int) -> int:
            if next(reads) == 2:
                if fails == "read":
                    raise OSError(5, "Input/output error")
                return 0
            return real(fd, [buffers[0][:1000]], offset)

        def describe_badly(digest: str) -> dict[str, Any]:
            raise KeyError(digest)

        with payload.open("rb") as file, monkeypatch.context() as patch:
            if fails == "describe":
                with pytest.raises(KeyError):
                    writer.add_file(file, "mp4", describe_badly)
            else:
                patch.setattr(shards.os, "preadv", preadv)
                words = {"read": "from byte 2000 on: Input/output", "short": "ended after 2000 of 5120 bytes"}[fails]
                with pytest.raises(TransientIO, match=words):
                    writer.add_file(file, "mp4", lambda digest: make_clip_row("bad-0"))
        for one in (unbroken, writer):
            add(one, "2-0")
            one.commit(2, [])
        for name in (shards.tar_name(0, "train"), shards.index_name(0)):
            assert (tmp_path / "unbroken" / name).read_bytes() == (folder / name).read_bytes()

    def test_memory_does_not_grow_with_a_payload(self, folder: Path, tmp_path: Path) -> None:
        with (tmp_path / "large").open("wb") as large:
            large.truncate(100_000_000)  # sparse: it takes no room
        writer = open_writer(folder, kind="clips")
        tracemalloc.start()
        try:
            with (tmp_path / "large").open("rb") as file:
                writer.add_file(file, "mp4", lambda digest: make_clip_row("0-0"))
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            writer.abort()
        assert peak_bytes < 10_000_000

    def test_eight_gibibytes_and_more(self, folder: Path) -> None:
        """A size that ustar cannot say, in a file with a hole in its place."""
        size = 9 * 2**30 + 5
        writer = open_writer(folder)
        writer.add(make_row("0-0"), "bin", b"before")
        tar = writer._tars["train"]
        tar.begin()
        tar._file.seek(size, os.SEEK_CUR)
        tar.name_last("1-0.bin", size)
        writer.add(make_row("2-0"), "bin", b"after")
        writer.commit(2, [])
        with tarfile.open(shard_path(folder, 0)) as tar:
            assert [(m.name, m.size) for m in tar if m.name.endswith("bin")] == [
                ("0-0.bin", 6),
                ("1-0.bin", size),
                ("2-0.bin", 5),
            ]
            assert tar.extractfile("2-0.bin").read() == b"after"  # type: ignore[union-attr]

    def test_readers_know_the_large_header(self, folder: Path, payload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tar_writer, "_USTAR_MAX_BYTES", 1000)
        writer = open_writer(folder, kind="clips")
        with payload.open("rb") as file:
            writer.add_file(file, "mp4", lambda digest: make_clip_row("0-0"))
        writer.commit(1, [])
        (sample,) = stream(shard_path(folder, 0))
        assert sample["mp4"] == payload.read_bytes() and json.loads(sample["json"])["key"] == "0-0"


class TestCommit:
    def write(self, folder: Path) -> ShardWriter:
        writer = open_writer(folder)
        add_codes(writer, make_row("0-000"), make_codes(0, 3))
        return writer

    def files(self, folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"dataset.json"}

    def test_nothing_has_its_name_before(self, folder: Path) -> None:
        writer = self.write(folder)
        assert all(Path(name).name.startswith(".") for name in self.files(folder))
        writer.commit(2, [REJECT])
        assert self.files(folder) == {"shards/train-000000.tar", "index/000000.parquet", "rejects/000000.parquet"}
        assert list(read_rejects(folder)) == [REJECT]

    def test_the_index_comes_last(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []
        real = Path.rename

        def rename(self: Path, target: Path) -> Path:
            order.append(f"{target.parent.name}/{target.name}")
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        self.write(folder).commit(2, [REJECT])
        assert order == ["shards/train-000000.tar", "rejects/000000.parquet", "index/000000.parquet"]

    @pytest.mark.parametrize("again", [False, True])
    @pytest.mark.parametrize("dies_at", ["train-000000.tar", "rejects/000000.parquet", "index/000000.parquet"])
    def test_dying_in_between(self, folder: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str, again: bool) -> None:
        """Whatever step is the last, the shard does not count (nor the one it replaces), and the next try writes it."""
        if again:
            self.write(folder).commit(1, [])
        real = Path.rename

        def rename(self: Path, target: Path) -> Path:
            if str(target).endswith(dies_at):
                raise KeyboardInterrupt
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            with pytest.raises(KeyboardInterrupt):
                self.write(folder).commit(2, [REJECT])
        assert committed_shards(folder, "f" * 32) == {}
        meta = create_or_resume(folder, describe())
        assert not list((folder / "shards").glob(".*"))
        self.write(folder).commit(2, [REJECT])
        assert committed_shards(folder, "f" * 32)[0].ledger.committed == 1
        finish(folder, meta, Ledger())
        assert list(verify(folder)) == []

    def test_rejects_of_before_go(self, folder: Path) -> None:
        self.write(folder).commit(2, [REJECT])
        self.write(folder).commit(1, [])
        assert list(read_rejects(folder)) == [] and not (folder / "rejects" / "000000.parquet").exists()
        write_rejects(Store.at(folder), "rejects/plan.parquet", [REJECT])
        assert list(read_rejects(folder)) == [REJECT]

    def test_abort(self, folder: Path) -> None:
        self.write(folder).abort()
        assert self.files(folder) == set()

    def test_abort_after_commit_is_harmless(self, folder: Path) -> None:
        writer = self.write(folder)
        writer.commit(1, [])
        before = self.files(folder)
        writer.abort()
        assert self.files(folder) == before

    @pytest.mark.parametrize(("planned", "rejects"), [(2, []), (1, [REJECT]), (0, [])])
    def test_books_that_do_not_balance(self, folder: Path, planned: int, rejects: list[Reject]) -> None:
        writer = self.write(folder)
        with pytest.raises(DatasetError, match="do not balance"):
            writer.commit(planned, rejects)
        writer.abort()
        assert self.files(folder) == set()

    def test_a_key_twice(self, folder: Path) -> None:
        writer = self.write(folder)
        add_codes(writer, make_row("0-000"), make_codes(1, 3))
        with pytest.raises(DatasetError, match="shard 000000 has two samples 0-000"):
            writer.commit(2, [])
        writer.abort()
        assert self.files(folder) == set()

    def test_foreign_index(self, folder: Path) -> None:
        self.write(folder).commit(1, [])
        with pytest.raises(DatasetError, match=r"index/000000.parquet belongs to dataset ffff"):
            committed_shards(folder, "other")


class TestShardInfo:
    def test_round_trip(self, folder: Path) -> None:
        writer = open_writer(folder, kind="clips")
        for n, codec in enumerate(("h264", "vp9", "h264")):
            writer.add(make_clip_row(f"{n}-0", codec=codec, source_container="mov", video_id="0"), "mp4", b"12345")
        info = writer.commit(4, [REJECT], parent_content="p")
        assert read_shard_info(Store.at(folder), 0) == info == ShardInfo.from_json(info.to_json())
        assert info.fingerprint == "f" * 32 and info.parent_content == "p"
        assert info.tar_bytes == shard_path(folder, 0).stat().st_size
        assert info.ledger == Ledger(planned=4, committed=3, rejected=Counter({"corrupt": 1}))
        assert info.totals == {
            "videos": 1, "seconds": 4.5, "frames": 9, "payload_bytes": 15,
            "codec": {"h264": 2, "vp9": 1}, "ext": {"mp4": 3}, "source_container": {"mov": 3},
        }  # fmt: skip
        assert read_shard_info(Store.at(folder), 1) is None

    @pytest.mark.parametrize(
        "change",
        [
            lambda samples: samples.pop(),
            lambda samples: samples.append(("9-0", b"9")),
            lambda samples: samples.__setitem__(1, ("1-0", b"another")),
            lambda samples: samples.__setitem__(1, ("1-1", b"1")),
        ],
    )
    def test_content_changes_with_any_sample(
        self, folder: Path, change: Callable[[list[tuple[str, bytes]]], Any]
    ) -> None:
        def content(samples: list[tuple[str, bytes]]) -> str:
            writer = open_writer(folder)
            for key, data in samples:
                writer.add(make_row(key), "bin", data)
            return writer.commit(len(samples), [], parent_content=str(samples)).content

        samples = [(f"{n}-0", b"%d" % n) for n in range(3)]
        before = content(samples)
        assert before == content(samples) == content(samples[::-1])
        change(samples)
        assert content(samples) != before

    @pytest.mark.parametrize("damage", ["text", "truncated", "foreign", "empty", "list"])
    def test_no_index_of_ours(self, folder: Path, damage: str) -> None:
        writer = open_writer(folder)
        add_codes(writer, make_row("0-0"), make_codes(0, 3))
        writer.commit(1, [])
        path = folder / shards.index_name(0)
        data = path.read_bytes()
        if damage in ("foreign", "list"):
            metadata = {b"tokenreel.shard": b"[1]"} if damage == "list" else None
            pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(metadata), path)
        else:
            path.write_bytes({"text": b"not parquet", "truncated": data[: len(data) // 2], "empty": b""}[damage])
        for call in (lambda: read_shard_info(Store.at(folder), 0), lambda: committed_shards(folder, "f" * 32)):
            with pytest.raises(DatasetError, match=r"index/000000.parquet is no tokenreel index.*delete it"):
                call()

    def test_damaged_rows(self, folder: Path) -> None:
        """The footer is whole, but not what it points at."""
        writer = open_writer(folder)
        add_codes(writer, make_row("0-0"), make_codes(0, 3))
        writer.commit(1, [])
        path = folder / shards.index_name(0)
        data = path.read_bytes()
        path.write_bytes(data[:4] + bytes(len(data) // 4) + data[4 + len(data) // 4 :])
        assert read_shard_info(Store.at(folder), 0) is not None
        with pytest.raises(DatasetError, match=r"000000.parquet cannot be read.*verify --repair"):
            read_shard_rows(Store.at(folder), 0)


def test_read_payload_of_damaged_shards(folder: Path) -> None:
    writer = open_writer(folder)
    add_codes(writer, make_row("0-0"), make_codes(0, 3))
    writer.commit(1, [])
    (row,) = read_shard_rows(Store.at(folder), 0)
    path = shard_path(folder, 0)
    np.testing.assert_array_equal(
        np.frombuffer(read_payload(Store.at(folder), row), np.uint16), make_codes(0, 3).ravel()
    )
    os.truncate(path, row["offset"] + 7)
    with pytest.raises(DatasetError, match=rf"shards/train-000000.tar: sample 0-0 ends after 7 of {row['size']} bytes"):
        read_payload(Store.at(folder), row)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_payload(Store.at(folder), row)

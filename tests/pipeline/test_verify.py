"""Verify: damage anywhere is found, told where it is, and healed by making that shard again."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import dataset
from pipeline.dataset import committed_shards, create_or_resume, finish, read_index, read_meta
from pipeline.errors import ConfigError, DatasetError
from pipeline.ledger import Ledger
from pipeline.schema import Reject
from pipeline.shards import read_payload, write_rejects
from pipeline.storage import Store
from pipeline.verify import Problem, shards_at_fault, verify
from tests.pipeline.datasets import add_codes, describe, make_codes, make_row, make_token_dataset, open_writer

REJECT = Reject(path="bad.mp4", stage="shard", reject_class="corrupt", reason="cut off")
FILTERED = Reject(path="short.mp4", stage="shard", reject_class="too-short", reason="1 s", outcome="filtered", key="k")
REFUSED = replace(REJECT, path="link.mp4", stage="plan", reject_class="outside-corpus")
SHARDS = {0: (0, 1, 2), 1: (3, 4)}
PLAN_BOOKS = Ledger(planned=1, rejected=Counter({"outside-corpus": 1}))


def write_shard(folder: Path, shard: int, parent_content: str = "") -> None:
    writer = open_writer(folder, shard)
    for sample in SHARDS[shard]:
        row = make_row(f"{sample}-000", caption=f"caption {sample}", split="val" if sample == 4 else "train")
        add_codes(writer, row, make_codes(sample, 3))
    rejects = [REJECT if shard else FILTERED]
    writer.commit(len(SHARDS[shard]) + 1, rejects, parent_content=parent_content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with five samples, a reject in each and one of the plan."""
    folder = tmp_path / "tokens"
    write_rejects(Store.at(tmp_path), "refused.parquet", [REFUSED])
    meta = create_or_resume(folder, describe(num_shards=2), plan_rejects=tmp_path / "refused.parquet")
    for shard in SHARDS:
        write_shard(folder, shard)
    finish(folder, meta, PLAN_BOOKS)
    return folder


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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def find(folder: Path, *expected: tuple[str, int | None]) -> list[Problem]:
    """Every problem expected is found, with its shard, and no other one is."""
    found = list(verify(folder))
    for words, shard in expected:
        assert any(words in problem.text and problem.shard == shard for problem in found), (words, found)
    for problem in found:
        assert any(words in problem.text and problem.shard == shard for words, shard in expected), problem
        assert problem.text.startswith(str(folder))
    return found


def heal(folder: Path, before: dict[str, bytes], *shards: int) -> None:
    """Just `shards` are at fault; the job that wrote them makes the same dataset again."""
    assert shards_at_fault(folder, list(verify(folder))) == list(shards)
    assert set(committed_shards(folder, "f" * 32, without=shards)) == set(SHARDS) - set(shards)
    for shard in shards:
        write_shard(folder, shard)
    finish(folder, read_meta(folder), PLAN_BOOKS)
    assert list(verify(folder)) == [] and contents(folder) == before


class TestDamage:
    def test_nothing_to_say(self, folder: Path) -> None:
        find(folder)

    @pytest.mark.parametrize("place", [0, 20, -1])
    def test_flipped_byte(self, folder: Path, place: int) -> None:
        before, row = contents(folder), read_index(folder).to_pylist()[1]
        flip(folder / "shards" / "train-000000.tar", row["offset"] + place % row["size"])
        find(folder, (f"shards/train-000000.tar: the bytes of sample {row['key']} are not the ones", 0))
        with pytest.raises(DatasetError, match=row["key"]):
            read_payload(Store.at(folder), row)
        heal(folder, before, 0)

    @pytest.mark.parametrize("place", range(0, 200, 23))
    def test_flipped_byte_in_the_json(self, folder: Path, place: int) -> None:
        """Readers of plain WebDataset take captions and splits from there."""
        row = read_index(folder).to_pylist()[1]
        flip(folder / "shards" / "train-000000.tar", row["json_offset"] + place)
        find(folder, (f"the JSON of sample {row['key']}", 0))

    def test_every_byte_counts(self, folder: Path) -> None:
        """Headers of the tar and of the arrays, padding, the end: what no hash covers."""
        path = folder / "shards" / "train-000001.tar"
        data = path.read_bytes()
        for place in range(0, len(data), 127):
            path.write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
            found = list(verify(folder))
            assert found and {problem.shard for problem in found} == {1}, place

    @pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
    def test_truncated_tar(self, folder: Path, kept: float) -> None:
        before, path = contents(folder), folder / "shards" / "train-000001.tar"
        os.truncate(path, int(path.stat().st_size * kept))
        found = list(verify(folder))
        assert any("were committed" in problem.text for problem in found)
        assert all("train-000001.tar" in problem.text and problem.shard == 1 for problem in found)
        heal(folder, before, 1)

    def test_longer_tar(self, folder: Path) -> None:
        with (folder / "shards" / "train-000001.tar").open("ab") as tar:
            tar.write(bytes(10240))
        found = list(verify(folder))
        assert any("were committed" in problem.text for problem in found)

    def test_missing_tar(self, folder: Path) -> None:
        before = contents(folder)
        (folder / "shards" / "train-000001.tar").unlink()
        find(folder, ("shards/train-000001.tar: missing", 1))
        heal(folder, before, 1)

    @pytest.mark.parametrize("what", [b"PAR1 no", b"", None])
    def test_damaged_index(self, folder: Path, what: bytes | None) -> None:
        before, path = contents(folder), folder / "index" / "000001.parquet"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if what is None else what)
        assert any("no tokenreel index" in problem.text and problem.shard == 1 for problem in verify(folder))
        heal(folder, before, 1)

    @pytest.mark.parametrize("place", range(4, 6000, 331))
    def test_flipped_byte_in_the_index(self, folder: Path, place: int) -> None:
        """Whatever a reader makes of it, verify neither dies nor blames another shard."""
        path = folder / "index" / "000001.parquet"
        flip(path, place % path.stat().st_size)
        assert {problem.shard for problem in verify(folder)} <= {1, None}

    def test_damaged_rows(self, folder: Path) -> None:
        """The footer is whole, so the books can be read, but the rows cannot."""
        before, path = contents(folder), folder / "index" / "000001.parquet"
        data = path.read_bytes()
        path.write_bytes(data[:4] + bytes(len(data) // 4) + data[4 + len(data) // 4 :])
        find(folder, ("000001.parquet cannot be read", 1))
        heal(folder, before, 1)

    @pytest.mark.parametrize(
        "change", [{"video_id": "not hex"}, {"video_id": "f" * 40}, {"video_id": None}, {"offset": -1}, {"size": 2**60}]
    )
    def test_rows_that_make_no_sense(self, folder: Path, change: dict[str, Any]) -> None:
        before = contents(folder)
        rewrite_index(folder, 1, lambda rows: rows[0].update(change))
        assert {problem.shard for problem in verify(folder)} == {1}
        heal(folder, before, 1)

    def test_a_row_was_dropped(self, folder: Path) -> None:
        before = contents(folder)
        rewrite_index(folder, 0, lambda rows: rows.pop())
        find(
            folder,
            ("index/000000.parquet: 2 rows; its books say 3", 0),
            ("index/000000.parquet: keys or hashes are not", 0),
            ("its end is not the one", 0),
        )
        heal(folder, before, 0)

    def test_the_first_row_was_dropped(self, folder: Path) -> None:
        rewrite_index(folder, 0, lambda rows: rows.pop(0))
        find(folder, ("2 rows; its books say 3", 0), ("keys or hashes", 0), ("not the samples of its index", 0))

    def test_a_row_was_changed(self, folder: Path) -> None:
        before = contents(folder)
        rewrite_index(folder, 0, lambda rows: rows[0].update(caption="another"))
        find(folder, ("the JSON of sample 0-000", 0))
        heal(folder, before, 0)

    def test_a_row_stands_twice(self, folder: Path) -> None:
        rewrite_index(folder, 0, lambda rows: rows.insert(1, rows[0]))
        found = list(verify(folder))
        assert any("keys stand twice" in problem.text for problem in found)
        assert {problem.shard for problem in found} == {0}


class TestFiles:
    def test_missing_shard(self, folder: Path) -> None:
        before = contents(folder)
        for path in folder.glob("*/*000001.*"):
            path.unlink()
        find(folder, ("shard 000001 is missing", 1), ("the files say", None))
        heal(folder, before, 1)

    def test_killed_before_the_index(self, folder: Path) -> None:
        before = contents(folder)
        (folder / "index" / "000001.parquet").unlink()
        find(
            folder,
            ("shard 000001 is missing", 1),
            ("shards/train-000001.tar: no index counts it", None),
            ("shards/val-000001.tar: no index counts it", None),
            ("rejects/000001.parquet: no index counts it", None),
            ("the files say", None),
        )
        heal(folder, before, 1)

    def test_strays(self, folder: Path) -> None:
        shutil.copy(folder / "shards" / "train-000000.tar", folder / "shards" / "train-000002.tar")
        shutil.copy(folder / "rejects" / "000000.parquet", folder / "rejects" / "000002.parquet")
        (folder / "shards" / ".000003.77.tmp").write_bytes(b"half")
        found = find(
            folder, ("shards/train-000002.tar: no index counts it", None), ("rejects/000002.parquet: no index", None)
        )
        with pytest.raises(ConfigError, match="no shard is at fault"):
            shards_at_fault(folder, found)

    def test_what_is_no_file_of_the_dataset(self, folder: Path, tmp_path: Path) -> None:
        """A folder, a pipe, and links out of the dataset are named; a link within it is as good as its file."""
        (folder / "shards" / "more").mkdir()
        os.mkfifo(folder / "index" / "000005.parquet")
        secret = tmp_path / "secret"
        shutil.copytree(folder / "rejects", secret)
        shutil.rmtree(folder / "rejects")
        (folder / "rejects").symlink_to(secret)
        shutil.move(folder / "shards" / "train-000001.tar", secret / "train.tar")
        (folder / "shards" / "train-000001.tar").symlink_to(secret / "train.tar")
        (folder / "shards" / "val-000001.tar").rename(folder / "val.tar")
        (folder / "shards" / "val-000001.tar").symlink_to(folder / "val.tar")
        found = [problem.text for problem in verify(folder)]
        for words in (
            "shards/more: a folder", "index/000005.parquet: neither a file nor a folder", "rejects: a link out of the dataset",
            f"shards/train-000001.tar: a link out of the dataset, to {secret}/train.tar",
        ):  # fmt: skip
            assert any(words in text for text in found), (words, found)
        assert len([text for text in found if "a link out of" in text and "val" in text]) == 0

    def test_foreign_index(self, folder: Path, tmp_path: Path) -> None:
        before = contents(folder)
        other = make_token_dataset(tmp_path / "other", [[3], [3, 3]], fingerprint="e" * 32)
        for part in ("index/000001.parquet", "shards/train-000001.tar"):
            shutil.copy(other / part, folder / part)
        find(
            folder, ("foreign, of dataset eeee", 1), ("the files say", None), ("rejects/000001.parquet: the index says", 1),
            ("stands in shard", None), ("val-000001.tar: no index", None), ("its shards are not those", None),
        )  # fmt: skip
        heal(folder, before, 1)

    def test_a_shard_too_many(self, folder: Path) -> None:
        before = contents(folder)
        for path in list(folder.glob("*/*000001.*")):
            shutil.copy(path, path.with_name(path.name.replace("000001", "000007")))
        find(
            folder, ("shard 000007 is foreign, the plan has 2 shards; delete index/000007.parquet", None), ("the files say", None), ("a duplicate", None),
            ("index/000007.parquet: of shard 000001, which was put in its place", 7), ("its shards are not those", None),
        )  # fmt: skip
        for path in folder.glob("*/*000007.*"):
            path.unlink()
        assert list(verify(folder)) == [] and contents(folder) == before

    def test_stale_tokens(self, folder: Path, tmp_path: Path) -> None:
        """Clips that were made again with other samples make the tokens of their shard stale, and no other ones."""
        clips = make_token_dataset(tmp_path / "clips", [[3], [2]])
        for shard, info in committed_shards(clips, "f" * 32).items():
            write_shard(folder, shard, info.content)
        before = contents(folder)
        assert list(verify(folder, clips)) == []
        writer = open_writer(clips, 1)
        add_codes(writer, make_row("77"), make_codes(7, 2))
        content = writer.commit(1, []).content
        assert list(verify(folder)) == []  # nobody can tell without the clips
        (problem,) = verify(folder, clips)
        assert problem.shard == 1 and "shard 000001 is stale" in problem.text and str(clips) in problem.text
        assert shards_at_fault(folder, [problem]) == [1]
        write_shard(folder, 1, content)
        assert list(verify(folder, clips)) == []
        assert contents(folder).keys() == before.keys()
        (clips / "index" / "000000.parquet").unlink()
        assert [problem.shard for problem in verify(folder, clips)] == [0]
        (clips / "index" / "000000.parquet").write_bytes(b"no")
        (problem,) = verify(folder, clips)  # the clips are at fault, so making tokens again would not help
        assert problem.shard is None and "clips/index/000000.parquet is no tokenreel index" in problem.text

    def test_shards_that_were_exchanged(self, folder: Path) -> None:
        """Each is whole, and not the one that was committed under its number."""
        before = contents(folder)
        for path in list(folder.glob("*/*000000.*")):
            path.rename(path.with_name(path.name.replace("000000", "000009")))
        for old, new in (("000001", "000000"), ("000009", "000001")):
            for path in list(folder.glob(f"*/*{old}.*")):
                path.rename(path.with_name(path.name.replace(old, new)))
        find(
            folder, ("of shard 000001, which was put in its place", 0), ("of shard 000000, which was put", 1),
            ("its shards are not those that dataset.json sums up", None),
        )  # fmt: skip
        heal(folder, before, 0, 1)

    def test_lists_of_tars(self, folder: Path) -> None:
        before = contents(folder)
        assert before["splits/train.txt"] == b"shards/train-000000.tar\nshards/train-000001.tar\n"
        assert before["splits/val.txt"] == b"shards/val-000001.tar\n"
        (folder / "splits" / "val.txt").write_bytes(before["splits/train.txt"])
        (folder / "splits" / "test.txt").write_bytes(b"x")
        find(folder, ("splits/val.txt: not the tars of split val", None), ("splits/test.txt: not the tars", None))
        finish(folder, read_meta(folder), PLAN_BOOKS)
        assert contents(folder) == before


class TestClashes:
    def make(self, folder: Path, *rows: tuple[int, str, str]) -> Path:
        """A token dataset of samples (shard, key, split)."""
        meta = create_or_resume(folder, describe(num_shards=2))
        for shard in (0, 1):
            writer, mine = open_writer(folder, shard), [row for row in rows if row[0] == shard]
            for _, key, split in mine:
                add_codes(writer, make_row(key, split=split), make_codes(0, 3))
            writer.commit(len(mine), [])
        finish(folder, meta, Ledger())
        return folder

    def test_clips_of_a_video(self, tmp_path: Path) -> None:
        find(self.make(tmp_path / "d", (0, "a-0", "train"), (0, "a-1", "train"), (1, "b-0", "val"), (1, "b-1", "val")))

    def test_a_video_in_two_shards(self, tmp_path: Path) -> None:
        folder = self.make(tmp_path / "d", (0, "abc-0", "train"), (1, "abc-1", "train"), (1, "b-0", "train"))
        found = find(folder, ("video 0000000000000abc stands in shard 000000 and in 000001: a duplicate", None))
        with pytest.raises(ConfigError, match="no shard is at fault"):
            shards_at_fault(folder, found)

    @pytest.mark.parametrize(("shard", "splits"), [(0, ("train", "val")), (1, ("train", "val")), (1, ("val", "test"))])
    def test_a_video_in_two_splits(self, tmp_path: Path, shard: int, splits: tuple[str, str]) -> None:
        folder = self.make(
            tmp_path / "d", (0, "ffffffffffffffff-0", splits[0]), (shard, "ffffffffffffffff-1", splits[1])
        )
        expected = [("video ffffffffffffffff stands in two splits", None), ("a duplicate", None)]
        find(folder, *expected[: 1 + shard])


class TestBooks:
    def test_wrong_totals(self, folder: Path) -> None:
        meta = read_meta(folder)
        assert meta.totals is not None
        dataset.write_meta(folder, replace(meta, totals={**meta.totals, "committed": 4}))
        find(folder, ("the files say", None), ("do not balance", None))

    def test_rejects_were_lost(self, folder: Path) -> None:
        before = contents(folder)
        (folder / "rejects" / "000001.parquet").unlink()
        find(folder, ("rejects/000001.parquet: the index says", 1))
        heal(folder, before, 1)

    def test_damaged_rejects(self, folder: Path) -> None:
        before = contents(folder)
        (folder / "rejects" / "000001.parquet").write_bytes(b"PAR1 no")
        find(folder, ("rejects/000001.parquet: cannot be read", 1))
        heal(folder, before, 1)

    @pytest.mark.parametrize("what", [b"PAR1 no", None])
    def test_rejects_of_the_plan(self, folder: Path, what: bytes | None) -> None:
        path = folder / "rejects" / "plan.parquet"
        path.unlink()
        if what is not None:
            path.write_bytes(what)
        find(folder, ("rejects/plan.parquet: cannot be read" if what else "the files say", None))

    def test_unfinished(self, tmp_path: Path) -> None:
        create_or_resume(tmp_path / "d", describe(num_shards=0))
        find(tmp_path / "d", ("unfinished", None))

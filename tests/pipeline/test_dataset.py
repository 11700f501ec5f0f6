"""A dataset in a folder: opened, resumed or refused, read, and finished with books that balance."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import dataset
from pipeline.dataset import (
    PLAN_NAME,
    PLAN_REJECTS,
    committed_shards,
    create_or_resume,
    finish,
    listed_shards,
    read_index,
    read_meta,
    read_rejects,
    read_rejects_file,
)
from pipeline.errors import ConfigError, DatasetError
from pipeline.ledger import Ledger
from pipeline.schema import Reject
from pipeline.shards import read_payload, write_rejects
from pipeline.storage import Store
from tests.pipeline.datasets import (
    add_codes,
    describe,
    make_codes,
    make_row,
    make_token_dataset,
    open_writer,
)

REJECT = Reject(path="bad.mp4", stage="shard", reject_class="corrupt", reason="cut off", stderr="moov atom not found")
FILTERED = Reject(path="short.mp4", stage="shard", reject_class="too-short", reason="1 s", outcome="filtered", key="k")
REFUSED = replace(REJECT, path="link.mp4", stage="plan", reject_class="outside-corpus")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with five samples, a reject in each and one of the plan."""
    folder = tmp_path / "tokens"
    write_rejects(Store.at(tmp_path), "refused.parquet", [REFUSED])
    meta = create_or_resume(folder, describe(num_shards=2), plan_rejects=tmp_path / "refused.parquet")
    for shard, samples in ((0, (0, 1, 2)), (1, (3, 4))):
        writer = open_writer(folder, shard)
        for sample in samples:
            row = make_row(f"{sample}-000", caption=f"caption {sample}", split="val" if sample == 4 else "train")
            add_codes(writer, row, make_codes(sample, 3))
        writer.commit(len(samples) + 1, [REJECT if shard else FILTERED])
    finish(folder, meta, Ledger(planned=1, rejected=Counter({"outside-corpus": 1})))
    return folder


class TestRead:
    def test_index_points_at_the_bytes(self, folder: Path) -> None:
        for n, row in enumerate(read_index(folder).to_pylist()):
            tar = (folder / row["tar"]).read_bytes()
            assert tar[row["offset"] : row["offset"] + row["size"]] == make_codes(n, 3).tobytes()
            assert read_payload(Store.at(folder), row) == make_codes(n, 3).tobytes()
            assert json.loads(tar[row["json_offset"] : row["json_offset"] + row["json_size"]])["key"] == row["key"]

    def test_index_is_in_the_order_of_shards(self, folder: Path) -> None:
        table = read_index(folder, ["key", "split"])
        assert table.column_names == ["key", "split", "shard", "tar"]
        assert table["key"].to_pylist() == [f"{n}-000" for n in range(5)]
        assert table["shard"].to_pylist() == [0, 0, 0, 1, 1]
        assert listed_shards(folder) == [0, 1]

    def test_what_is_no_index_is_left_out(self, folder: Path) -> None:
        for name in ("notes.txt", "x.parquet", ".000002.parquet.9.tmp"):
            (folder / "index" / name).write_bytes(b"x")
        assert listed_shards(folder) == [0, 1] and len(read_index(folder)) == 5

    def test_no_samples(self, tmp_path: Path) -> None:
        folder = make_token_dataset(tmp_path / "d", [[]])
        assert len(read_index(folder)) == 0
        assert read_index(folder, ["key"]).column_names == ["key", "shard", "tar"]

    @pytest.mark.parametrize("kind", ["clips", "tokens"])
    def test_no_shards(self, tmp_path: Path, kind: str) -> None:
        """The columns are there, so that a reader need not care."""
        create_or_resume(tmp_path / "d", describe(kind))
        made = make_token_dataset(tmp_path / "made", [[1]])
        assert len(read_index(tmp_path / "d")) == 0
        if kind == "tokens":
            assert read_index(tmp_path / "d").schema == read_index(made).schema
        assert read_index(tmp_path / "d", ["key"]).column_names == ["key", "shard", "tar"]

    def test_rejects(self, folder: Path) -> None:
        assert list(read_rejects(folder)) == [FILTERED, REJECT, REFUSED]
        assert read_rejects_file(Store.at(folder), PLAN_REJECTS) == [REFUSED]


class TestFinish:
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

    def test_counts_of_clips(self, tmp_path: Path) -> None:
        from tests.pipeline.test_shards import make_clip_row

        meta = create_or_resume(tmp_path / "d", describe("clips", 2))
        for shard, codecs in enumerate((["h264", "vp9"], ["h264"])):
            writer = open_writer(tmp_path / "d", shard, "clips")
            for n, codec in enumerate(codecs):
                writer.add(make_clip_row(f"{shard}{n}-0", codec=codec, source_container="mov"), "mp4", b"12")
            writer.commit(len(codecs), [])
        totals = finish(tmp_path / "d", meta, Ledger())[0].totals
        assert totals is not None
        assert totals["samples_by_codec"] == {"h264": 2, "vp9": 1}
        assert totals["samples_by_source_container"] == {"mov": 3} and totals["samples_by_ext"] == {"mp4": 3}
        assert "samples_by_source_codec" not in totals  # nobody knows it

    def test_content(self, tmp_path: Path) -> None:
        """It names the samples: the same for the same ones, another one for others."""
        one, two, other = (
            make_token_dataset(tmp_path / name, shards)
            for name, shards in (("one", [[3], [2]]), ("two", [[3], [2]]), ("other", [[3], [4]]))
        )
        contents = [read_meta(folder).content for folder in (one, two, other)]
        assert contents[0] == contents[1] != contents[2] and len(contents[0]) == 32
        assert describe().content == ""

    def test_twice_is_harmless(self, folder: Path) -> None:
        before = (folder / "dataset.json").read_bytes()
        finish(folder, read_meta(folder), Ledger(planned=1, rejected=Counter({"outside-corpus": 1})))
        assert (folder / "dataset.json").read_bytes() == before

    def test_missing_shards(self, folder: Path) -> None:
        (folder / "index" / "000000.parquet").unlink()
        with pytest.raises(DatasetError, match=r"shards \[0\] of 2 are missing"):
            finish(folder, read_meta(folder), Ledger())
        assert list(committed_shards(folder, "f" * 32)) == [1]

    def test_books_that_do_not_balance(self, folder: Path) -> None:
        with pytest.raises(DatasetError, match="do not balance"):
            finish(folder, read_meta(folder), Ledger(planned=2, rejected=Counter({"empty": 1})))


class TestResume:
    def test_same(self, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "d"
        assert create_or_resume(folder, describe()) == create_or_resume(folder, describe()) == read_meta(folder)

    def test_what_a_killed_job_was_writing_goes(self, folder: Path) -> None:
        before = sorted(folder.rglob("*"))
        for part in ("", "shards", "index", "rejects", "tokenizer"):
            (folder / part).mkdir(exist_ok=True)
            (folder / part / ".train-000001.tar.1-2f.tmp").write_bytes(b"half")
        create_or_resume(folder, describe(num_shards=2))
        assert sorted(folder.rglob("*")) == sorted([*before, folder / "tokenizer"])

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
        """Whoever knows plans names the differences; the old one stands in the dataset."""
        seen: list[bytes] = []

        def name_changes(old: Path, new: Path) -> list[str]:
            seen.extend([old.read_bytes(), new.read_bytes()])
            return ["changed: b.mp4", "added: d.mp4"]

        plan = tmp_path / "plan"
        plan.write_bytes(b"old plan")
        out = tmp_path / "d"
        create_or_resume(out, describe(), plan=plan)
        assert (out / PLAN_NAME).read_bytes() == b"old plan"
        plan.write_bytes(b"new plan")
        changed = describe(fingerprint="g", inputs_digest="j")
        with pytest.raises(ConfigError, match=r"input files \(changed: b.mp4, added: d.mp4\)"):
            create_or_resume(out, changed, plan=plan, name_changes=name_changes)
        assert seen == [b"old plan", b"new plan"]
        assert (out / PLAN_NAME).read_bytes() == b"old plan"
        with pytest.raises(ConfigError, match=r"input files \(unknown which\)"):
            create_or_resume(out, changed)

    def test_plans_are_kept(self, tmp_path: Path) -> None:
        plan, refused = tmp_path / "plan", tmp_path / "refused"
        plan.write_bytes(b"plan")
        write_rejects(Store.at(tmp_path), "refused", [REFUSED])
        for _ in range(2):
            create_or_resume(tmp_path / "d", describe(), plan=plan, plan_rejects=refused)
            assert (tmp_path / "d" / PLAN_NAME).read_bytes() == b"plan"
            assert list(read_rejects(tmp_path / "d")) == [REFUSED]
            (tmp_path / "d" / PLAN_NAME).unlink()  # killed before it was there

    def test_other_kind(self, tmp_path: Path) -> None:
        create_or_resume(tmp_path, describe())
        with pytest.raises(ConfigError, match="kind or version"):
            create_or_resume(tmp_path, describe("clips", fingerprint="g"))

    def test_a_job_killed_while_it_made_the_folder(self, tmp_path: Path) -> None:
        """Whatever part of the first steps was done, and whatever was left half-written, the next run takes it up."""
        (tmp_path / ".dataset.json.123.tmp").write_text("{")
        meta = create_or_resume(tmp_path, describe())
        (tmp_path / "index").rmdir()
        (tmp_path / "shards" / ".train-000000.tar.9-abc.tmp").write_bytes(b"half")
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

"""A corpus as a list of inputs: what counts, in which order, and what becomes a reject."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline.corpus import hash_file, list_corpus, split_duplicates
from pipeline.errors import ConfigError
from pipeline.schema import Reject, VideoRef


def make_files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def listed(corpus: Path, include: str = "*") -> tuple[list[str], dict[str, str]]:
    """Paths of the inputs, and {path: class} of the rejects."""
    _, refs, rejects = list_corpus(corpus, include)
    return [ref.path for ref in refs], {reject.path: reject.reject_class for reject in rejects}


class TestFolder:
    def test_order_is_by_path_whatever_the_order_of_creation(self, tmp_path: Path) -> None:
        names = ["b/2.mp4", "a.mp4", "b/10.mp4", "B.mp4", "a/x.mp4", "é.mp4"]
        one = make_files(tmp_path / "one", *names)
        two = make_files(tmp_path / "two", *reversed(names))
        assert listed(one)[0] == sorted(names) == listed(two)[0]

    def test_sizes_and_times(self, tmp_path: Path) -> None:
        path = make_files(tmp_path, "a.mp4") / "a.mp4"
        os.utime(path, ns=(1, 1_234_567_890_123_456_789))
        root, refs, _ = list_corpus(tmp_path, "*")
        assert refs == [VideoRef(path="a.mp4", size_bytes=5, mtime_ns=1_234_567_890_123_456_789)]
        assert root == tmp_path.resolve()

    def test_hidden_files_and_folders_are_ignored(self, tmp_path: Path) -> None:
        make_files(tmp_path, ".a.mp4", ".git/b.mp4", "c/.d.mp4", "e.mp4")
        assert listed(tmp_path) == (["e.mp4"], {})

    def test_include(self, tmp_path: Path) -> None:
        make_files(tmp_path, "a.mp4", "a.txt", "b/c.mp4", "b/c.mkv")
        assert listed(tmp_path, "*.mp4")[0] == ["a.mp4", "b/c.mp4"]
        assert listed(tmp_path, "b/*")[0] == ["b/c.mkv", "b/c.mp4"]

    def test_links(self, tmp_path: Path) -> None:
        corpus = make_files(tmp_path / "corpus", "in/real.mp4", "real.mp4")
        outside = make_files(tmp_path / "corpus-2", "secret.mp4")  # its name starts like the corpus's own
        (corpus / "inside.mp4").symlink_to("in/real.mp4")
        (corpus / "outside.mp4").symlink_to(outside / "secret.mp4")
        (corpus / "climbs.mp4").symlink_to("../corpus-2/secret.mp4")
        (corpus / "folder-outside").symlink_to(outside)
        (corpus / "folder-inside").symlink_to("in")
        (corpus / "dangling.mp4").symlink_to("nothing.mp4")
        (corpus / "loop.mp4").symlink_to("loop.mp4")
        (corpus / "two-steps.mp4").symlink_to("outside.mp4")
        paths, rejects = listed(corpus)
        assert paths == ["in/real.mp4", "inside.mp4", "real.mp4"]
        assert rejects == {
            "outside.mp4": "outside-corpus",
            "climbs.mp4": "outside-corpus",
            "two-steps.mp4": "outside-corpus",
            "folder-outside": "outside-corpus",
            "folder-inside": "unreadable",  # listed, not followed: its files are inputs already
            "dangling.mp4": "unreadable",
            "loop.mp4": "unreadable",
        }

    def test_a_corpus_may_itself_be_a_link(self, tmp_path: Path) -> None:
        make_files(tmp_path / "real", "a.mp4")
        (tmp_path / "link").symlink_to("real")
        root, refs, rejects = list_corpus(tmp_path / "link", "*")
        assert [ref.path for ref in refs] == ["a.mp4"] and not rejects
        assert root == (tmp_path / "real").resolve()

    def test_a_pipe_is_refused_without_opening_it(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.mp4")  # whoever opens it hangs
        assert listed(tmp_path) == ([], {"pipe.mp4": "unreadable"})

    def test_a_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "good.mp4").write_text("x")
        descriptor = os.open(os.fsencode(tmp_path) + b"/bad\xff.mp4", os.O_CREAT | os.O_WRONLY)
        os.close(descriptor)
        _, refs, rejects = list_corpus(tmp_path, "*")
        assert [ref.path for ref in refs] == ["good.mp4"]
        assert [(r.path, r.reject_class) for r in rejects] == [("bad\\udcff.mp4", "unreadable")]
        rejects[0].path.encode()  # it goes into Parquet and onto terminals
        assert "UTF-8" in rejects[0].reason

    @pytest.mark.parametrize("name", ["missing", "a.txt"])
    def test_no_corpus(self, tmp_path: Path, name: str) -> None:
        make_files(tmp_path, "a.txt")
        with pytest.raises(ConfigError, match="no such folder or manifest"):
            list_corpus(tmp_path / name, "*")

    def test_nothing_matches(self, tmp_path: Path) -> None:
        make_files(tmp_path, "a.txt")
        with pytest.raises(ConfigError, match=r"\*\.mp4"):
            list_corpus(tmp_path, "*.mp4")


ROWS = [
    {"video": "b.mp4", "caption": "a dog, running", "label": "007", "split": "val", "height": 3},
    {"video": "sub/a.mp4", "caption": None, "label": "08", "split": None, "height": 4},
]


def write_manifest(path: Path, rows: list[dict[str, object]]) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
class TestManifest:
    def test_columns(self, tmp_path: Path, suffix: str) -> None:
        make_files(tmp_path, "b.mp4", "sub/a.mp4", "unnamed.mp4")
        root, refs, rejects = list_corpus(write_manifest(tmp_path / f"m{suffix}", ROWS), "ignored for manifests")
        assert root == tmp_path.resolve() and not rejects
        # Labels are names: "007" must not come back as the number 7.
        assert [(r.path, r.caption, r.label, r.split) for r in refs] == [
            ("b.mp4", "a dog, running", "007", "val"),
            ("sub/a.mp4", None, "08", None),
        ]

    def test_paths_that_leave(self, tmp_path: Path, suffix: str) -> None:
        corpus = make_files(tmp_path / "corpus", "a.mp4", "sub/b.mp4")
        secret = make_files(tmp_path, "secret.mp4") / "secret.mp4"
        rows = [
            {"video": v} for v in ("a.mp4", "../secret.mp4", str(secret), "sub/../../secret.mp4", "none.mp4", "sub")
        ]
        paths, rejects = listed(write_manifest(corpus / f"m{suffix}", rows))
        assert paths == ["a.mp4"]
        assert rejects == {
            "../secret.mp4": "outside-corpus",
            str(secret): "outside-corpus",
            "sub/../../secret.mp4": "outside-corpus",
            "none.mp4": "unreadable",
            "sub": "unreadable",
        }

    def test_named_twice(self, tmp_path: Path, suffix: str) -> None:
        with pytest.raises(ConfigError, match=r"'a\.mp4' twice"):
            list_corpus(write_manifest(tmp_path / f"m{suffix}", [{"video": "a.mp4"}, {"video": "a.mp4"}]), "*")

    def test_missing_column(self, tmp_path: Path, suffix: str) -> None:
        with pytest.raises(ConfigError, match=r"path.*'video' is needed"):
            list_corpus(write_manifest(tmp_path / f"m{suffix}", [{"path": "a.mp4"}]), "*")

    def test_unknown_split(self, tmp_path: Path, suffix: str) -> None:
        with pytest.raises(ConfigError, match=r"test.*allowed: train, val"):
            list_corpus(write_manifest(tmp_path / f"m{suffix}", [{"video": "a.mp4", "split": "test"}]), "*")

    def test_damaged(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / f"m{suffix}").write_bytes(b'{"video": "a\n"\xff,,\n1,2,3,4\n')
        with pytest.raises(ConfigError, match="manifest"):
            list_corpus(tmp_path / f"m{suffix}", "*")


def test_csv_is_text(tmp_path: Path) -> None:
    """Guessed types would look for video 1 instead of 0001, and merge the labels 01 and 1."""
    make_files(tmp_path, "0001", "0002")
    (tmp_path / "m.csv").write_text('video,label,caption\n0001,01,true\n0002,1,"two\nlines"\n')
    _, refs, _ = list_corpus(tmp_path / "m.csv", "*")
    assert [(r.path, r.label, r.caption) for r in refs] == [("0001", "01", "true"), ("0002", "1", "two\nlines")]


class TestDuplicates:
    def test_the_first_by_path_stays(self, tmp_path: Path) -> None:
        for name, text in {"c.mp4": "same", "a.mp4": "same", "b/x.mp4": "same", "other.mp4": "othr"}.items():
            make_files(tmp_path, name)
            (tmp_path / name).write_text(text)
        root, refs, _ = list_corpus(tmp_path, "*")
        kept, rejects = split_duplicates(root, refs)
        assert [ref.path for ref in kept] == ["a.mp4", "other.mp4"]
        assert [(r.path, r.reject_class, r.stage) for r in rejects] == [
            ("b/x.mp4", "duplicate", "plan"),
            ("c.mp4", "duplicate", "plan"),
        ]
        assert all("a.mp4" in reject.reason for reject in rejects)

    def test_only_files_of_equal_size_are_read(self, tmp_path: Path) -> None:
        """A missing file cannot be read, so it shows who tries: alone in its size, nobody does."""
        (tmp_path / "a.mp4").write_text("12345")
        refs = [VideoRef(path="a.mp4", size_bytes=5, mtime_ns=0), VideoRef(path="gone.mp4", size_bytes=6, mtime_ns=0)]
        os.mkfifo(tmp_path / "pipe")  # reading it would hang
        refs.append(VideoRef(path="pipe", size_bytes=7, mtime_ns=0))
        assert split_duplicates(tmp_path, refs) == (refs, [])

    def test_an_unreadable_file_is_no_duplicate(self, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").write_text("12345")
        refs = [VideoRef(path=name, size_bytes=5, mtime_ns=0) for name in ("a.mp4", "gone.mp4")]
        assert split_duplicates(tmp_path, refs) == (refs, [])

    def test_empty_files_are_left_for_their_own_class(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        (tmp_path / "b").touch()
        root, refs, _ = list_corpus(tmp_path, "*")
        rejects: list[Reject]
        kept, rejects = split_duplicates(root, refs)
        assert len(kept) == 2 and not rejects

    def test_hash(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"abc")
        assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

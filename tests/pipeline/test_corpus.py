"""A corpus as rows: what counts, and what is rejected, before anything is sorted."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.corpus import make_examine, open_corpus
from pipeline.errors import ConfigError, TransientIO
from pipeline.patterns import translate
from pipeline.storage import Entry, Store
from tests.object_server import serve_objects


def make_files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def rows_of(corpus: Path | str, **options: Any) -> list[dict[str, Any]]:
    return pa.concat_tables(open_corpus(corpus, **options).tables).to_pylist()


def listed(corpus: Path | str, **options: Any) -> tuple[list[str], dict[str, str]]:
    """Paths of the inputs, sorted, and {path: class} of the rejects; files are looked at as planning does."""
    opened = open_corpus(corpus, **options)
    rows = [row for table in opened.tables for row in table.to_pylist()]
    paths, rejects = [], {row["path"]: row["reject_class"] for row in rows if row["reject_class"]}
    for row in rows:
        if not row["reject_class"]:
            found = make_examine(opened.store.path())(row["path"])
            if isinstance(found, Entry):
                paths.append(row["path"])
            else:
                rejects[row["path"]] = found[0]
    return sorted(paths), rejects


class TestFolder:
    def test_every_file(self, tmp_path: Path) -> None:
        names = ["b/2.mp4", "a.mp4", "b/10.mp4", "B.mp4", "a/x.mp4", "é.mp4", "two\nlines.mp4", "-option.mp4"]
        assert listed(make_files(tmp_path, *names)) == (sorted(names), {})

    def test_hidden_files_and_folders_are_ignored(self, tmp_path: Path) -> None:
        make_files(tmp_path, ".a.mp4", ".git/b.mp4", "c/.d.mp4", "e.mp4")
        assert listed(tmp_path) == (["e.mp4"], {})

    @pytest.mark.parametrize(
        ("include", "expected"),
        [
            ("*.mp4", ["a.mp4", "b/c.mp4"]),
            ("b/*", ["b/c.mkv", "b/c.mp4"]),  # from the right, as a folder's name may stand anywhere
            ("[ab].*", ["a.mp4", "a.txt"]),
            ("?.mk?", ["b/c.mkv"]),
        ],
    )
    def test_include(self, tmp_path: Path, include: str, expected: list[str]) -> None:
        make_files(tmp_path, "a.mp4", "a.txt", "b/c.mp4", "b/c.mkv")
        assert listed(tmp_path, include=include)[0] == expected

    def test_a_folder_that_may_not_be_listed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is in the books, though its name does not match; any other error may hide a part of the corpus."""
        make_files(tmp_path, "a.mp4", "b/c.mp4", "b/d/e.mp4")
        trouble = {str(tmp_path / "b"): errno.EACCES}
        original = os.scandir

        def scan(folder: str) -> Any:
            if number := trouble.get(str(folder)):
                raise OSError(number, os.strerror(number), str(folder))
            return original(folder)

        monkeypatch.setattr(os, "scandir", scan)
        reason = "a folder that cannot be listed: Permission denied"
        rows = rows_of(tmp_path, include="*.mp4")
        assert [(row["path"], row["reject_class"], row["reason"]) for row in rows] == [
            ("a.mp4", None, None),
            ("b", "unreadable", reason),
        ]
        trouble[str(tmp_path / "b")] = errno.EIO
        with pytest.raises(TransientIO, match=r"folder .*/b cannot be listed: Input/output error"):
            rows_of(tmp_path)
        trouble[str(tmp_path)] = errno.EACCES
        with pytest.raises(ConfigError, match=r"cannot be listed: Permission denied"):
            rows_of(tmp_path)

    @pytest.mark.parametrize("include", ["", "/a.mp4"])
    def test_a_pattern_that_nothing_can_match(self, tmp_path: Path, include: str) -> None:
        with pytest.raises(ConfigError, match="relative glob"):
            open_corpus(tmp_path, include=include)

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
        assert listed(tmp_path / "link") == (["a.mp4"], {})
        assert open_corpus(tmp_path / "link").store.path() == (tmp_path / "real").resolve()

    def test_a_pipe_is_refused_without_opening_it(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.mp4")  # whoever opens it hangs
        assert listed(tmp_path) == ([], {"pipe.mp4": "unreadable"})

    def test_a_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "good.mp4").write_text("x")
        descriptor = os.open(os.fsencode(tmp_path) + b"/bad\xff.mp4", os.O_CREAT | os.O_WRONLY)
        os.close(descriptor)
        assert listed(tmp_path) == (["good.mp4"], {"bad\\udcff.mp4": "unreadable"})
        assert "UTF-8" in next(row["reason"] for row in rows_of(tmp_path) if row["reason"])

    @pytest.mark.parametrize("name", ["missing", "a.dat", "missing.csv", ""])
    def test_no_corpus(self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(make_files(tmp_path, "a.dat"))
        with pytest.raises(ConfigError, match="no such folder or manifest"):
            open_corpus(name)

    def test_options_that_are_for_manifests(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--root is for manifests"):
            open_corpus(tmp_path, root="/somewhere")
        with pytest.raises(ConfigError, match=r"clips\.mode = manifest needs a manifest"):
            open_corpus(tmp_path, spans=True)


class TestGlob:
    @pytest.mark.parametrize(
        ("pattern", "root", "expected"),
        [
            ("v/**/*.mp4", "v", ["a.mp4", "x/b.mp4", "x/y/c.mp4"]),
            ("v/*.mp4", "v", ["a.mp4"]),
            ("v/x/**", "v/x", ["b.mkv", "b.mp4", "y/c.mp4"]),
            ("*/x/?.mp4", ".", ["v/x/b.mp4"]),
            ("v/x/[!c].mp4", "v/x", ["b.mp4"]),
            ("**/*.mp?", ".", ["v/a.mp4", "v/x/b.mp4", "v/x/y/c.mp4"]),
        ],
    )
    def test_root_and_files(
        self, tmp_path: Path, pattern: str, root: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_files(tmp_path, "v/a.mp4", "v/x/b.mp4", "v/x/b.mkv", "v/x/y/c.mp4", "v/.hidden/d.mp4", "v/.e.mp4")
        for given in (pattern, str(tmp_path / pattern)):
            monkeypatch.chdir(tmp_path)
            assert open_corpus(given).store.path() == (tmp_path / root).resolve()
            assert listed(given)[0] == expected

    def test_a_folder_whose_name_looks_like_a_pattern(self, tmp_path: Path) -> None:
        assert listed(make_files(tmp_path / "a[b]*", "c.mp4")) == (["c.mp4"], {})

    def test_hostile_names_cost_linear_time(self) -> None:
        names = pa.array(["a" * 100_000])
        assert not pa.compute.match_substring_regex(names, f"^{translate('*a*a*a*a*a*b')}$")[0].as_py()

    def test_an_object_store(self) -> None:
        with serve_objects() as server:
            server.make_bucket("bucket")
            for key in ("x/a.mp4", "x/y/b.mp4", "x/y/b.txt", "other/c.mp4"):
                Store.at(server.url("bucket")).write(key, key.encode())
            found = {row["path"]: row["size_bytes"] for row in rows_of(server.url("bucket/x/**/*.mp4"))}
            assert found == {"a.mp4": 7, "y/b.mp4": 9}
            assert [row["path"] for row in rows_of(server.url("bucket/x"), include="*.txt")] == ["y/b.txt"]


class TestPathsOfManifests:
    def test_what_leads_out(self, tmp_path: Path) -> None:
        corpus = make_files(tmp_path / "corpus", "a.mp4", "sub/b.mp4", "c d.mp4")
        secret = make_files(tmp_path, "secret.mp4") / "secret.mp4"
        (corpus / "link").symlink_to(tmp_path)
        names = [
            "a.mp4",
            "../secret.mp4",
            "sub/../a.mp4",
            str(secret),
            "C:/x.mp4",
            "C:\\x.mp4",
            "http://host/x.mp4",
            "..",
        ]
        names += ["file:///etc/passwd", "none.mp4", "sub", "link/secret.mp4", "nul\0.mp4", "..\\secret.mp4", "c d.mp4"]
        names += [f"{corpus}/../secret.mp4", "/", "//host/x"]
        (corpus / "m.txt").write_text("\n".join(names))
        paths, rejects = listed(corpus / "m.txt")
        assert paths == ["a.mp4", "c d.mp4"]
        unreadable = {"none.mp4", "sub", "..\\secret.mp4"}
        expected = {
            name: "unreadable" if name in unreadable else "outside-corpus" for name in names if name not in paths
        }
        expected["nul\0.mp4"] = "bad-row"
        expected["../secret.mp4"] = expected.pop(f"{corpus}/../secret.mp4")  # named as what it is below the root
        assert rejects == expected

    def test_names_in_full_below_the_root(self, tmp_path: Path) -> None:
        corpus = make_files(tmp_path / "corpus", "a.mp4", "sub/b.mp4", "c.mp4")
        (tmp_path / "link").symlink_to("corpus")
        rows = [f"{corpus}/a.mp4", f"file://{corpus}/sub/b.mp4", "./c.mp4", "sub//b.mp4", f"{tmp_path}/link/c.mp4"]
        (tmp_path / "m.txt").write_text("\n".join(rows))
        expected = ["a.mp4", "c.mp4", "c.mp4", "sub/b.mp4", "sub/b.mp4"]
        assert listed(tmp_path / "m.txt", root=str(tmp_path / "link")) == (expected, {})

    def test_another_root(self, tmp_path: Path) -> None:
        make_files(tmp_path / "videos", "a.mp4")
        (tmp_path / "lists").mkdir()
        (tmp_path / "lists/m.txt").write_text("a.mp4\n")
        assert listed(tmp_path / "lists/m.txt", root=str(tmp_path / "videos")) == (["a.mp4"], {})
        assert listed(tmp_path / "lists/m.txt") == ([], {"a.mp4": "unreadable"})

    def test_urls(self, tmp_path: Path) -> None:
        """Nothing is asked of the store: a manifest's paths are only read."""
        names = {
            "s3://bucket/x/a.mp4": ("a.mp4", None),
            "./b.mp4": ("b.mp4", None),
            "s3://bucket/x/../y.mp4": ("../y.mp4", "outside-corpus"),
            "s3://bucket/xy/a.mp4": ("s3://bucket/xy/a.mp4", "outside-corpus"),
            "s3://other/x/a.mp4": ("s3://other/x/a.mp4", "outside-corpus"),
            "/etc/passwd": ("/etc/passwd", "outside-corpus"),
            "a//b.mp4": ("a//b.mp4", "bad-row"),  # another object than a/b.mp4
        }
        (tmp_path / "m.txt").write_text("\n".join(names))
        rows = rows_of(tmp_path / "m.txt", root="s3://bucket/x?region=us-east-1&anonymous=true")
        assert [(row["path"], row["reject_class"]) for row in rows] == list(names.values())

    def test_encoded_dots_on_the_web(self, tmp_path: Path) -> None:
        names = ["a%20b.mp4", "%2e%2e/x", "a/.%2E/x", "a%2f..%2fx", "..;/x", "a..b/x.mp4", "..?x"]
        (tmp_path / "m.txt").write_text("\n".join(names))
        rows = rows_of(tmp_path / "m.txt", root="https://host.invalid/videos")
        assert [row["path"] for row in rows if not row["reject_class"]] == ["a%20b.mp4", "a..b/x.mp4"]
        assert {row["reject_class"] for row in rows} == {None, "outside-corpus"}

    def test_a_manifest_in_an_object_store(self) -> None:
        with serve_objects() as server:
            server.make_bucket("bucket")
            Store.at(server.url("bucket/x")).write("m.csv", b"video,label\na.mp4,007\n../b.mp4,\n")
            opened = open_corpus(server.url("bucket/x/m.csv"))
            rows = pa.concat_tables(opened.tables).to_pylist()
            assert opened.store.url == server.url("bucket/x")
            assert [(row["path"], row["label"], row["reject_class"]) for row in rows] == [
                ("a.mp4", "007", None),
                ("../b.mp4", None, "outside-corpus"),
            ]


class TestSpans:
    def test_they_are_needed(self, tmp_path: Path) -> None:
        (tmp_path / "m.csv").write_text("video,start_s,end_s\na.mp4,0,1.5\nb.mp4,,\nc.mp4,1,\n")
        rows = rows_of(tmp_path / "m.csv", spans=True)
        assert [row["reject_class"] for row in rows] == [None, "bad-row", "bad-row"]
        assert rows[2]["reason"] == "row 3 needs start_s and end_s for clips.mode = manifest"

    def test_they_are_not_dropped_silently(self, tmp_path: Path) -> None:
        (tmp_path / "m.csv").write_text("video,start_s,end_s\na.mp4,,\nb.mp4,,\nc.mp4,1,2\n")
        with pytest.raises(ConfigError, match=r"row 3: .*--clips\.mode manifest"):
            rows_of(tmp_path / "m.csv")

    def test_empty_columns_are_no_spans(self, tmp_path: Path) -> None:
        (tmp_path / "m.csv").write_text("video,start_s,end_s\na.mp4,,\n")
        assert rows_of(tmp_path / "m.csv")[0]["reject_class"] is None

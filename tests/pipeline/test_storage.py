"""The local store, and what all stores share: names, URLs, whole writes, files that are none."""

from __future__ import annotations

import os
import pickle
import subprocess
import threading
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import BadVideo, ConfigError
from pipeline.files import write_atomic
from pipeline.storage import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


class TestAt:
    def test_local(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for place in ("x/y", Path("x/y"), tmp_path / "x" / "y", f"{tmp_path}/x/y/"):
            store = Store.at(place)
            assert store.is_local and store.path("a") == tmp_path / "x" / "y" / "a"
            assert (store.url, str(store), store.name) == (f"{tmp_path}/x/y", f"{tmp_path}/x/y", "y")
            assert store.where("a/b") == f"{tmp_path}/x/y/a/b"
        assert Store.at(store) is store

    @pytest.mark.parametrize("name", ["a b", "ünïcode", "per%cent", "quest?ion", "new\nline", "s3:"])
    def test_names_of_folders(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).mkdir()
        store = Store.at(tmp_path / name)
        store.write("f", b"1")
        assert (tmp_path / name / "f").read_bytes() == b"1"
        assert store.name == name and store.where("f") == str(tmp_path / name / "f")
        copy = pickle.loads(pickle.dumps(store))  # noqa: S301
        assert copy.read("f") == b"1" and copy.url == store.url

    def test_a_path_that_looks_like_a_url_stays_a_path(self, tmp_path: Path) -> None:
        store = Store.at(tmp_path / "s3:" / "x")
        assert pickle.loads(pickle.dumps(store)).path() == tmp_path / "s3:" / "x"  # noqa: S301

    def test_unknown_scheme(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown scheme ftp://; allowed: a path, s3, gs"):
            Store.at("ftp://host/x")

    @pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "https://user:secret@host/x", "https://user@host/x"])
    def test_credentials(self, url: str) -> None:
        with pytest.raises(ConfigError, match="holds credentials") as caught:
            Store.at(url)
        assert "secret" not in str(caught.value)


class TestLocal:
    def test_round_trip(self, store: Store) -> None:
        store.write("a/b/c.bin", b"0123456789")
        assert store.read("a/b/c.bin") == b"0123456789"
        assert store.read_range("a/b/c.bin", 3, 4) == b"3456"
        assert store.read_range("a/b/c.bin", 8, 99) == b"89"
        assert store.read_range("a/b/c.bin", 99, 1) == store.read_range("a/b/c.bin", 3, 0) == b""
        with store.open("a/b/c.bin") as file:
            assert os.pread(file.fileno(), 3, 1) == b"123" and file.read() == b"0123456789"
        entry = store.stat("a/b/c.bin")
        assert entry is not None and (entry.name, entry.size_bytes) == ("a/b/c.bin", 10)
        assert entry.mtime_ns == store.path("a/b/c.bin").stat().st_mtime_ns
        assert store.exists("a/b/c.bin") and not store.exists("a/b/d")
        store.remove("a/b/c.bin")
        store.remove("a/b/c.bin")
        assert store.stat("a/b/c.bin") is None

    def test_ranges_beyond_what_one_call_reads(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """pread gives 2 GiB at most, and may give less."""
        store.write("f", bytes(range(200)))
        real = os.pread
        monkeypatch.setattr(storage.os, "pread", lambda fd, size, offset: real(fd, min(size, 7), offset))
        assert store.read_range("f", 5, 100) == bytes(range(5, 105))
        assert store.read_range("f", 150, 100) == bytes(range(150, 200))

    def test_missing(self, store: Store) -> None:
        for call in (store.read, store.open, lambda name: store.read_range(name, 0, 1)):
            with pytest.raises(FileNotFoundError):
                call("none")
        assert store.stat("none") is None and store.stat("none/below") is None
        assert store.list("none") == [] and list(store.walk("none")) == []

    def test_listing(self, store: Store, tmp_path: Path) -> None:
        for name in ("b", "a", ".hidden", "x/2", "x/1", "x/.tmp", "x/y/3", ".git/z"):
            store.write(name, name.encode())
        assert [entry.name for entry in store.list()] == ["a", "b"]
        assert [entry.name for entry in store.list("x")] == ["x/1", "x/2"]
        assert sorted(entry.name for entry in store.walk()) == ["a", "b", "x/1", "x/2", "x/y/3"]
        assert sorted(entry.name for entry in store.walk("x")) == ["x/1", "x/2", "x/y/3"]
        assert {entry.size_bytes for entry in store.list("x")} == {3}
        assert store.list("a") == []  # a file is no folder

    def test_links(self, store: Store, tmp_path: Path) -> None:
        """A link to a file is that file; links to folders, to nowhere and to themselves cost nothing else."""
        store.write("real/f", b"12345")
        for name, target in {"file": "real/f", "folder": "real", "nowhere": "none", "loop": "loop"}.items():
            (tmp_path / name).symlink_to(target)
        assert [(entry.name, entry.size_bytes) for entry in store.list()] == [("file", 5)]
        assert sorted(entry.name for entry in store.walk()) == ["file", "real/f"]

    def test_deep_folders(self, tmp_path: Path) -> None:
        """Deeper than Python's stack."""
        start = Path.cwd()
        try:
            os.chdir(tmp_path)
            for _ in range(1100):
                Path("d").mkdir()
                os.chdir("d")
            Path("f").write_bytes(b"1")
        finally:
            os.chdir(start)
        (entry,) = Store.at(tmp_path).walk()
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # Python's own removal would not come that deep
        assert entry.name == "d/" * 1100 + "f"

    def test_max_bytes(self, store: Store) -> None:
        store.write("f", b"12345")
        with store.open("f", max_bytes=5) as file:
            assert file.read() == b"12345"
        before = num_descriptors()
        with pytest.raises(BadVideo, match=r"5 bytes; at most 4 .*limits.max_file_bytes") as caught:
            store.open("f", max_bytes=4)
        assert caught.value.reject_class == "too-large" and num_descriptors() == before

    @pytest.mark.timeout(10)
    @pytest.mark.parametrize("call", ["open", "read", "read_range"])
    def test_what_is_no_file(self, store: Store, tmp_path: Path, call: str) -> None:
        """Whoever opens a named pipe the usual way waits for a writer for ever."""
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        (tmp_path / "device").symlink_to("/dev/zero")
        before = num_descriptors()
        for name in ("pipe", "folder", "device"):
            with pytest.raises(OSError, match="not a regular file"):
                getattr(store, call)(name, *((0, 1) if call == "read_range" else ()))
        assert num_descriptors() == before
        assert store.list() == []


class TestWholeWrites:
    def test_write_replaces_whole(self, store: Store, tmp_path: Path) -> None:
        store.write("a", b"old")
        store.write("a", b"new")
        assert store.read("a") == b"new" and [p.name for p in tmp_path.iterdir()] == ["a"]

    @pytest.mark.parametrize("fails", ["fsync", "rename"])
    @pytest.mark.parametrize("how", ["write", "put"])
    def test_a_failure_keeps_the_old(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, how: str
    ) -> None:
        store.write("a", b"old")
        scratch = store.scratch("a")
        scratch.write_bytes(b"new")

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(*((os, "fsync", full) if fails == "fsync" else (Path, "rename", full)))
        with pytest.raises(OSError, match="No space"):
            store.write("a", b"new") if how == "write" else store.put(scratch, "a")
        assert store.read("a") == b"old" and [entry.name for entry in store.list()] == ["a"]

    def test_put(self, store: Store, tmp_path: Path) -> None:
        scratch = store.scratch("x/y.tar")
        scratch.write_bytes(b"data")
        assert scratch.parent == tmp_path / "x"  # the same file system, so that a rename is enough
        assert store.list("x") == []  # hidden until it is whole
        store.put(scratch, "x/y.tar")
        assert store.read("x/y.tar") == b"data" and not scratch.exists()

    def test_two_writers_do_not_meet(self, store: Store) -> None:
        assert store.scratch("x") != store.scratch("x")

    def test_readers_see_old_or_new(self, store: Store) -> None:
        contents = [bytes([n]) * 100_000 for n in range(2)]
        store.write("f", contents[0])
        seen, ended = set(), threading.Event()

        def read() -> None:
            while not ended.is_set():
                seen.add(store.read("f"))

        thread = threading.Thread(target=read)
        thread.start()
        for n in range(60):
            store.write("f", contents[n % 2])
        ended.set()
        thread.join()
        assert seen <= set(contents)

    def test_write_atomic(self, tmp_path: Path) -> None:
        write_atomic(tmp_path / "a", b"old")
        write_atomic(tmp_path / "a", b"new")
        assert (tmp_path / "a").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1

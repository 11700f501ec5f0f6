"""Exact duplicates: all of them, only them, and no file is read that need not be."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import spill
from pipeline.duplicates import File, find_duplicates, hash_ends, hash_whole
from pipeline.storage import LocalStore, Store
from tests.object_server import serve_objects

BIG = 200_000  # more than both ends


class Reads(LocalStore):
    """A local folder that notes how many bytes of each file were read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.num_bytes: dict[str, int] = {}

    def read_range(self, name: str, offset: int, size_bytes: int) -> bytes:
        data = super().read_range(name, offset, size_bytes)
        self.num_bytes[name] = self.num_bytes.get(name, 0) + len(data)
        return data


def write(folder: Path, files: dict[str, bytes]) -> Reads:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return Reads(folder)


def videos(files: Iterable[tuple[str, int | None]], step: int = 3) -> Iterator[pa.Table]:
    """Tables of a few rows each, as planning hands them over."""
    rows = list(files)
    for start in range(0, len(rows), step):
        paths, sizes = zip(*rows[start : start + step], strict=True)
        yield pa.table({"path": pa.array(paths, pa.string()), "size_bytes": pa.array(sizes, pa.int64())})


def copies(store: Store, files: Iterable[tuple[str, int | None]], scratch: Path) -> dict[str, tuple[int, str]]:
    """{path of a copy: (size, path of the first)}"""
    rows = [row for table in find_duplicates(store, videos(files), scratch) for row in table.to_pylist()]
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: (row["size_bytes"], row["first"]) for row in rows}


def sized(files: dict[str, bytes]) -> list[tuple[str, int | None]]:
    return [(name, len(data)) for name, data in files.items()]


def test_the_first_by_path_stays(tmp_path: Path) -> None:
    files = {"c.mp4": b"same", "b/x.mp4": b"same", "a.mp4": b"same", "other.mp4": b"othr", "long.mp4": b"longer"}
    found = copies(write(tmp_path / "c", files), sized(files), tmp_path / "s")
    assert found == {"b/x.mp4": (4, "a.mp4"), "c.mp4": (4, "a.mp4")}


def test_each_level_reads_only_what_collides(tmp_path: Path) -> None:
    middle = bytes(BIG // 2) + b"x" + bytes(BIG // 2 - 1)  # only its middle differs
    files = {
        "alone": bytes(BIG + 1),
        "start": b"x" + bytes(BIG - 1),
        "end": bytes(BIG - 1) + b"x",
        "one": bytes(BIG),
        "two": bytes(BIG),
        "middle": middle,
        "empty": b"",
        "empty-too": b"",
    }
    store = write(tmp_path / "c", files)
    assert copies(store, sized(files), tmp_path / "s") == {"two": (BIG, "one")}
    ends = 2 * 65_536
    assert store.num_bytes == {
        "start": ends, "end": ends, "one": ends + BIG, "two": ends + BIG, "middle": ends + BIG
    }  # fmt: skip


def test_files_that_cannot_be_read_are_no_duplicates(tmp_path: Path) -> None:
    store = write(tmp_path / "c", {"a": b"12345", "folder/x": b"12345"})
    files: list[tuple[str, int | None]] = [("a", 5), ("gone", 5), ("folder", 5), ("folder/x", 5), ("unsized", None)]
    assert copies(store, files, tmp_path / "s") == {"folder/x": (5, "a")}


def test_a_size_that_is_not_true_makes_no_duplicate(tmp_path: Path) -> None:
    """Both begin with the same 4 bytes, which is all that a manifest says they have."""
    store = write(tmp_path / "c", {"a": b"ftyp one", "b": b"ftyp two", "c": b"ftyp two"})
    assert copies(store, [("a", 4), ("b", 4), ("c", 4)], tmp_path / "s") == {"c": (4, "b")}


@settings(max_examples=20, deadline=None)
@given(contents=st.lists(st.sampled_from([b"", b"a", b"b", b"aa", b"ab", bytes(70_000)]), max_size=30))
def test_against_a_dictionary(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("copies")
    files = {f"{(n * 37) % 100:02d}": data for n, data in enumerate(contents)}
    first: dict[bytes, str] = {}
    expected = {}
    for name in sorted(files):
        if files[name]:
            kept = first.setdefault(files[name], name)
            if kept != name:
                expected[name] = (len(files[name]), kept)
    assert copies(write(folder / "c", files), sized(files), folder / "s") == expected


def test_more_than_fits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "SPLIT_BYTES", 1000)
    files = {f"{n:03d}": b"%d" % (n % 50) for n in range(300)}
    found = copies(write(tmp_path / "c", files), sized(files), tmp_path / "s")
    assert found == {name: (len(data), f"{int(data):03d}") for name, data in files.items() if int(name) >= 50}


def test_the_steps_can_run_elsewhere(tmp_path: Path) -> None:
    """A caller that maps sees files only, and the functions give the same wherever they run."""
    files = {"a": bytes(BIG), "b": bytes(BIG), "c": b"x" * BIG, "d": b"alone"}
    store = write(tmp_path / "c", files)
    seen: list[list[File]] = []

    def here(function: Callable[[File], bytes | None], batch: list[File]) -> Iterator[bytes | None]:
        assert isinstance(function, functools.partial) and function.func in (hash_ends, hash_whole)
        seen.append(sorted(batch))
        return map(function, batch)

    tables = find_duplicates(store, videos(sized(files)), tmp_path / "s", map_files=here)
    assert [row for table in tables for row in table.to_pylist()] == [{"path": "b", "size_bytes": BIG, "first": "a"}]
    assert seen == [[("a", BIG), ("b", BIG), ("c", BIG)], [("a", BIG), ("b", BIG)]]


@pytest.mark.parametrize("size_bytes", [0, 1, 65_536, 65_537, 131_072, 131_073, 4 * 2**20, 4 * 2**20 + 1])
def test_hashes(tmp_path: Path, size_bytes: int) -> None:
    data = bytes(n % 251 for n in range(1000)) * (size_bytes // 1000 + 1)
    data = data[:size_bytes]
    store = write(tmp_path, {"a": data})
    assert hash_whole(store, ("a", size_bytes)) == hashlib.sha256(data).digest()
    ends = data if size_bytes <= 131_072 else data[:65_536] + data[-65_536:]
    assert hash_ends(store, ("a", size_bytes)) == hashlib.sha256(size_bytes.to_bytes(8, "little") + ends).digest()
    assert hash_whole(store, ("gone", 5)) is None and hash_ends(store, ("gone", 5)) is None


def test_an_object_store(tmp_path: Path) -> None:
    files = {"a": bytes(BIG), "b": bytes(BIG), "c": b"x" + bytes(BIG - 1), "d": b"alone"}
    with serve_objects() as server:
        server.make_bucket("bucket")
        store = Store.at(server.url("bucket/x"))
        for name, data in files.items():
            store.write(name, data)
        server.heal()
        assert copies(store, sized(files), tmp_path / "s") == {"b": (BIG, "a")}
        assert server.count("* /bucket/x/d*") == 0

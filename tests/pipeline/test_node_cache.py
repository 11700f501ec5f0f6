"""A cache that several processes share: made once, bounded, never without what is in use, whole after any death."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from pipeline.errors import ConfigError
from pipeline.node_cache import CacheFull, NodeCache, default_folder


class Maker:
    """Writes `size` bytes and counts how often it is asked."""

    def __init__(self, size: int = 100, error: Exception | None = None) -> None:
        self.size, self.error, self.calls = size, error, 0

    def __call__(self, file: IO[bytes]) -> None:
        self.calls += 1
        file.write(b"x" * self.size)
        file.flush()
        if self.error:
            raise self.error


def names(cache: NodeCache) -> set[str]:
    return {path.name for path in cache.folder.glob("*/*") if path.parent.name != ".locks"}


def put(cache: NodeCache, name: str, size: int = 100, **options: float) -> None:
    """Make a file and let go of it; a moment later than the one before, as far as the clock of the disk tells."""
    os.close(cache.open(f"d/{name}", size, Maker(size), **options))
    time.sleep(0.01)


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "cache", 350)


@contextlib.contextmanager
def another_process(cache: NodeCache, program: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `program` with `cache`; it has said something by the time the body begins."""
    head = "import os, sys, time\nfrom pathlib import Path\nfrom pipeline.node_cache import NodeCache\n"
    head += f"cache = NodeCache(Path({str(cache.folder)!r}), {cache.max_bytes})\n"
    process = subprocess.Popen([sys.executable, "-c", head + program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


def test_made_once_and_found_again(cache: NodeCache) -> None:
    maker = Maker()
    for _ in range(3):
        descriptor = NodeCache(cache.folder, 350).open("d/a", 100, maker)
        assert os.pread(descriptor, 200, 0) == b"x" * 100
        os.close(descriptor)
    assert maker.calls == 1
    assert cache.fetch("d/a", 100, maker) and maker.calls == 1


def test_what_was_used_longest_ago_goes_first(cache: NodeCache) -> None:
    for name in "abc":
        put(cache, name)
    put(cache, "a")  # used again
    put(cache, "d")
    assert names(cache) == {"a", "c", "d"}
    assert cache.used_bytes() == 300


def test_what_will_be_read_soon_counts_as_used(cache: NodeCache) -> None:
    for name in "abc":
        put(cache, name)
    assert cache.fetch("d/a", 100, Maker())
    put(cache, "d")
    assert names(cache) == {"a", "c", "d"}


def test_what_is_in_use_stays(cache: NodeCache) -> None:
    held = cache.open("d/a", 100, Maker())
    for name in "bcde":
        put(cache, name)
    assert names(cache) == {"a", "d", "e"}
    others = [cache.open(f"d/{name}", 100, Maker()) for name in "de"]
    with pytest.raises(CacheFull, match=r"in use; raise loader\.cache\.max_bytes = 350"):
        put(cache, "f")
    assert names(cache) == {"a", "d", "e"}, "nothing was evicted for what did not fit anyway"
    assert os.pread(held, 1, 0) == b"x"
    for descriptor in (held, *others):
        os.close(descriptor)
    put(cache, "f")
    assert "f" in names(cache)


def test_what_another_process_reads_stays(cache: NodeCache) -> None:
    put(cache, "a")
    with another_process(cache, "fd = cache.open('d/a', 100, None)\nprint('open', flush=True)\ntime.sleep(60)"):
        for name in "bcd":
            put(cache, name)
        assert names(cache) == {"a", "c", "d"}
    put(cache, "e")
    assert names(cache) == {"c", "d", "e"}, "its lock went with it"


def test_waits_for_room(cache: NodeCache) -> None:
    held = cache.open("d/a", 300, Maker(300))
    threading.Timer(0.2, os.close, [held]).start()
    put(cache, "b", timeout_s=10)
    assert names(cache) == {"b"}


def test_spared_names_stay(cache: NodeCache) -> None:
    for name in "abc":
        put(cache, name)
    assert cache.fetch("d/d", 100, Maker(), spared={"d/a", "d/d"})
    assert names(cache) == {"a", "c", "d"}
    with pytest.raises(CacheFull):
        cache.fetch("d/e", 100, Maker(), spared={"d/a", "d/c", "d/d"})


def test_a_failed_file_leaves_nothing(cache: NodeCache) -> None:
    with pytest.raises(RuntimeError, match="no luck"):
        cache.open("d/a", 100, Maker(error=RuntimeError("no luck")))
    assert not names(cache)
    with pytest.raises(CacheFull, match="the disk is full before the cache is"):
        cache.open("d/a", 100, Maker(error=OSError(28, "No space left on device")))
    assert not names(cache)


def test_one_makes_it_and_the_others_wait(cache: NodeCache) -> None:
    maker, going = Maker(), threading.Event()

    def slow(file: IO[bytes]) -> None:
        going.set()
        time.sleep(0.2)
        maker(file)

    first = threading.Thread(target=lambda: os.close(cache.open("d/a", 100, slow)))
    first.start()
    assert going.wait(10)
    assert not cache.fetch("d/a", 100, maker), "who fetches ahead goes on to the next one"
    assert cache.used_bytes() == 100, "what is being made counts as whole"
    os.close(cache.open("d/a", 100, maker))
    first.join()
    assert maker.calls == 1


def test_a_file_changes_its_name_only_while_nobody_counts(cache: NodeCache) -> None:
    """Else a count between the listing and the renaming finds it under neither name, and the cache outgrows its bound."""
    going, goes_on = threading.Event(), threading.Event()

    def slow(file: IO[bytes]) -> None:
        going.set()
        goes_on.wait(10)
        Maker()(file)

    writer = threading.Thread(target=lambda: os.close(cache.open("d/a", 100, slow)))
    writer.start()
    assert going.wait(10)
    with cache._lock("room"):
        goes_on.set()
        time.sleep(0.2)
        assert all(name.endswith(".tmp") for name in names(cache))
    writer.join()
    assert names(cache) == {"a"}


def test_a_killed_writer_leaves_room_and_no_file(cache: NodeCache) -> None:
    program = "def make(file):\n    file.write(b'half')\n    file.flush()\n    print('half', flush=True)\n    time.sleep(60)\n"
    with another_process(cache, program + "cache.open('d/a', 300, make)") as process:
        with pytest.raises(CacheFull):
            put(cache, "b")
        process.send_signal(signal.SIGKILL)
        process.wait()
    put(cache, "b")
    assert names(cache) == {"b"}
    put(cache, "a")
    assert names(cache) == {"a", "b"}


def test_a_folder_that_cannot_be_or_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        NodeCache(tmp_path / "file", 1)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to user"):
        NodeCache(tmp_path / "cache", 1)


def test_a_home_that_cannot_be_written_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "tokenreel"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/proc/nobody")
    assert default_folder() == tmp_path / f"tokenreel-{os.geteuid()}"
    NodeCache(default_folder(), 1)

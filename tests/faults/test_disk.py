"""A disk that is full, goes read-only or loses a permission in the middle of a job: a clear error, and nothing that a
reader would believe wrongly; with the disk well again the same command goes on to the unbroken run's bytes."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cases import MODES, check_no_ffmpeg_left, check_same, check_subset
from tests.faults.command import Command, run
from tests.faults.conftest import Unbroken
from tests.faults.points import Watch

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mount and chattr need root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 64 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if _call("mount", "-t", "tmpfs", "-o", "size=64m", "tokenreel-faults", folder):
        pytest.skip("mount is not allowed here")
    yield folder
    _call("umount", "--lazy", folder)


def test_a_full_disk(seed: int, unbroken: Unbroken, cluster: str, disk: Path, tmp_path: Path) -> None:
    draw = random.Random(f"disk {seed}")
    mode = draw.choice(list(MODES))
    whole = unbroken[mode]
    pages = sum(-(-len(data) // 4096) for data in whole.values())
    room = draw.randrange(8, pages)
    print(f"full disk, {mode}, seed {seed}: {room} pages for {pages}")
    assert not _call("mount", "-o", f"remount,size={room * 4096}", disk)
    words = unbroken.words(mode, disk / "out")
    result = run(*words, cwd=tmp_path, address=cluster, expect=1)
    assert "No space left on device" in result["error"], result["error"]
    assert str(disk) in result["error"], result["error"]
    check_no_ffmpeg_left()
    print(f"full disk, seed {seed}: {check_subset(disk / 'out', whole)} shards counted then; {result['error']}")
    assert not _call("mount", "-o", "remount,size=64m", disk)
    run(*words, cwd=tmp_path, address=cluster)
    check_same(disk / "out", whole)


@pytest.mark.parametrize("loss", ["read-only", "permission"])
def test_a_disk_that_takes_no_more(loss: str, seed: int, unbroken: Unbroken, cluster: str, tmp_path: Path) -> None:
    draw = random.Random(f"{loss} {seed}")
    mode = draw.choice(list(MODES))
    whole = unbroken[mode]
    out = tmp_path / "out"
    folder = out / draw.choice(["shards", "index"])
    point, count = draw.choice(["writing a tar", "tar without index", "index there"]), draw.randint(1, 2)
    print(f"{loss}, {mode}, seed {seed}: {folder.name}/ at {point} {count}")
    words = unbroken.words(mode, out)
    with Watch(out) as watch:
        command = Command(*words, cwd=tmp_path, address=cluster)
        assert watch.wait(point, count, lambda: command.is_running) is not None, command.said
        with _lost(loss, folder):
            result = command.end(expect=1)
            left = check_subset(out, whole)
    word = {"read-only": "Read-only file system", "permission": "Operation not permitted"}[loss]
    assert word in result["error"] and str(folder) in result["error"], result["error"]
    print(f"{loss}, seed {seed}: {left} shards counted then; {result['error']}")
    check_no_ffmpeg_left()
    run(*words, cwd=tmp_path, address=cluster)
    check_same(out, whole)


class _lost:
    """The folder as it is when its disk was remounted read-only, or when nobody may change it any more."""

    def __init__(self, loss: str, folder: Path) -> None:
        if loss == "read-only":
            # A second mount over the folder: the first one cannot be remounted while files in it are being written.
            self._begin = [("mount", "--bind", folder, folder), ("mount", "-o", "remount,bind,ro", folder)]
            self._end = ("umount", "--lazy", folder)
        else:
            self._begin, self._end = [("chattr", "+i", folder)], ("chattr", "-i", folder)

    def __enter__(self) -> None:
        for command in self._begin:
            if _call(*command):
                pytest.skip(f"{command[0]} is not allowed here")

    def __exit__(self, *_: object) -> None:
        _call(*self._end)


def _call(*words: object) -> int:
    return subprocess.run([str(word) for word in words], capture_output=True).returncode

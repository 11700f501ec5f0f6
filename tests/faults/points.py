"""Named points in the life of a dataset, seen from outside in the moment they happen (Linux's inotify).

The product has no hooks for this. Each point is a file that appears in the dataset's folder, under its temporary or its
final name, and the kernel reports it before whoever made it has gone on for long.
"""

from __future__ import annotations

import ctypes
import fnmatch
import os
import select
import struct
import time
from collections.abc import Callable
from pathlib import Path

_CREATE, _MOVED_TO, _IS_FOLDER = 0x100, 0x80, 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

POINTS = {
    "planning": ".plan/plan.parquet",
    "created": "dataset.json",
    "planned": "plan.parquet",
    "copying the tokenizer": "tokenizer/.*.tmp",
    "tokenizer there": "tokenizer/model.safetensors",
    "writing a tar": "shards/.*.tmp",
    "tar without index": "shards/*-??????.tar",
    "writing an index": "index/.*.tmp",
    "index there": "index/*.parquet",
    "finishing": ".dataset.json.*.tmp",
    # Of a training run.
    "starting": "config.json",
    "saving": "checkpoints/.*.tmp/*.safetensors",
    "saved": "checkpoints/????????/state.json",
}
"""Name to the file whose appearing is the point; globs over paths in the dataset or the run."""
SHARD_POINTS = ("writing a tar", "tar without index", "writing an index", "index there")
"""Those in the life of one shard."""
DRIVER_POINTS = {
    "shard": ("planning", "created", "planned", *SHARD_POINTS, "finishing"),
    "tokenize": ("created", "copying the tokenizer", "tokenizer there", *SHARD_POINTS, "finishing"),
}
"""Stage to the points in the life of its job, the first one first."""


class Watch:
    """Sees files appear in a folder that may not be there yet, and in the folders in it; close it after use."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._folders: dict[int, str] = {}
        self._folder = folder
        self._waiting: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._add("")

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def wait(self, point: str, count: int, goes_on: Callable[[], bool], timeout_s: float = 120.0) -> str | None:
        """The name of the `count`-th file from now on at a point of POINTS; None where `goes_on()` ended before."""
        deadline = time.monotonic() + timeout_s
        while True:
            for seen in self._read(0.1):
                count -= fnmatch.fnmatchcase(seen, POINTS[point]) and seen.count("/") == POINTS[point].count("/")
                if not count:
                    return seen
            if not goes_on():
                return None
            assert time.monotonic() < deadline, f"{point}: nothing came within {timeout_s:g} s"

    def _add(self, name: str) -> None:
        path = self._folder / name
        watch = _libc.inotify_add_watch(self._descriptor, os.fsencode(path), _CREATE | _MOVED_TO)
        if watch < 0:
            return  # it went again
        self._folders[watch] = f"{name}/" if name else ""
        for entry in os.scandir(path):  # what came before the watch
            self._note(self._folders[watch] + entry.name, entry.is_dir(follow_symlinks=False))

    def _note(self, name: str, is_folder: bool) -> None:
        if is_folder:
            self._add(name)
        else:
            self._waiting.append(name)

    def _read(self, timeout_s: float) -> list[str]:
        if not self._waiting and select.select([self._descriptor], [], [], timeout_s)[0]:
            data = os.read(self._descriptor, 2**16)
            while data:
                watch, mask, _, size = struct.unpack_from("iIII", data)
                name = data[16 : 16 + size].rstrip(b"\0").decode()
                data = data[16 + size :]
                if watch in self._folders:
                    self._note(self._folders[watch] + name, bool(mask & _IS_FOLDER))
        seen, self._waiting = self._waiting, []
        return seen

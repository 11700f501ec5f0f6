"""Files that the processes of one node make once and share, up to a size: whoever comes first makes a file, others wait.

Everything rests on `flock`, which the kernel releases with its process: a reader holds a shared lock on the file that it
reads, a writer an exclusive one on the file that it makes, and only what nobody holds can be evicted. So a process may be
killed anywhere, and what it leaves half made is nobody's and goes first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from pipeline.errors import ConfigError, TokenreelError
from pipeline.files import sync_path

log = logging.getLogger(__name__)
Make = Callable[[IO[bytes]], None]
"""Fills an empty file, which it must leave flushed."""
_NUM_LOCKS = 4096
_POLL_S = 0.05


class CacheFull(TokenreelError):
    """There is no room for a file, and all others are in use."""


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/tokenreel`, or `~/.cache/tokenreel`; one of this user's under the folder for temporary files where that
    cannot be written, as for users without a home."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenreel"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # the latter where nobody knows the home
        pass
    return Path(tempfile.gettempdir()) / f"tokenreel-{os.geteuid()}"


class NodeCache:
    """A folder on a node's own disk that holds at most `max_bytes` of files, those used last.

    Raises:
        ConfigError: the folder cannot be made, or belongs to somebody else, who could put other bytes into it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        try:
            (folder / ".locks").mkdir(parents=True, exist_ok=True, mode=0o700)
            owner = folder.stat().st_uid
        except OSError as error:
            raise ConfigError(
                f"loader.cache.folder = {folder}: cannot be made ({error.strerror}); choose another"
            ) from error
        if owner != os.geteuid():
            raise ConfigError(
                f"loader.cache.folder = {folder}: belongs to user {owner}, who is not this one; choose another"
            )

    def open(
        self, name: str, size_bytes: int, make: Make, *, timeout_s: float = 0.0, spared: Collection[str] = ()
    ) -> int:
        """A descriptor of the file `name`, made by `make` where it is missing. Nobody evicts the file until it is closed.

        Args:
            size_bytes: its size, or the most that it may take.
            timeout_s: how long to wait for others to let go of files, where there is no room.
            spared: names that must not be evicted for it.

        Raises:
            CacheFull: there is no room for it.
            Others: what `make` raises; nothing of the file is left then.
        """
        found = self._find(name)
        if found is not None:
            return found
        with self._lock(name):
            found = self._find(name)
            return self._make(name, size_bytes, make, timeout_s, spared) if found is None else found

    def fetch(self, name: str, size_bytes: int, make: Make, *, spared: Collection[str] = ()) -> bool:
        """Make `name` where it is missing and nobody is making it; False where somebody is. Raises as `open`.

        A file that is there counts as used now, since it will be soon.
        """
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.folder / name)
            return True
        with self._lock(name, wait=False) as is_mine:
            if is_mine:
                found = self._find(name)
                os.close(self._make(name, size_bytes, make, 0.0, spared) if found is None else found)
        return is_mine

    def discard(self, name: str) -> None:
        """Forget the file `name`; who reads it keeps what it has."""
        (self.folder / name).unlink(missing_ok=True)

    def used_bytes(self) -> int:
        """Bytes of all files, those that are being made counted as whole."""
        with self._lock("room"):
            return sum(entry.size_bytes for entry in self._entries())

    def _find(self, name: str) -> int | None:
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not os.fstat(descriptor).st_nlink:  # evicted between the two calls
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return descriptor

    def _make(self, name: str, size_bytes: int, make: Make, timeout_s: float, spared: Collection[str]) -> int:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        scratch = path.with_name(f".{path.name}.{size_bytes}.{secrets.token_hex(4)}.tmp")
        file = self._reserve(scratch, size_bytes, timeout_s, spared)
        try:
            with os.fdopen(os.dup(file), "wb+") as whole:
                make(whole)
            os.fsync(file)
            with self._lock("room"):  # or a count of the room in between would find it under neither name
                scratch.rename(path)
            sync_path(path.parent)
            fcntl.flock(file, fcntl.LOCK_SH)
        except BaseException as error:
            os.close(file)
            scratch.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheFull(
                    f"loader.cache.folder = {self.folder}: the disk is full before the cache is ({error.strerror}); lower "
                    "loader.cache.max_bytes, or choose another folder"
                ) from error
            raise
        return file

    def _reserve(self, scratch: Path, size_bytes: int, timeout_s: float, spared: Collection[str]) -> int:
        """The open, locked, empty file `scratch`, whose name says that there is room for `size_bytes`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with self._lock("room"):
                if self._make_room(size_bytes, spared):
                    file = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                    fcntl.flock(file, fcntl.LOCK_EX)
                    return file
            if time.monotonic() >= deadline_s:
                raise CacheFull(
                    f"loader.cache.folder = {self.folder}: no room for another {size_bytes} bytes, as "
                    f"all that is in it is in use; raise loader.cache.max_bytes = {self.max_bytes}"
                )
            time.sleep(_POLL_S)

    def _make_room(self, size_bytes: int, spared: Collection[str]) -> bool:
        """Evict what was used longest ago until `size_bytes` fit; nothing is evicted where that cannot be reached."""
        entries = self._entries()
        excess = sum(entry.size_bytes for entry in entries) + size_bytes - self.max_bytes
        held: list[tuple[_Entry, int]] = []
        try:
            for entry in sorted(entries, key=lambda entry: entry.used_ns):
                if excess <= 0:
                    break
                if entry.name in spared or (descriptor := _lock_unused(entry.path)) is None:
                    continue
                held.append((entry, descriptor))
                excess -= entry.size_bytes
            if excess > 0:
                return False
            for entry, _ in held:
                entry.path.unlink(missing_ok=True)
            return True
        finally:
            for _, descriptor in held:
                os.close(descriptor)

    def _entries(self) -> list[_Entry]:
        found = []
        for path in self.folder.glob("*/*"):
            if path.parent.name == ".locks":
                continue
            # A file may be gone by now, and a name that is not ours is left alone.
            with contextlib.suppress(OSError, ValueError, IndexError):
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    size = int(path.name.split(".")[-3]) if path.name.endswith(".tmp") else status.st_size
                    used_ns = 0 if path.name.endswith(".tmp") else status.st_mtime_ns
                    found.append(_Entry(f"{path.parent.name}/{path.name}", path, size, used_ns))
        return found

    @contextlib.contextmanager
    def _lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of `name` for the body; without `wait`, False where somebody else holds it."""
        place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % _NUM_LOCKS
        with (self.folder / ".locks" / (name if name == "room" else f"{place:04d}")).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True


class _Entry(NamedTuple):
    """A file of a cache. What is being made was never used."""

    name: str
    path: Path
    size_bytes: int
    used_ns: int


def _lock_unused(path: Path) -> int | None:
    """A descriptor that holds `path` alone, or None where somebody uses it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor

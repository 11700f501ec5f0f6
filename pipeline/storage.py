"""A folder of files, on a local disk or in an object store, by the few operations that a dataset needs.

Every write is whole or not at all, and every remote call is retried a bounded number of times. Errors are the same
everywhere: `FileNotFoundError`, `PermissionError`, `TransientIO` after the last attempt, other `OSError`s of the local
file system as they are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from pipeline.errors import BadVideo, ConfigError
from pipeline.files import sync_path, write_atomic

OBJECT_STORES = ("s3", "gs", "gcs", "abfs", "abfss")
_WEB = ("http", "https")
CHUNK_BYTES = 4 * 2**20
LOCAL_TROUBLE = (
    errno.EAGAIN, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EROFS,
)  # fmt: skip
"""Errors that are this machine's, and neither the storage's nor the file's: no room, descriptors, memory or processes."""
_INT64 = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file as its storage lists it; `name` is relative to the store, with `/`. `mtime_ns` is 0 where unknown, and
    `size_bytes` None: a web server need not state it."""

    name: str
    size_bytes: int | None
    mtime_ns: int
    """Since 1970; a time before 1677 or after 2262, which 64 bits have no number for, counts as the first or last that they have."""

    def __post_init__(self) -> None:
        if not _INT64[0] <= self.mtime_ns <= _INT64[1]:
            object.__setattr__(self, "mtime_ns", min(max(self.mtime_ns, _INT64[0]), _INT64[1]))


class Store(ABC):
    """A folder. Names are relative to it, with `/`; hidden files (`.name`) are nobody's business but the writer's."""

    url: str
    """An absolute path, or SCHEME://... ; `Store.at(url)` is this store again, on any node."""
    is_local = False

    @staticmethod
    def at(place: Store | Path | str) -> Store:
        """The store at a path or URL: a local path, s3://, gs://, abfs:// (pyarrow), http:// and https:// (read only).

        Raises:
            ConfigError: an unknown scheme, or credentials in the URL.
        """
        if isinstance(place, Store):
            return place
        if isinstance(place, Path) or "://" not in place:
            return LocalStore(Path(place).absolute())
        return _open_remote(place.rstrip("/"))

    @property
    def name(self) -> str:
        """The last part of the URL, which a person calls the folder by."""
        parts = urlsplit(self.url)
        return f"{parts.netloc}{parts.path}".rstrip("/").rpartition("/")[2]

    def where(self, name: str) -> str:
        """What a person calls the file `name`: its URL, without the options that the store's own may hold."""
        return f"{self.url.partition('?')[0].rstrip('/')}/{name}"

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        return (Store.at, (self.url,))

    def path(self, name: str = "") -> Path:
        """The local path of `name`. Raises `ConfigError` for a remote store."""
        raise ConfigError(f"{self.url} must be a local folder here; copy the dataset to a disk first")

    def exists(self, name: str) -> bool:
        return self.stat(name) is not None

    @abstractmethod
    def stat(self, name: str) -> Entry | None:
        """The file `name`, or None."""

    @abstractmethod
    def list(self, folder: str = "") -> list[Entry]:
        """Files directly in `folder`, hidden ones left out, sorted by name; none where there is no such folder. Links to
        files are files; what is neither (a named pipe, a link to nowhere) is left out."""

    @abstractmethod
    def walk(self, folder: str = "") -> Iterator[Entry]:
        """Every file below `folder`, as `list` finds them, in no particular order; memory for one folder at a time.
        Links to folders are not followed."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file."""

    @abstractmethod
    def read_range(self, name: str, offset: int, size_bytes: int) -> bytes:
        """Bytes `[offset, offset + size_bytes)`; fewer where the file ends before."""

    @abstractmethod
    def open(self, name: str, *, max_bytes: int | None = None) -> IO[bytes]:
        """The file as one with a real descriptor, which ffmpeg can seek in. A remote one is fetched to a nameless
        temporary file first, and is whole: its length is compared with what the storage says.

        Raises:
            BadVideo: `too-large`, more than `max_bytes`.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Make `name` hold `data`, whole or not at all; durable when this returns."""

    @abstractmethod
    def scratch(self, name: str) -> Path:
        """Where to write the file that `put` shall make `name`."""

    @abstractmethod
    def put(self, scratch: Path, name: str) -> None:
        """Make the finished file at `scratch` (flushed to disk) the file `name`, whole or not at all."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete `name`; nothing where it is not there."""


class LocalStore(Store):
    """A folder of a file system."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = str(folder)

    @property
    def name(self) -> str:
        return self._folder.name

    def where(self, name: str) -> str:
        return str(self._folder / name)

    def __reduce__(self) -> tuple[Any, ...]:
        return (LocalStore, (self._folder,))

    def path(self, name: str = "") -> Path:
        return self._folder / name

    def stat(self, name: str) -> Entry | None:
        try:
            return _entry(name, (self._folder / name).stat())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:  # a link to itself leads nowhere too
                return None
            raise

    def list(self, folder: str = "") -> list[Entry]:
        return _scan(self._folder, folder)[0]

    def walk(self, folder: str = "") -> Iterator[Entry]:
        waiting = [folder]
        while waiting:
            files, folders = _scan(self._folder, waiting.pop())
            yield from files
            waiting += reversed(folders)

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def read_range(self, name: str, offset: int, size_bytes: int) -> bytes:
        with self.open(name) as file:
            pieces = [os.pread(file.fileno(), size_bytes, offset)]
            # One call gives 2 GiB at most.
            while pieces[-1] and (left := size_bytes - sum(map(len, pieces))):
                pieces.append(os.pread(file.fileno(), left, offset + size_bytes - left))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def open(self, name: str, *, max_bytes: int | None = None) -> IO[bytes]:
        # Not blocking, so that a named pipe that took a file's place cannot hang whoever opens it.
        descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", self.where(name))
            if max_bytes is not None and status.st_size > max_bytes:
                raise too_large(status.st_size, max_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb")

    def write(self, name: str, data: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)

    def scratch(self, name: str) -> Path:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Process ids are not enough: containers on two nodes that share the folder may both have the same one.
        return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")

    def put(self, scratch: Path, name: str) -> None:
        sync_path(scratch)
        scratch.rename(self._folder / name)
        sync_path((self._folder / name).parent)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)


class RemoteStore(Store):
    """What all remote stores share: files pass through the local temporary folder, both ways."""

    def open(self, name: str, *, max_bytes: int | None = None) -> IO[bytes]:
        file = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
        try:
            self.fetch(name, file, max_bytes)
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    @abstractmethod
    def fetch(self, name: str, file: IO[bytes], max_bytes: int | None) -> None:
        """Fill an empty `file` with all of `name`, and flush it; as `open` says."""

    def scratch(self, name: str) -> Path:
        descriptor, path = tempfile.mkstemp(prefix="tokenreel-", suffix=f".{Path(name).name}")
        os.close(descriptor)
        return Path(path)


def too_large(size_bytes: int, max_bytes: int) -> BadVideo:
    """The refusal of a file over the limit."""
    return BadVideo(
        "too-large", f"a file of {size_bytes} bytes; at most {max_bytes} are allowed (limits.max_file_bytes)"
    )


def _scan(root: Path, folder: str) -> tuple[list[Entry], list[str]]:
    """The files and the folders in `folder`, each sorted by name."""
    prefix = f"{folder}/" if folder else ""
    files, folders = [], []
    try:
        with os.scandir(root / folder) as found:
            for one in found:
                if one.name.startswith("."):
                    continue
                if one.is_dir(follow_symlinks=False):
                    folders.append(prefix + one.name)
                    continue
                # A file that was deleted since, or a link to nowhere, must not cost the others.
                with contextlib.suppress(OSError):
                    if stat.S_ISREG((status := one.stat()).st_mode):
                        files.append(_entry(prefix + one.name, status))
    except (FileNotFoundError, NotADirectoryError):
        pass
    return sorted(files, key=lambda entry: entry.name), sorted(folders)


def _entry(name: str, status: os.stat_result) -> Entry:
    return Entry(name=name, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)


@lru_cache(maxsize=64)
def _open_remote(url: str) -> Store:
    parts = urlsplit(url)
    # abfs://CONTAINER@ACCOUNT.HOST/PATH names nobody.
    if parts.password or (parts.username and not parts.scheme.startswith("abfs")):
        raise ConfigError(
            f"{parts.scheme}://...@{parts.hostname}{parts.path} holds credentials, which would end up in logs and in MLflow; "
            "give them by the environment (AWS_ACCESS_KEY_ID, a profile, an instance role)"
        )
    # Imported here: a job on local disks needs neither.
    if parts.scheme in OBJECT_STORES:
        from pipeline.object_store import ObjectStore

        return ObjectStore(url)
    if parts.scheme in _WEB:
        if parts.query or parts.fragment:
            raise ConfigError(
                f"{parts.scheme}://{parts.netloc}{parts.path}: holds a ? or #, so no file's name can follow it"
            )
        from pipeline.web_store import WebStore

        return WebStore(url)
    raise ConfigError(f"{url}: unknown scheme {parts.scheme}://; allowed: a path, {', '.join((*OBJECT_STORES, *_WEB))}")

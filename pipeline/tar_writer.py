"""A tar in the making. The same members give the same bytes, whoever writes them and when."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import OutputError, TransientIO

_COPY_BYTES = 2**20
"""Read, hashed and written at a time: it stays in the CPU's cache on the way."""
_WRITEBACK_BYTES = 2**25
_USTAR_MAX_BYTES = 0o77777777777


class TarWriter:
    """Appends members to the file at `scratch`: ustar headers, mtime 0, no owner. Memory does not grow with them.

    A member's name may depend on its bytes: `begin`, `copy`, then `name_last`. Every error of the file itself is an `OutputError`.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._file = scratch.open("wb+")
        self._given_to_disk = 0

    def tell(self) -> int:
        """The place where the next member begins."""
        return self._file.tell()

    def add(self, name: str, data: bytes) -> int:
        """Append a member, and return the place of its bytes."""
        place = self.begin()
        self._write(data)
        self.name_last(name, len(data))
        return place

    def begin(self) -> int:
        """Leave room for a header, and return the place of the member's bytes."""
        self._write(bytes(tarfile.BLOCKSIZE))
        return self._file.tell()

    def copy(self, source: IO[bytes], offset: int, size: int) -> str:
        """Append `size` bytes of an open file from `offset` on, and return their SHA-256 in hex.

        Raises:
            TransientIO: the file cannot be read, or ended early.
        """
        hasher = hashlib.sha256()
        buffer = memoryview(bytearray(min(_COPY_BYTES, max(1, size))))
        done = 0
        while done < size:
            try:
                count = os.preadv(source.fileno(), [buffer[: size - done]], offset + done)
            except OSError as error:
                raise TransientIO(f"cannot be read from byte {offset + done} on: {error.strerror}") from error
            if not count:
                raise TransientIO(f"ended after {done} of {size} bytes; it changed while it was read")
            hasher.update(buffer[:count])
            self._write(buffer[:count])
            done += count
            self._start_writeback()
        return hasher.hexdigest()

    def name_last(self, name: str, size: int) -> None:
        """Write the header before the last `size` bytes, and end the member."""
        header = tar_header(name, size)
        end = self._file.tell()
        with self._output():
            self._file.seek(end - size - tarfile.BLOCKSIZE)
            self._file.write(header)
            self._file.seek(end)
            self._file.write(bytes(-size % tarfile.BLOCKSIZE))

    def take(self, other: TarWriter, place: int, size: int) -> int:
        """Append `size` bytes that `other` has at `place`, behind room for a header; the place that they have here."""
        here = self.begin()
        with other._output():
            other._file.flush()
            try:
                self.copy(other._file, place, size)
            except TransientIO as error:
                raise OSError(errno.EIO, str(error)) from error
        return here

    def rewind(self, position: int) -> None:
        """Drop everything from `position` on."""
        with self._output():
            self._file.seek(position)
            self._file.truncate()

    def end(self) -> int:
        """Write the tar's end, close the file, and return its size in bytes."""
        self._file.write(bytes(tar_end_bytes(self._file.tell())))
        size = self._file.tell()
        self._file.close()
        return size

    def abort(self) -> None:
        """Drop the file, if it is still there; never an error of its own: a full disk has said enough."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self.scratch.unlink(missing_ok=True)

    def _write(self, data: bytes | memoryview) -> None:
        with self._output():
            self._file.write(data)

    @contextlib.contextmanager
    def _output(self) -> Iterator[None]:
        """Tells errors of the tar itself from those of an input."""
        try:
            yield
        except OSError as error:
            raise OutputError(error.errno, error.strerror, str(self.scratch)) from error

    def _start_writeback(self) -> None:
        """Have the disk write what is there already, so that the flush at the end of the shard waits for little."""
        position = self._file.tell()
        if position - self._given_to_disk >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            span = (self._given_to_disk, position - self._given_to_disk)
            os.posix_fadvise(self._file.fileno(), *span, os.POSIX_FADV_DONTNEED)
            self._given_to_disk = position


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member: mode 0644, nobody's, from 1970."""
    header = tarfile.TarInfo(name)
    header.size = size
    header.mode = 0o644
    # ustar has no word for 8 GiB and more; every reader knows GNU's.
    return header.tobuf(tarfile.USTAR_FORMAT if size <= _USTAR_MAX_BYTES else tarfile.GNU_FORMAT)


def tar_end_bytes(position: int) -> int:
    """How many zeros end a tar whose last member ends at `position`: two blocks, and as many as fill a record."""
    end = position + 2 * tarfile.BLOCKSIZE
    return 2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE

"""S3, Google Cloud Storage and Azure Blob Storage through pyarrow's own clients; credentials come from the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs

from pipeline.errors import ConfigError, TransientIO
from pipeline.retry import retry
from pipeline.storage import CHUNK_BYTES, LOCAL_TROUBLE, Entry, RemoteStore, too_large

T = TypeVar("T")
_OPTIONS = {"endpoint_override", "region", "anonymous"}
_CONNECT_TIMEOUT_S = 10.0
_REQUEST_TIMEOUT_S = 60.0
# What an object store says when it means it; everything else may pass.
_REFUSALS = (
    "ACCESS_DENIED",
    "HTTP status 301",  # the bucket is in another region
    "HTTP status 400",
    "HTTP status 401",
    "HTTP status 403",
    "INVALID_ACCESS_KEY",
    "SIGNATURE_DOES_NOT_MATCH",
)
_MISSING = ("NO_SUCH_BUCKET", "NO_SUCH_KEY", "HTTP status 404", "RESOURCE_NOT_FOUND")


class ObjectStore(RemoteStore):
    """A prefix of a bucket. `s3://BUCKET/PREFIX?endpoint_override=http://HOST:PORT` names an S3 of one's own."""

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        if parts.scheme == "s3":
            self._prefix = f"{parts.netloc}{parts.path}".strip("/")
            self._fs = _open_s3(parts.netloc, parts.query)
        else:
            try:
                self._fs, self._prefix = pa.fs.FileSystem.from_uri(url)
            except (pa.ArrowException, OSError) as error:
                raise ConfigError(f"{url}: {error}") from error

    def stat(self, name: str) -> Entry | None:
        return self._retry(f"looking for {name}", lambda: self._stat(name))

    def list(self, folder: str = "") -> list[Entry]:
        found = self._entries(folder)
        return sorted((entry for entry, is_file in found if is_file), key=lambda entry: entry.name)

    def walk(self, folder: str = "") -> Iterator[Entry]:
        # Folder by folder: one recursive listing of ten million objects would stand in memory as a whole.
        folders = [folder]
        while folders:
            for entry, is_file in self._entries(folders.pop()):
                if is_file:
                    yield entry
                else:
                    folders.append(entry.name)

    def read(self, name: str) -> bytes:
        return self._retry(f"reading {name}", lambda: self._read(name, 0, None))

    def read_range(self, name: str, offset: int, size_bytes: int) -> bytes:
        return self._retry(f"reading {name}", lambda: self._read(name, offset, size_bytes))

    def fetch(self, name: str, file: IO[bytes], max_bytes: int | None) -> None:
        self._retry(f"fetching {name}", lambda: self._fetch(name, file, max_bytes))

    def write(self, name: str, data: bytes) -> None:
        self._retry(f"writing {name}", lambda: self._upload(name, lambda: iter([data]), len(data)))

    def put(self, scratch: Path, name: str) -> None:
        def chunks() -> Iterator[bytes]:
            with scratch.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk

        self._retry(f"uploading {name}", lambda: self._upload(name, chunks, scratch.stat().st_size))
        scratch.unlink()

    def remove(self, name: str) -> None:
        def delete() -> None:
            if self._stat(name) is not None:
                self._fs.delete_file(self._key(name))

        self._retry(f"deleting {name}", delete)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if name else self._prefix

    def _stat(self, name: str) -> Entry | None:
        info = self._fs.get_file_info(self._key(name))
        return _entry(name, info) if info.type == pa.fs.FileType.File else None

    def _entries(self, folder: str) -> Sequence[tuple[Entry, bool]]:
        selector = pa.fs.FileSelector(self._key(folder), allow_not_found=True)
        infos = self._retry(f"listing {folder or 'it'}", lambda: self._fs.get_file_info(selector))
        return [
            (_entry(info.path[len(self._prefix) + 1 :], info), info.type == pa.fs.FileType.File)
            for info in infos
            if not info.base_name.startswith(".")
        ]

    def _read(self, name: str, offset: int, size_bytes: int | None) -> bytes:
        with self._fs.open_input_file(self._key(name)) as remote:
            total = remote.size()
            wanted = max(0, min(total - offset, total if size_bytes is None else size_bytes))
            data: bytes = remote.read_at(wanted, offset) if wanted else b""
        if len(data) != wanted:
            raise TransientIO(f"{len(data)} of {wanted} bytes came")
        return data

    def _fetch(self, name: str, file: IO[bytes], max_bytes: int | None) -> None:
        file.seek(0)
        file.truncate()
        with self._fs.open_input_file(self._key(name)) as remote:
            size = remote.size()
            if max_bytes is not None and size > max_bytes:
                raise too_large(size, max_bytes)
            while chunk := remote.read(CHUNK_BYTES):
                file.write(chunk)
        file.flush()
        if file.tell() != size:
            raise TransientIO(f"{file.tell()} of {size} bytes came")

    def _upload(self, name: str, chunks: Callable[[], Iterator[bytes]], size_bytes: int) -> None:
        # An upload that breaks off can leave a shorter object: its size is read back, and an index is written last.
        with self._fs.open_output_stream(self._key(name), buffer_size=0) as remote:
            for chunk in chunks():
                remote.write(chunk)
        entry = self._stat(name)
        if entry is None or entry.size_bytes != size_bytes:
            raise TransientIO(f"{entry.size_bytes if entry else 'none'} of {size_bytes} bytes arrived")

    def _retry(self, action: str, call: Callable[[], T]) -> T:
        def translated() -> T:
            try:
                return call()
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.errno in LOCAL_TROUBLE:  # of the temporary file
                    raise
                text = " ".join(str(error).split())
                if any(word in text for word in _MISSING):
                    raise FileNotFoundError(f"{self.url}: {action}: {text}") from error
                if any(word in text for word in _REFUSALS):
                    raise PermissionError(f"{self.url}: {action}: {text}") from error
                raise TransientIO(text) from error

        return retry(f"{self.url}: {action}", translated)


def _entry(name: str, info: pa.fs.FileInfo) -> Entry:
    return Entry(name=name, size_bytes=info.size or 0, mtime_ns=info.mtime_ns or 0)


def _find_region(bucket: str) -> str:
    try:
        return str(pa.fs.resolve_s3_region(bucket))
    except OSError as error:
        raise ConfigError(
            f"s3://{bucket}: no region is known for it ({error}); check its name, or set AWS_REGION"
        ) from error


@lru_cache(maxsize=16)
def _open_s3(bucket: str, query: str) -> pa.fs.FileSystem:
    options = dict(parse_qsl(query))
    if unknown := sorted(options.keys() - _OPTIONS):
        raise ConfigError(f"s3://{bucket}: unknown options {unknown}; allowed: {sorted(_OPTIONS)}")
    endpoint = (
        options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else _find_region(bucket)
    return pa.fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        anonymous=options.get("anonymous") == "true",
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_REQUEST_TIMEOUT_S,
        # Not allow_delayed_open, which makes a small file one request in place of three: when a large upload cannot be
        # begun, it puts an empty object in the place of the old one.
        # One attempt here: `retry` counts and reports them, in one place for all stores.
        retry_strategy=pa.fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )

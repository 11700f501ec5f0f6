"""Files on a web server, read only: the root of a manifest's paths."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, NoReturn
from urllib.parse import unquote, urljoin, urlsplit

import requests
import urllib3

from pipeline.errors import ConfigError, TransientIO
from pipeline.retry import retry
from pipeline.storage import CHUNK_BYTES, Entry, RemoteStore, too_large

_TIMEOUT_S = (10.0, 60.0)  # to connect, and between two pieces of the answer
_MIN_BYTES_PER_S = 2**17
"""On average from the beginning of an answer on, once `_GRACE_S` are over: so a stated length also bounds the time."""
_GRACE_S = 60.0
_MAX_UNSTATED_S = 3600.0
"""For an answer that does not state its length, whatever its rate."""
_MAX_BYTES = 2**34
"""Of a file that nobody else bounds, such as a manifest."""
_MAX_REDIRECTS = 5
_MAX_INT64 = 2**63 - 1
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}


class WebStore(RemoteStore):
    """Files below `http(s)://HOST/PATH`. Names are URL paths as the manifest writes them.

    requests, not fsspec: fsspec reports every failure as a missing file, and what may be tried again is decided by the
    status. A redirect that leads out of the root is refused: it could name a host that only this cluster can reach.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def stat(self, name: str) -> Entry | None:
        def head() -> Entry:
            with self._request("HEAD", name, {}) as answer:
                mtime_ns = _mtime_ns(answer.headers.get("Last-Modified"))
                return Entry(name=name, size_bytes=_length(answer), mtime_ns=mtime_ns)

        try:
            return retry(f"{self.url}: looking for {name}", head)
        except FileNotFoundError:
            return None

    def list(self, folder: str = "") -> list[Entry]:
        raise ConfigError(f"{self.url}: a web server cannot list its files; name them in a manifest")

    def walk(self, folder: str = "") -> Iterator[Entry]:
        yield from self.list(folder)

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def read_range(self, name: str, offset: int, size_bytes: int) -> bytes:
        def get() -> bytes:
            with self._request("GET", name, {"Range": f"bytes={offset}-{offset + size_bytes - 1}"}) as answer:
                if answer.status_code == 416:
                    return b""
                # A server without ranges sends the whole file; skipping to the place would read it for nothing.
                if answer.status_code != 206:
                    raise PermissionError(f"{self.url}/{name}: the server sends no ranges")
                data = bytearray()
                for piece in self._body(answer):
                    data += piece
                    if len(data) > size_bytes:
                        raise PermissionError(
                            f"{self.url}/{name}: the server sends more than the range it was asked for"
                        )
                return bytes(data)

        return retry(f"{self.url}: reading {name}", get)

    def fetch(self, name: str, file: IO[bytes], max_bytes: int | None) -> None:
        retry(f"{self.url}: fetching {name}", lambda: self._fetch(name, file, max_bytes))

    def write(self, name: str, data: bytes) -> None:
        self._refuse()

    def put(self, scratch: Path, name: str) -> None:
        self._refuse()

    def remove(self, name: str) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(f"{self.url}: a dataset cannot be written to a web server; give a folder or an object store")

    def _fetch(self, name: str, file: IO[bytes], max_bytes: int | None) -> None:
        file.seek(0)
        file.truncate()
        with self._request("GET", name, {}) as answer:
            if answer.status_code != 200:
                raise PermissionError(
                    f"{self.url}/{name}: HTTP status {answer.status_code} where a whole file was asked for"
                )
            self._check_size(name, _length(answer) or 0, max_bytes)  # before any of it is read
            for piece in self._body(answer):
                file.write(piece)
                self._check_size(name, file.tell(), max_bytes)
        file.flush()

    def _check_size(self, name: str, size_bytes: int, max_bytes: int | None) -> None:
        if max_bytes is not None and size_bytes > max_bytes:
            raise too_large(size_bytes, max_bytes)
        if max_bytes is None and size_bytes > _MAX_BYTES:
            raise PermissionError(
                f"{self.url}/{name}: {size_bytes} bytes; at most {_MAX_BYTES} are read from a web server"
            )

    def _body(self, answer: requests.Response) -> Iterator[bytes]:
        """The bytes as they come, no more than the server stated: whatever it may say of an encoding, nothing is unpacked.

        Raises:
            TransientIO: they come too slowly, for too long, or are others in number than stated.
        """
        started_s, done, expected = time.monotonic(), 0, _length(answer)
        # read1 comes back with what there is, so that a server which sends a byte a minute meets the deadline.
        while piece := answer.raw.read1(CHUNK_BYTES, decode_content=False):
            done += len(piece)
            if expected is not None and done > expected:
                raise TransientIO(f"more than the {expected} bytes came that the server stated")
            yield piece
            passed_s = time.monotonic() - started_s
            if done < (passed_s - _GRACE_S) * _MIN_BYTES_PER_S:
                raise TransientIO(
                    f"{done} bytes came in {passed_s:.0f} s; at least {_MIN_BYTES_PER_S} a second are waited for"
                )
            if expected is None and passed_s > _MAX_UNSTATED_S:
                raise TransientIO(
                    f"not finished after {_MAX_UNSTATED_S:.0f} s, and the server does not state the file's length"
                )
        if expected is not None and done != expected:
            raise TransientIO(f"{done} of {expected} bytes came")

    @contextmanager
    def _request(self, method: str, name: str, headers: dict[str, str]) -> Iterator[requests.Response]:
        url = f"{self.url}/{name}"
        if not self._is_inside(url):
            raise PermissionError(f"{url}: leads out of the corpus")
        try:
            for _ in range(_MAX_REDIRECTS):
                answer = requests.request(
                    method,
                    url,
                    headers={"Accept-Encoding": "identity", **headers},
                    timeout=_TIMEOUT_S,
                    stream=True,
                    allow_redirects=False,
                )
                if not answer.is_redirect:
                    break
                answer.close()
                url = urljoin(url, answer.headers["Location"])
                if not self._is_inside(url):
                    raise PermissionError(f"{self.url}/{name}: leads to {url}, outside of the corpus")
            else:
                raise PermissionError(f"{self.url}/{name}: redirected more than {_MAX_REDIRECTS} times")
            with answer:
                _check_status(answer, url)
                yield answer
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            raise TransientIO(str(error)) from error
        except (requests.RequestException, ValueError) as error:  # an address that is none
            raise PermissionError(f"{self.url}/{name}: {error}") from error

    def _is_inside(self, url: str) -> bool:
        parts = unquote(urlsplit(url).path).replace("\\", "/").split("/")
        return url.startswith(f"{self.url}/") and ".." not in parts


def _length(answer: requests.Response) -> int | None:
    text = answer.headers.get("Content-Length", "")
    return min(int(text), _MAX_INT64) if text.isascii() and text.isdecimal() else None


def _check_status(answer: requests.Response, url: str) -> None:
    status = answer.status_code
    if status in _TRANSIENT_STATUS:
        raise TransientIO(f"HTTP status {status}")
    if status in (404, 410):
        raise FileNotFoundError(f"{url}: HTTP status {status}")
    if status not in (200, 206, 416):
        raise PermissionError(f"{url}: HTTP status {status}")


def _mtime_ns(text: str | None) -> int:
    try:
        return min(int(parsedate_to_datetime(text or "").timestamp()) * 10**9, _MAX_INT64)
    except (ValueError, OverflowError):
        return 0

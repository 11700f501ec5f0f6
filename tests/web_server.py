"""A web server on loopback with files, ranges and redirects, and with every way to misbehave."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What the server answers for a path.

    body: repeated for ever where `endless`, else sent whole, or only `sent_bytes` of it before it hangs up.
    status, location, headers: of the answer; a header that the server sets itself is replaced.
    drip_s: seconds between two bytes of the body.
    is_chunked: the length is not said before.
    ranges: whether a request for a part gets the part.
    failures: requests that get `failure_status` before the page is there; 0 hangs up.
    """

    body: bytes = b""
    endless: bool = False
    sent_bytes: int | None = None
    status: int = 200
    location: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    drip_s: float = 0.0
    is_chunked: bool = False
    ranges: bool = True
    failures: int = 0
    failure_status: int = 503


class WebServer:
    """A running server; made by `serve_web`. `pages` maps paths (from `/` on, as a request spells them) to pages."""

    def __init__(self, port: int, stopping: threading.Event) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.pages: dict[str, Page] = {}
        self.stopping = stopping
        self.requests: list[str] = []
        """`METHOD PATH` of every request, in order."""
        self.asked: Counter[str] = Counter()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    control: WebServer

    def do_GET(self) -> None:
        control = self.control
        control.requests.append(f"{self.command} {self.path}")
        page = control.pages.get(self.path)
        if page is None:
            self._send_head(404, {"Content-Length": "0"})
            return
        control.asked[self.path] += 1
        self.close_connection = True
        if control.asked[self.path] <= page.failures:
            if page.failure_status:
                self._send_head(page.failure_status, {"Content-Length": "0"})
            return
        status, body = page.status, page.body
        headers = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT", "Connection": "close"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and page.ranges and status == 200:
            start, end = int(asked[1]), min(int(asked[2]) + 1, len(body))
            status = 206 if start < len(body) else 416
            headers["Content-Range"] = (
                f"bytes {start}-{end - 1}/{len(body)}" if status == 206 else f"bytes */{len(body)}"
            )
            body = body[start:end] if status == 206 else b""
        if page.location:
            headers["Location"] = page.location
        if page.is_chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif not page.endless:
            headers["Content-Length"] = str(len(body))
        self._send_head(status, {**headers, **page.headers})
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self._send_body(page, body)

    do_HEAD = do_GET

    def _send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_body(self, page: Page, body: bytes) -> None:
        if page.endless:
            while not self.control.stopping.is_set():
                self.wfile.write(page.body)
            return
        sent = body[: page.sent_bytes]
        for piece in [sent[n : n + 1] for n in range(len(sent))] if page.drip_s else [sent] if sent else []:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if page.is_chunked else piece)
            if page.drip_s:
                self.wfile.flush()
                time.sleep(page.drip_s)
        if page.is_chunked and page.sent_bytes is None:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serve_web() -> Iterator[WebServer]:
    """A server on a free port for the body."""
    stopping = threading.Event()
    handler = type("Handler", (_Handler,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.control = control = WebServer(server.server_port, stopping)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield control
    finally:
        stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()

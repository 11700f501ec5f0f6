"""An S3-speaking server on loopback that fails as it is told: moto's, with faults in front of it.

Any process can use it, Ray's workers among them: everything is in the URL (`ObjectServer.url`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal
from urllib.parse import unquote

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

_CODES = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What goes wrong with which requests.

    kind: `status` answers with `status`, without doing anything. `lost` does what it is asked, and answers with
        `status` all the same. `reset` hangs up without an answer. `stall` is silent for `stall_s`, then hangs up.
        `short` hangs up after half of the body that it announced.
    method: GET, PUT, ...; a glob.
    target: glob over `/BUCKET/KEY`, with `?QUERY` where the request has one.
    times: requests it meets; None for all.
    share: of the requests that match, drawn from the server's seed.
    """

    kind: Literal["status", "lost", "reset", "stall", "short"]
    method: str = "*"
    target: str = "*"
    times: int | None = None
    share: float = 1.0
    status: int = 503
    stall_s: float = 30.0


class ObjectServer:
    """A running server; made by `serve_objects`."""

    def __init__(self, port: int, seed: int, stopping: threading.Event) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.stopping = stopping
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        self._faults: list[tuple[Fault, list[int]]] = []
        self.requests: list[str] = []
        """`METHOD /BUCKET/KEY?QUERY` of every request, in order."""
        self.page_keys = 1000
        """Keys in one answer to a listing."""
        self.met: Counter[str] = Counter()
        """Faults that were dealt out, by kind."""

    def url(self, place: str) -> str:
        """What `Store.at` takes for `BUCKET/PREFIX`."""
        return f"s3://{place}?endpoint_override={self.endpoint}&anonymous=true"

    @functools.cached_property
    def client(self) -> Any:
        """boto3's client: another reader and writer than the one under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def make_bucket(self, name: str) -> str:
        self.client.create_bucket(Bucket=name)
        return name

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Every object of a bucket, but the empty ones that stand for folders."""
        client = self.client
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys if not key.endswith("/")}

    def inject(self, *faults: Fault) -> None:
        """Deal out these faults from now on, besides those that are not used up; the first that matches counts."""
        with self._lock:
            self._faults += [(fault, [0]) for fault in faults]

    def heal(self, seed: int | None = None) -> None:
        """No more faults; forget what was counted. With a seed, draw from now on as a server does that was made with it."""
        with self._lock:
            if seed is not None:
                self._random.seed(seed)
            self._faults.clear()
            self.requests.clear()
            self.page_keys = 1000
            self.met.clear()

    def count(self, pattern: str) -> int:
        """Requests so far that match a glob over `METHOD /BUCKET/KEY?QUERY`."""
        with self._lock:
            return sum(fnmatch.fnmatchcase(request, pattern) for request in self.requests)

    def take(self, method: str, target: str) -> Fault | None:
        """Note a request, and say what is to go wrong with it."""
        with self._lock:
            self.requests.append(f"{method} {target}")
            for fault, used in self._faults:
                if not fnmatch.fnmatchcase(method, fault.method) or not fnmatch.fnmatchcase(target, fault.target):
                    continue
                if (fault.times is None or used[0] < fault.times) and self._random.random() < fault.share:
                    used[0] += 1
                    self.met[fault.kind] += 1
                    return fault
        return None


class _Handler(MotoRequestHandler):
    protocol_version = "HTTP/1.1"
    control: ObjectServer

    def run_wsgi(self) -> None:
        # A client without credentials signs nothing, and moto tells from the signature that a body comes in pieces.
        if "aws-chunked" in self.headers.get("Content-Encoding", "") and "x-amz-content-sha256" not in self.headers:
            self.headers["x-amz-content-sha256"] = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
        if "Authorization" not in self.headers:  # and it lets nobody change an object without one
            scope = "Credential=anyone/20200101/us-east-1/s3/aws4_request"
            self.headers["Authorization"] = f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=0"
        self.path = self.path.replace("max-keys=1000", f"max-keys={self.control.page_keys}")
        fault = self.control.take(self.command, unquote(self.path))
        if fault is None:
            super().run_wsgi()
            return
        self.close_connection = True
        if fault.kind == "stall":
            self.control.stopping.wait(fault.stall_s)
        if fault.kind in ("stall", "reset"):
            # Nothing is sent any more, and what was sent is forgotten: the client sees a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        if fault.kind == "status":
            self._read_body()
        else:
            answer = self._answer()
        if fault.kind == "short":
            head, _, body = answer.partition(b"\r\n\r\n")
            self.wfile.write(head + b"\r\n\r\n" + body[: len(body) // 2])
            return
        code = _CODES.get(fault.status, "Error")
        body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
        self.send_response(fault.status)
        for name, value in (
            ("Content-Type", "application/xml"),
            ("Content-Length", len(body)),
            ("Connection", "close"),
        ):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read_body(self) -> None:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self) -> bytes:
        wire, self.wfile = self.wfile, BytesIO()
        try:
            super().run_wsgi()
            return self.wfile.getvalue()
        finally:
            self.wfile = wire
            self.close_connection = True

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve_objects(seed: int = 0) -> Iterator[ObjectServer]:
    """A server on a free port for the body; what is in it goes with the process."""
    stopping = threading.Event()
    handler = type("Handler", (_Handler,), {})
    server = make_server(
        "127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True, request_handler=handler
    )
    server.daemon_threads = True  # type: ignore[attr-defined]
    handler.control = control = ObjectServer(server.server_port, seed, stopping)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield control
    finally:
        stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()

"""Files on a web server that may be slow, broken or hostile: bounded, whole, and never from elsewhere."""

from __future__ import annotations

import gzip
import os
import pickle
import socket
import time
from collections.abc import Iterator

import pytest

from pipeline import retry as retry_module
from pipeline import web_store
from pipeline.errors import BadVideo, ConfigError, TransientIO
from pipeline.storage import Entry, Store
from tests.web_server import Page, WebServer, serve_web

DATA = bytes(range(256)) * 40


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setattr(retry_module, "_FIRST_DELAY_S", 0.001)
    with serve_web() as server:
        server.pages["/root/a.mp4"] = Page(body=DATA)
        server.pages["/secret"] = Page(body=b"secret")
        yield server


@pytest.fixture
def store(server: WebServer) -> Store:
    return Store.at(f"{server.url}/root")


class TestFiles:
    def test_read(self, server: WebServer, store: Store) -> None:
        assert store.read("a.mp4") == DATA
        assert store.read_range("a.mp4", 250, 10) == DATA[250:260]
        assert store.read_range("a.mp4", len(DATA) - 3, 99) == DATA[-3:]
        assert store.read_range("a.mp4", len(DATA), 5) == b""
        with store.open("a.mp4") as file:
            assert os.pread(file.fileno(), 4, 7) == DATA[7:11] and os.fstat(file.fileno()).st_size == len(DATA)
        assert store.stat("a.mp4") == Entry(name="a.mp4", size_bytes=len(DATA), mtime_ns=1445412480 * 10**9)
        assert server.requests[-1] == "HEAD /root/a.mp4"

    def test_names(self, server: WebServer, store: Store) -> None:
        assert not store.is_local and store.name == "root" and store.url == f"{server.url}/root"
        assert Store.at(f"{server.url}/root/").where("x/y.mp4") == f"{server.url}/root/x/y.mp4"
        assert pickle.loads(pickle.dumps(store)).read("a.mp4") == DATA  # noqa: S301
        server.pages["/root/b%C3%BCcher/a%20b.mp4"] = Page(body=b"1")
        assert store.read("bücher/a b.mp4") == b"1"

    @pytest.mark.parametrize("rest", ["?token=abc", "#part", "/x?y"])
    def test_a_root_is_a_folder(self, rest: str) -> None:
        with pytest.raises(ConfigError, match=r"holds a \? or #") as caught:
            Store.at(f"https://host/x{rest}")
        assert "abc" not in str(caught.value)  # it may be a secret

    def test_read_only(self, store: Store) -> None:
        for call in (
            lambda: store.write("x", b""), lambda: store.remove("x"), lambda: store.put(store.scratch("x"), "x"),
        ):  # fmt: skip
            with pytest.raises(ConfigError, match="cannot be written to a web server"):
                call()
        for call in (store.list, lambda: list(store.walk())):
            with pytest.raises(ConfigError, match="cannot list its files"):
                call()

    @pytest.mark.parametrize("status", [404, 410])
    def test_missing(self, server: WebServer, store: Store, status: int) -> None:
        server.pages["/root/gone.mp4"] = Page(status=status)
        assert store.stat("gone.mp4") is None
        for call in (store.read, store.open, lambda name: store.read_range(name, 0, 1)):
            server.requests.clear()
            with pytest.raises(FileNotFoundError, match=rf"/root/gone.mp4: HTTP status {status}"):
                call("gone.mp4")
            assert len(server.requests) == 1

    @pytest.mark.parametrize("status", [400, 401, 403, 405, 451])
    def test_refused(self, server: WebServer, store: Store, status: int) -> None:
        server.pages["/root/no.mp4"] = Page(status=status)
        for call in (store.stat, store.read):
            server.requests.clear()
            with pytest.raises(PermissionError, match=rf"/root/no.mp4: HTTP status {status}"):
                call("no.mp4")
            assert len(server.requests) == 1

    @pytest.mark.parametrize("said", ["", "nonsense", "-5", "9" * 40])
    def test_odd_headers(self, server: WebServer, store: Store, said: str) -> None:
        """What a server says of a file must fit into the columns of a plan."""
        server.pages["/root/odd.mp4"] = Page(
            body=b"1", headers={"Content-Length": said, "Last-Modified": "Fri, 31 Dec 9999 23:59:59 GMT"}
        )
        try:
            entry = store.stat("odd.mp4")
        except (PermissionError, TransientIO):
            return
        assert entry is not None and 0 <= entry.mtime_ns < 2**63
        assert entry.size_bytes is None or 0 <= entry.size_bytes < 2**63

    def test_a_length_that_is_not_stated(self, server: WebServer, store: Store) -> None:
        server.pages["/root/b.mp4"] = Page(body=DATA, is_chunked=True)
        assert store.stat("b.mp4") == Entry(name="b.mp4", size_bytes=None, mtime_ns=1445412480 * 10**9)


class TestBadMoments:
    @pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 0])
    def test_passes(self, server: WebServer, store: Store, status: int) -> None:
        server.pages["/root/b.mp4"] = Page(body=DATA, failures=4, failure_status=status)
        assert store.read("b.mp4") == DATA
        assert server.requests == ["GET /root/b.mp4"] * 5

    @pytest.mark.parametrize("call", ["stat", "read", "open", "read_range"])
    def test_attempts_are_bounded(self, server: WebServer, store: Store, call: str) -> None:
        server.pages["/root/b.mp4"] = Page(body=DATA, failures=99)
        with pytest.raises(TransientIO, match=r"/root: .* b.mp4: failed 5 times, at last: HTTP status 503"):
            getattr(store, call)("b.mp4", *((0, 1) if call == "read_range" else ()))
        assert len(server.requests) == 5

    @pytest.mark.parametrize("is_chunked", [False, True])
    @pytest.mark.parametrize("sent_bytes", [0, 1, 5000])
    def test_short_bodies(self, server: WebServer, store: Store, is_chunked: bool, sent_bytes: int) -> None:
        server.pages["/root/b.mp4"] = Page(body=DATA, sent_bytes=sent_bytes, is_chunked=is_chunked)
        for call in (store.read, lambda name: store.read_range(name, 0, len(DATA))):
            server.requests.clear()
            with pytest.raises(TransientIO, match=r"b.mp4: failed 5 times"):
                call("b.mp4")
            assert len(server.requests) == 5

    def test_chunked(self, server: WebServer, store: Store) -> None:
        server.pages["/root/b.mp4"] = Page(body=DATA, is_chunked=True)
        assert store.read("b.mp4") == DATA and store.read_range("b.mp4", 1, 5) == DATA[1:6]

    def test_connection_refused(self, server: WebServer) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            with pytest.raises(TransientIO, match="failed 5 times"):
                Store.at(f"http://127.0.0.1:{closed.getsockname()[1]}/x").read("a")

    def test_silence(self, server: WebServer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(web_store, "_TIMEOUT_S", (1.0, 0.1))
        server.pages["/root/b.mp4"] = Page(body=b"12", drip_s=0.5)
        with pytest.raises(TransientIO, match="failed 5 times"):
            store.read("b.mp4")

    def test_a_byte_now_and_then(self, server: WebServer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Never silent for long, and never done: only a deadline for the whole ends that."""
        monkeypatch.setattr(web_store, "_GRACE_S", 0.2)
        monkeypatch.setattr(retry_module, "ATTEMPTS", 2)
        for page in (Page(body=bytes(2000), drip_s=0.01), Page(body=bytes(2000), drip_s=0.01, is_chunked=True)):
            server.pages["/root/b.mp4"] = page
            started_s = time.monotonic()
            for call in (store.read, lambda name: store.read_range(name, 0, 2000)):
                with pytest.raises(TransientIO, match=r"bytes came in 0 s; at least 131072 a second"):
                    call("b.mp4")
            assert time.monotonic() - started_s < 5

    def test_a_body_without_a_length_has_an_end(
        self, server: WebServer, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However fast: where no length is stated, it may as well go on for ever."""
        monkeypatch.setattr(web_store, "_MAX_UNSTATED_S", 0.2)
        monkeypatch.setattr(retry_module, "ATTEMPTS", 2)
        server.pages["/root/b.mp4"] = Page(body=bytes(100_000), endless=True)
        with pytest.raises(TransientIO, match="not finished after 0 s, and the server does not state"):
            store.open("b.mp4", max_bytes=2**40)
        monkeypatch.setattr(web_store, "_MAX_UNSTATED_S", 3600)
        monkeypatch.setattr(web_store, "_MAX_BYTES", 10**6)
        with pytest.raises(PermissionError, match="at most 1000000 are read from a web server"):
            store.read("b.mp4")  # as a manifest is


class TestHostile:
    def test_endless(self, server: WebServer, store: Store) -> None:
        server.pages["/root/b.mp4"] = Page(body=bytes(100_000), endless=True)
        with pytest.raises(BadVideo, match="at most 1000000 are allowed") as caught:
            store.open("b.mp4", max_bytes=1_000_000)
        assert caught.value.reject_class == "too-large" and len(server.requests) == 1

    def test_a_stated_length_bounds_an_endless_body(self, server: WebServer, store: Store) -> None:
        """Of a body that goes on, what was stated is taken, by whichever of the two ways a length is given."""
        server.pages["/root/b.mp4"] = Page(body=bytes(1000), endless=True, headers={"Content-Length": "250000"})
        assert store.open("b.mp4", max_bytes=10**6).read() == bytes(250_000)
        headers = {"Content-Length": "5000", "Transfer-Encoding": "chunked"}
        server.pages["/root/b.mp4"] = Page(body=b"3e8\r\n" + bytes(1000) + b"\r\n", endless=True, headers=headers)
        with pytest.raises(TransientIO, match=r"more than the 5000 bytes came that the server stated"):
            store.open("b.mp4", max_bytes=2**40)

    def test_a_stated_length_over_the_limit_is_refused_unread(self, server: WebServer, store: Store) -> None:
        server.pages["/root/b.mp4"] = Page(body=b"1", drip_s=9, headers={"Content-Length": str(2**40)})
        started_s = time.monotonic()
        with pytest.raises(BadVideo, match=f"a file of {2**40} bytes; at most 1000000"):
            store.open("b.mp4", max_bytes=10**6)
        assert time.monotonic() - started_s < 5 and len(server.requests) == 1

    def test_a_range_that_never_ends(self, server: WebServer, store: Store) -> None:
        server.pages["/root/b.mp4"] = Page(body=bytes(100_000), endless=True, status=206, ranges=False)
        with pytest.raises(PermissionError, match="more than the range"):
            store.read_range("b.mp4", 0, 1000)

    def test_a_server_without_ranges(self, server: WebServer, store: Store) -> None:
        server.pages["/root/b.mp4"] = Page(body=bytes(100_000), endless=True, ranges=False)
        with pytest.raises(PermissionError, match="sends no ranges"):
            store.read_range("b.mp4", 0, 1000)

    def test_a_part_is_no_whole(self, server: WebServer, store: Store) -> None:
        server.pages["/root/b.mp4"] = Page(body=b"half", status=206)
        with pytest.raises(PermissionError, match="HTTP status 206 where a whole file was asked for"):
            store.read("b.mp4")

    def test_nothing_is_unpacked(self, server: WebServer, store: Store) -> None:
        """A small body that says it is compressed could be gigabytes."""
        packed = gzip.compress(bytes(10_000_000))
        server.pages["/root/b.mp4"] = Page(body=packed, headers={"Content-Encoding": "gzip"})
        assert store.open("b.mp4", max_bytes=100_000).read() == packed
        assert store.read_range("b.mp4", 0, 50) == packed[:50]

    @pytest.mark.parametrize("location", ["/root/a.mp4", "a.mp4", "x/../a.mp4", "{url}/root/a.mp4"])
    def test_redirects_within(self, server: WebServer, store: Store, location: str) -> None:
        server.pages["/root/r.mp4"] = Page(status=302, location=location.format(url=server.url))
        assert store.read("r.mp4") == DATA
        assert store.stat("r.mp4") == Entry(name="r.mp4", size_bytes=len(DATA), mtime_ns=1445412480 * 10**9)

    @pytest.mark.parametrize(
        "location",
        [
            "/secret",
            "../secret",
            "{url}/secret",
            "{url}/root/../secret",
            "{url}/root/%2e%2e/secret",
            "/root/x/..%2f..%2fsecret",
            "/root/..\\secret",
            "{url}/root2/a.mp4",
            "{url}@127.0.0.1:1/x",
            "http://169.254.169.254/latest/meta-data",
            "//127.0.0.1:1/x",
            "file:///etc/passwd",
            "ftp://127.0.0.1/x",
            "http://[",
        ],
    )
    def test_redirects_that_lead_out(self, server: WebServer, store: Store, location: str) -> None:
        server.pages["/root/r.mp4"] = Page(status=302, location=location.format(url=server.url))
        for call in (store.read, store.stat, lambda name: store.read_range(name, 0, 5)):
            server.requests.clear()
            with pytest.raises(PermissionError, match=r"/root/r\.mp4"):
                call("r.mp4")
            assert len(server.requests) == 1

    @pytest.mark.parametrize("name", ["../secret", "x/../../secret", "%2e%2e/secret", "..\\secret", "x/%2E./../secret"])
    def test_names_that_lead_out(self, server: WebServer, store: Store, name: str) -> None:
        with pytest.raises(PermissionError, match="leads out of the corpus"):
            store.read(name)
        assert not server.requests

    def test_redirects_for_ever(self, server: WebServer, store: Store) -> None:
        server.pages["/root/r.mp4"] = Page(status=302, location="/root/r.mp4")
        with pytest.raises(PermissionError, match="redirected more than 5 times"):
            store.read("r.mp4")
        assert len(server.requests) == 5

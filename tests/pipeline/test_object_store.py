"""Object stores against a real S3-speaking server: what is written is read, and every failure is bounded and named."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from pipeline import object_store
from pipeline import retry as retry_module
from pipeline.dataset import committed_shards, create_or_resume, finish, read_index, read_meta, read_rejects
from pipeline.errors import BadVideo, ConfigError, TransientIO
from pipeline.ledger import Ledger
from pipeline.schema import Reject
from pipeline.shards import read_payload, tar_name
from pipeline.storage import Store
from pipeline.verify import shards_at_fault, verify
from tests.object_server import Fault, ObjectServer, serve_objects
from tests.pipeline.datasets import add_codes, describe, make_codes, make_row, open_writer

REJECT = Reject(path="bad.mp4", stage="shard", reject_class="corrupt", reason="cut off")
BUCKETS = iter(f"bucket-{n}" for n in range(1000))


@pytest.fixture(scope="module")
def running() -> Iterator[ObjectServer]:
    with serve_objects() as server:
        yield server


@pytest.fixture
def server(running: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """The server without faults; waits between attempts, and for its answers, are short."""
    monkeypatch.setattr(retry_module, "_FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(object_store, "_REQUEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr(object_store, "_CONNECT_TIMEOUT_S", 1.0)
    object_store._open_s3.cache_clear()
    running.heal()
    yield running
    running.heal()
    object_store._open_s3.cache_clear()


@pytest.fixture
def bucket(server: ObjectServer) -> str:
    return server.make_bucket(next(BUCKETS))


@pytest.fixture
def store(server: ObjectServer, bucket: str) -> Store:
    store = Store.at(server.url(f"{bucket}/some/data"))
    store.write("there", b"0123456789" * 100)
    server.heal()
    return store


CALLS: dict[str, Callable[[Store], Any]] = {
    "stat": lambda store: store.stat("there"),
    "list": lambda store: [entry.name for entry in store.list()],
    "walk": lambda store: [entry.name for entry in store.walk()],
    "read": lambda store: store.read("there"),
    "read_range": lambda store: store.read_range("there", 5, 10),
    "open": lambda store: store.open("there").read(),
    "write": lambda store: store.write("new", b"new" * 100),
    "remove": lambda store: store.remove("there"),
}


class TestRoundTrip:
    def test_files(self, server: ObjectServer, bucket: str, store: Store) -> None:
        store.write("a/b.bin", bytes(range(256)))
        assert server.objects(bucket)["some/data/a/b.bin"] == bytes(range(256))
        assert store.read("a/b.bin") == bytes(range(256))
        assert store.read_range("a/b.bin", 250, 3) == bytes([250, 251, 252])
        assert store.read_range("a/b.bin", 250, 99) == bytes(range(250, 256))
        assert store.read_range("a/b.bin", 999, 1) == b""
        entry = store.stat("a/b.bin")
        assert entry is not None and (entry.name, entry.size_bytes) == ("a/b.bin", 256) and entry.mtime_ns > 0
        store.write("a/b.bin", b"")
        entry = store.stat("a/b.bin")
        assert store.read("a/b.bin") == b"" and entry is not None and entry.size_bytes == 0
        store.remove("a/b.bin")
        store.remove("a/b.bin")
        assert store.stat("a/b.bin") is None and not store.exists("a/b.bin")

    def test_open_gives_a_real_descriptor(self, store: Store) -> None:
        with store.open("there") as file:
            assert os.pread(file.fileno(), 4, 2) == b"2345"
            assert os.fstat(file.fileno()).st_size == 1000 and os.fstat(file.fileno()).st_nlink == 0
            assert Path(f"/dev/fd/{file.fileno()}").read_bytes() == file.read()

    def test_max_bytes(self, server: ObjectServer, store: Store) -> None:
        assert len(store.open("there", max_bytes=1000).read()) == 1000
        server.heal()
        with pytest.raises(BadVideo, match="1000 bytes; at most 999"):
            store.open("there", max_bytes=999)
        assert server.count("GET *there*") == 0  # nothing was fetched to find out

    def test_put_in_parts(self, server: ObjectServer, bucket: str, store: Store) -> None:
        """More than one part of an upload (5 MiB or more each)."""
        data = os.urandom(11 * 2**20)
        scratch = store.scratch("shards/train-000000.tar")
        scratch.write_bytes(data)
        store.put(scratch, "shards/train-000000.tar")
        assert not scratch.exists()
        assert server.objects(bucket)["some/data/shards/train-000000.tar"] == data
        with store.open("shards/train-000000.tar") as file:
            assert file.read() == data

    def test_listing(self, server: ObjectServer, bucket: str, store: Store) -> None:
        client = server.client
        for key in ("x/2", "x/1", "x/.hidden", "x/y/3", "x/", "x/y/", ".git/z", "ünï cöde+%41.mp4"):
            client.put_object(Bucket=bucket, Key=f"some/data/{key}", Body=b"1")
        client.put_object(Bucket=bucket, Key="some/data2/near", Body=b"1")
        assert [entry.name for entry in store.list("x")] == ["x/1", "x/2"]
        assert [entry.name for entry in store.list()] == ["there", "ünï cöde+%41.mp4"]
        assert sorted(entry.name for entry in store.walk()) == ["there", "x/1", "x/2", "x/y/3", "ünï cöde+%41.mp4"]
        assert store.list("none") == list(store.walk("none")) == []
        assert store.read("ünï cöde+%41.mp4") == b"1"

    def test_more_than_one_page(self, server: ObjectServer, bucket: str, store: Store) -> None:
        client = server.client
        for n in range(5):
            client.put_object(Bucket=bucket, Key=f"some/data/many/{n}", Body=b"")
        server.heal()
        server.page_keys = 2
        assert [entry.name for entry in store.list("many")] == [f"many/{n}" for n in range(5)]
        assert server.count("GET *prefix=some/data/many/*") == 3

    def test_names(self, server: ObjectServer, bucket: str, store: Store) -> None:
        assert store.name == "data" and not store.is_local
        assert store.where("shards/1.tar") == f"s3://{bucket}/some/data/shards/1.tar"
        assert Store.at(server.url(f"{bucket}/some/data/")).name == "data"
        assert Store.at(server.url(bucket)).name == bucket
        assert Store.at(server.url(bucket)).where("x") == f"s3://{bucket}/x"
        copy = pickle.loads(pickle.dumps(store))  # noqa: S301
        assert copy.url == store.url and copy.read("there") == store.read("there")
        with pytest.raises(ConfigError, match="must be a local folder"):
            store.path("x")

    def test_a_bucket_as_it_is(self, server: ObjectServer, bucket: str) -> None:
        store = Store.at(server.url(bucket))
        store.write("a/b", b"1")
        assert store.read("a/b") == b"1" and [entry.name for entry in store.walk()] == ["a/b"]

    def test_endpoint_from_the_environment(
        self, server: ObjectServer, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in (
            ("AWS_ENDPOINT_URL_S3", server.endpoint), ("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "y"),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        store = object_store.ObjectStore(f"s3://{bucket}/env")
        store.write("f", b"1")
        assert server.objects(bucket) == {"env/f": b"1"}

    def test_unknown_option(self) -> None:
        with pytest.raises(
            ConfigError, match=r"unknown options \['endpoint'\]; allowed: \['anonymous', 'endpoint_over"
        ):
            Store.at("s3://bucket/x?endpoint=http://127.0.0.1:1")

    def test_other_clouds(self) -> None:
        """Nothing is asked of a network until a file is."""
        assert Store.at("gs://bucket/a/b").where("c") == "gs://bucket/a/b/c"
        azure = object_store.ObjectStore("abfs://container@account.dfs.core.windows.net/a/b")
        assert azure._prefix == "container/a/b" and Store.at(azure.url).name == "b"
        with pytest.raises(ConfigError, match="gs://bucket/a"):
            Store.at("gs://bucket/a?surprise=1")


class TestErrors:
    @pytest.mark.parametrize("status", [500, 503])
    @pytest.mark.parametrize("name", CALLS)
    def test_a_bad_moment_passes(self, server: ObjectServer, store: Store, name: str, status: int) -> None:
        expected = None if name in ("write", "remove") else CALLS[name](store)
        server.inject(Fault(kind="status", status=status, times=2))
        assert CALLS[name](store) == expected
        assert server.met["status"] == 2
        server.heal()
        assert store.exists("new") == (name == "write") and store.exists("there") == (name != "remove")

    @pytest.mark.parametrize("fault", ["status", "reset"])
    @pytest.mark.parametrize("name", CALLS)
    def test_attempts_are_bounded(self, server: ObjectServer, store: Store, name: str, fault: Any) -> None:
        server.inject(Fault(kind=fault))
        with pytest.raises(TransientIO) as caught:
            CALLS[name](store)
        assert server.met[fault] == 5
        for words in ("failed 5 times", store.url, {"list": "it", "walk": "it", "write": "new"}.get(name, "there")):
            assert words in str(caught.value), words
        server.heal()
        assert store.read("there") == b"0123456789" * 100 and not store.exists("new")

    @pytest.mark.parametrize("status", [400, 401, 403])
    @pytest.mark.parametrize("name", CALLS)
    def test_a_refusal_is_not_repeated(self, server: ObjectServer, store: Store, name: str, status: int) -> None:
        server.inject(Fault(kind="status", status=status))
        with pytest.raises(PermissionError, match="some/data"):
            CALLS[name](store)
        assert server.met["status"] == 1

    def test_missing(self, server: ObjectServer, store: Store) -> None:
        for call in (store.read, store.open, lambda name: store.read_range(name, 0, 1)):
            server.heal()
            with pytest.raises(FileNotFoundError, match="some/data/none"):
                call("none")
            assert len(server.requests) <= 2

    def test_missing_bucket(self, server: ObjectServer) -> None:
        store = Store.at(server.url("no-such-bucket/x"))
        assert store.stat("a") is None and store.list() == []
        with pytest.raises(FileNotFoundError, match=r"no-such-bucket.*writing a.*NO_SUCH_BUCKET"):
            store.write("a", b"1")
        with pytest.raises(FileNotFoundError, match="no-such-bucket"):
            store.read("a")
        assert server.count("P* *") == 1

    def test_connection_refused(self, server: ObjectServer) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            store = Store.at(
                f"s3://bucket/x?endpoint_override=http://127.0.0.1:{closed.getsockname()[1]}&anonymous=true"
            )
            with pytest.raises(TransientIO, match=r"reading a: failed 5 times.*(?i:connect)"):
                store.read("a")

    def test_a_server_that_falls_silent(self, server: ObjectServer, store: Store) -> None:
        server.inject(Fault(kind="stall", times=1, stall_s=10))
        assert store.read("there") == b"0123456789" * 100
        assert server.met["stall"] == 1

    @pytest.mark.parametrize("name", ["read", "read_range", "open"])
    def test_short_reads(self, server: ObjectServer, store: Store, name: str) -> None:
        expected = CALLS[name](store)
        server.inject(Fault(kind="short", method="GET", times=3))
        assert CALLS[name](store) == expected and server.met["short"] == 3
        server.inject(Fault(kind="short", method="GET"))
        with pytest.raises(TransientIO, match="there: failed 5 times"):
            CALLS[name](store)

    @pytest.mark.parametrize("kind", ["status", "lost", "reset", "short"])
    @pytest.mark.parametrize("step", ["POST *?uploads", "PUT *", "POST *uploadId*", "HEAD *"])
    def test_uploads_are_whole_or_not_at_all(
        self, server: ObjectServer, bucket: str, store: Store, kind: Any, step: str
    ) -> None:
        """Whatever step of an upload fails: the old object, or the new one, and the right one once it is said to be."""
        method, target = step.split()
        old, new = b"0123456789" * 100, b"n" * 50_000
        server.inject(Fault(kind=kind, method=method, target=target.replace("?", "[?]")))
        try:
            store.write("there", new)
            is_written = True
        except TransientIO as error:
            assert "failed 5 times" in str(error)
            is_written = False
        is_met = bool(server.met[kind])
        has_body = not (kind == "short" and method in ("PUT", "HEAD"))  # what is said in headers cannot be cut short
        server.heal()
        found = server.objects(bucket)["some/data/there"]
        assert found == new if is_written else found in (old, new)
        assert is_met and is_written == (not has_body)
        store.write("there", new)
        assert store.read("there") == new

    def test_a_moment_within_an_upload(self, server: ObjectServer, bucket: str, store: Store) -> None:
        for method in ("PUT", "POST", "HEAD"):
            for kind in ("status", "lost", "reset"):
                server.heal()
                server.inject(Fault(kind=kind, method=method, times=1))  # type: ignore[arg-type]
                data = f"{method} {kind}".encode()
                store.write("there", data)
                assert server.met[kind] == 1 and server.objects(bucket)["some/data/there"] == data

    def test_a_full_local_disk_is_not_the_storage(
        self, server: ObjectServer, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`open` fetches to the temporary folder; retrying would fill it five times."""
        real = tempfile.TemporaryFile

        class Full:
            def __init__(self) -> None:
                self._file: IO[bytes] = real()

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def write(self, data: bytes) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(tempfile, "TemporaryFile", Full)
        with pytest.raises(OSError, match="No space left"):
            store.open("there")
        assert server.count("GET *there*") == 1


def write_shard(store: Store, shard: int, samples: tuple[int, ...], rejects: tuple[Reject, ...] = ()) -> None:
    writer = open_writer(store, shard)
    try:
        for sample in samples:
            add_codes(writer, make_row(f"{sample}-000"), make_codes(sample, 3))
        writer.commit(len(samples) + len(rejects), list(rejects))
    finally:
        writer.abort()


class TestDataset:
    @pytest.fixture
    def out(self, server: ObjectServer, bucket: str) -> Store:
        return Store.at(server.url(f"{bucket}/tokens"))

    def test_a_dataset(
        self, server: ObjectServer, bucket: str, out: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same bytes as on a disk, under the same names."""
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        stores: list[Store] = [out, Store.at(tmp_path / "tokens")]
        for store in stores:
            meta = create_or_resume(store, describe(num_shards=2))
            write_shard(store, 0, (0, 1), (REJECT,))
            write_shard(store, 1, (2,))
            assert create_or_resume(store, describe(num_shards=2)) == meta
            finished, ledger = finish(store, meta, Ledger())
            assert read_meta(store, kind="tokens", complete=True) == finished
            assert (ledger.planned, ledger.committed) == (4, 3)
            assert list(verify(store)) == []
            assert list(read_rejects(store)) == [REJECT]
            rows = read_index(store).to_pylist()
            assert [read_payload(store, row) for row in rows] == [make_codes(n, 3).tobytes() for n in range(3)]
        local = {
            f"tokens/{path.relative_to(tmp_path / 'tokens')}": path.read_bytes()
            for path in (tmp_path / "tokens").rglob("*")
            if path.is_file()
        }
        assert server.objects(bucket) == local
        assert not list(scratch.iterdir())

    def test_the_index_comes_last(self, server: ObjectServer, out: Store) -> None:
        create_or_resume(out, describe())
        server.heal()
        write_shard(out, 0, (0,), (REJECT,))
        done = [line.split("?")[0] for line in server.requests if line.startswith("POST") and "uploadId" in line]
        assert [name.split("tokens/")[1] for name in done] == [
            "shards/train-000000.tar", "rejects/000000.parquet", "index/000000.parquet",
        ]  # fmt: skip

    @pytest.mark.parametrize("part", ["shards", "rejects", "index"])
    @pytest.mark.parametrize("kind", ["status", "reset"])
    def test_no_half_shard_counts(self, server: ObjectServer, bucket: str, out: Store, part: str, kind: Any) -> None:
        """Storage gives up while a shard is written, over an older one or a new one: what counts is whole."""
        meta = create_or_resume(out, describe(num_shards=2))
        write_shard(out, 0, (5, 6))
        for shard in (0, 1):
            server.inject(Fault(kind=kind, method="P*", target=f"*/{part}/*"))
            with pytest.raises(TransientIO, match=f"{part}/.*00000{shard}.*failed 5 times"):
                write_shard(out, shard, (shard, 7 + shard), (REJECT,))
            server.heal()
            assert shard not in committed_shards(out, meta.fingerprint)
            create_or_resume(out, describe(num_shards=2))
            write_shard(out, shard, (shard, 7 + shard), (REJECT,))
        finish(out, meta, Ledger())
        assert list(verify(out)) == []
        assert read_index(out)["key"].to_pylist() == ["0-000", "7-000", "1-000", "8-000"]

    def test_an_outage_is_no_damage(self, server: ObjectServer, out: Store) -> None:
        """`verify --repair` drops shards that are damaged; a server that is away must not cost any."""
        meta = create_or_resume(out, describe())
        write_shard(out, 0, (0,), (REJECT,))
        finish(out, meta, Ledger())
        for part in ("index/", "shards/", "rejects/", "dataset.json"):
            for status, error in ((503, TransientIO), (403, PermissionError)):
                server.heal()
                server.inject(Fault(kind="status", status=status, target=f"*{part}*"))
                with pytest.raises(error):
                    list(verify(out))

    def test_repair(self, server: ObjectServer, bucket: str, out: Store) -> None:
        meta = create_or_resume(out, describe(num_shards=2))
        write_shard(out, 0, (0, 1))
        write_shard(out, 1, (2,))
        finish(out, meta, Ledger())
        before = server.objects(bucket)
        key = "tokens/shards/train-000001.tar"
        damaged = bytearray(before[key])
        damaged[700] ^= 1
        server.client.put_object(Bucket=bucket, Key=key, Body=bytes(damaged))
        problems = list(verify(out))
        assert {problem.shard for problem in problems} == {1}
        assert all(f"s3://{bucket}/tokens/shards/train-000001.tar" in problem.text for problem in problems)
        assert shards_at_fault(out, problems) == [1]
        assert list(committed_shards(out, meta.fingerprint, without=[1])) == [0]
        write_shard(out, 1, (2,))
        finish(out, meta, Ledger())
        assert list(verify(out)) == [] and server.objects(bucket) == before

    def test_leftovers_do_not_confuse_a_resume(self, server: ObjectServer, bucket: str, out: Store) -> None:
        meta = create_or_resume(out, describe())
        client = server.client
        client.put_object(Bucket=bucket, Key="tokens/index/", Body=b"")
        client.put_object(Bucket=bucket, Key=f"tokens/{tar_name(0, 'train')}", Body=b"half")
        client.create_multipart_upload(Bucket=bucket, Key="tokens/index/000000.parquet")
        assert create_or_resume(out, describe()) == meta
        assert committed_shards(out, meta.fingerprint) == {} and len(read_index(out)) == 0
        write_shard(out, 0, (0,))
        finish(out, meta, Ledger())
        assert list(verify(out)) == []

    @pytest.mark.parametrize("key", ["thesis.txt", "deep/below/thesis.txt"])
    def test_foreign_files(self, server: ObjectServer, bucket: str, out: Store, key: str) -> None:
        server.client.put_object(Bucket=bucket, Key=f"tokens/{key}", Body=b"keep me")
        with pytest.raises(ConfigError, match=r"holds other files.*thesis"):
            create_or_resume(out, describe())
        assert server.objects(bucket) == {f"tokens/{key}": b"keep me"}

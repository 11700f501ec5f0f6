"""Token datasets in an object store: the batches of a local copy, through a bounded cache that checks what it fetches."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import shard_files
from pipeline.errors import ConfigError, DatasetError
from pipeline.loader import CacheConfig, LoaderConfig, TokenLoader
from pipeline.node_cache import NodeCache
from tests.object_server import Fault, ObjectServer, serve_objects
from tests.pipeline.datasets import GRID, PAD, make_token_dataset, shard_path

LENGTHS = [[9, 2, 4], [5, 30], [1, 12, 7, 4], [6, 6, 6]] * 2
SHARD_BYTES = 10240


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_token_dataset(tmp_path_factory.mktemp("shards") / "tokens", LENGTHS)
    assert {shard_path(folder, shard).stat().st_size for shard in range(len(LENGTHS))} == {SHARD_BYTES}
    return folder


@pytest.fixture
def server(local: Path) -> Iterator[ObjectServer]:
    with serve_objects() as control:
        control.make_bucket("bucket")
        for path in sorted(local.rglob("*")):
            if path.is_file():
                control.client.put_object(
                    Bucket="bucket", Key=f"tokens/{path.relative_to(local)}", Body=path.read_bytes()
                )
        yield control


def open_loader(place: str | Path, cache: Path, max_bytes: int = 10**6, **config: Any) -> TokenLoader:
    values = {"batch_size": 4, "shards_per_block": 2, "cache": CacheConfig(folder=cache, max_bytes=max_bytes), **config}
    return TokenLoader(place, LoaderConfig(**values), window=(4, *GRID), num_views=2, pad=PAD, rank=0, world_size=1)


def fetched(server: ObjectServer) -> Counter[str]:
    """How often each tar was asked for."""
    gets = (line.removeprefix("GET ") for line in server.requests if line.startswith("GET "))
    return Counter(Path(target).name for target in gets if target.endswith(".tar"))


def wait_until(reached: Any) -> None:
    deadline_s = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def assert_same_epoch(one: TokenLoader, other: TokenLoader) -> None:
    for step in range(len(one) // 4 + 1):
        a, b = one.batch(step), other.batch(step)
        assert a["keys"] == b["keys"] and torch.equal(a["tokens"], b["tokens"]) and torch.equal(a["seeds"], b["seeds"])


def test_same_batches_and_each_shard_fetched_once(server: ObjectServer, local: Path, tmp_path: Path) -> None:
    url = server.url("bucket/tokens")
    assert_same_epoch(open_loader(url, tmp_path / "cache"), open_loader(local, tmp_path / "cache"))
    assert fetched(server) == {f"train-{shard:06d}.tar": 1 for shard in range(len(LENGTHS))}
    server.requests.clear()
    again = open_loader(url, tmp_path / "cache")
    assert_same_epoch(again, open_loader(local, tmp_path / "cache"))
    assert server.requests and not fetched(server), "a node that comes back finds its cache"
    assert not [line for line in server.requests if "index" in line]


def test_the_bound_holds(server: ObjectServer, local: Path, tmp_path: Path) -> None:
    """Room for the shards of one block and a half, so that shards go and come back."""
    bound = 3 * SHARD_BYTES + 4096
    loader = open_loader(server.url("bucket/tokens"), tmp_path / "cache", bound)
    reference = open_loader(local, tmp_path / "local")
    for step in range(3 * len(loader) // 4):
        assert torch.equal(loader.batch(step)["tokens"], reference.batch(step)["tokens"])
        assert NodeCache(tmp_path / "cache", bound).used_bytes() <= bound
    assert sum(fetched(server).values()) > len(LENGTHS)


def test_too_small_a_cache_is_refused(server: ObjectServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_bytes = 21000 is less than the 22016 bytes of .* largest 2 shards"):
        open_loader(server.url("bucket/tokens"), tmp_path / "cache", 21_000)
    assert len(open_loader(server.url("bucket/tokens"), tmp_path / "cache", 21_000, shards_per_block=1)) == 24


def test_shards_come_before_they_are_used_and_in_order(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "_FETCH_THREADS", 1)
    loader = open_loader(server.url("bucket/tokens"), tmp_path / "cache", batch_size=1)
    loader._plan_reading(0)
    wait_until(lambda: len(list((tmp_path / "cache").glob("*/*.tar"))) == 4)
    time.sleep(0.1)
    planned = loader._order.shards_ahead(0, 2)
    assert [len(block) for block in planned] == [2, 2]
    assert list(fetched(server)) == [f"train-{shard:06d}.tar" for block in planned for shard in block]


def test_a_short_answer_is_asked_for_again(server: ObjectServer, local: Path, tmp_path: Path) -> None:
    server.inject(Fault(kind="short", method="GET", target="*.tar", times=3))
    assert_same_epoch(
        open_loader(server.url("bucket/tokens"), tmp_path / "cache"), open_loader(local, tmp_path / "local")
    )
    assert server.met["short"] == 3


def test_wrong_bytes_are_never_read(server: ObjectServer, local: Path, tmp_path: Path) -> None:
    """Of the right length, but for one bit of one payload; in the end it is good again."""
    good = shard_path(local, 2).read_bytes()
    bad = bytearray(good)
    bad[640] ^= 1  # the first payload's first byte: after its header and that of .npy
    for step in range(7):
        server.client.put_object(Bucket="bucket", Key="tokens/shards/train-000002.tar", Body=bytes(bad))
        loader = open_loader(server.url("bucket/tokens"), tmp_path / "cache")
        try:
            loader.batch(step)
        except DatasetError as error:
            assert "train-000002.tar: the bytes of sample 00005 are not those that were committed, 3 times over" in str(
                error
            )
            break
    else:
        raise AssertionError("a damaged shard was read")
    server.client.put_object(Bucket="bucket", Key="tokens/shards/train-000002.tar", Body=good)
    assert torch.equal(loader.batch(step)["tokens"], open_loader(local, tmp_path / "local").batch(step)["tokens"])


def test_a_dataset_that_changes_under_a_run(server: ObjectServer, local: Path, tmp_path: Path) -> None:
    loader = open_loader(server.url("bucket/tokens"), tmp_path / "cache", shards_per_block=8, batch_size=24)
    other = make_token_dataset(tmp_path / "other", [[9, 2, 5], *LENGTHS[1:]])
    server.client.put_object(
        Bucket="bucket", Key="tokens/index/000000.parquet", Body=(other / "index/000000.parquet").read_bytes()
    )
    with pytest.raises(DatasetError, match="changed while it is being read"):
        loader.batch(0)
    with pytest.raises(DatasetError, match=r"not those that dataset.json sums up"):
        open_loader(server.url("bucket/tokens"), tmp_path / "another")


def test_a_cached_shard_that_was_cut_is_fetched_again(server: ObjectServer, local: Path, tmp_path: Path) -> None:
    url = server.url("bucket/tokens")
    assert_same_epoch(open_loader(url, tmp_path / "cache"), open_loader(local, tmp_path / "local"))
    for path in (tmp_path / "cache").glob("*/*.tar"):
        os.truncate(path, 700)
    assert_same_epoch(open_loader(url, tmp_path / "cache"), open_loader(local, tmp_path / "local"))


def test_workers_share_the_work(server: ObjectServer, tmp_path: Path) -> None:
    """Two processes read the same epoch at the same time: every shard comes once, and both read the same."""
    program = (
        "import sys, hashlib\nfrom pathlib import Path\nfrom tests.pipeline.test_shard_files import open_loader\n"
        "loader = open_loader(sys.argv[1], Path(sys.argv[2]))\n"
        "tokens = b''.join(loader.batch(step)['tokens'].numpy().tobytes() for step in range(6))\n"
        "print(hashlib.sha256(tokens).hexdigest())\n"
    )
    command = [sys.executable, "-c", program, server.url("bucket/tokens"), str(tmp_path / "cache")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert len(outputs[0]) == 65 and outputs[0] == outputs[1]
    assert set(fetched(server).values()) == {1} and len(fetched(server)) == len(LENGTHS)


def test_cache_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_bytes = 0: must be 1 or more"):
        CacheConfig(max_bytes=0)
    config = replace(LoaderConfig(), cache=CacheConfig(folder=tmp_path / "here"))
    assert config.cache.open().folder == tmp_path / "here"

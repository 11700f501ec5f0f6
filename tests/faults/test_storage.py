"""An object store that fails: corpus and dataset in it, with 500, 503, resets, silence and half bodies at a seeded rate."""

from __future__ import annotations

import io
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.faults.cases import ALWAYS, MODES, files_of, shard_of
from tests.faults.command import run
from tests.object_server import Fault, ObjectServer, serve_objects

_MAX_RUNS = 8
_OUR_OWN = ("config.json",)


class Bucket:
    """The corpus in a store, and what an unbroken run makes of it, by mode."""

    def __init__(self, server: ObjectServer, corpus: Path, folder: Path, address: str) -> None:
        self.server, self._folder, self._address = server, folder, address
        self._name = server.make_bucket("faults")
        for path in sorted(corpus.iterdir()):
            server.client.put_object(Bucket=self._name, Key=f"corpus/{path.name}", Body=path.read_bytes())
        self.corpus = server.url(f"{self._name}/corpus")
        self._files: dict[str, dict[str, bytes]] = {}

    def unbroken(self, mode: str) -> dict[str, bytes]:
        if mode not in self._files:
            self.server.heal()
            out = self._folder / mode
            words = ("shard", self.corpus, out, *MODES[mode], *ALWAYS)
            assert run(*words, cwd=self._folder / f"{mode}-logs", address=self._address)["committed"] > 5
            self._files[mode] = files_of(out)
        return self._files[mode]

    def out(self, name: str) -> str:
        return self.server.url(f"{self._name}/{name}")

    def files(self, name: str) -> dict[str, bytes]:
        """The dataset at `out(name)`, as `files_of` gives it of a local one."""
        found = {
            key.removeprefix(f"{name}/"): data
            for key, data in self.server.objects(self._name).items()
            if key.startswith(f"{name}/")
        }
        return {key: data for key, data in found.items() if key not in _OUR_OWN}


@pytest.fixture(scope="module")
def bucket(fault_corpus: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with serve_objects() as server:
        yield Bucket(server, fault_corpus, tmp_path_factory.mktemp("bucket"), cluster)


def faults(rate: float, stall_s: float = 1.0) -> list[Fault]:
    """Of all requests, `rate` fail, each of six ways as often as the others."""
    shares = [rate / 6 / (1 - number * rate / 6) for number in range(6)]  # a later one meets what the earlier ones left
    return [
        Fault(kind="status", status=500, share=shares[0]),
        Fault(kind="status", status=503, share=shares[1]),
        Fault(kind="lost", status=500, share=shares[2]),
        Fault(kind="reset", share=shares[3]),
        Fault(kind="stall", stall_s=stall_s, share=shares[4]),
        Fault(kind="short", method="GET", share=shares[5]),
    ]


def test_a_store_that_fails_now_and_then(seed: int, bucket: Bucket, cluster: str, tmp_path: Path) -> None:
    draw = random.Random(f"store {seed}")
    mode, rate = draw.choice(list(MODES)), draw.choice([0.05, 0.1, 0.2])
    whole = bucket.unbroken(mode)
    is_remote = draw.random() < 0.7
    name = f"out{seed}"
    out = bucket.out(name) if is_remote else str(tmp_path / "out")
    words = ("shard", bucket.corpus, out, *MODES[mode], *ALWAYS)

    def files() -> dict[str, bytes]:
        return bucket.files(name) if is_remote else files_of(tmp_path / "out")

    met: Counter[str] = Counter()
    for shard_of_runs in range(1, _MAX_RUNS + 1):
        bucket.server.heal(seed + 1000 * shard_of_runs)
        if shard_of_runs < _MAX_RUNS:
            bucket.server.inject(*faults(rate))
        result = run(*words, cwd=tmp_path, address=cluster, expect=None)
        met += bucket.server.met
        bucket.server.heal()  # for our own reading
        _check_believed(files(), whole)
        if result["exit_code"] == 0:
            break
        assert result["exit_code"] == 1 and "failed 5 times" in result["error"], result
    lost = result["rejected_by_class"].get("storage", 0)
    print(
        f"store, {mode}, seed {seed}: {rate:.0%} of requests, {dict(met)}; {shard_of_runs} runs, {lost} rejects of class storage"
    )
    bucket.server.heal()
    if lost:
        result = run(*words, "--retry-rejects", "storage", cwd=tmp_path, address=cluster)
    assert "storage" not in result["rejected_by_class"]
    ours = files()
    different = [
        one for one in sorted(ours.keys() | whole.keys()) if not _is_same(ours.get(one), whole.get(one), one, lost)
    ]
    assert not different, f"not as an unbroken run leaves it: {different}"
    assert run("verify", out, cwd=tmp_path / "verify")["num_problems"] == 0


def test_a_store_that_is_gone(seed: int, bucket: Bucket, cluster: str, tmp_path: Path) -> None:
    """It goes at a seeded request, for good: the job ends with a word about it; when it is back, the job goes on."""
    draw = random.Random(f"gone {seed}")
    whole = bucket.unbroken("copy")
    name = f"gone{seed}"
    out = bucket.out(name)
    words = ("shard", bucket.corpus, out, *MODES["copy"], *ALWAYS)
    target = draw.choice(["/faults/*", f"/faults/{name}*", f"/faults/{name}/index/*", f"/faults/{name}/shards/*"])
    bucket.server.heal()
    bucket.server.inject(draw.choice([Fault(kind="status", target=target), Fault(kind="reset", target=target)]))
    started_s = time.monotonic()
    result = run(*words, cwd=tmp_path, address=cluster, expect=1)
    elapsed_s = time.monotonic() - started_s
    print(f"gone, seed {seed}: {target}, {elapsed_s:.0f} s: {result['error']}")
    assert elapsed_s < 90
    assert "failed 5 times" in result["error"] and "s3://faults/" in result["error"]
    bucket.server.heal()
    _check_believed(bucket.files(name), whole)
    run(*words, cwd=tmp_path, address=cluster)
    assert bucket.files(name) == whole


def _check_believed(ours: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """A shard that a reader believes is the unbroken run's, but for what the storage kept from it; it has its tar."""
    for index in (name for name in ours if name.startswith("index/")):
        tars = {name for name in ours if name.startswith("shards/") and shard_of(name) == shard_of(index)}
        assert tars, f"{index} without its tars"
        if ours[index] == whole[index]:
            expected = {name for name in whole if name.startswith("shards/") and shard_of(name) == shard_of(index)}
            assert tars == expected and all(ours[name] == whole[name] for name in tars), index
        else:
            assert b"storage" in ours[index], index


def _is_same(ours: bytes | None, whole: bytes | None, name: str, was_retried: int) -> bool:
    if was_retried and ours and whole and name.startswith("rejects/"):
        return _rows(ours) == _rows(whole)
    return ours == whole


def _rows(rejects: bytes) -> list[dict[str, object]]:
    """Without the number of attempts: what was retried has been tried more often."""
    return [{**row, "attempts": 0} for row in pq.read_table(io.BytesIO(rejects)).to_pylist()]

"""Three hosts with addresses of their own (network namespaces on one bridge) and a shared folder: a head and two that work, one
of which is cut off from the network in each stage. Nothing is lost, and nothing is there twice."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.checkpoint import list_checkpoints, read_cursor
from jobs.config import save_config
from jobs.journal import read_journal
from jobs.workers import WorkersConfig
from tests.e2e.training import make_config, make_tokens
from tests.faults.cases import check_same, check_subset
from tests.faults.conftest import Unbroken
from tests.faults.kills import TITLES

_NET = "10.231.77"
_ENV = {
    "RAY_AUTH_MODE": "disabled",
    # A host that is silent for so long is dead: five checks, by default 3 s apart.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_initial_delay_ms": "2000",
    # A connection on which nothing answers is broken, and what ran at its other end is done again; by default after minutes.
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}


class Hosts:
    """Host 1 is the head, without CPUs, where drivers run; the others have two CPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tag = f"tr{os.getpid() % 10000}"
        self._rays: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        _ip("link", "add", self._tag, "type", "bridge")
        _ip("addr", "add", f"{_NET}.254/24", "dev", self._tag)
        _ip("link", "set", self._tag, "up")
        for host in (1, 2, 3):
            self._connect(host)
        self._ray(
            1, "--head", "--num-cpus=0", "--port=6379", f"--temp-dir={self.folder}/ray", "--include-dashboard=false"
        )
        for host in (2, 3):
            self.join(host)

    def join(self, host: int) -> None:
        """Start Ray on a host, or start it anew on one whose network was cut."""
        if host in self._rays:
            self._end(host)
            _ip("link", "set", f"{self._tag}h{host}", "up")
        self._ray(host, f"--address={_NET}.1:6379", "--num-cpus=2")
        self.wait_for_nodes({f"{_NET}.{other}" for other in self._rays})

    def cut(self, host: int) -> None:
        """Nothing reaches the host or leaves it any more; its processes and its view of the shared folder stay."""
        _ip("link", "set", f"{self._tag}h{host}", "down")

    def work_of(self, host: int) -> list[str]:
        """What Ray calls the processes of a host that hold a shard or decode now."""
        titles = []
        for pid in _ip("netns", "pids", f"{self._tag}n{host}").split():
            with contextlib.suppress(psutil.Error):
                titles.append(psutil.Process(int(pid)).cmdline()[0].strip())
        return sorted(title for title in titles if any(name in title for name in TITLES.values()))

    def popen(self, host: int, words: list[object], log: Path, **env: str) -> subprocess.Popen[bytes]:
        """A Python program on a host."""
        environment = {**os.environ, **_ENV, "RAY_TMPDIR": str(self.folder), "RAY_ADDRESS": f"{_NET}.1:6379", **env}
        command = ["ip", "netns", "exec", f"{self._tag}n{host}", sys.executable, *map(str, words)]
        with log.open("ab") as file:
            return subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, cwd=log.parent, start_new_session=True
            )

    def alive(self) -> set[str]:
        """Addresses of the nodes that the head believes alive."""
        program = "import json, ray; ray.init(logging_level='ERROR'); print(json.dumps([n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']]))"
        done = subprocess.run(
            ["ip", "netns", "exec", f"{self._tag}n1", sys.executable, "-c", program],
            env={**os.environ, **_ENV, "RAY_TMPDIR": str(self.folder), "RAY_ADDRESS": f"{_NET}.1:6379"},
            capture_output=True, text=True, timeout=90,
        )  # fmt: skip
        return set(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else set()

    def wait_for_nodes(self, wanted: set[str]) -> None:
        deadline = time.monotonic() + 120
        while (alive := self.alive()) != wanted:
            assert time.monotonic() < deadline, f"alive: {alive}, wanted: {wanted}\n{self._said()}"
            time.sleep(0.5)

    def stop(self) -> None:
        for host in list(self._rays):
            self._end(host)
        for host in (1, 2, 3):
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in _ip("netns", "pids", f"{self._tag}n{host}").split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                _ip("netns", "del", f"{self._tag}n{host}")
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._tag)

    def _connect(self, host: int) -> None:
        space, inner, outer = f"{self._tag}n{host}", f"{self._tag}p{host}", f"{self._tag}h{host}"
        _ip("netns", "add", space)
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("link", "set", inner, "netns", space)
        _ip("link", "set", outer, "master", self._tag)
        _ip("link", "set", outer, "up")
        for words in (
            ("addr", "add", f"{_NET}.{host}/24", "dev", inner),
            ("link", "set", inner, "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "via", f"{_NET}.254"),  # by it programs find their own address
        ):
            _ip("-n", space, *words)

    def _ray(self, host: int, *words: str) -> None:
        common = [
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--disable-usage-stats",
            f"--node-ip-address={_NET}.{host}",
        ]
        self._rays[host] = self.popen(host, [*common, *words], self.folder / f"ray{host}.log")

    def _end(self, host: int) -> None:
        process = self._rays.pop(host)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for pid in _ip("netns", "pids", f"{self._tag}n{host}").split() if host != 1 else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        process.kill()
        process.wait()

    def _said(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("ray*.log")))


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def _can_make_hosts() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    made = subprocess.run(["ip", "netns", "add", "trprobe"], capture_output=True)
    subprocess.run(["ip", "netns", "del", "trprobe"], capture_output=True)
    return made.returncode == 0


@pytest.fixture(scope="module")
def hosts(only_in_make_faults: None) -> Iterator[Hosts]:
    if not _can_make_hosts():
        pytest.skip("needs root and ip (iproute2), to make network namespaces")
    with tempfile.TemporaryDirectory(prefix="tr", ignore_cleanup_errors=True) as folder:
        own = Hosts(Path(folder))
        try:
            own.start()
            yield own
        finally:
            own.stop()


class Job:
    """`tokenreel ...` on the head."""

    def __init__(self, hosts: Hosts, words: tuple[object, ...], folder: Path) -> None:
        self._log = folder / "job.log"
        store = f"sqlite:///{folder}/mlflow.db"
        self._process = hosts.popen(1, ["-m", "jobs", *words], self._log, MLFLOW_TRACKING_URI=store)

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, what: str, happened: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 150
        while not happened():
            assert self._process.poll() is None, f"it ended before {what}:\n{self.said[-3000:]}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.said[-3000:]}"
            time.sleep(0.02)

    def end(self) -> dict[str, Any]:
        try:
            assert self._process.wait(280) == 0, self.said[-4000:]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end:\n{self.said[-4000:]}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        result: dict[str, Any] = json.loads(self.said.splitlines()[-1])
        return result


@pytest.mark.parametrize("mode", ["transcode", "tokens-of-copy"])
def test_a_host_is_cut_off_from_a_data_job(
    only_in_make_faults: None, hosts: Hosts, unbroken: Unbroken, tmp_path: Path, mode: str
) -> None:
    whole, out = unbroken[mode], tmp_path / "out"
    began = time.monotonic()
    job = Job(hosts, unbroken.words(mode, out), tmp_path)
    job.wait_for("a shard", lambda: any((out / "index").glob("[!.]*.parquet")))
    job.wait_for("work on the host that is cut off", lambda: hosts.work_of(3))
    work = hosts.work_of(3)
    hosts.cut(3)
    cut_s = time.monotonic()
    left = check_subset(out, whole)
    job.end()
    print(
        f"{mode}: a host cut off {cut_s - began:.0f} s after the start, with {left} shards done and while it ran {work}; "
        f"done {time.monotonic() - cut_s:.0f} s later"
    )
    check_same(out, whole)
    hosts.join(3)
    check_same(out, whole)  # what still ran on the cut-off host has changed nothing since


def test_a_host_is_cut_off_from_a_training_run(only_in_make_faults: None, hosts: Hosts, tmp_path: Path) -> None:
    steps, tokens = 150, make_tokens(tmp_path / "tokens")
    elastic = WorkersConfig(num_workers=4, min_workers=2)
    config = make_config(tokens, tmp_path / "run", elastic, layers=8, steps=steps, save_every_steps=20)
    journal = config.out / "metrics.jsonl"
    began = time.monotonic()
    words = ("pretrain", "debug", "--config", save_config(tmp_path / "config", config))
    job = Job(hosts, words, tmp_path)
    job.wait_for("a checkpoint of four workers", lambda: list_checkpoints(config.out) and _steps(journal, 4))
    hosts.cut(3)
    reached, cut_s = _steps(journal, 4)[-1], time.monotonic()
    job.wait_for("a step of two workers", lambda: _steps(journal, 2))
    again_s = time.monotonic()
    result = job.end()
    print(
        f"pretrain: a host cut off {cut_s - began:.0f} s after the start, after step {reached}; two workers go on after step "
        f"{_steps(journal, 2)[0] - 1} {again_s - cut_s:.0f} s later"
    )
    assert result["committed"] == steps
    rows = list(read_journal(journal))
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), "a step is missing, or there twice"
    assert _steps(journal, 2)[-1] == steps
    hosts.join(3)

    alone = make_config(
        tokens, tmp_path / "alone", WorkersConfig(num_workers=2), layers=8, steps=steps, save_every_steps=20
    )
    Job(hosts, ("pretrain", "debug", "--config", save_config(tmp_path / "config-alone", alone)), tmp_path).end()
    digests = [read_cursor(list_checkpoints(one.out)[-1]).keys_digest for one in (config, alone)]
    assert digests[0] == digests[1] == result["keys_digest"], "other samples, or another order"


def _steps(journal: Path, num_workers: int) -> list[int]:
    return [row["step"] for row in read_journal(journal) if row["num_workers"] == num_workers]

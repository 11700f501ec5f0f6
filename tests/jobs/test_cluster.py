"""Which cluster a job joins, and what it says of one that is not there or has no room."""

from __future__ import annotations

import http.server
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from jobs import cluster as cluster_module
from jobs.cluster import _find_cluster
from pipeline.errors import ConfigError, TokenreelError
from tests.conftest import Stages


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "_ANSWER_S", 0.5)
    monkeypatch.setattr(cluster_module, "_GREETING_S", 0.5)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def web_port() -> Iterator[int]:
    """Something that answers, such as Ray's dashboard, and is no head."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://head:8265", ["tokenreel submit JOB ... --address http://head:8265", "HOST:PORT"]),
        ("head", ["head:6379"]),
        ("head:port", ["head:6379"]),
    ],
)
def test_what_is_no_address_of_a_cluster_is_a_usage_error(
    address: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError) as caught:
        _find_cluster()
    for word in [address, *words]:
        assert word in str(caught.value)


def test_a_stale_address_is_said_to_be_waited_for_and_then_refused(
    closed_port: int, impatient: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    started_s = time.monotonic()
    with caplog.at_level(logging.INFO), pytest.raises(TokenreelError, match="RAY_ADDRESS=local") as caught:
        _find_cluster()
    assert time.monotonic() - started_s < 5 and f"127.0.0.1:{closed_port}" in str(caught.value)
    assert len(caplog.records) == 1 and "up to 0.5 s" in caplog.text


def test_what_answers_and_is_no_ray_is_refused(web_port: int, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{web_port}")
    with pytest.raises(TokenreelError, match=r"no gRPC server|timed out"):
        _find_cluster()


def test_the_cluster_that_ray_start_left_is_named(
    cluster: str,
    closed_port: int,
    impatient: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    note = tmp_path / "ray" / "ray_current_cluster"
    note.parent.mkdir()
    with caplog.at_level(logging.INFO):
        assert _find_cluster() == ""
        assert "starting a local Ray" in caplog.text
        note.write_text(cluster)
        assert _find_cluster() == cluster
        assert f"joining the Ray cluster at {cluster} (left by `ray start`" in caplog.text
    note.write_text(f"127.0.0.1:{closed_port}")
    with pytest.raises(TokenreelError, match=r"left by `ray start`.*RAY_ADDRESS=local"):
        _find_cluster()


def test_a_folder_too_deep_for_rays_sockets(tmp_path: Path) -> None:
    code = "from jobs.cluster import connect\nwith connect(): pass"
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path / ("x" * 90)), "RAY_ADDRESS": "local"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "ConfigError: RAY_TMPDIR" in done.stderr and "/tmp/ray-$USER" in done.stderr


def test_a_cluster_without_room_is_waited_for_aloud(stages: Stages, cluster: str, tmp_path: Path) -> None:
    from jobs.config import to_text
    from tests.conftest import small_pretrain_config

    holder = ray.remote(num_cpus=2)(type("Holder", (), {"ping": lambda self: True})).remote()
    ray.get(holder.ping.remote())
    saved = tmp_path / "config.json"
    saved.write_text(to_text(small_pretrain_config(stages.tokens, tmp_path / "run")))
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    words = [sys.executable, "-m", "jobs", "pretrain", "--config", str(saved)]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "waiting for" in line:
            ray.kill(holder)
    assert process.wait() == 0, said
    (waiting,) = [line for line in said if "waiting for" in line]
    assert "pretrain: waiting for 2 CPUs, of which the cluster has 2, 0 of them free" in waiting
    assert any("the cluster has room after" in line for line in said)

"""A Ray head with dashboard and job server, as processes of their own, in a folder where no other job finds it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Head:
    """url: of the job server. gcs: what `ray start --address` takes. folder: Ray's own, with its logs."""

    url: str
    gcs: str
    folder: Path
    metrics_port: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started_head(num_cpus: int = 2, env: dict[str, str] | None = None) -> Iterator[Head]:
    """The head for the body, in the environment `env` beside this process's; then it and all its processes are gone."""
    with tempfile.TemporaryDirectory(prefix="tr", ignore_cleanup_errors=True) as folder:
        ports = [free_port() for _ in range(3)]
        words = [
            "start",
            "--head",
            "--block",
            f"--num-cpus={num_cpus}",
            f"--port={ports[0]}",
            "--node-ip-address=127.0.0.1",
        ]
        words += [f"--dashboard-port={ports[1]}", f"--metrics-export-port={ports[2]}", f"--temp-dir={folder}/ray"]
        words += ["--disable-usage-stats", "--include-dashboard=true"]
        # Its folder is an option, so nothing is noted where others look: RAY_TMPDIR is for that note.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs start `python`
        # Where a home folder holds a token, Ray would ask for it.
        environment = {**os.environ, "PATH": path, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", **(env or {})}
        environment.pop("RAY_ADDRESS", None)
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", *words],
                env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True,
            )  # fmt: skip
        url = f"http://127.0.0.1:{ports[1]}"
        try:
            deadline = time.monotonic() + 90
            while not _answers(url):
                said = (Path(folder) / "log").read_text()
                assert process.poll() is None and time.monotonic() < deadline, f"no head:\n{said[-3000:]}"
                time.sleep(0.2)
            yield Head(url=url, gcs=f"127.0.0.1:{ports[0]}", folder=Path(folder), metrics_port=ports[2])
        finally:
            process.send_signal(signal.SIGTERM)  # it ends what it started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=2):
            return True
    except urllib.error.HTTPError:
        return True  # it asks for a token
    except OSError:
        return False

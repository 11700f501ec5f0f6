"""MLflow's own pages on the runs of this working directory."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from dataclasses import dataclass

from jobs.mlflow_store import redact_uri, resolve_tracking_uri
from jobs.result import JobResult
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class UiConfig:
    """Where the pages are served."""

    port: int = 5000
    """TCP port, 1 to 65535."""
    host: str = "127.0.0.1"
    """Address to listen at. The pages have no login: anything but loopback shows them to the network."""

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be 1 to 65535")


def run(config: UiConfig) -> JobResult:
    """Serve MLflow's pages until Ctrl-C, or name the server's address where MLFLOW_TRACKING_URI is one.

    Raises:
        ConfigError: the port is in use or the host is not this machine's.
    """
    uri = resolve_tracking_uri()
    if uri.startswith(("http://", "https://")):
        log.info(f"runs are at {redact_uri(uri)} (MLFLOW_TRACKING_URI)")
        return JobResult(job="ui", out="", figures={"url": redact_uri(uri)})
    _check_port(config)
    url = f"http://{config.host}:{config.port}"
    log.info(f"runs of {redact_uri(uri)} are at {url}; Ctrl-C ends it")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--host",
        config.host,
        "--port",
        str(config.port),
        "--workers",
        "1",
    ]
    # The URI may hold a password, which every user of the machine could read in a command line.
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = 0
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
    return JobResult(job="ui", out="", status="done" if code == 0 else "failed", figures={"url": url})


def _check_port(config: UiConfig) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just freed is free
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot serve at {config.host} port {config.port}: {error.strerror}; choose a free one with --port"
        ) from error

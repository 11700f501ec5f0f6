"""Ray as the jobs use it: the cluster that RAY_ADDRESS names, or a local one for the time of the job."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from jobs.stopping import begin_ending, kept_handlers, shielded_children, was_stopped
from pipeline.errors import ConfigError, TokenreelError

log = logging.getLogger(__name__)

_ANSWER_S = 20.0
_SHORT_TMPDIR = "/tmp/ray-$USER"
_GREETING_S = 5.0

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # What ran on a node that the network lost is done again once its connection is found dead: within a minute and a half,
    # where Ray takes seven. Ray's servers refuse who asks more often than once a minute, unless they are told the same.
    "RAY_grpc_client_keepalive_time_ms": "65000",
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
}


def prepare_environment() -> None:
    """What Ray shall find set, where nobody has set it otherwise; before Ray is imported, as it reads some of it then."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def connect() -> Iterator[None]:
    """A Ray connection for the body. One that exists is used and left alone, so jobs can share a cluster.

    Raises:
        ConfigError: RAY_ADDRESS is not the address of a cluster.
        TokenreelError: no cluster answers there.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    address = _find_cluster()
    # Ray lets workers import from the driver's folder before anything else, and people have folders named models or jobs;
    # from our own packages' folder there is nothing to mistake. What workers log stays in Ray's session folder: errors
    # travel in exceptions, and progress in journals.
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_handlers())
        stack.enter_context(contextlib.chdir(Path(__file__).resolve().parent.parent))
        if not address:
            stack.enter_context(_local_token())
            stack.enter_context(shielded_children())
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        except OSError as error:
            if "AF_UNIX" not in str(error):
                raise
            raise ConfigError(
                f"RAY_TMPDIR = {os.environ.get('RAY_TMPDIR')}: too long a path for Ray's sockets, whose whole names may have 107 "
                f"bytes; set it to a short one, such as {_SHORT_TMPDIR}"
            ) from error
    resources = ray.cluster_resources()
    log.info("Ray: %g CPUs, %g GPUs", resources.get("CPU", 0), resources.get("GPU", 0))
    try:
        yield
    finally:
        if was_stopped():
            begin_ending()  # the job's books come first, and Ray ends with this process
        else:
            own = _own_processes()
            ray.shutdown()
            _kill(own)


def end_children() -> None:
    """Kill all that this process started. Ray, which may be half started or half gone, is not asked to help."""
    _kill(psutil.Process().children(recursive=True))


def _own_processes() -> list[psutil.Process]:
    """All processes of the Ray that this one started."""
    from ray._private import worker

    kinds: dict[str, list[Any]] = worker._global_node.all_processes if worker._global_node else {}
    own = []
    for info in itertools.chain(*kinds.values()):
        info.process.terminate = info.process.kill  # shielded from SIGTERM, by which Ray would end them, and wait
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(info.process.pid)
            own += [process, *process.children(recursive=True)]
    return own


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:  # all: what a killed raylet started would live on for a minute
        with contextlib.suppress(psutil.Error):
            process.kill()


def _find_cluster() -> str:
    """Address of the cluster that `ray.init` will join, which answers; empty where it will start one. Says which it is."""
    from ray._private.services import find_bootstrap_address

    address, source = os.environ.get("RAY_ADDRESS", ""), "RAY_ADDRESS"
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS = {address} is the address of a job server, for `tokenreel submit JOB ... --address {address}`. To run "
            "the job from here, on a node of the cluster, give HOST:PORT of Ray's head (6379 by default), or unset RAY_ADDRESS "
            "for a Ray of its own"
        )
    if address in ("", "auto"):
        address, source = (
            find_bootstrap_address(None) or "",
            "left by `ray start`; RAY_ADDRESS=local starts one instead",
        )
    if address in ("", "local"):
        log.info("starting a local Ray for this job: seconds, up to half a minute on a slow machine")
        return ""
    _wait_for_answer(address, source)
    log.info("joining the Ray cluster at %s (%s)", address, source)
    return address


def _wait_for_answer(address: str, source: str) -> None:
    """Return when a gRPC server answers at `address`. Ray's own attempts at one that is gone take minutes.

    Raises:
        ConfigError: it is no HOST:PORT.
        TokenreelError: nothing answered in time.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"RAY_ADDRESS = {address}: give HOST:PORT of Ray's head, such as head:6379, or local")
    deadline_s, is_told = time.monotonic() + _ANSWER_S, False
    while True:
        try:
            _greet(host.strip("[]"), int(port))
            return
        except OSError as error:
            trouble = str(error)
        if not is_told:
            log.info("no Ray answers at %s (%s): %s; waiting for it, up to %g s", address, source, trouble, _ANSWER_S)
            is_told = True
        if time.monotonic() > deadline_s:
            raise TokenreelError(
                f"no Ray cluster answers at {address} ({source}): {trouble}. Start it (ray start --head), correct RAY_ADDRESS, or "
                "set RAY_ADDRESS=local for a Ray of this job's own"
            )
        time.sleep(1.0)


def _greet(host: str, port: int) -> None:
    """Connect and exchange HTTP/2 greetings, which every gRPC server answers at once; OSError where that fails."""
    with socket.create_connection((host, port), timeout=_GREETING_S) as connection:
        if os.environ.get("RAY_USE_TLS") == "1":
            return  # that somebody listens is all that can be asked in plain words
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        head = connection.recv(9, socket.MSG_WAITALL)
    if len(head) < 9 or head[3] != 4:  # a SETTINGS frame
        raise OSError("what answers there is no gRPC server")


@contextlib.contextmanager
def _local_token() -> Iterator[None]:
    """A Ray that is started in the body gets a token that nobody else knows.

    Ray 2.60 protects it so by itself, but keeps the token in the home folder, which a user may not be able to write, and
    warns that it does.
    """
    notices = logging.getLogger("ray._private.authentication.authentication_token_setup")
    level = notices.level
    notices.setLevel(logging.ERROR)
    if not any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
    try:
        yield
    finally:
        notices.setLevel(level)


def count(resource: str) -> float:
    """How much of "CPU" or "GPU" the connected cluster has."""
    import ray

    return float(ray.cluster_resources().get(resource, 0.0))


def place_models(wanted: int) -> tuple[int, dict[str, float]]:
    """How many models work side by side on the connected cluster, and the Ray resources of each: a GPU, if there are any.

    Models on CPUs reserve none, so that decoding can use what they leave, and none is idle while there is work.

    Args:
        wanted: 0 for as many as there are GPUs or, without any, CPUs.
    """
    gpus, cpus = int(count("GPU")), int(count("CPU"))
    if gpus:
        return wanted or gpus, {"num_gpus": 1, "num_cpus": 0}
    return wanted or max(1, cpus), {"num_cpus": 0}

"""Ray as the jobs use it: the cluster that RAY_ADDRESS names, or a local one for the time of the job."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


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
    """A Ray connection for the body. One that exists is used and left alone, so jobs can share a cluster."""
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray lets workers import from the driver's folder before anything else, and people have folders named models or jobs;
    # from our own packages' folder there is nothing to mistake. What workers log stays in Ray's session folder: errors
    # travel in exceptions, and progress in journals.
    with contextlib.chdir(Path(__file__).resolve().parent.parent):
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    resources = ray.cluster_resources()
    log.info("Ray: %g CPUs, %g GPUs", resources.get("CPU", 0), resources.get("GPU", 0))
    try:
        yield
    finally:
        ray.shutdown()


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

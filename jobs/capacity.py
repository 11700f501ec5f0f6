"""Tells a person that a job waits for what other jobs of the cluster hold."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 2.0
_SAY_EVERY_S = 60.0


@contextlib.contextmanager
def report_waiting(job: str, needs: Mapping[str, float], has_begun: Callable[[], bool] | None = None) -> Iterator[None]:
    """Where the connected cluster has less than `needs` free, say so for the body: at once, and each minute until the work begins.

    A Ray that this process started is not looked at: nobody else is there.

    Args:
        needs: "CPU", "GPU": the least with which the work begins.
        has_begun: by default, whether a task that needs as much was run.
    """
    if not needs:
        yield
        return
    from ray._private import worker

    node = worker._global_node
    if (node is not None and node.is_head()) or not (trouble := _shortage(needs)):
        yield
        return
    ended = threading.Event()
    seen = has_begun or _watch_task(needs)

    def watch() -> None:
        started_s = said_s = time.monotonic()
        log.warning(
            "%s: waiting for %s. `ray status` on the head says who has them; the job begins by itself", job, trouble
        )
        while not ended.wait(_LOOK_EVERY_S):
            if seen():
                log.info("%s: the cluster has room after %.0f s", job, time.monotonic() - started_s)
                return
            if time.monotonic() - said_s >= _SAY_EVERY_S:
                said_s = time.monotonic()
                log.warning("%s: waiting for %.0f s: %s", job, said_s - started_s, _shortage(needs) or trouble)

    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _shortage(needs: Mapping[str, float]) -> str:
    """What of `needs` is not free, in words; empty where all is."""
    import ray

    free, total = ray.available_resources(), ray.cluster_resources()
    return " and ".join(
        f"{need:g} {name}s, of which the cluster has {total.get(name, 0):g}, {free.get(name, 0):g} of them free"
        for name, need in needs.items()
        if free.get(name, 0) < need
    )


def _watch_task(needs: Mapping[str, float]) -> Callable[[], bool]:
    import ray

    task = ray.remote(lambda: None).options(num_cpus=needs.get("CPU", 0), num_gpus=needs.get("GPU", 0)).remote()
    return lambda: bool(ray.wait([task], timeout=0)[0])

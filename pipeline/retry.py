"""Bounded retries with backoff, for storage that has a bad moment."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import TransientIO

T = TypeVar("T")
log = logging.getLogger(__name__)

ATTEMPTS = 5
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 8.0


def retry(what: str, call: Callable[[], T]) -> T:
    """What `call` returns, tried up to ATTEMPTS times while it raises `TransientIO`.

    The waits double from 0.5 s, each shortened by a random part, so that a thousand workers that failed together do
    not come back together.

    Raises:
        TransientIO: the last attempt failed too; names `what` and counts the attempts.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except TransientIO as error:
            if attempt == ATTEMPTS:
                raise TransientIO(f"{what}: failed {ATTEMPTS} times, at last: {error}") from error
            delay_s = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            log.warning(f"{what}: {error}; attempt {attempt + 1} of {ATTEMPTS} in {delay_s:.1f} s")
            time.sleep(delay_s)
    raise AssertionError("unreachable")

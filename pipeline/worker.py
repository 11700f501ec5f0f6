"""What a worker tells its driver: how busy it was, and what it warned of."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderUse:
    """Seconds that encoders spent encoding, and from their first to their last batch, summed over them.

    A process that was killed takes its numbers with it.
    """

    busy_s: float = 0.0
    span_s: float = 0.0

    def __add__(self, other: EncoderUse) -> EncoderUse:
        return EncoderUse(busy_s=self.busy_s + other.busy_s, span_s=self.span_s + other.span_s)

    @property
    def wait_share(self) -> float:
        """The share of the time in which an encoder had nothing to encode."""
        return 1 - self.busy_s / self.span_s if self.span_s else 0.0


class BusyClock:
    """Measures how long at least one of several threads is in the body of `with`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._busy_s = self._began_s = self._last_s = 0.0
        self._first_s: float | None = None

    def __enter__(self) -> None:
        with self._lock:
            now = time.monotonic()
            if self._first_s is None:
                self._first_s = now
            if not self._inside:
                self._began_s = now
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._last_s = time.monotonic()
            self._inside -= 1
            if not self._inside:
                self._busy_s += self._last_s - self._began_s

    def use(self) -> EncoderUse:
        """Up to the last time that nobody was inside."""
        if self._first_s is None:
            return EncoderUse()
        return EncoderUse(busy_s=self._busy_s, span_s=self._last_s - self._first_s)


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """What this thread logs as a warning or worse in the body: a worker's log is not the driver's."""
    messages: list[str] = []
    thread = threading.get_ident()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                messages.append(record.getMessage())

    collector = Collector(logging.WARNING)
    logging.getLogger().addHandler(collector)
    try:
        yield messages
    finally:
        logging.getLogger().removeHandler(collector)

"""How a command ends when it is asked to: Ctrl-C, SIGTERM and SIGHUP do the same, whenever and however often they come."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHIELDED = {signal.SIGTERM, signal.SIGHUP}
_RAISE_AGAIN_S = 1.5
_END_WITHIN_S = 25.0
"""Slurm and Kubernetes kill half a minute after they asked."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end. Like Ctrl-C's own exception it passes every `except Exception`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)

    @property
    def signal_name(self) -> str:
        return str(self.args[0])


class _Stopper:
    """The signals of this process. `Stopped` is raised in the main thread until something ends for it; then nothing is."""

    def __init__(self) -> None:
        self.stopped: Stopped | None = None
        self.is_ending = False
        self._is_deferred = False
        self._last_words: Callable[[Stopped], None] = lambda _: None

    def catch(self, last_words: Callable[[Stopped], None]) -> None:
        self._last_words = last_words
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: object) -> None:
        if self.is_ending:
            return
        if self.stopped is None:
            self.stopped = Stopped(number)
            threading.Thread(target=self._see_to_it, args=(number,), name="stopping", daemon=True).start()
        if not self._is_deferred:
            raise self.stopped

    def _see_to_it(self, number: int) -> None:
        """Ends the process where the main thread does not: it waits for what has died, or not even its exception got through, as
        where it was raised in a callback of Python's own."""
        deadline_s = time.monotonic() + _END_WITHIN_S
        while time.monotonic() < deadline_s:
            time.sleep(_RAISE_AGAIN_S)
            if not self.is_ending:
                signal.pthread_kill(threading.main_thread().ident or 0, number)
        assert self.stopped is not None
        self._last_words(self.stopped)
        os._exit(1)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.stopped is not None:
            raise self.stopped


_stopper = _Stopper()


def catch_signals(last_words: Callable[[Stopped], None]) -> None:
    """Answer `SIGNALS` from here on by `Stopped`, but for those that are ignored, as by nohup. In the main thread only.

    Args:
        last_words: called, from another thread, before the process is ended where it does not end in time by itself.
    """
    _stopper.catch(last_words)


def deferred_signals() -> contextlib.AbstractContextManager[None]:
    """Signals in the body raise at its end: a module whose import is broken off may raise anything, or stay half made."""
    return _stopper.deferred()


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Keep others from answering `SIGNALS` in the body and after it.

    `ray.init` answers SIGTERM by `sys.exit` and puts a handler below Python's that prints the stack; Ray Train answers SIGINT so,
    each time that it is sent.
    """
    replace = signal.signal

    def replace_others(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in SIGNALS else replace(number, handler)

    if threading.current_thread() is not threading.main_thread():  # nobody can replace them there
        yield
        return
    signal.signal = replace_others  # type: ignore[assignment]  # there is no other way to stop Ray
    try:
        yield
    finally:
        signal.signal = replace
        for number in SIGNALS:  # once more, over what lies below
            if callable(handler := signal.getsignal(number)):
                signal.signal(number, handler)


@contextlib.contextmanager
def shielded_children() -> Iterator[None]:
    """Processes that this thread starts in the body never get SIGTERM and SIGHUP, as Ray sees to for SIGINT by itself.

    A terminal, `timeout` and Slurm send them to all processes. A driver whose own Ray is gone cannot end in order: Ray ends it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SHIELDED)


def take_sigterm(handler: Callable[[], object]) -> None:
    """Call `handler` for each SIGTERM of this process from here on, shielded or not. In the main thread only."""
    signal.signal(signal.SIGTERM, lambda *_: handler())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def was_stopped() -> bool:
    return _stopper.stopped is not None


def begin_ending() -> Stopped | None:
    """Signals do nothing from here on: the work is done or broken off, and is being put in order. Returns what broke it off, if
    a signal did."""
    _stopper.is_ending = True
    return _stopper.stopped

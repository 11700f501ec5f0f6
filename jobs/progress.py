"""Progress of a job on stderr: a bar at a terminal, a line every 30 s in a log."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from jobs.journal import last_row

log = logging.getLogger(__name__)
_LOG_EVERY_S = 30.0


class Progress:
    """Counts `done` of `total` units, with a few figures (rejects by class, the loss) beside them; use it by `with`."""

    def __init__(self, job: str, unit: str, total: int, done: int = 0) -> None:
        self._job, self._unit, self._total, self.done = job, unit, total, done
        self._started_s = time.monotonic()
        self._first = done
        self._figures: Mapping[str, object] = {}
        self._bar = tqdm(
            total=total, initial=done, unit=unit, desc=job, file=sys.stderr, disable=not sys.stderr.isatty()
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._log_regularly, name="progress-log", daemon=True)

    def __enter__(self) -> Progress:
        if self._bar.disable:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar.disable:
            self._thread.join()
            self._log()
        self._bar.close()

    def note(self, figures: Mapping[str, object]) -> None:
        self._figures = figures
        self._bar.set_postfix(figures, refresh=False)

    def advance(self, units: int) -> None:
        self.done += units
        self._bar.update(units)

    def _log_regularly(self) -> None:
        # By the clock, not by progress: a log that falls silent says nothing about whether the job still lives.
        while not self._ended.wait(_LOG_EVERY_S):
            self._log()

    def _log(self) -> None:
        rate = (self.done - self._first) / max(1e-9, time.monotonic() - self._started_s)
        left = f"{(self._total - self.done) / rate:.0f} s left" if rate else "time left unknown"
        figures = "".join(f", {name} {value}" for name, value in self._figures.items())
        log.info(f"{self._job}: {self.done} of {self._total} {self._unit}, {rate:.3g}/s, {left}{figures}")


@contextlib.contextmanager
def follow(journal: Path, job: str, steps: int) -> Iterator[None]:
    """Show a training run's progress for the body, from the journal that its rank 0 writes."""
    ended = threading.Event()
    row = last_row(journal)
    progress = Progress(job, "steps", steps, int(row["step"]) if row else 0)

    def watch() -> None:
        shown = progress.done
        while True:
            is_last = ended.wait(1.0)
            row = last_row(journal)
            if row and row["step"] > shown:
                progress.note({"loss": f"{float(row['loss']):.4g}"} if "loss" in row else {})
                progress.advance(int(row["step"]) - shown)
                shown = int(row["step"])
            if is_last:
                return

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        with progress:
            yield
    finally:
        ended.set()
        thread.join()

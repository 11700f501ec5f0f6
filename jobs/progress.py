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
    """Counts `done` of `total` units, with a few figures (rejects by class, the loss) beside them."""

    def __init__(self, job: str, unit: str, total: int, done: int = 0) -> None:
        self._job, self._unit, self._total, self.done = job, unit, total, done
        self._started_s = self._logged_s = time.monotonic()
        self._first = done
        self._figures: Mapping[str, object] = {}
        self._bar = tqdm(
            total=total, initial=done, unit=unit, desc=job, file=sys.stderr, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def note(self, figures: Mapping[str, object]) -> None:
        self._figures = figures
        self._bar.set_postfix(figures, refresh=False)

    def advance(self, units: int) -> None:
        self.done += units
        self._bar.update(units)
        now_s = time.monotonic()
        if self._bar.disable and (now_s - self._logged_s >= _LOG_EVERY_S or self.done == self._total):
            self._logged_s = now_s
            rate = (self.done - self._first) / max(1e-9, now_s - self._started_s)
            left_s = (self._total - self.done) / rate if rate else float("inf")
            figures = "".join(f", {name} {value}" for name, value in self._figures.items())
            log.info(
                f"{self._job}: {self.done} of {self._total} {self._unit}, {rate:.3g}/s, {left_s:.0f} s left{figures}"
            )


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

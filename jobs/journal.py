"""Metrics as a local file, one JSON row a step: what a run writes first, and all it ever waits for.

A journal needs no MLflow, so a training worker writes one on a machine that has none. `jobs/tracking.py` reads it in
the driver and copies it to MLflow. Rows look like `{"step": 20, "time_s": 1763719708.1, "loss": 0.31}`; values that
JSON has no number for are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

JOURNAL_NAME = "metrics.jsonl"
_RESERVED = frozenset({"step", "time_s"})
_WARN_EVERY_S = 60.0


class Journal:
    """An append-only `folder/metrics.jsonl` whose steps never go backwards; one writer at a time.

    Opening repairs a half-written last line, so a journal survives `kill -9`. Each row is flushed to the operating
    system, not to the disk: a killed process loses nothing, a power cut may lose the last rows.

    Args:
        folder: made if it is not there.
        name: the file's name; another one for metrics of another source, such as `system.jsonl`.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, name: str = JOURNAL_NAME) -> None:
        self.path = Path(folder) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._warned_s = -math.inf
        self._file: BinaryIO | None = None
        self.last_step = -1
        self._open()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one row; costs microseconds and never raises.

        A row that cannot be written (full disk, a step before the last one, a value that is no number) is dropped with
        a warning, at most one a minute: a run of days is worth more than a row.
        """
        try:
            row: dict[str, Any] = {"step": int(step), "time_s": round(time.time(), 3)}
            for key, value in metrics.items():
                if key in _RESERVED:
                    raise ValueError(f"a metric is named {key!r}, which is a column of the journal itself")
                number = float(value)
                row[key] = number if math.isfinite(number) else str(number)
            line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
            with self._lock:
                if step < self.last_step:
                    raise ValueError(f"step {step} comes after step {self.last_step}; call truncate_after on resume")
                if self._file is None:
                    raise ValueError("the journal is closed")
                self._file.write(line)
                self._file.flush()
                self.last_step = int(step)
        except (OSError, ValueError, TypeError, OverflowError) as error:
            self._warn(f"metrics of step {step} are not in {self.path}: {error}")

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps than `step`, which a resumed run is about to write again.

        The new file replaces the old one whole: a reader sees either. Call it before the first `log` after a restore,
        with the step of the checkpoint; -1 empties the journal.

        Raises:
            OSError: the folder cannot be written; the journal is as it was.
        """
        with self._lock:
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            with temporary.open("wb") as file:
                for row in read_journal(self.path):
                    if row["step"] <= step:
                        file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
            self._open()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        if self._file is not None:
            self._file.close()
        if self.path.exists() and not stat.S_ISREG(self.path.lstat().st_mode):
            raise OSError(errno.EINVAL, "a link or no regular file, so no journal", str(self.path))
        self._file = self.path.open("ab")
        end, self.last_step = _find_end(self.path)
        if end < self._file.tell():
            self._file.truncate(end)

    def _warn(self, message: str) -> None:
        now_s = time.monotonic()
        if now_s - self._warned_s >= _WARN_EVERY_S:
            self._warned_s = now_s
            log.warning(message)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole row of a journal, in file order; a half-written or damaged line is left out, a missing file is empty.

    Values are as in the file: `float(value)` also reads "nan", "inf" and "-inf".
    """
    try:
        with Path(path).open("rb") as file:
            for line in file:
                if (row := parse_row(line)) is not None:
                    yield row
    except FileNotFoundError:
        return


def read_metric(path: Path, name: str) -> Iterator[float]:
    """The values of one metric, row by row; a value that is no number is left out."""
    for row in read_journal(path):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            yield float(row[name])


def last_row(path: Path, tail_bytes: int = 1 << 16) -> dict[str, Any] | None:
    """The newest whole row within the last `tail_bytes` of a journal, or None; costs the same however long it is."""
    try:
        with Path(path).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - tail_bytes))
            rows = (parse_row(line) for line in reversed(file.read().splitlines(keepends=True)))
            return next((row for row in rows if row is not None), None)
    except FileNotFoundError:
        return None


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds, or None where it is not a whole row."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) and math.isfinite(row["time_s"]) else None
    except (ValueError, TypeError, KeyError):
        return None


def _find_end(path: Path, tail_bytes: int = 1 << 16) -> tuple[int, int]:
    """Byte offset just after the last newline of `path`, and the step of the last whole row (-1: none)."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while True:
            start = max(0, size - tail_bytes)
            file.seek(start)
            tail = file.read(size - start)
            end = tail.rfind(b"\n") + 1
            for line in reversed(tail[:end].splitlines(keepends=True)):
                if (row := parse_row(line)) is not None:
                    return start + end, row["step"]
            if start == 0:
                return end, -1
            tail_bytes *= 8  # a row longer than the tail: look further back


class SystemSampler:
    """Writes `folder/system[.NODE].jsonl` from a background thread: CPU, memory, disk, network and, where NVIDIA's
    Python bindings are installed, GPUs. MLflow's "System metrics" page knows these names.

    Args:
        folder: where the journal goes; the disk that it lies on is the one that is measured.
        node: names the machine where a run has several; "" for one.
        interval_s: seconds between samples.
    """

    def __init__(self, folder: Path, *, node: str = "", interval_s: float = 10.0) -> None:
        self._folder = Path(folder)
        self._prefix = f"system/{node}/" if node else "system/"
        self._name = f"system.{node}.jsonl" if node else "system.jsonl"
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tokenreel-system", daemon=True)

    def start(self) -> SystemSampler:
        """Begin sampling and return self; never raises."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End sampling; waits at most a second."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        try:
            import psutil

            process, network = psutil.Process(), psutil.net_io_counters()
            psutil.cpu_percent()  # the first call has nothing to compare with and returns 0
            with Journal(self._folder, self._name) as journal:
                while not self._stop.wait(self._interval_s):
                    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self._folder))
                    metrics = {
                        "cpu_utilization_percentage": psutil.cpu_percent(),
                        "system_memory_usage_megabytes": memory.used / 1e6,
                        "system_memory_usage_percentage": memory.percent,
                        "process_memory_usage_megabytes": process.memory_info().rss / 1e6,
                        "disk_usage_percentage": disk.percent,
                        "disk_usage_megabytes": disk.used / 1e6,
                        "disk_available_megabytes": disk.free / 1e6,
                    }
                    if network is not None and (now := psutil.net_io_counters()) is not None:
                        metrics["network_receive_megabytes"] = (now.bytes_recv - network.bytes_recv) / 1e6
                        metrics["network_transmit_megabytes"] = (now.bytes_sent - network.bytes_sent) / 1e6
                    metrics.update(_sample_gpus())
                    journal.log(journal.last_step + 1, {self._prefix + key: value for key, value in metrics.items()})
        except Exception as error:  # a broken /proc must not end a run
            log.warning(f"system metrics stopped: {error}")


def _sample_gpus() -> dict[str, float]:
    """Use and memory of each NVIDIA GPU of this machine; empty where there is none or no binding for it."""
    try:
        import pynvml

        pynvml.nvmlInit()  # counted by the library: a second call is free
        metrics: dict[str, float] = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            metrics[f"gpu_{index}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            metrics[f"gpu_{index}_memory_usage_megabytes"] = memory.used / 1e6
            metrics[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
        return metrics
    except Exception:  # no bindings, no driver, a lost GPU: a sample less, never a job less
        return {}

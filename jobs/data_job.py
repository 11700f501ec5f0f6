"""What shard and tokenize share: open or resume the dataset, track it in MLflow, keep the books, report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.config import CONFIG_NAME
from jobs.folder import lock_folder
from jobs.journal import Journal
from jobs.progress import Progress
from jobs.result import JobResult, result_of_books
from jobs.tracking import DatasetInput, Tracker
from pipeline import dataset
from pipeline.dataset import DatasetMeta
from pipeline.ledger import Ledger, OnShard
from pipeline.schema import Reject


class DataJob:
    """A dataset in the making. Use it by `with DataJob.open(...)`; report with `finish`."""

    def __init__(self, job: str, out: Path, meta: DatasetMeta, done: dict[int, Ledger], tracker: Tracker) -> None:
        self._job, self.out, self.meta, self._tracker = job, out, meta, tracker
        self.todo = [shard for shard in range(meta.num_shards) if shard not in done]
        self._books = sum(done.values(), Ledger())
        self._started_s = time.monotonic()

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        job: str,
        out: Path,
        meta: DatasetMeta,
        params: dict[str, Any],
        inputs: Sequence[DatasetInput],
        input_files: pa.Table | None = None,
    ) -> Iterator[DataJob]:
        """The job of `out` for the body, with its MLflow run, which an error in the body marks as failed.

        Raises:
            ConfigError: `out` holds something else, or another job works on it.
            DatasetError: `out` is damaged.
        """
        with lock_folder(out):
            meta = dataset.create_or_resume(out, meta, input_files)
            done = dataset.committed_shards(out, meta.fingerprint)
            tags = {"tokenreel.fingerprint": meta.fingerprint, "tokenreel.out": str(out)}
            name = f"{job} {out.name}"
            with Tracker.open(out, job=job, name=name, params=params, tags=tags, inputs=inputs) as tracker:
                yield cls(job, out, meta, done, tracker)

    @contextlib.contextmanager
    def progress(self, unit: str) -> Iterator[OnShard]:
        """A callback for finished shards that moves the progress bar and the metrics."""
        total = self.meta.num_shards
        with (
            Progress(self._job, "shards", total, total - len(self.todo)) as bar,
            Journal(self.out) as journal,
        ):

            def on_shard(shard: int, ledger: Ledger) -> None:
                self._books += ledger
                bar.note({f"rejected as {name}": n for name, n in sorted(self._books.rejected.items())})
                bar.advance(1)
                elapsed_s = time.monotonic() - self._started_s
                done = self._books.committed
                rejected, filtered = self._books.rejected.total(), self._books.filtered.total()
                figures = {
                    "committed": done,
                    "rejected": rejected,
                    "filtered": filtered,
                    f"{unit}_per_s": done / elapsed_s,
                }
                journal.log(journal.last_step + 1, {name: float(value) for name, value in figures.items()})

            yield on_shard

    def finish(self, plan_rejects: Sequence[Reject], max_reject_fraction: float, **figures: Any) -> JobResult:
        """Check the books, write the totals, end the MLflow run.

        Raises:
            DatasetError: the books do not balance.
        """
        self.meta, ledger = dataset.finish(self.out, self.meta, plan_rejects)
        assert self.meta.totals is not None
        sizes = {name: value for name, value in self.meta.totals.items() if not isinstance(value, dict)}
        result = result_of_books(self._job, str(self.out), ledger, max_reject_fraction, **{**sizes, **figures})
        result.fingerprint = self.meta.fingerprint
        result.elapsed_s = time.monotonic() - self._started_s
        summary = {
            f"total_{name}": float(value)
            for name, value in {**sizes, **figures}.items()
            if isinstance(value, int | float)
        }
        self._tracker.finish("FINISHED", summary, [self.out / "dataset.json", self.out / CONFIG_NAME])
        self._tracker.close()
        result.mlflow_run_id = self._tracker.run_id or ""
        return result

"""What shard and tokenize share: open or resume the dataset, track it in MLflow, keep the books, report."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.capacity import report_waiting
from jobs.config import CONFIG_NAME, to_plain, to_text
from jobs.folder import work_folder
from jobs.gauges import JobMetrics
from jobs.journal import Journal
from jobs.planning.prediction import StagePrediction, compare
from jobs.progress import Progress
from jobs.result import JobResult, Status, result_of_books
from jobs.tracking import DatasetInput, Tracker
from pipeline import dataset
from pipeline.dataset import DatasetMeta
from pipeline.errors import ConfigError, TokenreelError
from pipeline.internal import INTERNAL
from pipeline.ledger import Ledger
from pipeline.schema import REJECT_CLASSES
from pipeline.shards import ShardInfo, Written
from pipeline.storage import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectPolicy:
    """What a data job does about rejects."""

    max_reject_fraction: float = 0.1
    """More rejects than this share of the planned clips stop the job, with exit code 3. What is done stays; the same command
    with a larger share goes on."""
    judge_after: int = 50
    """Clips before that share is judged: the first bad file of a corpus is no bad corpus."""
    retry_rejects: tuple[str, ...] = ()
    """Classes of rejects to try again, such as storage, timeout, resources, internal; limits may have changed."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_reject_fraction <= 1 or self.judge_after < 1:
            raise ConfigError(
                f"max_reject_fraction = {self.max_reject_fraction} must be in [0, 1], judge_after = {self.judge_after} 1 or more"
            )
        if unknown := sorted(set(self.retry_rejects) - set(REJECT_CLASSES)):
            raise ConfigError(f"retry_rejects: no class {', '.join(unknown)}; allowed: {', '.join(REJECT_CLASSES)}")

    def condemns(self, books: Ledger) -> bool:
        return books.planned >= self.judge_after and books.reject_fraction > self.max_reject_fraction


class _TooManyRejects(TokenreelError):
    """Ends the stage from within its callback."""


class DataJob:
    """A dataset in the making. Use it by `with DataJob.open(...)`; report with `finish`."""

    def __init__(
        self,
        job: str,
        out: Store,
        meta: DatasetMeta,
        policy: RejectPolicy,
        done: dict[int, ShardInfo],
        plan_books: Ledger,
        tracker: Tracker,
    ) -> None:
        self._job, self.out, self.meta, self._policy, self._tracker = job, out, meta, policy, tracker
        self.todo = [shard for shard in range(meta.num_shards) if shard not in done]
        self._plan_books = plan_books
        self._books = sum((info.ledger for info in done.values()), plan_books)
        self._started_s = time.monotonic()
        self._is_stopped = False

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        job: str,
        out: Store,
        meta: DatasetMeta,
        config: Any,
        inputs: Sequence[DatasetInput],
        *,
        policy: RejectPolicy,
        parent_contents: Mapping[int, str] | None = None,
        plan_books: Ledger | None = None,
        remake: Collection[int] = (),
        **creation: Any,
    ) -> Iterator[DataJob]:
        """The job of `out` for the body, with its MLflow run, which an error in the body marks as failed.

        The caller holds the lock of `work_folder(out)`.

        Args:
            parent_contents: for each shard the content that it must have been made from; another one makes it stale, and
                it is done again.
            plan_books: of the inputs that the plan refused.
            remake: shards that are made again, whatever is there; each stays until the new one is whole.
            creation: for `dataset.create_or_resume`.

        Raises:
            ConfigError: `out` holds something else.
            DatasetError: `out` is damaged.
        """
        meta = dataset.create_or_resume(out, meta, **creation)
        done = {
            shard: info
            for shard, info in dataset.committed_shards(out, meta.fingerprint, remake).items()
            if not any(info.ledger.rejected[name] for name in policy.retry_rejects)
            and (parent_contents is None or info.parent_content == parent_contents[shard])
        }
        out.write(CONFIG_NAME, to_text(config).encode())
        tags = {"tokenreel.fingerprint": meta.fingerprint, "tokenreel.out": out.url}
        work, params = work_folder(out), to_plain(config)
        with Tracker.open(work, job=job, name=f"{job} {out.name}", params=params, tags=tags, inputs=inputs) as tracker:
            yield cls(job, out, meta, policy, done, plan_books or Ledger(), tracker)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Any]:
        """A callback for finished shards that moves the progress bar and the metrics, and ends the body where there are
        too many rejects."""
        total, started_s = self.meta.num_shards, time.monotonic()
        videos, frames, read_bytes = 0, 0, 0
        warned = set[str]()
        metrics = JobMetrics(self._job, self.out.name)
        with (
            report_waiting(self._job, {"CPU": 1}),
            Progress(self._job, "shards", total, total - len(self.todo)) as bar,
            Journal(work_folder(self.out)) as journal,
            contextlib.suppress(_TooManyRejects),
        ):

            def on_shard(written: Written) -> None:
                nonlocal videos, frames, read_bytes
                info = written.info
                for warning in set(written.warnings) - warned:
                    log.warning(f"{self._job}: {warning}")
                warned.update(written.warnings)
                self._books += info.ledger
                videos += info.totals["videos"]
                frames += info.totals["frames"]
                read_bytes += written.read_bytes
                elapsed_s = time.monotonic() - started_s
                rates = {
                    "videos_per_s": videos / elapsed_s,
                    "frames_per_s": frames / elapsed_s,
                    "gb_per_s": read_bytes / 1e9 / elapsed_s,
                }
                rejected = {f"rejected/{name}": n for name, n in sorted(self._books.rejected.items())}
                bar.note({**{name: f"{rate:.3g}" for name, rate in rates.items()}, **rejected})
                bar.advance(1)
                counts = {
                    "committed": self._books.committed,
                    "rejected": self._books.rejected.total(),
                    "filtered": self._books.filtered.total(),
                    **rejected,
                }
                figures = {**rates, **counts}
                journal.log(journal.last_step + 1, {name: float(value) for name, value in figures.items()})
                metrics.set({**figures, "shards_done": bar.done, "shards_planned": total})
                if bar.done < total and self._policy.condemns(self._books):
                    self._is_stopped = True
                    raise _TooManyRejects

            yield on_shard

    def finish(self, predicted: StagePrediction | None = None, **figures: Any) -> JobResult:
        """Check the books, write the totals, end the MLflow run. A stopped job reports what it came to; one with rejects of class
        `internal` has failed, though all else of it is done.

        Args:
            predicted: what a plan said; predicted over actual is reported as `predicted_over_actual`, its time only where
                this process made every shard.
            figures: further ones for the result.

        Raises:
            DatasetError: the books do not balance.
        """
        ledger, totals = self._books, dict[str, Any]()
        if not self._is_stopped:
            self.meta, ledger = dataset.finish(self.out, self.meta, self._plan_books)
            totals = self.meta.totals or {}
        status: Status = "too-many-rejects" if self._policy.condemns(ledger) else "done"
        if status != "done":
            log.error(
                f"{self._job}: {ledger.rejected.total()} of {ledger.planned} clips were rejected, more than "
                f"max_reject_fraction = {self._policy.max_reject_fraction:g}; the reasons stand in {self.out.where('rejects')}"
            )
        if not self._is_stopped and (num_internal := ledger.rejected[INTERNAL]):
            status = "failed"  # all else is committed, but a defect of ours must not pass unseen
            figures["error"] = (
                f"{num_internal} of {ledger.planned} inputs raised an error that tokenreel did not foresee (class {INTERNAL}); "
                f"all others are done. {self.out.where('rejects')} has each with its traceback: please report it; "
                f"--retry-rejects {INTERNAL} tries them again"
            )
            log.error(f"{self._job}: {figures['error']}")
        shown = {
            **{name: value for name, value in totals.items() if name not in {*ledger.to_json(), "tars"}},
            **figures,
        }
        result = result_of_books(self._job, self.out.url, ledger, status, **shown)
        result.fingerprint = self.meta.fingerprint
        result.elapsed_s = time.monotonic() - self._started_s
        compared: dict[str, float] = {}
        if predicted is not None and not self._is_stopped:
            actual = {**totals, **figures, "rejected": ledger.rejected.total()}
            if len(self.todo) == self.meta.num_shards:
                actual["wall_s"] = result.elapsed_s
            compared = result.figures["predicted_over_actual"] = compare(predicted, actual)
        summary = {f"total_{name}": float(value) for name, value in shown.items() if isinstance(value, int | float)}
        summary |= {f"predicted_over_actual/{name}": ratio for name, ratio in compared.items()}
        with contextlib.ExitStack() as stack:
            self._tracker.finish("FAILED" if self._is_stopped else "FINISHED", summary, self._documents(stack))
            self._tracker.close()
        result.mlflow_run_id = self._tracker.run_id or ""
        return result

    def _documents(self, stack: contextlib.ExitStack) -> list[Path]:
        """Small files that MLflow keeps with the run."""
        if not self.out.is_local:
            for name in ("dataset.json", CONFIG_NAME):
                path = work_folder(self.out) / name
                path.write_bytes(self.out.read(name))
                stack.callback(path.unlink)
        return [work_folder(self.out) / name for name in ("dataset.json", CONFIG_NAME)]

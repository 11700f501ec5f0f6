"""MLflow that can never stop or slow a job: files first, a background thread copies them.

A job writes everything into its own out folder; the folder is the spool. Nothing here waits for MLflow but `close`,
and that for a bounded time. What MLflow did not take stays in the folder and goes there at the next open of it, models
once the job has written and registered them again.

    out/metrics.jsonl, out/system*.jsonl    numbers, by `jobs.journal`
    out/pictures/*.png                      `reconstructions_00000100.png`, written whole (rename) by the job
    out/mlflow_spool.json                   what the run shall be: params, tags, inputs, ending. Written by the job
    out/mlflow_run.json                     what MLflow has: run id, cursors. Written by the shipper thread alone

Each copy is at-least-once and harmless when doubled. The run is created under a tag that is looked for first. Metrics
keep their own time, so MLflow drops a row that it already has; and for each metric the last shipped step is kept: a
resumed run that writes steps again does not send them again, the first value of a step stays. So the byte cursor is
only there to save reading; where the file no longer matches it, reading starts over at row 0.
"""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from jobs.journal import SystemSampler
from jobs.mlflow_store import resolve_tracking_uri
from jobs.shipper import Shipper
from jobs.spool import MAX_TAG, SPOOL_NAME, STATE_NAME, clean_name, read_json, write_json
from jobs.stopping import begin_ending

log = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
_MAX_PARAM = 6000
_CLOSE_S, _CLOSE_WHEN_STOPPED_S = 20.0, 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInput:
    """A dataset that a run reads, for MLflow's lineage.

    name: what a person calls it, such as the folder's name.
    fingerprint: `dataset.json`'s; at most 36 characters.
    uri: where it lies: a path or an object store's URI.
    context: what it is to the run: "corpus", "training", "validation", "tokenizer".
    parent_fingerprint: of what it was made from; "" where not known.
    run_id: the MLflow run that made it; "" where not known. For a local `uri` the folder is asked.
    totals: numbers to show beside it, such as samples and bytes.
    content: digest of what the dataset holds; it changes where rejects were retried with success, the fingerprint does not.
    """

    name: str
    fingerprint: str
    uri: str
    context: str = "training"
    parent_fingerprint: str = ""
    run_id: str = ""
    totals: dict[str, float] = field(default_factory=dict)
    content: str = ""


def read_run_id(folder: Path) -> str | None:
    """The id of the MLflow run that made `folder`, or None where no run did or MLflow never took it."""
    return read_json(Path(folder) / STATE_NAME).get("run_id") or None


class Tracker:
    """One MLflow run for one out folder, over any number of restarts. Made by `Tracker.open`, used by `with`.

    No method raises because of MLflow, and none but `close` waits for it. One process a folder: the job's own lock on
    its out folder is what guarantees it.
    """

    def __init__(
        self,
        out: Path,
        spool: dict[str, Any],
        tracking_uri: str,
        *,
        sample_system: bool,
        identified: Callable[[], None],
    ) -> None:
        self._out = out
        self._spool = spool
        self._identified = identified
        self._shipper = Shipper(out, tracking_uri, identified)
        self._closed = False
        self._save()
        self._sampler = SystemSampler(out).start() if sample_system else None
        self._shipper.start()

    @classmethod
    def open(
        cls,
        out: Path,
        *,
        job: str,
        name: str,
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        inputs: Sequence[DatasetInput] = (),
        sample_system: bool = True,
        identified: Callable[[], None] = lambda: None,
    ) -> Tracker:
        """Begin the run of `out`, or continue it where it has one, whatever its status; takes milliseconds.

        The experiment is MLFLOW_EXPERIMENT_NAME or "tokenreel"; the store is `resolve_tracking_uri()`. With another
        store than last time the whole folder goes there, as a new run.

        Args:
            out: the job's out folder; made if it is not there.
            job: "shard", "tokenize", ...; the tag `tokenreel.job`.
            name: what MLflow's table shows.
            params: the resolved config; nested dicts become dotted names. MLflow never changes a param: on a continued
                run the new value of a changed one goes to the tag `tokenreel.changed_params`.
            tags: further tags, such as `tokenreel.fingerprint` of what the job makes.
            inputs: what it reads; also sets the tags `tokenreel.parent_fingerprint` and `tokenreel.parent_run_id`.
            sample_system: also sample this machine every 10 s.
            identified: called, in the background, when `mlflow_run.json` has the id of a new run, and once more at the end of
                `close`; such as to copy that file and the spool elsewhere. It must not raise.

        Raises:
            OSError: `out` cannot be written, so no job can run there either.
        """
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        before = read_json(out / SPOOL_NAME)
        records = [_resolve_input(one) for one in inputs]
        lineage = {
            "tokenreel.parent_fingerprint": ",".join(one.fingerprint for one in records),
            "tokenreel.parent_run_id": ",".join(one.run_id for one in records if one.run_id),
        }
        all_tags = {"tokenreel.job": job, **{k: v for k, v in lineage.items() if v}, **(tags or {})}
        spool = {
            "spool_id": before.get("spool_id") or uuid.uuid4().hex,
            "experiment": os.environ.get("MLFLOW_EXPERIMENT_NAME") or "tokenreel",
            "name": name,
            "start_time_ms": before.get("start_time_ms") or int(time.time() * 1000),
            "params": {clean_name(key): str(value)[:_MAX_PARAM] for key, value in _flatten(params or {})},
            "tags": {clean_name(key): str(value)[:MAX_TAG] for key, value in all_tags.items()},
            "inputs": [asdict(one) for one in records],
            "models": {},  # the job writes their folders again, and then registers them again
            "ending": None,
        }
        return cls(out, spool, resolve_tracking_uri(), sample_system=sample_system, identified=identified)

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None as long as MLflow has not answered, in which case it comes later or next time."""
        return self._shipper.run_id

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags that were not known at `open`, such as the fingerprint of what the job made."""
        self._spool["tags"].update({clean_name(key): str(value)[:MAX_TAG] for key, value in tags.items()})
        self._save()

    def register_model(self, name: str, folder: Path, alias: str) -> None:
        """Upload `folder` as the run's artifact `ALIAS_model/` and register it as the version of `name` that `alias` names
        from then on, such as "final" or "best". The version has the run's `tokenreel.*` tags, so it leads back to its
        corpus. The folder must stay as it is until `close`; the next start of the job registers it again. Equal weights and
        config are registered once, under all their aliases, however often they are exported and registered.
        """
        cleaned = re.sub(r"[/:]", "-", clean_name(name))
        self._spool["models"][alias] = {"name": cleaned, "folder": str(Path(folder).resolve())}
        self._save()

    def finish(
        self, status: RunStatus, summary: dict[str, float] | None = None, artifacts: Iterable[Path] = ()
    ) -> None:
        """Say how the job ended: its final numbers, small files to keep with the run (config, contact sheet), status.

        Files must stay where they are until `close`; a missing one is left out with a warning.
        """
        self._spool["ending"] = {
            "status": status,
            "time_ms": int(time.time() * 1000),
            "summary": {clean_name(key): str(float(value)) for key, value in (summary or {}).items()},
            "artifacts": [str(Path(path).resolve()) for path in artifacts],
        }
        self._save()

    def close(self, timeout_s: float = _CLOSE_S) -> bool:
        """Give the shipper up to `timeout_s` for what is left, and return whether MLflow has all of it.

        With MLflow down it gives up after three attempts, a few seconds. What is left stays in the folder.
        """
        if not self._closed:
            self._closed = True
            if self._sampler is not None:
                self._sampler.stop()
            self._shipper.stop(timeout_s)
            self._identified()
            if not self._shipper.is_done:
                what = ", ".join(self._shipper.missing) or "all"
                log.warning(f"MLflow does not have {what} of {self._out} yet; the same command sends the rest")
        return self._shipper.is_done

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        if is_stopped:
            begin_ending()
        if self._spool["ending"] is None:
            failed: RunStatus = "FAILED" if kind is not None and issubclass(kind, Exception) else "KILLED"
            self.finish("FINISHED" if kind is None else failed)
        # Who asked the process to end will not wait for long.
        self.close(_CLOSE_WHEN_STOPPED_S if is_stopped else _CLOSE_S)

    def _save(self) -> None:
        try:
            write_json(self._out / SPOOL_NAME, self._spool)
        except OSError as error:
            log.warning(f"cannot write {self._out / SPOOL_NAME}: {error}; MLflow will not see the last change")
        self._shipper.wake()


def _resolve_input(one: DatasetInput) -> DatasetInput:
    run_id = one.run_id
    if not run_id and "://" not in one.uri:
        run_id = read_run_id(Path(one.uri)) or ""
    return replace(one, run_id=run_id)


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

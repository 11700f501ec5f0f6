"""MLflow that can never stop or slow a job: files first, a background thread copies them.

A job writes everything into its own out folder; the folder is the spool. Nothing here waits for MLflow but `close`,
and that for a bounded time. What MLflow did not take stays in the folder and goes there at the next open of it.

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

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import socket
import sqlite3
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

from jobs.journal import JOURNAL_NAME, SystemSampler, parse_row

log = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

SPOOL_NAME = "mlflow_spool.json"
STATE_NAME = "mlflow_run.json"

_POLL_S = 2.0
_BACKOFF_MAX_S = 60.0
_WARN_EVERY_S = 60.0
_PROBE_S = 2.0
_READ_BYTES = 4 << 20
_METRICS_A_CALL = 1000
_PAIRS_A_CALL = 100
_MAX_KEY = 250
_MAX_PARAM = 6000
_MAX_TAG = 5000  # MLflow itself takes 8000; older servers take 5000
_MAX_INPUT_TAG = 500

# The thread retries by itself, so a call inside it should give up soon. Printing and usage reports are off: standard
# output belongs to the CLI, and a job calls nobody that it was not told to call. A value that a person set stays.
_MLFLOW_ENV = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


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
    """

    name: str
    fingerprint: str
    uri: str
    context: str = "training"
    parent_fingerprint: str = ""
    run_id: str = ""
    totals: dict[str, float] = field(default_factory=dict)


def resolve_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or else a SQLite store `mlflow.db` in the working directory, as an absolute URI."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def redact_uri(uri: str) -> str:
    """`uri` without the user and password it may hold: fit for logs and files."""
    return re.sub(r"(?<=://)[^/@]*@", "", uri)


def probe_store(uri: str) -> None:
    """Return if a tracking store answers at all, within two seconds and without importing MLflow.

    An HTTP server must accept a connection; a SQLite file must be absent, or readable and not locked; other stores are
    not asked. MLflow's own first attempt at a store that is down lasts minutes.

    Raises:
        OSError: nobody listens, or the file cannot be read.
        sqlite3.Error: the file is locked or is no database.
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), timeout=_PROBE_S):
            return
    if parts.scheme == "sqlite":
        path = Path(uri.removeprefix("sqlite:///").split("?")[0])
        if not path.exists():
            if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
                raise OSError(f"no folder that can be written: {path.parent}")
            return
        connection = sqlite3.connect(path, timeout=_PROBE_S)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            connection.rollback()
        finally:
            connection.close()


def read_run_id(folder: Path) -> str | None:
    """The id of the MLflow run that made `folder`, or None where no run did or MLflow never took it."""
    return _read_json(Path(folder) / STATE_NAME).get("run_id") or None


class Tracker:
    """One MLflow run for one out folder, over any number of restarts. Made by `Tracker.open`, used by `with`.

    No method raises because of MLflow, and none but `close` waits for it. One process a folder: the job's own lock on
    its out folder is what guarantees it.
    """

    def __init__(self, out: Path, spool: dict[str, Any], tracking_uri: str, *, sample_system: bool) -> None:
        self._out = out
        self._spool = spool
        self._shipper = _Shipper(out, tracking_uri)
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

        Raises:
            OSError: `out` cannot be written, so no job can run there either.
        """
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        before = _read_json(out / SPOOL_NAME)
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
            "params": {_clean(key): str(value)[:_MAX_PARAM] for key, value in _flatten(params or {})},
            "tags": {_clean(key): str(value)[:_MAX_TAG] for key, value in all_tags.items()},
            "inputs": [asdict(one) for one in records],
            "model": before.get("model"),
            "ending": None,
        }
        return cls(out, spool, resolve_tracking_uri(), sample_system=sample_system)

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None as long as MLflow has not answered, in which case it comes later or next time."""
        return self._shipper.run_id

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags that were not known at `open`, such as the fingerprint of what the job made."""
        self._spool["tags"].update({_clean(key): str(value)[:_MAX_TAG] for key, value in tags.items()})
        self._save()

    def register_model(self, name: str, folder: Path) -> None:
        """Upload `folder` (safetensors and config) as the run's artifact `model/` and register it as a version of
        `name`. The version has the run's `tokenreel.*` tags, so it leads back to its corpus. The folder must stay as it
        is until `close`. Unchanged files are registered once; one model a run.
        """
        self._spool["model"] = {"name": re.sub(r"[/:]", "-", _clean(name)), "folder": str(Path(folder).resolve())}
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
            "summary": {_clean(key): str(float(value)) for key, value in (summary or {}).items()},
            "artifacts": [str(Path(path).resolve()) for path in artifacts],
        }
        self._save()

    def close(self, timeout_s: float = 20.0) -> bool:
        """Give the shipper up to `timeout_s` for what is left, and return whether MLflow has all of it.

        With MLflow down it gives up after three attempts, a few seconds. What is left stays in the folder.
        """
        if not self._closed:
            self._closed = True
            if self._sampler is not None:
                self._sampler.stop()
            self._shipper.stop(timeout_s)
            if not self._shipper.is_done:
                log.warning(f"MLflow does not have all of {self._out} yet; the rest goes there at the next open of it")
        return self._shipper.is_done

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spool["ending"] is None:
            failed: RunStatus = "FAILED" if kind is not None and issubclass(kind, Exception) else "KILLED"
            self.finish("FINISHED" if kind is None else failed)
        self.close()

    def _save(self) -> None:
        try:
            _write_json(self._out / SPOOL_NAME, self._spool)
        except OSError as error:
            log.warning(f"cannot write {self._out / SPOOL_NAME}: {error}; MLflow will not see the last change")
        self._shipper.wake()


def ship_leftovers(out: Path, timeout_s: float = 60.0) -> bool:
    """Send what an ended job could not, without continuing its run; True when MLflow has all of `out`.

    For a folder that no job is writing to: a run without an ending, whose driver was killed, is ended as KILLED.
    """
    path = Path(out) / SPOOL_NAME
    if not path.exists():
        return True
    spool = _read_json(path)
    if spool.get("ending") is None:
        time_ms = int(path.stat().st_mtime * 1000)
        _write_json(path, {**spool, "ending": {"status": "KILLED", "time_ms": time_ms, "summary": {}, "artifacts": []}})
    shipper = _Shipper(Path(out), resolve_tracking_uri())
    shipper.start()
    shipper.stop(timeout_s)
    return shipper.is_done


class _Shipper:
    """The background thread that copies one out folder to MLflow, and the only one that talks to MLflow."""

    def __init__(self, out: Path, tracking_uri: str) -> None:
        self._out = out
        self._uri = tracking_uri
        self._state = self._read_state()
        self._client: Any = None
        self._is_attached = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline_s = math.inf
        self._warned_s = -math.inf
        self._thread = threading.Thread(target=self._run, name="tokenreel-mlflow", daemon=True)
        self.is_done = False

    @property
    def run_id(self) -> str | None:
        return self._state.get("run_id") or None

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        self._deadline_s = time.monotonic() + timeout_s
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        backoff_s, num_failed_closing = _POLL_S, 0
        while True:
            is_last = self._closing.is_set()  # read before the pass: what was written before the stop is in it
            self._wake.clear()
            try:
                self._ship()
                backoff_s = _POLL_S
                self.is_done = is_last
                wait_s = _POLL_S
            except Exception as error:  # whatever MLflow, its server or its database does: the job goes on
                self._warn(f"MLflow at {redact_uri(self._uri)} is not taking data, will try again: {_brief(error)}")
                self._is_attached = False
                wait_s = 1.0 if is_last else backoff_s
                backoff_s = min(2 * backoff_s, _BACKOFF_MAX_S)
                num_failed_closing += is_last
            if self.is_done or num_failed_closing >= 3 or time.monotonic() + wait_s > self._deadline_s:
                return
            if is_last:
                time.sleep(wait_s)
            else:
                self._wait(wait_s)

    def _wait(self, seconds: float) -> None:
        """Sleep until something changes; while MLflow fails (backoff), only the stop counts as a change."""
        (self._wake if self._is_attached else self._closing).wait(seconds)

    def _ship(self) -> None:
        """Bring MLflow up to date with the folder. Raises whatever failed; all that was taken is in the state file."""
        spool = _read_json(self._out / SPOOL_NAME)
        if not self._is_attached:
            probe_store(self._uri)
            if self._client is None:
                self._client = _open_client(self._uri)
            self._attach(spool)
        self._ship_params(spool)
        self._ship_tags(spool)
        self._ship_inputs(spool)
        for path in [self._out / JOURNAL_NAME, *sorted(self._out.glob("system*.jsonl"))]:
            self._ship_journal(path)
        self._ship_files(sorted(self._out.glob("pictures/*.png")), "pictures")
        if spool["model"] is not None:
            self._ship_model(spool["model"], spool["tags"])
        if self._closing.is_set() and (ending := spool["ending"]) is not None:
            self._ship_ending(ending)

    def _attach(self, spool: dict[str, Any]) -> None:
        """Find the folder's run, or create it, and set it to RUNNING unless it is ending."""
        run_id = self._state["run_id"]
        if run_id and not self._is_alive(run_id):
            log.warning(f"MLflow run {run_id} was deleted; {self._out} goes to a new one")
            self._state, run_id = self._new_state(), ""
        if not run_id:
            self._state["run_id"] = self._create_run(spool)
            self._save_state()
        elif spool["ending"] is None:
            self._client.update_run(run_id, status="RUNNING")
        self._is_attached = True

    def _create_run(self, spool: dict[str, Any]) -> str:
        """The id of a new run, or of the one that an earlier attempt made whose answer was lost."""
        experiment_id = self._find_experiment(spool["experiment"])
        known = f"tags.`tokenreel.spool_id` = '{spool['spool_id']}'"
        if runs := self._client.search_runs([experiment_id], known, max_results=1):
            if spool["ending"] is None:
                self._client.update_run(runs[0].info.run_id, status="RUNNING")
            return str(runs[0].info.run_id)
        tags = {"tokenreel.spool_id": spool["spool_id"], "mlflow.source.name": "tokenreel"}
        run = self._client.create_run(experiment_id, spool["start_time_ms"], tags, spool["name"])
        return str(run.info.run_id)

    def _is_alive(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _find_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if (experiment := self._client.get_experiment_by_name(name)) is not None:
            return str(experiment.experiment_id)
        location = None
        if self._uri.startswith("sqlite:"):
            # Without a server MLflow puts artifacts below the working directory of whoever asks; keep them beside the
            # database, where `tokenreel ui` finds them too.
            database = Path(self._uri.removeprefix("sqlite:///").split("?")[0])
            location = (database.resolve().parent / "mlartifacts" / _clean(name).replace("/", "-")).as_uri()
        try:
            # The kind makes MLflow open its training pages, not those for prompts and traces.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return str(self._client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS":  # another job was faster
                return str(self._client.get_experiment_by_name(name).experiment_id)
            raise

    def _ship_params(self, spool: dict[str, Any]) -> None:
        from mlflow.entities import Param

        if (digest := _digest(spool["params"])) == self._state["params"]:
            return
        known = self._client.get_run(self.run_id).data.params
        fresh = [Param(key, value) for key, value in spool["params"].items() if key not in known]
        for start in range(0, len(fresh), _PAIRS_A_CALL):
            batch = fresh[start : start + _PAIRS_A_CALL]
            self._send("params", self._client.log_batch, self.run_id, params=batch)
        changed = {key: value for key, value in spool["params"].items() if known.get(key, value) != value}
        if changed:
            text = json.dumps(changed, sort_keys=True)[:_MAX_TAG]
            self._send("params", self._client.set_tag, self.run_id, "tokenreel.changed_params", text)
        self._state["params"] = digest
        self._save_state()

    def _ship_tags(self, spool: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        if (digest := _digest(spool["tags"])) == self._state["tags"]:
            return
        tags = [RunTag(key, value) for key, value in spool["tags"].items()]
        for start in range(0, len(tags), _PAIRS_A_CALL):
            batch = tags[start : start + _PAIRS_A_CALL]
            self._send("tags", self._client.log_batch, self.run_id, tags=batch)
        self._state["tags"] = digest
        self._save_state()

    def _ship_inputs(self, spool: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, InputTag
        from mlflow.entities import DatasetInput as MlflowInput

        if (digest := _digest(spool["inputs"])) == self._state["inputs"]:
            return
        inputs = []
        for one in spool["inputs"]:
            scheme = urllib.parse.urlsplit(one["uri"]).scheme
            key = "url" if scheme in ("http", "https") else "uri"
            dataset = Dataset(
                name=one["name"][:500] or "dataset",
                digest=one["fingerprint"][:36],
                source_type=scheme if scheme in ("s3", "gs", "http", "https") else "local",
                source=json.dumps({key: redact_uri(one["uri"])}),
                profile=json.dumps(one["totals"]) if one["totals"] else None,
            )
            tags = {
                "mlflow.data.context": one["context"],
                "tokenreel.parent_fingerprint": one["parent_fingerprint"],
                "tokenreel.parent_run_id": one["run_id"],
            }
            inputs.append(MlflowInput(dataset, [InputTag(k, v[:_MAX_INPUT_TAG]) for k, v in tags.items() if v]))
        if inputs:
            self._send("inputs", self._client.log_inputs, self.run_id, inputs)
        self._state["inputs"] = digest
        self._save_state()

    def _ship_journal(self, path: Path) -> None:
        """Send the rows that came since the last time; the cursor is saved after each call to MLflow."""
        if not path.exists():
            return
        cursor = self._state["cursors"].setdefault(path.name, {"offset": 0, "tail": ""})
        with path.open("rb") as file:
            if _hash_before(file, cursor["offset"]) != cursor["tail"]:
                cursor["offset"] = 0  # the file was cut and written again since
            file.seek(cursor["offset"])
            while lines := file.readlines(_READ_BYTES):
                whole = [line for line in lines if line.endswith(b"\n")]
                self._send_rows(whole)
                cursor["offset"] += sum(map(len, whole))
                cursor["tail"] = _hash_before(file, cursor["offset"])
                self._save_state()
                if len(whole) < len(lines):
                    return  # the last line is still being written; the next pass reads it from its start
                file.seek(cursor["offset"])

    def _send_rows(self, lines: list[bytes]) -> None:
        from mlflow.entities import Metric

        batch: list[Metric] = []
        steps: dict[str, int] = {}
        known: dict[str, int] = self._state["last_steps"]

        def send() -> None:
            self._send("metrics", self._client.log_batch, self.run_id, metrics=batch)
            known.update(steps)
            self._save_state()

        for row in filter(None, map(parse_row, lines)):
            for key, value in _read_metrics(row):
                if row["step"] > steps.get(key, known.get(key, -1)):
                    batch.append(Metric(key, value, int(row["time_s"] * 1000), row["step"]))
                    steps[key] = row["step"]
                if len(batch) == _METRICS_A_CALL:
                    send()
                    batch, steps = [], {}
        if batch:
            send()

    def _ship_files(self, paths: list[Path], artifact_path: str | None) -> None:
        for path in paths:
            key = f"{artifact_path or ''}/{path.name}"
            try:
                stat = path.stat()
            except OSError as error:
                self._warn(f"not copied to MLflow: {error}")
                continue
            version = [stat.st_size, stat.st_mtime_ns]
            if self._state["files"].get(key) != version:
                self._send(key, self._client.log_artifact, self.run_id, str(path), artifact_path)
                self._state["files"][key] = version
                self._save_state()

    def _ship_model(self, model: dict[str, str], tags: dict[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        name, folder = model["name"], Path(model["folder"])
        files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
        digest = _digest([[str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns] for path, stat in files])
        if digest in self._state["models"].get(name, []):
            return
        if not files:
            self._warn(f"no model registered: {folder} holds no file")
            return
        # A version must keep its bytes: the model of a run that was continued goes to a folder of its own.
        where = f"model-{digest[:8]}" if self._state["models"] else "model"
        self._client.log_artifacts(self.run_id, str(folder), where)
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self._client.search_model_versions(f"run_id = '{self.run_id}'")
        if not any(one.name == name and one.tags.get("tokenreel.digest") == digest for one in versions):
            source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{where}"
            lineage = {key: value for key, value in tags.items() if key.startswith("tokenreel.")}
            self._client.create_model_version(name, source, self.run_id, {**lineage, "tokenreel.digest": digest})
        self._state["models"].setdefault(name, []).append(digest)
        self._save_state()

    def _ship_ending(self, ending: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        if (digest := _digest(ending)) == self._state["ending"]:
            return
        self._ship_files([Path(path) for path in ending["artifacts"]], None)
        steps = [step for key, step in self._state["last_steps"].items() if not key.startswith("system/")]
        last_step = max(steps, default=0)
        metrics = [Metric(key, float(value), ending["time_ms"], last_step) for key, value in ending["summary"].items()]
        for start in range(0, len(metrics), _METRICS_A_CALL):
            batch = metrics[start : start + _METRICS_A_CALL]
            self._send("summary", self._client.log_batch, self.run_id, metrics=batch)
        self._client.set_terminated(self.run_id, ending["status"], ending["time_ms"])
        self._state["ending"] = digest
        self._save_state()

    def _send(self, what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run the call; what MLflow refuses for good is left out with a warning and blocks nothing."""
        from mlflow.exceptions import MlflowException

        try:
            call(*args, **kwargs)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            log.warning(f"MLflow refused {what} of {self._out}; left out there, still in the folder: {_brief(error)}")

    def _new_state(self) -> dict[str, Any]:
        return {
            "tracking_uri": redact_uri(self._uri),
            "run_id": "",
            "cursors": {},
            "last_steps": {},
            "params": "",
            "tags": "",
            "inputs": "",
            "files": {},
            "models": {},
            "ending": "",
        }

    def _read_state(self) -> dict[str, Any]:
        new, old = self._new_state(), _read_json(self._out / STATE_NAME)
        return {**new, **old} if old.get("tracking_uri") == new["tracking_uri"] else new

    def _save_state(self) -> None:
        _write_json(self._out / STATE_NAME, self._state)

    def _warn(self, message: str) -> None:
        now_s = time.monotonic()
        if now_s - self._warned_s >= _WARN_EVERY_S:
            self._warned_s = now_s
            log.warning(message)


def _open_client(uri: str) -> Any:
    for key, value in _MLFLOW_ENV.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    if uri.startswith("sqlite:"):
        _create_database(Path(uri.removeprefix("sqlite:///").split("?")[0]))
    return MlflowClient(uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)


def _create_database(path: Path) -> None:
    """Make the SQLite store if it is not there, whole or not at all.

    MLflow makes its tables one by one for seconds; a second job that starts meanwhile, or a kill, would meet half of
    them. So they are made under another name, and by one process of this machine at a time.
    """
    lock = Path(tempfile.gettempdir()) / f"tokenreel-mlflow-{_digest(str(path.resolve()))}.lock"
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no lock, such as another user's: the link below still lets one win
            fcntl.flock(stack.enter_context(lock.open("a")), fcntl.LOCK_EX)
            temporary = path.with_name(f".{path.name}.new")  # what a killed process left is replaced
            temporary.unlink(missing_ok=True)
            temporary.with_name(f"{temporary.name}-journal").unlink(missing_ok=True)
        if path.exists():
            return
        from mlflow import MlflowClient

        try:
            MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
            os.link(temporary, path)
        except FileExistsError:
            pass  # another machine was faster
        except PermissionError:
            temporary.replace(path)  # a file system without hard links
        finally:
            temporary.unlink(missing_ok=True)


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


def _clean(name: str) -> str:
    """`name` as MLflow takes it: letters, digits and `_-. :/`, no empty, `.` or `..` part, at most 250 characters."""
    parts = [re.sub(r"[^\w\-. :]", "_", part) for part in str(name).split("/")]
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:_MAX_KEY].rstrip("/") or "_"


def _read_metrics(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if key not in ("step", "time_s"):
            with contextlib.suppress(TypeError, ValueError):
                yield _clean(key), float(value)


def _hash_before(file: BinaryIO, offset: int, num_bytes: int = 256) -> str:
    """Digest of the last bytes before `offset`; "" at the start of the file."""
    if offset == 0:
        return ""
    start = max(0, offset - num_bytes)
    file.seek(start)
    return hashlib.sha256(file.read(offset - start)).hexdigest()[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _brief(error: Exception) -> str:
    text = " ".join(redact_uri(str(error)).split())
    return f"{type(error).__name__}: {text[:300]}"


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where it is missing or damaged, which both mean: start over."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)

"""The background thread that copies a job's folder to MLflow; see `jobs.tracking` for what it promises."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jobs.description import describe, origin_tags
from jobs.journal import JOURNAL_NAME, parse_row
from jobs.lineage import to_inputs
from jobs.mlflow_store import digest_text, open_client, probe_store, redact_uri
from jobs.registry import note_verdict, register
from jobs.spool import MAX_TAG, SPOOL_NAME, STATE_NAME, clean_name, read_json, write_json
from pipeline.errors import TokenreelError

log = logging.getLogger(__name__)

_POLL_S = 2.0
_BACKOFF_MAX_S = 60.0
_WARN_EVERY_S = 60.0
_READ_BYTES = 4 << 20
_METRICS_A_CALL = 1000
_PAIRS_A_CALL = 100
_NOTE = "mlflow.note.content"


class Shipper:
    """The background thread that copies one out folder to MLflow, and the only one that talks to MLflow."""

    def __init__(self, out: Path, tracking_uri: str, identified: Callable[[], None] = lambda: None) -> None:
        self._out = out
        self._uri = tracking_uri
        self._identified = identified
        self._state = self._read_state()
        self._client: Any = None
        self._is_attached = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline_s = math.inf
        self._warned_s = -math.inf
        self._thread = threading.Thread(target=self._run, name="tokenreel-mlflow", daemon=True)
        self._files_backoff_s, self._next_files_s = _POLL_S, 0.0
        self.is_done = False
        self.missing: list[str] = []
        """What MLflow's stores of files and models refused at the last try."""

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
        spool = read_json(self._out / SPOOL_NAME)
        if not self._is_attached:
            probe_store(self._uri)
            if self._client is None:
                self._client = open_client(self._uri)
            self._attach(spool)
        self._ship_params(spool)
        self._ship_tags(spool)
        self._ship_inputs(spool)
        for path in [self._out / JOURNAL_NAME, *sorted(self._out.glob("system*.jsonl"))]:
            self._ship_journal(path)
        is_ending = self._closing.is_set() and spool["ending"] is not None
        if is_ending:  # before any file: a store that refuses those must not leave the run RUNNING
            self._ship_ending(spool["ending"])
        self._ship_description(spool)
        if is_ending or time.monotonic() >= self._next_files_s:
            self._ship_extras(spool, is_ending)

    def _ship_extras(self, spool: dict[str, Any], is_ending: bool) -> None:
        """Files, models and what other runs shall know, each apart: MLflow may keep them elsewhere than its numbers, and refuse them."""
        pictures = sorted(self._out.glob("pictures/*.png"))
        kinds: dict[str, Callable[[], None]] = {"pictures": lambda: self._ship_files(pictures, "pictures")}
        if is_ending:
            artifacts = [Path(path) for path in spool["ending"]["artifacts"]]
            kinds["files"] = lambda: self._ship_files(artifacts, None)
        for alias, model in spool["models"].items():
            kinds[f"{alias} model"] = functools.partial(self._ship_model, alias, model, spool)
        if is_ending:
            kinds["numbers beside the model"] = lambda: self._ship_verdict(spool)
        failed: dict[str, Exception] = {}
        for kind, ship in kinds.items():
            try:
                ship()
            except Exception as error:
                failed[kind] = error
        self.missing = list(failed)
        self._files_backoff_s = min(2 * self._files_backoff_s, _BACKOFF_MAX_S) if failed else _POLL_S
        self._next_files_s = time.monotonic() + self._files_backoff_s if failed else 0.0
        if failed:
            first = next(iter(failed.values()))
            self._warn(
                f"MLflow at {redact_uri(self._uri)} has the run of {self._out}, and not its {', '.join(failed)}: {_brief(first)}"
                f"{_way_out(first)}"
            )
            if is_ending:
                raise first

    def _attach(self, spool: dict[str, Any]) -> None:
        """Find the folder's run, or create it, and set it to RUNNING unless it is ending."""
        run_id = self._state["run_id"]
        if run_id and not self._is_alive(run_id):
            log.warning(f"MLflow run {run_id} was deleted; {self._out} goes to a new one")
            self._state, run_id = self._new_state(), ""
        if not run_id:
            self._state["run_id"] = self._create_run(spool)
            self._save_state()
            self._identified()
        elif spool["ending"] is None:
            self._client.update_run(run_id, status="RUNNING")
        self._is_attached = True

    def _create_run(self, spool: dict[str, Any]) -> str:
        """The id of a new run, or of the one that an earlier attempt made whose answer was lost."""
        experiment_id = self._state["experiment_id"] = self._find_experiment(spool["experiment"])
        known = f"tags.`tokenreel.spool_id` = '{spool['spool_id']}'"
        if runs := self._client.search_runs([experiment_id], known, max_results=1):
            if spool["ending"] is None:
                self._client.update_run(runs[0].info.run_id, status="RUNNING")
            return str(runs[0].info.run_id)
        tags = {"tokenreel.spool_id": spool["spool_id"], **origin_tags(spool["tags"]["tokenreel.job"])}
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
            if experiment.lifecycle_stage != "active":
                number = experiment.experiment_id
                raise TokenreelError(
                    f"experiment {name} was deleted there; restore it (mlflow experiments restore --experiment-id {number}), or name "
                    "another one in MLFLOW_EXPERIMENT_NAME and run the command again"
                )
            return str(experiment.experiment_id)
        location = None
        if self._uri.startswith("sqlite:"):
            # Without a server MLflow puts artifacts below the working directory of whoever asks; keep them beside the
            # database, where `tokenreel ui` finds them too.
            database = Path(self._uri.removeprefix("sqlite:///").split("?")[0])
            location = (database.resolve().parent / "mlartifacts" / clean_name(name).replace("/", "-")).as_uri()
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

        if (digest := digest_text(spool["params"])) == self._state["params"]:
            return
        known = self._client.get_run(self.run_id).data.params
        fresh = [Param(key, value) for key, value in spool["params"].items() if key not in known]
        for start in range(0, len(fresh), _PAIRS_A_CALL):
            batch = fresh[start : start + _PAIRS_A_CALL]
            self._send("params", self._client.log_batch, self.run_id, params=batch)
        changed = {key: value for key, value in spool["params"].items() if known.get(key, value) != value}
        if changed:
            text = json.dumps(changed, sort_keys=True)[:MAX_TAG]
            self._send("params", self._client.set_tag, self.run_id, "tokenreel.changed_params", text)
        self._state["params"] = digest
        self._save_state()

    def _ship_tags(self, spool: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        if (digest := digest_text(spool["tags"])) == self._state["tags"]:
            return
        tags = [RunTag(key, value) for key, value in spool["tags"].items()]
        for start in range(0, len(tags), _PAIRS_A_CALL):
            batch = tags[start : start + _PAIRS_A_CALL]
            self._send("tags", self._client.log_batch, self.run_id, tags=batch)
        self._state["tags"] = digest
        self._save_state()

    def _ship_inputs(self, spool: dict[str, Any]) -> None:
        if (digest := digest_text(spool["inputs"])) == self._state["inputs"]:
            return
        inputs = list(to_inputs(spool["inputs"]))
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

    def _ship_model(self, alias: str, model: dict[str, str], spool: dict[str, Any]) -> None:
        known = self._state["models"]
        register(self._client, self._state["run_id"], alias, model, known, spool["tags"], self._state["note"])
        self._save_state()

    def _ship_description(self, spool: dict[str, Any]) -> None:
        """Tell on the run's page what it was made from, with links, and how it ended; what a person wrote there stays."""
        if (digest := digest_text([spool["inputs"], spool["ending"]])) == self._state["described"]:
            return
        experiments = {}
        for run_id in {one["run_id"] for one in spool["inputs"] if one["run_id"]}:
            with contextlib.suppress(Exception):  # of another store, or deleted: named without a link
                experiments[run_id] = str(self._client.get_run(run_id).info.experiment_id)
        text = describe(spool, experiments)[:MAX_TAG]
        if self._client.get_run(self.run_id).data.tags.get(_NOTE, "") in ("", self._state["note"]):
            self._send("description", self._client.set_tag, self.run_id, _NOTE, text)
        self._state["described"], self._state["note"] = digest, text
        self._save_state()

    def _ship_verdict(self, spool: dict[str, Any]) -> None:
        """Put an ending's numbers on the versions of the run's own model, and those of an evaluation on its model's run."""
        if (digest := digest_text([spool["ending"], spool["models"]])) == self._state["verdict"]:
            return
        note_verdict(self._client, self._state["run_id"], spool, self._state["note"])
        self._state["verdict"] = digest
        self._save_state()

    def _ship_ending(self, ending: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        if (digest := digest_text(ending)) == self._state["ending"]:
            return
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
            "experiment_id": "",
            "cursors": {},
            "last_steps": {},
            "params": "",
            "tags": "",
            "inputs": "",
            "files": {},
            "models": {},
            "ending": "",
            "described": "",
            "note": "",
            "verdict": "",
        }

    def _read_state(self) -> dict[str, Any]:
        new, old = self._new_state(), read_json(self._out / STATE_NAME)
        return {**new, **old} if old.get("tracking_uri") == new["tracking_uri"] else new

    def _save_state(self) -> None:
        write_json(self._out / STATE_NAME, self._state)

    def _warn(self, message: str) -> None:
        now_s = time.monotonic()
        if now_s - self._warned_s >= _WARN_EVERY_S:
            self._warned_s = now_s
            log.warning(message)


def _read_metrics(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if key not in ("step", "time_s"):
            with contextlib.suppress(TypeError, ValueError):
                yield clean_name(key), float(value)


def _hash_before(file: BinaryIO, offset: int, num_bytes: int = 256) -> str:
    """Digest of the last bytes before `offset`; "" at the start of the file."""
    if offset == 0:
        return ""
    start = max(0, offset - num_bytes)
    file.seek(start)
    return hashlib.sha256(file.read(offset - start)).hexdigest()[:16]


def _way_out(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"; install {error.name} where the job runs"
    return "; the same command sends them once the store of artifacts takes them"


def _brief(error: Exception) -> str:
    text = " ".join(redact_uri(str(error)).split())
    return f"{type(error).__name__}: {text[:300]}"

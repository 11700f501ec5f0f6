"""`tokenreel submit`: run a job on a cluster, through Ray's job server, as if it ran here."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jobs.config import to_text
from jobs.pack import pack_folder
from jobs.result import EXIT_CODES, JobResult, Status
from jobs.stopping import Stopped
from pipeline.errors import ConfigError, TokenreelError

log = logging.getLogger(__name__)
_CODE = ("jobs", "models", "pipeline")
_POLL_S = 1.0
_STOP_S = 60.0
_AGENT_S = 120.0
"""How long a cluster may take from answering to having a node that takes jobs; it has just been started, or is busy."""
_TAIL_CHARS = 1 << 16
_OUTPUTS = ("out", "save", "page")
"""Options of jobs that name what they write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitConfig:
    """Run a job on the Ray cluster whose job server is at --address; follow its log, and end with its exit code.

    `tokenreel submit JOB [the job's options] [options of submit]`. The cluster gets this version of tokenreel and the files of
    the working directory, without data and secrets; its nodes have tokenreel's dependencies and ffmpeg. The same command
    again attaches to the job while it runs, reports it once it succeeded, and starts it anew if it failed or was stopped.

    A cluster with token authentication: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as for Ray's own
    commands. RAY_JOB_HEADERS holds headers (a JSON object) for a proxy in front of it.
    """

    words: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    address: str = ""
    """Address of the job server, http://HEAD:8265 or https://; by default what RAY_API_SERVER_ADDRESS names."""
    name: str = ""
    """What makes two commands the same job; by default the job, and where it writes to."""
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Name of an environment variable whose value the job gets; may be given several times. Values are never printed here, but
    Ray keeps them: in a log on the nodes, and for whoever may use the job server. Lasting secrets belong into the nodes' own
    environment."""
    wait: bool = True
    """Follow the log until the job ends; --no-wait returns once it is submitted, or with the state of one that runs."""
    action: Literal["run", "status", "stop"] = "run"
    """status: say how the job of that name stands, and start nothing. stop: stop it."""
    on_interrupt: Literal["stop", "leave"] = "stop"
    """What Ctrl-C does to the job. A lost connection, a closed terminal or a kill leave it running."""
    working_dir: Path = Path()
    """Folder whose files go along and in which the job starts."""
    exclude: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """More to leave behind, as a line of a .gitignore; may be given several times. Data, datasets, runs, secrets and what a
    .gitignore names are left behind anyway."""
    max_pack_mb: float = 20.0
    """Megabytes that these files may have; more is refused."""
    num_cpus: float = 0.0
    """CPUs of the cluster that the job's own process reserves; its tasks and workers reserve theirs."""

    def __post_init__(self) -> None:
        if self.max_pack_mb <= 0 or self.num_cpus < 0:
            raise ConfigError(
                f"submit: max_pack_mb = {self.max_pack_mb} must be more than 0, num_cpus = {self.num_cpus} 0 or more"
            )
        if not re.fullmatch(r"[\w.-]*", self.name, re.ASCII):
            raise ConfigError(
                f"submit: name = {self.name!r}: ASCII letters, digits and _ . - only; it becomes part of an address"
            )
        if missing := [name for name in self.env if name not in os.environ]:
            raise ConfigError(f"--env {missing[0]}: no such environment variable here; export it, or leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A job as the cluster knows it. name: of all its attempts. digest: of its resolved config."""

    job: str
    name: str
    digest: str
    entrypoint: str


def describe(config: SubmitConfig) -> Submission:
    """Parse the job's own options here, so that a wrong one is told before anything is sent.

    Raises:
        ConfigError: no such job, an option that is wrong, or an output that only the job's own process would see.
    """
    from jobs.cli import parse_job

    job, job_config = parse_job(list(config.words))
    out = str(getattr(job_config, "out", ""))
    for name in _OUTPUTS:
        place = str(getattr(job_config, name, None) or ".")  # doctor's own default is ".", where it keeps nothing
        if place != "." and "://" not in place and not Path(place).is_absolute():
            raise ConfigError(
                f"{name} = {place}: a submitted job starts in a folder of the cluster's that goes when it ends; give a path that "
                "all nodes share, from / on, or a URL (s3://, gs://, abfs://)"
            )
    if job == "inspect" and "://" in job_config.dataset and job_config.page is None:
        raise ConfigError(
            f"page: not given, and that of {job_config.dataset} would be written into a folder of the cluster's that goes when the "
            "job ends; give --page, a path that all nodes share"
        )
    text = f"{job} {to_text(job_config)}"
    target = out or text
    folder = re.sub(r"[^\w.-]", "-", Path(out.partition("?")[0]).name, flags=re.ASCII) or "job"
    default = f"{job}-{folder}-{hashlib.sha256(target.encode()).hexdigest()[:8]}"
    # -P: what stands in the working directory is never mistaken for our packages.
    return Submission(
        job=job,
        name=config.name or default,
        digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        entrypoint=f"python -P -m jobs {shlex.join(config.words)}",
    )


def run(config: SubmitConfig) -> JobResult:
    """Returns the job's own result, with `submission_id`, `state` and `attempt` among its figures.

    Raises:
        ConfigError: the job's options are wrong, the pack is too large, or another job of that name runs.
        TokenreelError: the cluster cannot be reached, or refuses.
    """
    submission = describe(config)
    with _connected(config) as client:
        newest = _newest(client, submission.name)
        if config.action == "status":
            return _report(client, newest, submission)
        if config.action == "stop":
            return _stop(client, newest, submission)
        if newest is None or not _is_same_job(newest, submission):
            newest = _submit(client, config, submission, newest)
        submission_id = newest.submission_id
        if not config.wait and not newest.status.is_terminal():
            log.info(f"submit: {submission_id} is {newest.status}; the same command follows it")
            return JobResult(job=submission.job, out="", figures=_figures(newest))
        try:
            log_text = asyncio.run(_follow(client, submission_id))
        except KeyboardInterrupt as stop:
            is_by_hand = not isinstance(stop, Stopped) or stop.signal_name == "SIGINT"
            if config.on_interrupt == "leave" or not is_by_hand:
                log.warning(f"submit: {submission_id} goes on; the same command follows it, --action stop stops it")
                raise
            log.warning(f"submit: stopping {submission_id}; the same command starts it again, and it resumes")
            _stop(client, newest, submission)
            raise
        return _result(client.get_job_info(submission_id), log_text, submission.job)


@contextlib.contextmanager
def _connected(config: SubmitConfig) -> Iterator[Any]:
    """Ray's client for the body; what it raises is told as ours."""
    variable = "RAY_API_SERVER_ADDRESS"
    address = config.address or os.environ.get(variable, "")
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"address = {address!r}: must be that of the cluster's job server, such as http://head:8265 (Ray's dashboard); "
            f"give --address, or set {variable}"
        )
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("job.sdk", "dashboard_sdk"):
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    before = os.environ.get(variable)
    os.environ[variable] = address  # else Ray prefers what RAY_ADDRESS names
    try:
        headers = json.loads(os.environ.get("RAY_JOB_HEADERS") or "{}")
        yield JobSubmissionClient(address, headers=headers)
    except AuthenticationError as error:
        raise ConfigError(
            f"{address} asks for a token: {_first_line(error)}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        if isinstance(error, TokenreelError):
            raise
        raise TokenreelError(f"job server at {address}: {_first_line(error)}") from error
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _newest(client: Any, name: str) -> Any:
    """The newest attempt of the job, or None."""
    attempts = [one for one in client.list_jobs() if (one.metadata or {}).get("tokenreel.name") == name]
    return max(attempts, key=_attempt, default=None)


def _attempt(info: Any) -> int:
    return int(info.metadata["tokenreel.attempt"])


def _is_same_job(newest: Any, submission: Submission) -> bool:
    """Whether to attach to it or report it, rather than start another attempt.

    Raises:
        ConfigError: it runs, and with another config.
    """
    is_same = newest.metadata["tokenreel.config"] == submission.digest
    if newest.status.is_terminal():
        return is_same and str(newest.status) == "SUCCEEDED"
    if not is_same:
        raise ConfigError(
            f"{newest.submission_id} runs with other settings: {newest.entrypoint}. Wait for it, stop it (--action stop), or "
            "give this one another --name"
        )
    log.info(f"submit: {newest.submission_id} is {newest.status} already; following it")
    return True


def _submit(client: Any, config: SubmitConfig, submission: Submission, newest: Any) -> Any:
    attempt = 1 if newest is None else _attempt(newest) + 1
    submission_id = f"{submission.name}-{attempt}"
    if "MLFLOW_TRACKING_URI" not in config.env:
        log.info(
            "submit: no --env MLFLOW_TRACKING_URI: unless the cluster's nodes have one, the job's run stays unseen"
        )
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "working_dir.zip"
        names = pack_folder(
            config.working_dir, archive, excludes=config.exclude, max_bytes=int(config.max_pack_mb * 1e6)
        )
        if not names:  # Ray takes no empty one
            archive = Path(folder) / "empty"
            archive.mkdir()
        log.info(f"submit: {submission_id} takes {len(names)} files of {config.working_dir.resolve()} along")
        runtime_env = {
            "working_dir": str(archive),
            "py_modules": [str(root / package) for package in _CODE],
            "excludes": ["__pycache__"],
            "env_vars": {name: os.environ[name] for name in config.env},
        }
        metadata = {
            "tokenreel.name": submission.name,
            "tokenreel.config": submission.digest,
            "tokenreel.attempt": str(attempt),
        }
        try:
            _wait_for_agent(
                lambda: client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=submission_id,
                    runtime_env=runtime_env,
                    metadata=metadata,
                    entrypoint_num_cpus=config.num_cpus or None,
                )
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            info = client.get_job_info(submission_id)  # somebody else was faster
            _is_same_job(info, submission)
            return info
    return client.get_job_info(submission_id)


def _wait_for_agent(submit: Callable[[], object], within_s: float = _AGENT_S) -> None:
    """Submit, and again for so long as the job server has no node's agent that takes jobs: it asks to try later."""
    deadline_s = time.monotonic() + within_s
    while True:
        try:
            submit()
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline_s:
                raise
        log.info("submit: no node takes jobs yet; trying again")
        time.sleep(_POLL_S / 4)


async def _follow(client: Any, submission_id: str) -> str:
    """Copy the job's log to stderr until the job ends; returns the end of it. A lost connection is made again."""
    import aiohttp

    shown, tail = 0, ""
    while True:
        position = 0
        try:
            async for text in client.tail_job_logs(submission_id):
                new = text[max(0, shown - position) :]  # each connection starts at the log's first line
                position += len(text)
                if new:
                    sys.stderr.write(new)
                    sys.stderr.flush()
                    shown, tail = position, (tail + new)[-_TAIL_CHARS:]
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            log.warning(f"submit: the log broke off ({_first_line(error)}); asking again")
        with contextlib.suppress(OSError):  # the head may be away for a while; its job is not
            if client.get_job_info(submission_id).status.is_terminal():
                return tail
        await asyncio.sleep(_POLL_S)


def _result(info: Any, log_text: str, job: str) -> JobResult:
    """The result that the job printed, or, of one that printed none, what Ray says about its end."""
    code = info.driver_exit_code
    status: Status = next((name for name, value in EXIT_CODES.items() if value == code), "failed")
    printed = _last_result(log_text)
    figures = {**printed, **_figures(info), "driver_exit_code": code}
    if status == "failed" and "error" not in figures:
        figures["error"] = error = _lines(info.message or f"the job is {info.status}")[-1]
        if "ModuleNotFoundError" in error:
            figures["error"] += (
                "; the head's `python` has not what tokenreel needs: start Ray on it from an environment that `make setup` "
                "made (`. .venv/bin/activate`)"
            )
    common = {
        name: figures.pop(name) for name in ("job", "out", "planned", "committed", "filtered", "rejected", "fingerprint",
        "mlflow_run_id", "elapsed_s") if name in figures
    }  # fmt: skip
    figures.pop("status", None)
    return JobResult(**{"job": job, "out": "", **common}, status=status, figures=figures)


def _last_result(log_text: str) -> dict[str, Any]:
    for line in reversed(log_text.splitlines()):
        if line.startswith('{"job"'):
            with contextlib.suppress(ValueError):
                plain: dict[str, Any] = json.loads(line)
                return plain
    return {}


def _report(client: Any, newest: Any, submission: Submission) -> JobResult:
    if newest is None:
        raise ConfigError(
            f"no job named {submission.name} on this cluster; the same command without --action starts it"
        )
    log.info(f"submit: {newest.submission_id} is {newest.status}")
    if not newest.status.is_terminal():
        return JobResult(job=submission.job, out="", figures=_figures(newest))
    return _result(newest, client.get_job_logs(newest.submission_id), submission.job)


def _stop(client: Any, newest: Any, submission: Submission) -> JobResult:
    if newest is None:
        raise ConfigError(f"no job named {submission.name} on this cluster, so there is none to stop")
    client.stop_job(newest.submission_id)
    deadline_s = time.monotonic() + _STOP_S
    while not (info := client.get_job_info(newest.submission_id)).status.is_terminal():
        if time.monotonic() > deadline_s:
            raise TokenreelError(
                f"{newest.submission_id} is still {info.status} {_STOP_S:g} s after it was told to stop"
            )
        time.sleep(_POLL_S / 4)
    log.info(f"submit: {newest.submission_id} is {info.status}")
    return JobResult(job=submission.job, out="", figures=_figures(info))


def _figures(info: Any) -> dict[str, Any]:
    return {"submission_id": info.submission_id, "state": str(info.status), "attempt": _attempt(info)}


def _first_line(error: BaseException) -> str:
    return next(iter(_lines(str(error))), type(error).__name__)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]

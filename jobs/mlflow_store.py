"""Where MLflow keeps runs: its address, whether it answers, and how a client is opened without waiting for minutes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import sqlite3
import tempfile
import urllib.parse
import uuid
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_PROBE_S = 2.0

# The thread retries by itself, so a call inside it should give up soon. Printing and usage reports are off: standard
# output belongs to the CLI, and a job calls nobody that it was not told to call. A value that a person set stays.
_MLFLOW_ENV = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def resolve_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or else a SQLite store `mlflow.db`; what it says relative to the working directory, absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and (path := uri.removeprefix("sqlite:///")):
        return f"sqlite:///{Path(path).absolute()}"
    is_path = ":" not in uri and not uri.startswith("databricks")
    return str(Path(uri).absolute()) if is_path else uri


def redact_uri(uri: str) -> str:
    """`uri`, or a text with URIs, without the users and passwords that they may hold: fit for logs and files.

    SQLAlchemy takes a password that has `/` in it, and one in the query.
    """
    without_user = re.sub(r"(?<=://)([^\s/@?#]*|[^\s/@?#:]*:[^\s@?#]*)@", "", uri)
    return re.sub(r"(?<=[?&])(user|password|token)=[^&\s]*", r"\1=...", without_user)


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


def open_client(uri: str) -> Any:
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
    lock = Path(tempfile.gettempdir()) / f"tokenreel-mlflow-{digest_text(str(path.resolve()))}.lock"
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


def digest_text(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

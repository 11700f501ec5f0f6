"""The small files in a job's folder through which a job tells the shipper what MLflow shall hold."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

SPOOL_NAME = "mlflow_spool.json"
STATE_NAME = "mlflow_run.json"
_MAX_KEY = 250
MAX_TAG = 5000  # MLflow itself takes 8000; older servers take 5000


def clean_name(name: str) -> str:
    """`name` as MLflow takes it: letters, digits and `_-. :/`, no empty, `.` or `..` part, at most 250 characters."""
    parts = [re.sub(r"[^\w\-. :]", "_", part) for part in str(name).split("/")]
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:_MAX_KEY].rstrip("/") or "_"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where it is missing or damaged, which both mean: start over."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)

"""What MLflow's pages say of a run besides its numbers: who ran which code, from what, and how it came out."""

from __future__ import annotations

import contextlib
import getpass
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MAX_NUMBERS = 16


def origin_tags(job: str) -> dict[str, str]:
    """Tags that MLflow's own columns show: the user, the command, and the commit where the code lies in a checkout."""
    tags = {"mlflow.source.name": f"tokenreel {job}", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError):  # a container may run under a number that has no name
        tags["mlflow.user"] = getpass.getuser()
    if commit := _read_commit():
        tags["mlflow.source.git.commit"] = commit
    return tags


def _read_commit() -> str:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installed package, perhaps below somebody else's checkout
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe(spool: Mapping[str, Any], experiments: Mapping[str, str]) -> str:
    """Markdown about a run: the job, what it made and from what, and its final numbers.

    Args:
        experiments: of each run among the parents that MLflow knows, the id of its experiment.
    """
    tags = spool["tags"]
    lines = [
        f"`tokenreel {tags['tokenreel.job']}`" + (f" -> `{tags['tokenreel.out']}`" if "tokenreel.out" in tags else "")
    ]
    lines += [_parent(one, experiments) for one in spool["inputs"]]
    if (ending := spool["ending"]) and ending["summary"]:
        lines += ["", "| | |", "| --- | --- |", *_rows(list(ending["summary"].items())[:_MAX_NUMBERS])]
    return "\n".join(lines)


def _parent(one: Mapping[str, Any], experiments: Mapping[str, str]) -> str:
    name = one["name"].translate({ord(letter): f"\\{letter}" for letter in "[]*_`<>"})
    if (experiment := experiments.get(one["run_id"])) is not None:
        name = f"[{name}](#/experiments/{experiment}/runs/{one['run_id']})"
    return f"- {one['context']}: {name} (fingerprint `{one['fingerprint']}`)"


def _rows(numbers: Sequence[tuple[str, str]]) -> list[str]:
    return [f"| {name} | {float(value):.6g} |" for name, value in numbers]

"""Runs `tokenreel` as a user or a script does: as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_command(*args: object, cwd: Path, address: str = "", expect: int = 0) -> dict[str, Any]:
    """Run a command to its end, check its exit code, and return the JSON of its last line of stdout."""
    done = subprocess.run(_words(args), cwd=cwd, env=_environment(address), capture_output=True, text=True, timeout=240)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def start_command(*args: object, cwd: Path, address: str, start_new_session: bool = False) -> subprocess.Popen[str]:
    """Start a command; its stdout is a pipe."""
    return subprocess.Popen(
        _words(args), cwd=cwd, env=_environment(address), stdout=subprocess.PIPE, text=True,
        start_new_session=start_new_session,
    )  # fmt: skip


def kill_command(*args: object, cwd: Path, address: str, when: Callable[[], bool]) -> None:
    """Start a command, and kill it with SIGKILL as soon as `when()` holds."""
    with (cwd / "killed.log").open("w") as log:
        process = subprocess.Popen(_words(args), cwd=cwd, env=_environment(address), stdout=log, stderr=log)
        deadline = time.monotonic() + 180
        while not when():
            assert process.poll() is None, f"ended before it could be killed:\n{(cwd / 'killed.log').read_text()}"
            assert time.monotonic() < deadline, "never came to the point where it should be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()


def _words(args: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-m", "jobs", *map(str, args)]


def _environment(address: str) -> dict[str, str]:
    return {**os.environ, **({"RAY_ADDRESS": address} if address else {})}

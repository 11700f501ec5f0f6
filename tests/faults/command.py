"""`tokenreel` in a process of its own that can be killed, forked from one that has imported everything already.

A fork takes milliseconds where a fresh interpreter takes seconds, and a hundred kills are wanted.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["mlflow", "ray", "jobs.cli", "jobs.shard", "jobs.tokenize", "jobs.verify", "pipeline.stages"]
)


class Command:
    """A running `tokenreel ...`; what it prints goes to files in `cwd`."""

    def __init__(self, *words: object, cwd: Path, address: str = "", env: dict[str, str] | None = None) -> None:
        cwd.mkdir(parents=True, exist_ok=True)
        self._files = (cwd / "stdout.log", cwd / "stderr.log")
        self._words = [str(word) for word in words]
        environment = {**os.environ, **(env or {}), **({"RAY_ADDRESS": address} if address else {})}
        self._process = _CONTEXT.Process(target=_run, args=(self._words, str(cwd), environment), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    @property
    def said(self) -> str:
        """Its stdout and stderr so far."""
        return "\n".join(file.read_text(errors="replace") for file in self._files if file.exists())

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.join()

    def end(self, *, expect: int | None = 0, timeout_s: float = 200.0) -> dict[str, Any]:
        """Wait for its end, check its exit code (None: any), and return the JSON of its last line of stdout."""
        self._process.join(timeout_s)
        if self._process.is_alive():
            self.kill()
            raise AssertionError(f"{self._words} did not end within {timeout_s:g} s:\n{self.said[-6000:]}")
        code = self._process.exitcode
        assert expect is None or code == expect, f"{self._words}: exit code {code}, not {expect}\n{self.said[-6000:]}"
        lines = self._files[0].read_text().splitlines()
        result: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return {**result, "exit_code": code}


def run(*words: object, cwd: Path, address: str = "", expect: int | None = 0) -> dict[str, Any]:
    """Run a command to its end; see `Command.end`."""
    return Command(*words, cwd=cwd, address=address).end(expect=expect)


def _run(words: list[str], cwd: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, name in ((1, "stdout.log"), (2, "stderr.log")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    from jobs.cli import main

    main(words)

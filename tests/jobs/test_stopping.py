"""Signals to a command, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_HEAD = """
import signal, sys, time
from jobs import cli, stopping

import dataclasses

@dataclasses.dataclass
class Config: ...

def wait(body=lambda: time.sleep(60)):
    print("ready", file=sys.stderr, flush=True)
    body()

cli._JOBS["wait"] = cli._Job(module="__main__", config="Config", summary="")
cli.parse_options = lambda name, words: Config()
sys.argv = ["tokenreel", "wait"]
"""


def start(code: str, **options: object) -> subprocess.Popen[str]:
    """`code` defines `run(config)`, the job; `wait()` in it is where the signals come."""
    script = f"{_HEAD}\n{textwrap.dedent(code)}\ncli.main()"
    process: subprocess.Popen[str] = subprocess.Popen(  # type: ignore[call-overload]
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line == "ready\n":
            return process
    raise AssertionError("it never began")


def end(process: subprocess.Popen[str]) -> tuple[dict, str]:
    said, log = process.communicate(timeout=60)
    return json.loads(said.splitlines()[-1]), log


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_each_signal_ends_a_job_with_one_line_and_its_json(name: str, times: int) -> None:
    process = start("""
        def run(config):
            try:
                wait()
            finally:
                stopping.begin_ending()
                time.sleep(0.5)  # its books are put in order, whatever comes now
    """)
    for _ in range(times):
        process.send_signal(getattr(signal, name))
        time.sleep(0.1)
    result, log = end(process)
    assert process.returncode == 1 and result["status"] == "failed"
    assert result["error"] == f"stopped by {name}; run the same command again to resume"
    assert len(log.splitlines()) == 1 and name in log


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(name: str) -> None:
    """As by nohup."""
    number = getattr(signal, name)
    process = start(
        "def run(config): wait(lambda: time.sleep(1)); return cli.JobResult(job='wait', out='')",
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
    )
    process.send_signal(number)
    assert end(process)[0]["status"] == "done" and process.returncode == 0


def test_a_signal_whose_exception_was_swallowed_is_raised_again() -> None:
    process = start("""
        def run(config):
            try:
                wait()
            except BaseException:  # as in a callback of Python's
                time.sleep(60)
    """)
    process.send_signal(signal.SIGTERM)
    started_s = time.monotonic()
    assert "SIGTERM" in end(process)[0]["error"]
    assert process.returncode == 1 and time.monotonic() - started_s < 20


def test_a_job_that_cannot_end_is_ended_with_its_json() -> None:
    process = start("""
        stopping._END_WITHIN_S = 1.0
        def run(config):
            try:
                wait()
            finally:
                stopping.begin_ending()
                time.sleep(60)
    """)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in end(process)[0]["error"] and process.returncode == 1


def test_a_signal_during_imports_raises_after_them() -> None:
    process = start("""
        def run(config):
            with stopping.deferred_signals():
                wait(lambda: time.sleep(0.5))
                print("imported", file=sys.stderr)
            time.sleep(60)
    """)
    process.send_signal(signal.SIGTERM)
    result, log = end(process)
    assert "SIGTERM" in result["error"] and log.startswith("imported")


def test_others_cannot_take_the_handlers() -> None:
    process = start("""
        def run(config):
            with stopping.kept_handlers():
                for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                    signal.signal(getattr(signal, name), lambda *_: sys.exit(0))
                taken = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
            wait()
    """)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in end(process)[0]["error"]


def test_shielded_children_outlive_a_signal_to_the_group_and_take_it_when_they_ask_for_it() -> None:
    process = start(
        """
        import subprocess
        child = "import time; print(1, flush=True); time.sleep(2); print('whole', flush=True)"
        asks = "import time; from jobs import stopping; stopping.take_sigterm(lambda: print('told', flush=True)); print(1, flush=True); time.sleep(2)"
        def run(config):
            with stopping.shielded_children():
                children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for code in (child, asks)]
            for one in children:
                one.stdout.readline()
            try:
                wait()
            finally:
                stopping.begin_ending()
                print([one.stdout.read().strip() for one in children], flush=True)
    """,
        start_new_session=True,
    )
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said.splitlines()[0] == "['whole', 'told']"
    assert process.returncode == 1

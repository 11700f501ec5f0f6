"""`tokenreel submit` against a real job server that asks for a token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cases import ALWAYS
from tests.faults.ray_head import Head, started_head

TOKEN = "0123456789abcdef0123456789abcdef"
_AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@pytest.fixture(scope="module")
def head(only_in_make_faults: None) -> Iterator[Head]:
    with started_head(env=_AUTH) as head:
        yield head


class Submitter:
    """`tokenreel submit` in a working directory that holds a manifest, a secret, and a folder with a package's name of ours."""

    def __init__(self, head: Head, folder: Path, shared: Path) -> None:
        self._head, self._folder = head, folder
        (folder / "jobs").mkdir()
        (folder / "jobs" / "__init__.py").write_text("raise ImportError('not ours')")
        (folder / ".env").write_text("A=1")
        (folder / "list.csv").write_text("video\n" + "".join(f"{path.name}\n" for path in sorted(shared.iterdir())))
        store = f"sqlite:///{folder}/mlflow.db"
        self._environment = {**os.environ, **_AUTH, "RAY_ADDRESS": "127.0.0.1:1", "MLFLOW_TRACKING_URI": store}

    def start(self, *words: object, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "jobs", "submit", *map(str, words), "--address", self._head.url]
        command += ["--env", "MLFLOW_TRACKING_URI"]
        return subprocess.Popen(
            command, cwd=self._folder, env={**self._environment, **env}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # Where the suite runs in the background of a shell, Ctrl-C is ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def run(self, *words: object, expect: int = 0, **env: str) -> tuple[dict[str, Any], str]:
        """The result it prints, and what it says on stderr."""
        process = self.start(*words, **env)
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == expect, f"exit code {process.returncode}\n{stdout}\n{stderr[-4000:]}"
        return json.loads(stdout.splitlines()[-1]), stderr


@pytest.fixture
def submitter(only_in_make_faults: None, head: Head, fault_corpus: Path, tmp_path: Path) -> Submitter:
    folder = tmp_path / "work"
    folder.mkdir()
    return Submitter(head, folder, fault_corpus)


def test_a_job_runs_there_as_here(
    only_in_make_faults: None, submitter: Submitter, fault_corpus: Path, tmp_path: Path
) -> None:
    words = ("shard", "list.csv", tmp_path / "clips", "--root", fault_corpus, *ALWAYS)
    result, said = submitter.run(*words, "--env", "MY_SECRET", MY_SECRET="hunter2")
    assert (result["job"], result["status"], result["state"], result["attempt"]) == ("shard", "done", "SUCCEEDED", 1)
    assert result["committed"] > 5 and result["mlflow_run_id"]
    assert "shard: " in said and "videos in" in said, "its log is followed"
    assert "hunter2" not in said + json.dumps(result)
    assert "takes 2 files" in said, said  # not .env
    again, _ = submitter.run(*words, "--env", "MY_SECRET", MY_SECRET="hunter2")
    assert {**again, "elapsed_s": 0} == {**result, "elapsed_s": 0}, "a job that succeeded is reported, not run again"


def test_exit_codes_are_the_jobs(only_in_make_faults: None, submitter: Submitter, tmp_path: Path) -> None:
    result, _ = submitter.run("verify", tmp_path / "nothing", expect=2)
    assert result["driver_exit_code"] == 2 and "dataset.json" in result["error"]
    (tmp_path / "bad").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "bad" / name).write_bytes(b"")
    words = ("shard", tmp_path / "bad", tmp_path / "out", "--judge-after", "1")
    result, _ = submitter.run(*words, expect=3)
    assert (result["status"], result["rejected_by_class"], result["attempt"]) == ("too-many-rejects", {"empty": 2}, 1)
    result, _ = submitter.run(*words, expect=3)
    assert result["attempt"] == 2, "a job that failed is started anew"


def test_attach_status_stop_and_ctrl_c(
    only_in_make_faults: None, submitter: Submitter, fault_corpus: Path, tmp_path: Path
) -> None:
    submitter.run("shard", "list.csv", tmp_path / "clips", "--root", fault_corpus, *ALWAYS)
    words = ("train-tokenizer", tmp_path / "clips", tmp_path / "tokenizer", "--tokenizer.channels", "8")
    words = (*words, "--loader.frames.size-px", "32", "--loader.batch-size", "4", "--loop.steps")
    first, _ = submitter.run(*words, "1000000", "--no-wait")
    assert first["state"] in ("PENDING", "RUNNING") and first["attempt"] == 1
    attached, _ = submitter.run(*words, "1000000", "--no-wait")
    assert attached["submission_id"] == first["submission_id"]
    refused, _ = submitter.run(*words, "7", "--no-wait", expect=2)
    assert "runs with other settings" in refused["error"] and "--name" in refused["error"]
    stopped, _ = submitter.run(*words, "1000000", "--action", "stop")
    assert stopped["state"] == "STOPPED"
    status, _ = submitter.run(*words, "1000000", "--action", "status", expect=1)
    assert status["state"] == "STOPPED"

    process = submitter.start(*words, "1000000")
    journal, deadline = tmp_path / "tokenizer" / "metrics.jsonl", time.monotonic() + 120
    while not (journal.exists() and journal.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 1 and "stopping train-tokenizer-tokenizer" in stderr, stderr[-3000:]
    status, _ = submitter.run(*words, "1000000", "--action", "status", expect=1)
    assert (status["state"], status["attempt"]) == ("STOPPED", 2)


@pytest.mark.parametrize("token", ["", "f" * 32])
def test_no_token_and_a_wrong_one(only_in_make_faults: None, submitter: Submitter, tmp_path: Path, token: str) -> None:
    env = {"RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    result, _ = submitter.run("verify", tmp_path, expect=2, **env)
    assert "RAY_AUTH_TOKEN" in result["error"] and TOKEN not in result["error"]

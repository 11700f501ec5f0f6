"""The contract for scripts: one JSON line on stdout, exit codes, errors that say the value and the way out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import cli
from tests.conftest import Stages
from tests.e2e.command import run_command, start_command

COMMON = {
    "job",
    "status",
    "out",
    "planned",
    "committed",
    "filtered",
    "rejected",
    "fingerprint",
    "mlflow_run_id",
    "elapsed_s",
}


def test_a_done_job_prints_the_common_fields_and_its_own(stages: Stages, tmp_path: Path) -> None:
    result = run_command("verify", stages.clips, cwd=tmp_path)
    assert result.keys() >= COMMON | {"num_problems"}
    assert result["job"] == "verify"
    assert result["status"] == "done"
    assert result["committed"] == stages.results["shard"].committed


def test_help_is_broken_into_lines_by_the_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    assert cli.run(["evaluate", "--help"]) == 0
    assert "(the last one, in a run without that split), or the last one. (default: best)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["shard", "no-such-folder", "out"], ["no-such-folder", "folder of videos"]),
        (["shard", ".", "out", "--storage", "zip"], ["zip", "copy", "transcode"]),
        (["shard", ".", "out", "--no-such-option", "3"], ["--no-such-option"]),
        (["shard", ".", "out", "--clips.mode", "window"], ["storage = copy", "transcode"]),
        (["tokenize", "nowhere", "out", "--tokenizer", "t"], ["nowhere", "no such folder", "OUT"]),
        (["train-tokenizer", "nowhere", "out"], ["nowhere", "no such folder", "OUT"]),
        (["pretrain", "debug", "--tokens", "nowhere", "--out", "o"], ["nowhere", "no such folder", "OUT"]),
        (["verify", "."], ["dataset.json"]),
        (["verify", b"caf\xe9"], ["caf\\udce9", "not a name in UTF-8; rename it"]),
        (["pretrain", "no-such-recipe"], ["no-such-recipe", "debug"]),
        (["pretrain", "debug", "--tokens", "nowhere", "--out", "o", "--optim.lr", "-1"], ["lr", "-1"]),
        (["no-such-job"], ["no-such-job", "pretrain"]),
    ],
)
def test_bad_usage_exits_with_2_and_says_what_is_allowed(words: list, expected: list[str], tmp_path: Path) -> None:
    result = run_command(*map(os.fsdecode, words), cwd=tmp_path, expect=2)
    assert result["status"] == "usage"
    for word in expected:
        assert word in result["error"]
    assert not (tmp_path / "out").exists()


def test_a_locale_that_cannot_name_a_dataset_is_what_is_wrong(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its index was called no index of ours, to be deleted."""
    named = shutil.copytree(stages.clips, tmp_path / "clips 日本")
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    for words, cwd in ((["verify", named], tmp_path), (["verify", "."], named)):
        error = run_command(*words, cwd=cwd, expect=2)["error"]
        assert "PYTHONUTF8=1" in error and "delete" not in error
    monkeypatch.delenv("PYTHONUTF8")
    assert run_command("verify", named, cwd=tmp_path)["status"] == "done", "Python's own choice for LC_ALL=C is UTF-8"


def test_more_rejects_than_allowed_exit_with_3(cluster: str, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "good.mp4").write_bytes((corpus / "bikes.mp4").read_bytes())
    (folder / "bad.mp4").write_bytes(b"")
    judge = ("--judge-after", 2)
    result = run_command("shard", folder, "out", *judge, cwd=tmp_path, address=cluster, expect=3)
    assert result["status"] == "too-many-rejects"
    assert result["rejected_by_class"] == {"empty": 1}
    result = run_command("shard", folder, "out", *judge, "--max-reject-fraction", 0.5, cwd=tmp_path, address=cluster)
    assert result["status"] == "done"
    result = run_command("shard", folder, "few", cwd=tmp_path, address=cluster)
    assert result["status"] == "done", "two files are too few to judge a corpus by"


def test_sigterm_is_a_failure_that_says_how_to_resume(cluster: str, corpus: Path, tmp_path: Path) -> None:
    words = ("shard", corpus, "out", "--storage", "transcode")
    process = start_command(*words, cwd=tmp_path, address=cluster)
    while not (tmp_path / "out" / "plan.parquet").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    result = json.loads(said.splitlines()[-1])
    assert process.returncode == 1 and result["status"] == "failed"
    assert "run the same command again" in result["error"]
    assert run_command(*words, cwd=tmp_path, address=cluster)["status"] == "done"


def test_folders_of_the_users_own_with_our_packages_names_do_no_harm(
    cluster: str, corpus: Path, tmp_path: Path
) -> None:
    for name in ("models", "pipeline", "jobs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not yours')")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "good.mp4").write_bytes((corpus / "bikes.mp4").read_bytes())
    words = [Path(sys.executable).parent / "tokenreel", "shard", "videos", "out"]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "RAY_ADDRESS": cluster}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["committed"] == 1


def test_a_damaged_dataset_exits_with_1(stages: Stages, tmp_path: Path) -> None:
    copy = shutil.copytree(stages.clips, tmp_path / "clips")
    next(iter((copy / "shards").glob("*.tar"))).unlink()
    assert run_command("verify", copy, cwd=tmp_path, expect=1)["status"] == "failed"

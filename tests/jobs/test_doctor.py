from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from jobs import doctor
from jobs.doctor import Check, DoctorConfig, check_all, format_checks, run


@pytest.fixture(autouse=True)
def _no_services(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def test_all_checks_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    start_s = time.monotonic()
    result = run(DoctorConfig(out=str(tmp_path / "not" / "yet"), timeout_s=20))
    assert time.monotonic() - start_s < 20
    checks = {check["name"]: check for check in result.figures["checks"]}
    names = "python packages ffmpeg ffprobe encoder decoders demuxers gpu ray shm mlflow storage space clock files"
    assert list(checks) == names.split()
    assert result.status == "done", caplog.text
    assert all(bool(check["advice"]) == (check["status"] != "ok") for check in result.figures["checks"])
    assert list(tmp_path.iterdir()) == []  # nothing left behind, no store made
    assert "storage" in caplog.text


def test_broken_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor, "_check_torch", lambda timeout_s: [])
    checks = {check.name: check for check in check_all(DoctorConfig(out=str(tmp_path / "file")))}
    assert {name: checks[name].status for name in ("ffmpeg", "ffprobe", "ray", "mlflow", "storage")} == {
        "ffmpeg": "fail", "ffprobe": "fail", "ray": "fail", "mlflow": "warn", "storage": "fail"
    }  # fmt: skip
    assert "secret" not in format_checks(list(checks.values()))


def test_a_check_that_hangs_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_check_storage", lambda out: time.sleep(30))
    monkeypatch.setattr(doctor, "_check_torch", lambda timeout_s: [])
    start_s = time.monotonic()
    checks = check_all(DoctorConfig(timeout_s=1))
    assert time.monotonic() - start_s < 3
    assert any(check.name == "storage" and "no answer" in check.detail for check in checks)


def test_format_checks() -> None:
    lines = format_checks(
        [Check(name="a", status="ok", detail="x"), Check(name="bcd", status="warn", detail="y", advice="do z")]
    ).splitlines()
    assert lines == ["ok    a    x", "warn  bcd  y", "           -> do z"]


def test_names_of_ffmpeg_lines() -> None:
    assert doctor._read_names(" D  mov,mp4,m4a,3gp QuickTime / MOV") == ["mov", "mp4", "m4a", "3gp"]
    assert doctor._read_names("") == []

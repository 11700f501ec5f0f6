"""Retries: bounded, spaced out, and only for what may pass."""

from __future__ import annotations

import logging

import pytest

from pipeline import retry as retry_module
from pipeline.errors import TransientIO
from pipeline.retry import ATTEMPTS, retry


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited for, without waiting."""
    seen: list[float] = []
    monkeypatch.setattr(retry_module.time, "sleep", seen.append)
    return seen


def failing(times: int, error: Exception) -> tuple[list[int], object]:
    calls: list[int] = []

    def call() -> str:
        calls.append(len(calls))
        if len(calls) <= times:
            raise error
        return "done"

    return calls, call


@pytest.mark.parametrize("times", range(ATTEMPTS))
def test_up_to_four_failures_pass(times: int, waits: list[float], caplog: pytest.LogCaptureFixture) -> None:
    calls, call = failing(times, TransientIO("busy"))
    with caplog.at_level(logging.WARNING):
        assert retry("reading x", call) == "done"  # type: ignore[arg-type]
    assert len(calls) == times + 1 and len(waits) == times == len(caplog.records)
    assert all("reading x" in record.message and "busy" in record.message for record in caplog.records)


def test_the_last_error_says_all(waits: list[float]) -> None:
    calls, call = failing(99, TransientIO("HTTP status 503"))
    with pytest.raises(TransientIO) as caught:
        retry("s3://bucket: reading x", call)  # type: ignore[arg-type]
    assert str(caught.value) == "s3://bucket: reading x: failed 5 times, at last: HTTP status 503"
    assert len(calls) == ATTEMPTS == 5
    assert len(waits) == 4  # none after the last attempt


def test_waits_double_and_differ(waits: list[float]) -> None:
    for _ in range(20):
        with pytest.raises(TransientIO):
            retry("x", failing(99, TransientIO("busy"))[1])  # type: ignore[arg-type]
    for attempt in range(4):
        column = waits[attempt::4]
        assert all(2**attempt / 4 <= wait <= 2**attempt / 2 for wait in column)
        assert len(set(column)) == 20


@pytest.mark.parametrize("error", [FileNotFoundError("x"), PermissionError("x"), ValueError("x"), OSError(28, "full")])
def test_what_is_permanent_is_tried_once(error: Exception, waits: list[float]) -> None:
    calls, call = failing(99, error)
    with pytest.raises(type(error)):
        retry("x", call)  # type: ignore[arg-type]
    assert len(calls) == 1 and not waits

"""Gauges on a real Ray, with names that Ray does not take."""

from __future__ import annotations

import logging

import pytest

from jobs.gauges import JobMetrics


def test_a_run_of_any_name_has_gauges(cluster: str, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("run", "my r\u00fcn \u65e5\u672c", "line\nbreak", "bytes\udcff", ""):
        JobMetrics("pretrain", name).set({"loss": 1.0, "rejected/corrupt": 2})
    assert not caplog.records


def test_what_ray_does_not_take_ends_no_job(cluster: str, caplog: pytest.LogCaptureFixture) -> None:
    metrics = JobMetrics("pretrain", "run")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            metrics.set({"rejected/\u00fc": 1.0, "loss": 1.0})
    assert [record.message[:11] for record in caplog.records] == ["no figures "]

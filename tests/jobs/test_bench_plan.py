"""`tokenreel bench plan`: that it measures what it says, on a manifest that a test can wait for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.bench import plan as bench
from jobs.bench.plan import BenchPlanConfig, run
from pipeline.errors import ConfigError


@pytest.mark.parametrize("options", [{"format": "csv"}, {"format": "parquet", "stat": True}])
def test_the_plan_repeats(tmp_path: Path, options: dict[str, object]) -> None:
    out = tmp_path / "out"
    result = run(replace(BenchPlanConfig(out=out, rows=600, videos_per_shard=100), **options))
    figures = json.loads(result.to_json())
    assert result.status == "done" and figures["same_plan"] is True
    assert (figures["planned"], figures["committed"], figures["num_shards"]) == (600, 600, 6)
    assert all(50 * 2**20 < peak < 2**31 for peak in figures["peak_rss_bytes"]) and min(figures["plan_s"]) > 0
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("format", ["csv", "jsonl", "txt"])
def test_a_shuffled_manifest_has_the_same_rows_in_another_order(tmp_path: Path, format: str) -> None:
    config = BenchPlanConfig(out=tmp_path, rows=250, format=format)
    texts = []
    for shuffled in (False, True):
        (folder := tmp_path / str(shuffled)).mkdir()
        texts.append(bench._write_manifest(folder, config, shuffled).read_text().splitlines())
    assert texts[0] != texts[1] and sorted(texts[0]) == sorted(texts[1])
    assert len(texts[0]) == 250 + (format == "csv")


def test_a_difference_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shuffle that loses a row must not pass for the same plan."""
    chunks = bench._chunks
    monkeypatch.setattr(
        bench, "_chunks", lambda config, shuffled: ([rows[shuffled:] for rows in chunks(config, False)])
    )
    assert run(BenchPlanConfig(out=tmp_path / "out", rows=50, format="jsonl")).status == "failed"


def test_nothing_of_a_person_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    with pytest.raises(ConfigError, match="empty or missing folder"):
        run(BenchPlanConfig(out=tmp_path, rows=1))
    assert (tmp_path / "videos").is_dir()


@pytest.mark.parametrize("options", [{"rows": 0}, {"format": "xlsx"}, {"videos_per_shard": 0}])
def test_bad_settings(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        BenchPlanConfig(out=tmp_path, **options)

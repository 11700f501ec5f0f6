"""The bench runs both sides of every case on the same videos, and its ratios are of what it timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.bench import shard
from jobs.bench.shard import BenchShardConfig
from pipeline.errors import ConfigError
from tests.corpora import make_clip


def test_every_case_is_timed_on_both_sides(cluster: str, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in (1, 2):
        make_clip(folder / f"{number}.mp4", seconds=1, seed=number)
    config = BenchShardConfig(folder=tmp_path / "bench", videos=tmp_path / "videos", repeats=1)
    figures = shard.run(config).figures
    for case in ("copy", "remux", "transcode", "score"):
        row = figures[case]
        assert row["videos"] == 2 and row["ours_s"] > 0 and row["limit_s"] > 0
        assert row["limit_over_ours"] == pytest.approx(row["limit_s"] / row["ours_s"], rel=0.2, abs=0.01)
        assert ("ray_data_over_ours" in row) == (case == "copy")
    assert not (config.folder / "out").exists()


def test_videos_of_its_own_differ(tmp_path: Path) -> None:
    config = BenchShardConfig(folder=tmp_path, num_videos=2)
    folder = shard._make_videos(config, 1)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(first) == len(set(first.values())) == 2
    assert shard._make_videos(config, 1) == folder  # they stay for the next run


def test_bad_use(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file there"):
        shard.run(BenchShardConfig(folder=tmp_path, videos=tmp_path))
    with pytest.raises(ConfigError, match="repeats"):
        BenchShardConfig(repeats=0)

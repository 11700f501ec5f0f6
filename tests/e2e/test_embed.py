"""The embed job on the cluster: the model's own features, the same bytes whatever dies, and what it refuses."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs import embed
from jobs.embed import EmbedConfig
from jobs.embeddings import load_embeddings
from jobs.model_folder import load_model, write_model
from jobs.window_embedder import WindowEmbedder
from models.vimpac import VimpacBackbone, VimpacObjective
from pipeline.dataset import read_index
from pipeline.embedding import EmbedSettings
from pipeline.errors import ConfigError
from pipeline.loader import WindowReader
from tests.conftest import Stages
from tests.faults.cases import files_of


@pytest.fixture(scope="module")
def embeddings(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embed") / "embeddings"
    result = embed.run(EmbedConfig(tokens=str(stages.tokens), run=stages.model, out=str(out), num_encoders=1))
    assert result.status == "done" and result.committed == stages.results["tokenize"].committed
    return out


def test_a_row_is_the_mean_of_its_clips_windows(stages: Stages, embeddings: Path) -> None:
    values, rows = load_embeddings(embeddings, ["key", "label", "num_windows"])
    backbone = load_model(stages.model / "model").backbone
    t, _, _ = backbone.config.shape
    reader = WindowReader(stages.tokens, "all", backbone.config.shape, backbone.config.pad_id)
    assert rows["key"].to_pylist() == reader.index["key"].to_pylist() and len(values) == len(reader)
    model = WindowEmbedder(backbone, EmbedSettings())
    assert values.shape[1] == model.width == 3 * backbone.config.hidden
    for sample in (0, len(reader) - 1):
        starts = np.arange(0, max(1, int(reader.lengths[sample]) - t + 1), t)
        assert rows["num_windows"][sample].as_py() == len(starts)
        windows = reader.read(np.full(len(starts), sample), starts)
        np.testing.assert_allclose(values[sample], model.all(windows).mean(axis=0), rtol=1e-3, atol=1e-4)


def test_the_bytes_are_the_same_whatever_dies(
    stages: Stages, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver was killed after one shard, in the middle of writing another; then a model's process dies at work."""
    out = Path(shutil.copytree(embeddings, tmp_path / "out"))
    whole = files_of(embeddings)
    kept, *lost = sorted(path for path in (out / "index").iterdir() if path.name[0] != ".")
    assert len(lost) >= 2
    for path in lost:
        path.unlink()
    (out / "index" / ".000001.parquet.0.tmp").write_bytes(b"half")
    made, marker = embed._make_embedder, tmp_path / "died"

    def make(*arguments):
        model = made(*arguments)

        class Dying:
            window, pad, width = model.window, model.pad, model.width

            def __call__(self, windows):
                if not marker.exists():
                    marker.touch()
                    os._exit(1)
                return model(windows)

        return Dying()

    monkeypatch.setattr(embed, "_make_embedder", make)
    before = kept.stat().st_mtime_ns
    result = embed.run(EmbedConfig(tokens=str(stages.tokens), run=stages.model, out=str(out), num_encoders=1))
    assert result.status == "done" and marker.exists()
    assert files_of(out) == whole and kept.stat().st_mtime_ns == before
    assert not list((out / "index").glob(".*"))


def test_other_settings_or_another_model_are_refused_by_name(stages: Stages, embeddings: Path, tmp_path: Path) -> None:
    before = files_of(embeddings)
    config = EmbedConfig(tokens=str(stages.tokens), run=stages.model, out=str(embeddings))
    with pytest.raises(ConfigError, match=r"pool = 'cls-mean-drift' \(now 'cls'\)"):
        embed.run(replace(config, settings=EmbedSettings(pool="cls")))
    trained = load_model(stages.model / "model")
    write_model(
        tmp_path / "model", VimpacObjective(VimpacBackbone(trained.backbone.config), trained.config), stages.model
    )
    with pytest.raises(ConfigError, match="made with other setting model"):
        embed.run(replace(config, run=tmp_path / "model"))
    with pytest.raises(ConfigError, match="layer = 9: the model has 2"):
        embed.run(replace(config, out=str(tmp_path / "other"), settings=EmbedSettings(layer=9)))
    with pytest.raises(ConfigError, match="no pre-trained model"):
        embed.run(replace(config, run=tmp_path / "none"))
    assert files_of(embeddings) == before


def test_pools_and_layers(stages: Stages) -> None:
    backbone = load_model(stages.model / "model").backbone
    t, d = backbone.config.num_frames, backbone.config.hidden
    reader = WindowReader(stages.tokens, "all", backbone.config.shape, backbone.config.pad_id)
    windows = reader.read(np.arange(3), np.zeros(3, np.int64))
    everything = WindowEmbedder(backbone, EmbedSettings()).all(windows)
    for place, pool in enumerate(("cls", "mean")):
        part = WindowEmbedder(backbone, EmbedSettings(pool=pool, batch_windows=2)).all(windows)
        np.testing.assert_allclose(part, everything[:, place * d : (place + 1) * d], rtol=1e-4, atol=1e-5)
    last = WindowEmbedder(backbone, EmbedSettings(layer=backbone.config.layers)).all(windows)
    assert np.array_equal(last, everything)  # post-LN: the last layer's output is the network's
    assert not np.allclose(WindowEmbedder(backbone, EmbedSettings(layer=1)).all(windows), everything)
    rounded = WindowEmbedder(backbone, EmbedSettings(precision="bf16")).all(windows)
    assert rounded.dtype == np.float32 and 0 < np.abs(rounded - everything).max() < 0.1
    windows[:, 2:] = backbone.config.pad_id
    cut = WindowEmbedder(backbone, EmbedSettings()).all(windows)
    windows[:, 2:] = windows[:, :1]  # what stands behind the end would count, were it not PAD
    assert t > 2 and not np.allclose(WindowEmbedder(backbone, EmbedSettings()).all(windows), cut)


def test_the_index_has_what_the_tokens_say(stages: Stages, embeddings: Path) -> None:
    tokens = {row["key"]: row for row in read_index(stages.tokens).to_pylist()}
    for row in load_embeddings(embeddings)[1].to_pylist():
        for name in ("clip_key", "video_id", "source", "start_s", "end_s", "split", "num_frames"):
            assert row[name] == tokens[row["sample_key"]][name]

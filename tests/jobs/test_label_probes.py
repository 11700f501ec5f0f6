"""Probes by the labels of a token dataset: which rows fit, choose and test, and that a signal in the codes is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.evaluation.label_probes import describe_labels, draw_splits, measure_labels, token_cells, token_histogram
from jobs.evaluation.probes import spread_windows
from models.vimpac import VimpacBackbone, VimpacConfig
from pipeline.dataset import create_or_resume, finish
from pipeline.ledger import Ledger
from pipeline.loader import WindowReader
from pipeline.shards import ShardWriter
from pipeline.storage import Store
from tests.pipeline.datasets import add_codes, describe, make_row

CONFIG = VimpacConfig(
    layers=2, hidden=16, heads=2, head_dim=8, mlp=32, num_frames=3, grid_height=4, grid_width=4, codebook_size=12
)
VIDEOS, CLIPS = 40, 2


@pytest.fixture(scope="module")
def backbones() -> tuple[VimpacBackbone, VimpacBackbone]:
    torch.manual_seed(0)
    return VimpacBackbone(CONFIG).eval(), VimpacBackbone(CONFIG).eval()


def make_reader(folder: Path, labels: list[str | None]) -> WindowReader:
    """Videos of three clips; a video's codes are of its label's third of the codebook. A quarter of them is `val`."""
    rng = np.random.default_rng(0)
    meta = create_or_resume(folder, describe())
    writer = ShardWriter(Store.at(folder), "tokens", meta.fingerprint, 0)
    for number, label in enumerate(labels):
        for clip in range(CLIPS):
            codes = rng.integers(4, size=(4, 4, 4)) + 4 * (number % 3)
            row = make_row(f"{number:016x}-{clip:09d}", 4, height=4, width=4, label=label)
            row["split"] = "val" if number % 4 == 0 else "train"
            add_codes(writer, row, codes.astype(np.uint16))
    writer.commit(len(labels) * CLIPS, [])
    finish(folder, meta, Ledger())
    return WindowReader(folder, "all", CONFIG.shape, CONFIG.pad_id)


def test_a_signal_in_the_codes_is_found_in_other_videos(tmp_path: Path, backbones) -> None:
    reader = make_reader(tmp_path / "tokens", ["abc"[number % 3] for number in range(VIDEOS)])
    found = measure_labels(*backbones, reader, max_clips=1000, batch_size=16)
    assert found["rows"] == {"train": 24 * CLIPS, "val": 6 * CLIPS, "test": 10 * CLIPS}
    assert {"linear", "knn", "attentive", "recall@1", "recall@5", "recall@10", "map"} == found.keys() - {"rows"}
    for name in ("linear", "knn", "recall@1"):
        assert found[name]["token_histogram"] == 1 and found[name]["chance"] < 0.5
    assert found["attentive"].keys().isdisjoint({"single_frame", "token_histogram"})
    for row in [row for name, row in found.items() if name != "rows"]:
        low, high = row["difference_interval"]
        assert low <= row["difference"] <= high
        assert row["difference"] == pytest.approx(row["pretrained"] - row["untrained"])
    section = describe_labels(found)
    assert section.table is not None and len(section.table.lines) == 7


def test_labels_that_say_nothing_give_chance(tmp_path: Path, backbones) -> None:
    labels = [str(label) for label in np.random.default_rng(1).integers(2, size=VIDEOS)]
    found = measure_labels(*backbones, make_reader(tmp_path / "tokens", labels), max_clips=70, batch_size=16)
    assert sum(found["rows"].values()) == 70 < VIDEOS * CLIPS
    for name in ("linear", "knn", "attentive"):
        assert found[name]["pretrained_interval"][0] < 0.6 and found[name]["pretrained"] < 0.8


@pytest.mark.parametrize("labels", [[None] * 8, ["a"] * 8, ["a", None, None, None, None, None, None, None]])
def test_nothing_is_measured_where_labels_allow_none(tmp_path: Path, backbones, labels: list) -> None:
    assert measure_labels(*backbones, make_reader(tmp_path / "tokens", labels), max_clips=10, batch_size=4) == {}


def test_splits_of_the_index_are_kept() -> None:
    videos = np.array([1, 1, 2, 2, 3, 4, 5])
    given = draw_splits(np.array(["train"] * 4 + ["val", "test", "test"]), videos)
    assert [part.tolist() for part in given] == [[0, 1, 2, 3], [4], [5, 6]]
    train, val, test = draw_splits(np.array(["train"] * 4 + ["val"] * 3), videos)
    assert test.tolist() == [4, 5, 6] and set(videos[train]) & set(videos[val]) == set()
    assert sorted([*train, *val]) == [0, 1, 2, 3]
    train, val, test = draw_splits(np.array(["train"] * 4 + ["test"] * 3), videos)
    assert test.tolist() == [4, 5, 6] and len(val) and sorted([*train, *val]) == [0, 1, 2, 3]


def test_windows_are_at_most_as_many_as_allowed_and_of_as_many_videos(tmp_path: Path) -> None:
    reader = make_reader(tmp_path / "tokens", ["a"] * VIDEOS)
    for allowed in (10, VIDEOS, 2 * VIDEOS):
        samples, _ = spread_windows(reader, CONFIG.num_frames, allowed)
        videos = {reader.index["video_id"][int(sample)].as_py() for sample in samples}
        assert len(samples) == allowed and len(videos) == min(allowed, VIDEOS)


def test_cells_are_means_of_tokens(backbones) -> None:
    config = VimpacConfig(
        layers=1, hidden=16, heads=2, head_dim=8, mlp=32, num_frames=2, grid_height=8, grid_width=8, codebook_size=12
    )
    backbone = VimpacBackbone(config).eval()
    windows = np.random.default_rng(0).integers(12, size=(3, 2, 8, 8)).astype(np.uint16)
    cells = token_cells(backbone, windows, batch_size=2)
    with torch.inference_mode():
        features = backbone(torch.from_numpy(windows.astype(np.int64)))
    assert cells.shape == (3, 1 + 2 * 16, 16)
    np.testing.assert_allclose(cells[:, 0], features.cls, atol=2e-3)
    np.testing.assert_allclose(cells[:, 1 + 16 + 5], features.tokens[:, 1, 2:4, 2:4].mean(dim=(1, 2)), atol=2e-3)


def test_a_histogram_leaves_padding_out() -> None:
    windows = np.array([[[[0, 3], [3, 3]]], [[[13, 13], [13, 13]]]], np.uint16)
    assert token_histogram(windows, 12).sum(axis=1).tolist() == [1, 0]
    assert token_histogram(windows, 12)[0, 3] == 0.75

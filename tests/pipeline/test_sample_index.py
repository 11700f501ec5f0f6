"""The cached index: the rows of the dataset's own, selected, shared by who selects alike, and never of other files."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import sample_index
from pipeline.dataset import create_or_resume, finish, read_index, read_meta
from pipeline.errors import DatasetError
from pipeline.ledger import Ledger
from pipeline.loader import select_rows
from pipeline.node_cache import CacheFull, NodeCache
from pipeline.quality import QualityThresholds
from pipeline.sample_index import SampleIndex, name_tar, open_index
from pipeline.storage import Store
from tests.pipeline.datasets import GRID, add_codes, describe, make_codes, make_row, make_token_dataset, open_writer

LENGTHS = [[9, 2, 4], [], [5, 30], [1]]


def open_it(folder: Path, cache: Path, split: Any = "all", max_bytes: int = 10**6, **keep: float) -> SampleIndex:
    thresholds = QualityThresholds(**keep)
    return open_index(
        Store.at(folder),
        read_meta(folder),
        NodeCache(cache, max_bytes),
        functools.partial(select_rows, split=split, keep=thresholds),
        selection={"split": split, "keep": thresholds.given()},
        columns=["split", *(f"score_{name[4:]}" for name in thresholds.given())],
    )


def cached(cache: Path) -> int:
    return len(list(cache.glob("index/*")))


def keys_of(index: SampleIndex) -> list[str]:
    return [key.decode() for key in index.rows["key"].tolist()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_token_dataset(tmp_path / "tokens", LENGTHS, splits=["val", *["train"] * 5])


@pytest.mark.parametrize("shards_at_a_time", [1, 3, 64])
def test_rows_are_those_of_the_dataset(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards_at_a_time: int
) -> None:
    monkeypatch.setattr(sample_index, "_SHARDS_AT_A_TIME", shards_at_a_time)
    index, table = open_it(folder, tmp_path / "cache"), read_index(folder)
    assert keys_of(index) == table["key"].to_pylist()
    for name in ("offset", "num_frames"):
        np.testing.assert_array_equal(index.rows[name], table[name].to_numpy())
    np.testing.assert_array_equal(index.shard_of_each, table["shard"].to_numpy())
    assert [name_tar(number) for number in index.rows["tar"]] == table["tar"].to_pylist()
    assert [(tar.shard, tar.split, tar.num_samples) for tar in index.tars] == [
        (0, "train", 2), (0, "val", 1), (2, "train", 2), (3, "train", 1),
    ]  # fmt: skip
    assert [tar.tar_bytes for tar in index.tars] == [
        (folder / name_tar(tar.number)).stat().st_size for tar in index.tars
    ]
    assert index.grids == (GRID,)


def test_a_row_is_one_cache_line() -> None:
    assert sample_index.ROW.itemsize == 64


def test_made_once_for_all_who_select_alike(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    train = keys_of(open_it(folder, cache, "train"))
    assert train == [f"{n:05d}" for n in range(1, 6)]
    assert keys_of(open_it(folder, cache, "val")) == ["00000"] and cached(cache) == 2
    monkeypatch.setattr(sample_index, "_build", None)  # who builds again fails
    assert keys_of(open_it(folder, cache, "train")) == train


def test_thresholds_select(tmp_path: Path) -> None:
    meta = create_or_resume(tmp_path / "tokens", describe())
    writer = open_writer(tmp_path / "tokens")
    for n, motion in enumerate((0.1, 0.5, None)):
        add_codes(writer, make_row(f"{n:05d}", score_motion=motion), make_codes(n, 3))
    writer.commit(3, [])
    finish(tmp_path / "tokens", meta, Ledger())
    cache = tmp_path / "cache"
    assert keys_of(open_it(tmp_path / "tokens", cache, min_motion=0.2)) == ["00001"]
    assert keys_of(open_it(tmp_path / "tokens", cache, min_motion=0.05)) == ["00000", "00001"]
    assert keys_of(open_it(tmp_path / "tokens", cache)) == ["00000", "00001", "00002"]
    assert cached(cache) == 3


def test_other_content_is_another_index(folder: Path, tmp_path: Path) -> None:
    assert len(open_it(folder, tmp_path / "cache").rows) == 6
    writer = open_writer(folder, 3)
    for n, length in ((5, 1), (6, 8)):
        add_codes(writer, make_row(f"{n:05d}", length), make_codes(n, length))
    writer.commit(2, [])
    with pytest.raises(DatasetError, match=r"not those that dataset.json sums up"):
        open_it(folder, tmp_path / "other")
    finish(folder, read_meta(folder), Ledger())
    assert len(open_it(folder, tmp_path / "cache").rows) == 7


def test_an_empty_selection(folder: Path, tmp_path: Path) -> None:
    index = open_it(folder, tmp_path / "cache", "test")
    assert len(index.rows) == 0 and index.grids == () and len(index.shard_of_each) == 0


def test_a_mapped_index_is_not_evicted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one index: the second comes when the first is let go."""
    monkeypatch.setattr(sample_index, "_ROOM_TIMEOUT_S", 0.0)
    held = open_it(folder, tmp_path / "cache", "train", max_bytes=6300)
    with pytest.raises(CacheFull):
        open_it(folder, tmp_path / "cache", "val", max_bytes=6300)
    del held
    assert keys_of(open_it(folder, tmp_path / "cache", "val", max_bytes=6300)) == ["00000"]
    assert cached(tmp_path / "cache") == 1


def test_damaged_and_foreign_indexes(folder: Path, tmp_path: Path) -> None:
    path = folder / "index/000002.parquet"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(DatasetError, match=r"index/000002.parquet is no tokenreel index"):
        open_it(folder, tmp_path / "cache")
    other = make_token_dataset(tmp_path / "other", LENGTHS, fingerprint="e" * 32)
    path.write_bytes((other / "index/000002.parquet").read_bytes())
    with pytest.raises(DatasetError, match=f"shard 000002 belongs to dataset {'e' * 32}"):
        open_it(folder, tmp_path / "cache")
    assert cached(tmp_path / "cache") == 0


def test_too_long_a_key(tmp_path: Path) -> None:
    meta = create_or_resume(tmp_path / "tokens", describe())
    writer = open_writer(tmp_path / "tokens")
    add_codes(writer, make_row("k" * 49), make_codes(0, 3))
    writer.commit(1, [])
    finish(tmp_path / "tokens", meta, Ledger())
    with pytest.raises(DatasetError, match="a key of 49 bytes; at most 48"):
        open_it(tmp_path / "tokens", tmp_path / "cache")

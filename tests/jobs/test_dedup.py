"""dedup from a dataset to the loader: copies go, the right one stays, and what is written says why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import dedup, recipes
from jobs.cli import run as run_command
from jobs.dedup import DedupConfig, find
from jobs.pretrain import make_loader
from jobs.result import JobResult
from pipeline.dataset import create_or_resume, finish, read_index, read_meta
from pipeline.errors import ConfigError, DatasetError
from pipeline.ledger import Ledger
from pipeline.loader import LoaderConfig, TokenLoader, WindowReader
from pipeline.near_duplicates import NearDuplicateConfig
from pipeline.storage import Store
from tests.pipeline.datasets import add_codes, describe, make_row, open_writer, shard_path
from tests.pipeline.scenes import CODEBOOK_SIZE, FPS, make_codes

SAMPLES: dict[str, tuple[np.ndarray, str]] = {
    **{f"a{scene}": (make_codes(scene), "train") for scene in range(8)},
    "b1": (make_codes(1, noise=0.02), "train"),  # as long as a1, which has the smaller key
    "b2": (make_codes(2, start_s=1, num_frames=40), "train"),  # longer than a2
    "b3": (make_codes(3, noise=0.02, num_frames=24), "val"),  # shorter, but of the validation split
    "still": (np.repeat(make_codes(4)[:1], 32, axis=0), "train"),
    "still2": (np.repeat(make_codes(4)[:1], 32, axis=0), "train"),
}


def make_dataset(folder: Path, samples: dict[str, tuple[np.ndarray, str]], num_shards: int = 3) -> Path:
    meta = create_or_resume(
        folder,
        describe(num_shards=num_shards, extra={"tokenizer": {"fingerprint": "t", "codebook_size": CODEBOOK_SIZE}}),
    )
    for shard in range(num_shards):
        writer = open_writer(folder, shard)
        own = sorted(samples)[shard::num_shards]
        for key in own:
            codes, split = samples[key]
            grid = {"height": 16, "width": 16, "fps": FPS, "end_s": len(codes) / FPS}
            add_codes(writer, make_row(key, len(codes), split=split, **grid), codes)
        writer.commit(len(own), [])
    finish(folder, meta, Ledger())
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dedup") / "tokens", SAMPLES)


@pytest.fixture(scope="module", autouse=True)
def mlflow(mlflow_uri: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
        yield


@pytest.fixture(scope="module")
def result(tokens: Path) -> JobResult:
    return dedup.run(DedupConfig(tokens=str(tokens)))


def read_groups(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(folder / "groups.parquet").to_pylist()}


def test_views_of_a_clip_stay_or_go_together(tmp_path: Path) -> None:
    """A second view of a clip is no near-duplicate of the first, and goes where that goes."""
    clips = {key: codes for key, (codes, _) in SAMPLES.items() if key in ("a0", "a1", "b1")}
    meta = create_or_resume(
        tmp_path, describe(extra={"tokenizer": {"fingerprint": "t", "codebook_size": CODEBOOK_SIZE}})
    )
    writer = open_writer(tmp_path)
    for key, codes in sorted(clips.items()):
        for view in ("128c", "128cf"):
            grid = {"height": 16, "width": 16, "fps": FPS, "end_s": len(codes) / FPS, "clip_key": key, "view": view}
            add_codes(writer, make_row(f"{key}-{view}", len(codes), **grid), codes)
    writer.commit(6, [])
    finish(tmp_path, meta, Ledger())
    figures = dedup.run(DedupConfig(tokens=str(tmp_path))).figures
    assert (figures["samples"], figures["duplicates"]) == (3, 1)
    kept = pq.read_table(tmp_path / "dedup" / "keep.parquet")["key"].to_pylist()
    assert kept == [f"{key}-128c{flip}" for key in ("a0", "a1") for flip in ("", "f")]


def test_figures(tokens: Path, result: JobResult) -> None:
    figures = result.figures
    assert (figures["samples"], figures["duplicates"], figures["groups"]) == (13, 3, 3)
    assert figures["duplicate_share"] == pytest.approx(3 / 13, abs=1e-6)
    assert figures["across_splits"] == 1 and figures["crowded_keys"] == 0
    assert (result.planned, result.committed, result.filtered) == (13, 10, 3)
    assert result.fingerprint == read_meta(tokens).fingerprint
    assert result.out == str(tokens / "dedup")


def test_groups_say_who_stays_and_why(tokens: Path, result: JobResult) -> None:
    groups = read_groups(tokens / "dedup")
    reasons = {key: row["duplicate_of"] for key, row in groups.items()}
    assert reasons == {"a1": None, "b1": "a1", "a2": "b2", "b2": None, "a3": "b3", "b3": None}
    assert {key: row["group"] for key, row in groups.items()} == {key: reasons[key] or key for key in groups}
    assert all(row["kept"] == (row["duplicate_of"] is None) == (row["score"] is None) for row in groups.values())
    assert groups["b1"]["score"] >= NearDuplicateConfig().min_score
    assert groups["a2"]["offset_s"] == pytest.approx(-1, abs=0.25)  # it begins a second before b2 does
    assert groups["b1"]["offset_s"] == pytest.approx(0, abs=0.25)
    assert groups["b3"]["split"] == "val"


def test_the_loader_applies_the_keep_list(tokens: Path, result: JobResult) -> None:
    keep_list = tokens / "dedup" / "keep.parquet"
    window = (4, 16, 16)
    loader = TokenLoader(
        tokens, LoaderConfig(batch_size=9, keep_list=keep_list), window=window, num_views=1, pad=999, rank=0, world_size=1
    )  # fmt: skip
    assert len(loader) == 9
    assert sorted(loader.batch(0)["keys"]) == sorted(SAMPLES.keys() - {"b1", "a2", "a3", "b3"})
    reader = WindowReader(tokens, "val", window, 999, keep_list=keep_list)
    assert reader.read_keys(np.arange(len(reader))) == ["b3"]
    assert len(WindowReader(tokens, "all", window, 999)) == 13


def test_pretrain_takes_the_keep_list(tokens: Path, result: JobResult) -> None:
    """The loader of a run sees the file through its config."""
    recipe = recipes.debug()
    backbone = replace(recipe.backbone, codebook_size=CODEBOOK_SIZE)
    loader = replace(recipe.loader, batch_size=2, keep_list=tokens / "dedup" / "keep.parquet")
    config = replace(recipe, tokens=str(tokens), backbone=backbone, loader=loader)
    assert len(make_loader(config, rank=0, world_size=1)) == 9


def test_the_same_command_writes_the_same_bytes(tokens: Path, result: JobResult, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (tokens / "dedup").glob("*.parquet")}
    again = dedup.run(DedupConfig(tokens=str(tokens), out=str(tmp_path / "out")))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")} == before
    assert again.mlflow_run_id and again.mlflow_run_id != result.mlflow_run_id
    assert not (tmp_path / "out" / ".keys").exists()


class TestFind:
    def scores(self, tokens: Path, folder: Path, **settings: Any) -> dict[tuple[str, str], float]:
        index = read_index(tokens)
        found = find(Store.at(tokens), read_meta(tokens), index, NearDuplicateConfig(**settings), folder / "keys")
        keys = index["key"].to_pylist()
        return {(keys[a], keys[b]): score for (a, b), score in zip(found.pairs.tolist(), found.scores, strict=True)}

    def test_it_learns_from_as_many_samples_as_it_is_told(self, tokens: Path, tmp_path: Path) -> None:
        assert self.scores(tokens, tmp_path) != self.scores(tokens, tmp_path, learn_samples=3)

    def test_no_samples(self, tmp_path: Path) -> None:
        assert self.scores(make_dataset(tmp_path / "none", {}, num_shards=1), tmp_path) == {}

    def test_a_cut_off_shard(self, tmp_path: Path) -> None:
        tokens = make_dataset(tmp_path / "cut", dict(list(SAMPLES.items())[:2]), num_shards=1)
        os.truncate(shard_path(tokens, 0), 30_000)
        with pytest.raises(DatasetError, match="a1 is cut off; run `tokenreel verify"):
            self.scores(tokens, tmp_path)


def test_bad_use(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="is not a dataset"):
        dedup.run(DedupConfig(tokens=str(tmp_path)))
    with pytest.raises(ConfigError, match="holds a dataset; choose another folder"):
        dedup.run(DedupConfig(tokens=str(tokens), out=str(tokens)))
    assert run_command(["dedup", str(tokens), str(tmp_path / "out"), "--min-score", "2"]) == 2
    assert "min_score = 2.0" in capsys.readouterr().out

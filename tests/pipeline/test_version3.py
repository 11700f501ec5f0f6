"""Datasets in the format before this one, as that release wrote them: they can be read, and nothing is added to them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs import verify as jobs_verify
from jobs.config import load_config
from jobs.shard import ShardConfig
from jobs.token_origin import settings_of
from jobs.verify import VerifyConfig
from pipeline import schema
from pipeline.clips import ClipConfig
from pipeline.dataset import create_or_resume, read_index, read_meta
from pipeline.decode import FrameConfig
from pipeline.errors import ConfigError
from pipeline.frames import FrameLoader, FrameLoaderConfig
from pipeline.loader import CacheConfig, LoaderConfig, TokenLoader
from pipeline.schema import CLIP_SCHEMA, TOKEN_SCHEMA, fingerprint
from pipeline.sharding import ShardSettings
from pipeline.shards import read_payload, read_shard_columns, read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings
from pipeline.verify import verify

DATA = Path(__file__).parents[1] / "data" / "version3"


@pytest.fixture
def version3(tmp_path: Path) -> Path:
    """The clip dataset `clips` and the token dataset `tokens` that was made from it."""
    return Path(shutil.copytree(DATA, tmp_path / "version3"))


@pytest.mark.parametrize(("kind", "columns"), [("clips", CLIP_SCHEMA.names), ("tokens", TOKEN_SCHEMA.names)])
def test_columns_that_the_format_lacked_are_null(version3, kind, columns, monkeypatch):
    newer = {name: one.append(schema.pa.field("new", schema.pa.int32())) for name, one in _schemas().items()}
    monkeypatch.setattr("pipeline.shards.INDEX_SCHEMAS", newer)
    store = Store.at(version3 / kind)
    rows = read_shard_rows(store, 0)
    assert set(rows[0]) == {*columns, "new", "shard", "tar"}
    assert [row["new"] for row in rows] == [None] * len(rows)
    assert read_index(store)["new"].null_count == len(rows)
    assert read_index(store, ["key", "new"])["new"].null_count == len(rows)
    assert read_shard_columns(store, 0, ["new", "key"])[1].column_names == ["new", "key", "shard", "tar"]
    for row in rows:
        assert len(read_payload(store, row)) == row["size"]


def _schemas():
    from pipeline import shards

    return shards.INDEX_SCHEMAS


def test_the_loaders_read_one_split_of_its_mixed_shards(version3, tmp_path):
    config = LoaderConfig(batch_size=5, cache=CacheConfig(folder=tmp_path / "cache"))
    loader = TokenLoader(version3 / "tokens", config, window=(2, 2, 2), num_views=1, pad=16, rank=0, world_size=1)
    batch = loader.batch(0)
    index = read_index(version3 / "tokens").to_pylist()
    assert sorted(batch["keys"]) == [row["key"] for row in index if row["split"] == "train"]
    assert {row["split"] for row in index} == {"train", "val"}
    assert int(batch["tokens"].max()) < 16
    frames = FrameLoaderConfig(frames=FrameConfig(fps=5.0, size_px=32), batch_size=4, frames_per_clip=4, split="val")
    assert np.ptp(FrameLoader(version3 / "clips", frames, rank=0, world_size=1).batch(0)["frames"].numpy()) > 0


@pytest.mark.parametrize("kind", ["clips", "tokens"])
def test_a_resume_names_the_command_that_makes_it_anew(version3, kind):
    folder = version3 / kind
    meta, before = read_meta(folder, complete=True), (folder / "dataset.json").read_bytes()
    assert meta.schema_version == 3
    job = {"clips": "tokenreel shard CORPUS OUT", "tokens": "tokenreel tokenize CLIPS OUT"}[kind]
    with pytest.raises(ConfigError, match=rf"version 3.*another folder.*{job} --config {folder}/config.json"):
        create_or_resume(folder, replace(meta, schema_version=schema.SCHEMA_VERSION))
    assert (folder / "dataset.json").read_bytes() == before


def test_an_unknown_format_names_those_that_are_read(version3):
    path = version3 / "clips" / "dataset.json"
    path.write_text(path.read_text().replace('"schema_version": 3', '"schema_version": 5'))
    with pytest.raises(ConfigError, match="schema version 5; this tokenreel reads 3 and 4"):
        read_meta(path.parent)


def test_identities_of_runs_models_and_caches_are_those_of_the_release_before():
    assert fingerprint(runs=["a", "b"]) == "f6f1e5f1a896071f172dad90b974c18f"
    assert schema.identify_dataset(kind="clips", inputs="i", config={}) != fingerprint(
        kind="clips", inputs="i", config={}
    )


def test_verify_names_the_short_clips(version3):
    """Low timescale, remuxed: most pictures of these clips are missing, and their index did not say so."""
    short = [row["key"] for row in read_index(version3 / "clips").to_pylist() if row["source"] == "low.mp4"]
    found = [problem.text for problem in verify(version3 / "clips")]
    assert len(found) == len(short) == 3
    for key, text, frames in zip(short, found, (27, 30, 25), strict=True):
        assert f"clip {key} of low.mp4 is short: it holds 10 pictures of the {frames}" in text
    assert list(verify(version3 / "tokens", version3 / "clips")) == []


@pytest.mark.parametrize("kind", ["clips", "tokens"])
def test_repair_refuses_and_names_the_command(version3, kind):
    tar = version3 / kind / "shards" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    before = {path: path.read_bytes() for path in version3.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"schema version 3.*Make the dataset anew in another folder.*--config"):
        jobs_verify.run(VerifyConfig(dataset=str(version3 / kind), repair=True))
    assert {path: path.read_bytes() for path in version3.rglob("*") if path.is_file()} == before


def test_shards_that_were_exchanged_are_found(version3):
    """Format 3 does not say which shard an index is of; the digest over all of them does."""
    folder = make_two_shards(version3 / "clips")
    assert "its shards are not those that dataset.json sums up" in " ".join(one.text for one in verify(folder))


def make_two_shards(folder: Path) -> Path:
    """The dataset with its one shard twice, which `dataset.json` does not sum up."""
    for path in list(folder.glob("*/000000.*")):
        shutil.copy(path, path.with_name(path.name.replace("000000", "000001")))
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace('"num_shards": 1', '"num_shards": 2'))
    return folder


def test_the_command_that_makes_it_anew_is_taken(version3):
    """Its config.json says 0 and "" for what is left to tokenreel; these are no values any more."""
    config = load_config(version3 / "clips" / "config.json", ShardConfig)
    assert config == ShardConfig(corpus="corpus", out="clips", settings=config.settings)
    assert config.settings == ShardSettings(
        clips=ClipConfig(mode="window", window_s=1.0), storage="remux", videos_per_shard=3, val_fraction=0.35
    )
    assert settings_of(read_meta(version3 / "tokens")) == TokenizeSettings(
        frames=FrameConfig(fps=5.0, size_px=32, pick="nearest")
    )

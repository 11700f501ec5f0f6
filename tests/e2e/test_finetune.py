"""Fine-tuning and its test as jobs: on two workers, from a pre-trained run, with lineage and a registered model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow.parquet import read_table

from jobs import evaluate, finetune
from jobs.checkpoint import list_checkpoints
from jobs.evaluate import EvaluateConfig
from jobs.evaluation import predictions
from jobs.evaluation.classification import ClassifyConfig
from jobs.evaluation.predictions import Predictor
from jobs.journal import read_journal
from jobs.model_folder import load_classifier
from jobs.workers import WorkersConfig
from pipeline.dataset import read_index, read_meta
from pipeline.labelled import LabelledConfig
from tests.conftest import Stages
from tests.jobs.labelled_tokens import CLASSES, NETWORK, make_config, make_labelled_tokens


def test_a_classifier_from_a_pretrained_run(
    stages: Stages, mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pytorch
    from mlflow.tracking import MlflowClient

    tokenizer = read_meta(stages.tokens).extra["tokenizer"]["fingerprint"]
    tokens = make_labelled_tokens(
        tmp_path / "tokens", {"train": 8, "val": 3, "test": 4}, grid=(8, 8), views=("",), tokenizer=tokenizer
    )
    manifest = tmp_path / "splits.csv"  # says what the tokens say
    named = read_index(tokens, ["source", "label", "split"]).to_pylist()
    lines = [f"{row['source']},{row['label']},{row['split']}\n" for row in named]
    manifest.write_text("video,label,split\n" + "".join(lines))
    config = make_config(
        tokens,
        tmp_path / "run",
        from_run=stages.model,
        epochs=12.0,
        loader=LabelledConfig(batch_size=12, fps=8.0, splits=manifest),
        backbone=replace(NETWORK, grid_height=8, grid_width=8),
        workers=WorkersConfig(num_workers=2),
        register_as="tokenreel-classifier-test",
    )
    result = finetune.run(config)
    assert (result.status, result.planned, result.committed) == ("done", 24, 24)  # 12 epochs of 24 clips, 12 a batch
    accuracies = {
        row["step"]: row["val_accuracy"] for row in read_journal(config.out / "metrics.jsonl") if "val_accuracy" in row
    }
    assert accuracies.keys() == {8, 16, 24}
    assert result.figures["last_val_accuracy"] == accuracies[24] and result.figures["classes"] == 3
    assert result.figures["best_val_accuracy"] == max(accuracies.values())
    before = list_checkpoints(config.out)
    again = replace(config, register_as="")
    assert finetune.run(again).fingerprint == result.fingerprint and list_checkpoints(config.out) == before

    client = MlflowClient(mlflow_uri)
    tags = client.get_run(result.mlflow_run_id).data.tags
    assert stages.results["pretrain"].mlflow_run_id in tags["tokenreel.parent_run_id"]
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()[:32]
    parents = ["f" * 32, stages.results["pretrain"].fingerprint, digest]
    assert tags["tokenreel.parent_fingerprint"].split(",") == parents
    codes = torch.randint(64, (2, *NETWORK.shape[:1], 8, 8))
    theirs = mlflow.pytorch.load_model("models:/tokenreel-classifier-test@final")(codes)
    with torch.inference_mode():
        expected = load_classifier(config.out / "model").logits(codes).softmax(-1)
    np.testing.assert_allclose(theirs.detach(), expected, atol=1e-5)

    tested = evaluate.run(EvaluateConfig(run=config.out, batch_size=16))
    figures = tested.figures
    assert figures["top1_low"] <= figures["top1"] <= figures["top1_high"]
    assert (tested.planned, figures["clips"], figures["num_clips"], figures["split"]) == (12, 12, 2, "test")
    metrics = client.get_run(tested.mlflow_run_id).data
    assert metrics.metrics["top1"] == figures["top1"]
    assert metrics.tags["tokenreel.parent_run_id"].split(",")[0] == result.mlflow_run_id
    files = {file.path.rpartition("/")[2] for file in client.list_artifacts(tested.mlflow_run_id)}
    assert files >= {"report.html", "results.json", "confusion.png", "predictions.parquet"}

    # The same run as another split: the mean of two equal runs is either.
    other = shutil.copytree(config.out, tmp_path / "other", ignore=shutil.ignore_patterns("evaluation", "mlflow*"))
    options = ClassifyConfig(split="val", select="last", num_clips=1)
    both = evaluate.run(EvaluateConfig(run=config.out, more_runs=(other,), classify=options))
    assert both.figures["top1"] == pytest.approx(result.figures["last_val_accuracy"])
    assert both.figures["top1_std"] == 0 and both.planned == 18
    report = json.loads(Path(both.figures["report"]).read_text())
    assert [one["split"] for one in report["each"]] == ["val", "val"] and report["each"][0]["num_clips"] == 1
    assert json.loads((config.out / "evaluation" / "results.json").read_text())["split"] == "test"  # as it was
    assert load_classifier(config.out / "model").classes == CLASSES

    # Copies on Ray, one of which dies, say the same as the one in this process.
    alone = evaluate.run(EvaluateConfig(run=config.out, batch_size=1)).figures
    before_kill = read_table(config.out / "evaluation" / "predictions.parquet")
    marker = tmp_path / "died"
    monkeypatch.setattr(predictions, "Predictor", dying_once(marker))
    monkeypatch.chdir(tmp_path)
    options = ClassifyConfig(num_models=2)
    beside = evaluate.run(EvaluateConfig(run=Path("run"), tokens="tokens", batch_size=1, classify=options)).figures
    assert marker.exists()
    after_kill = read_table(config.out / "evaluation" / "predictions.parquet")
    assert after_kill["key"] == before_kill["key"] and after_kill["predicted"] == before_kill["predicted"]
    np.testing.assert_allclose(after_kill["confidence"], before_kill["confidence"], atol=1e-6)
    assert beside["top1"] == alone["top1"]


def dying_once(marker: Path) -> type[Predictor]:
    """A predictor whose process dies at the third part that it gets, once in the life of `marker`."""

    class Dying(Predictor):
        parts = 0

        def predict(self, numbers: np.ndarray) -> np.ndarray:
            self.parts += 1
            if self.parts == 3 and not marker.exists():
                marker.touch()
                os._exit(1)
            return super().predict(numbers)

    return Dying

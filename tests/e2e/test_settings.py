"""Settings of whole jobs: each changes what it says, and nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import evaluate, pretrain, tokenize
from jobs.evaluate import EvaluateConfig
from jobs.mlflow_store import open_client
from jobs.training import TrainingFailed, read_run_fingerprint
from jobs.workers import WorkersConfig
from pipeline.errors import ConfigError
from pipeline.shards import to_parquet
from tests.conftest import Stages, small_pretrain_config, small_tokenize_config
from tests.e2e.test_kill_and_resume import dataset_files


def test_more_encoders_make_the_same_tokens(stages: Stages, tmp_path: Path) -> None:
    config = small_tokenize_config(stages.clips, tmp_path / "tokens", stages.tokenizer)
    result = tokenize.run(replace(config, num_encoders=2))
    assert result.figures["tokens"] == stages.results["tokenize"].figures["tokens"]
    assert dataset_files(tmp_path / "tokens") == dataset_files(stages.tokens)


def test_gpus_that_the_cluster_lacks_are_refused_by_number(stages: Stages, tmp_path: Path) -> None:
    config = small_pretrain_config(stages.tokens, tmp_path / "run")
    with pytest.raises(ConfigError, match="2 GPU workers asked for; the cluster has 0"):
        pretrain.run(replace(config, workers=WorkersConfig(num_workers=2, device="gpu")))


def test_a_run_without_failures_to_spare_says_why_it_ended(stages: Stages, tmp_path: Path) -> None:
    tokens = shutil.copytree(stages.tokens, tmp_path / "tokens")
    for shard in (tokens / "shards").glob("*.tar"):
        shard.write_bytes(b"")
    config = small_pretrain_config(tokens, tmp_path / "run")
    with pytest.raises(TrainingFailed, match=r"is cut off; run `tokenreel verify"):
        pretrain.run(replace(config, workers=WorkersConfig(num_workers=2, max_failures=0)))


def test_a_run_that_was_made_with_other_settings_is_refused_by_name(stages: Stages) -> None:
    config = small_pretrain_config(stages.tokens, stages.model)
    with pytest.raises(ConfigError, match=r"optim\.lr = 0\.004 \(now 0\.1\)"):
        pretrain.run(replace(config, optim=replace(config.optim, lr=0.1)))


def test_evaluation_probes_labels_where_there_are_some(stages: Stages, mlflow_uri: str, tmp_path: Path) -> None:
    tokens = Path(shutil.copytree(stages.tokens, tmp_path / "tokens"))
    model = shutil.copytree(stages.model, tmp_path / "model", ignore=shutil.ignore_patterns("evaluation", "mlflow*"))
    count = 0
    for path in sorted((tokens / "index").glob("*.parquet")):  # as if every clip were a video, and had a label
        table = pq.read_table(path)
        places = range(count, count + len(table))
        count += len(table)
        columns = {
            "label": ["even" if place % 2 else "odd" for place in places],
            "video_id": [f"{place:016x}" for place in places],
        }
        for name, texts in columns.items():
            table = table.set_column(table.column_names.index(name), name, pa.array(texts))
        path.write_bytes(to_parquet(table))
    config = EvaluateConfig(run=model, tokens=str(tokens), max_windows=4)
    result = evaluate.run(config)
    labels = result.figures["labels"]
    assert sum(labels["rows"].values()) == count and labels.keys() >= {"linear", "attentive", "knn"}
    for name in ("pretrained", "untrained", "single_frame", "token_histogram", "chance"):
        assert 0 <= labels["linear"][name] <= 1
    assert json.loads((model / "evaluation" / "results.json").read_text())["labels"] == labels
    page = Path(result.figures["contact_sheet"]).read_text()
    assert "Labels on frozen features" in page and "<td>attentive</td>" in page
    logged = open_client(mlflow_uri).get_run(result.mlflow_run_id).data.metrics
    assert logged["label_linear_pretrained"] == pytest.approx(labels["linear"]["pretrained"])


def test_what_evaluation_measures_on(stages: Stages, tmp_path: Path, mlflow_uri: str) -> None:
    tokens = shutil.copytree(stages.tokens, tmp_path / "tokens")
    model = shutil.copytree(stages.model, tmp_path / "model", ignore=shutil.ignore_patterns("evaluation", "mlflow*"))
    config = EvaluateConfig(run=model, tokens=str(tokens), max_windows=4, batch_size=3)
    result = evaluate.run(config)
    few = result.figures
    logged = open_client(mlflow_uri).get_run(result.mlflow_run_id)
    assert read_run_fingerprint(model)[:36] in {one.dataset.digest for one in logged.inputs.dataset_inputs}
    again = evaluate.run(replace(config, batch_size=32)).figures
    more = evaluate.run(replace(config, max_windows=16)).figures
    assert few["masked_token_accuracy"] == pytest.approx(again["masked_token_accuracy"], abs=0.02)
    assert few["masked_tokens"] == again["masked_tokens"] < more["masked_tokens"]
    assert few["probes"]["speed"]["tested"] < more["probes"]["speed"]["tested"]
    described = json.loads((tokens / "dataset.json").read_text())
    described["extra"]["tokenizer"]["fingerprint"] = "0" * 32
    (tokens / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="was trained on other codes"):
        evaluate.run(config)

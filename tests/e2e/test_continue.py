"""A second stage as a job: its source counts as an input, and the same command runs again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import pretrain
from jobs.checkpoint import list_checkpoints
from jobs.journal import read_journal
from pipeline.dataset import read_meta
from pipeline.errors import ConfigError
from tests.conftest import Stages, small_pretrain_config


def test_a_run_continues_another(stages: Stages, tmp_path: Path) -> None:
    config = small_pretrain_config(stages.tokens, tmp_path / "two")
    config = replace(
        config,
        loop=replace(config.loop, steps=10),
        continue_from=stages.model,
        register_as="",
        workers=replace(config.workers, num_workers=1),
    )
    result = pretrain.run(config)
    assert (result.status, result.committed, result.planned) == ("done", 10, 10)
    assert [row["step"] for row in read_journal(config.out / "metrics.jsonl") if "loss" in row] == [9, 10]
    inputs = json.loads((config.out / "run.json").read_text())["inputs"]
    tokens = f"{stages.results['tokenize'].fingerprint} {read_meta(stages.tokens).content}"
    assert inputs == [tokens, stages.results["pretrain"].fingerprint]
    assert (config.out / "model" / "model.safetensors").exists()

    before = list_checkpoints(config.out)
    assert pretrain.run(config).fingerprint == result.fingerprint
    assert list_checkpoints(config.out) == before
    with pytest.raises(ConfigError, match="inputs"):  # this folder's run began elsewhere
        pretrain.run(replace(config, continue_from=None))

"""kill -9 in the middle of a job, then the same command again: the result is that of an unbroken run."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import pretrain
from jobs.config import save_config
from jobs.journal import read_journal
from pipeline.dataset import read_meta
from tests.conftest import Stages, small_pretrain_config, small_shard_config, small_tokenize_config
from tests.e2e.command import kill_command, run_command
from tests.e2e.training import find_train_worker


def dataset_files(folder: Path) -> dict[str, bytes]:
    """Everything that a dataset consists of, by relative path; what the job wrote beside it (logs, MLflow) is not it."""
    parts = [path for part in ("shards", "index", "rejects") for path in (folder / part).iterdir()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in parts}


def committed(out: Path) -> int:
    return len(list((out / "index").glob("*.parquet")))


@pytest.mark.parametrize("job", ["shard", "tokenize"])
def test_a_killed_data_job_resumes_to_identical_bytes(job: str, stages: Stages, cluster: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if job == "shard":
        whole, config = stages.clips, small_shard_config(stages.corpus, out)
    else:
        whole, config = stages.tokens, small_tokenize_config(stages.clips, out, stages.tokenizer)
    command = (job, "--config", save_config(tmp_path / "config", config))
    kill_command(*command, cwd=tmp_path, address=cluster, when=lambda: committed(out) >= 1)
    left = committed(out)
    assert 1 <= left < committed(whole), "the kill came too late to prove anything"
    result = run_command(*command, cwd=tmp_path, address=cluster)
    assert result["planned"] == result["committed"] + result["filtered"] + result["rejected"]
    ours, theirs = dataset_files(out), dataset_files(whole)
    assert ours == theirs
    assert read_meta(out).totals == read_meta(whole).totals
    assert read_meta(out).fingerprint == read_meta(whole).fingerprint


def test_a_killed_training_run_resumes_to_identical_losses(stages: Stages, cluster: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = small_pretrain_config(stages.tokens, out)
    command = ("pretrain", "debug", "--config", save_config(tmp_path / "config", replace(config, register_as="")))
    journal = out / "metrics.jsonl"
    kill_command(
        *command, cwd=tmp_path, address=cluster, when=lambda: any(row["step"] >= 5 for row in read_journal(journal))
    )
    assert not (out / "checkpoints" / "00000008").exists(), "the kill came too late to prove anything"
    result = run_command(*command, cwd=tmp_path, address=cluster)
    unbroken = stages.results["pretrain"]
    assert result["keys_digest"] == unbroken.figures["keys_digest"]
    assert losses(journal) == losses(stages.model / "metrics.jsonl")
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = Path("checkpoints") / "00000008" / name
        assert (out / last).read_bytes() == (stages.model / last).read_bytes()


def losses(journal: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_journal(journal)]


def test_a_killed_worker_is_replaced_and_changes_no_loss(stages: Stages, cluster: str, tmp_path: Path) -> None:
    """One of two workers dies; the job itself goes on from its last checkpoint, and nobody has to run it again."""
    out = tmp_path / "out"
    config = replace(small_pretrain_config(stages.tokens, out), register_as="")
    journal = out / "metrics.jsonl"
    killed = threading.Event()

    def kill_one() -> None:
        while not any(row["step"] >= 5 for row in read_journal(journal)):
            time.sleep(0.01)
        find_train_worker().kill()
        killed.set()

    threading.Thread(target=kill_one, daemon=True).start()
    result = pretrain.run(config)
    assert killed.is_set()
    assert result.status == "done"
    assert losses(journal) == losses(stages.model / "metrics.jsonl")

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest

from jobs.spool import SPOOL_NAME
from jobs.status import StatusConfig, find_jobs, read_status, run
from pipeline.errors import ConfigError
from tests.conftest import Stages


def test_every_job_of_a_project(stages: Stages, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    project = stages.clips.parent
    jobs = {one["job"]: one for one in run(StatusConfig(project=project)).figures["jobs"] if one["job"] != "evaluate"}
    assert jobs.keys() == {"shard", "train-tokenizer", "tokenize", "pretrain"}
    assert {one["state"] for one in jobs.values()} == {"finished"}
    assert (jobs["pretrain"]["done"], jobs["pretrain"]["total"], jobs["pretrain"]["unit"]) == (8, 8, "steps")
    assert jobs["shard"]["done"] == jobs["shard"]["total"] == len(list((stages.clips / "index").iterdir()))
    assert jobs["shard"]["rejected"] == stages.results["shard"].rejected
    run_id = stages.results["shard"].mlflow_run_id
    link = jobs["shard"]["mlflow"]
    assert link.startswith("http://127.0.0.1:5000/#/experiments/") and link.endswith(f"/runs/{run_id}")
    assert "/experiments/0/" not in link, "the run's own experiment"
    assert "8 of 8 steps (100%)" in caplog.text and link in caplog.text


def test_how_a_job_stands_that_has_not_ended(stages: Stages, tmp_path: Path) -> None:
    clips = shutil.copytree(stages.clips, tmp_path / "clips")
    spool = json.loads((clips / SPOOL_NAME).read_text())
    (clips / SPOOL_NAME).write_text(json.dumps({**spool, "ending": None}))
    next((clips / "index").iterdir()).unlink()
    status = read_status(clips)
    assert (status.state, status.done) == ("running", status.total - 1)
    for path in clips.glob("*.json*"):
        os.utime(path, (time.time() - 300, time.time() - 300))
    status = read_status(clips)
    assert status.state == "lost" and 290 < status.age_s < 600


def test_damaged_and_foreign_files_are_no_reason_to_fail(tmp_path: Path) -> None:
    for name in ("a/shards", "c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / SPOOL_NAME).write_text("{half")
    (tmp_path / "a" / "dataset.json").write_text("{half")
    (tmp_path / "a" / "shards" / SPOOL_NAME).write_text("{}")  # inside a dataset is no job
    (tmp_path / "c" / SPOOL_NAME).write_text("{}")
    assert [folder.name for folder in sorted(find_jobs(tmp_path))] == ["a", "c"]
    jobs = run(StatusConfig(project=tmp_path)).figures["jobs"]
    assert [(one["job"], one["state"], one["done"], one["mlflow"]) for one in jobs] == [("?", "running", None, "")] * 2


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        run(StatusConfig(project=tmp_path / "nowhere"))

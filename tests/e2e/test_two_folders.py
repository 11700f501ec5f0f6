"""Two users type the same relative paths in two folders, at the same time; each gets what is his."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from jobs.config import to_plain
from jobs.journal import read_journal
from jobs.mlflow_store import open_client
from jobs.spool import STATE_NAME
from jobs.workers import WorkersConfig
from tests.e2e.command import start_command
from tests.e2e.training import make_config, make_tokens

STEPS = 6


def test_each_run_has_its_own_metrics(cluster: str, mlflow_uri: str, tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "tokens")
    # As a person would write it by hand: relative, and the same in both folders.
    plain = to_plain(make_config(Path("tokens"), Path("model"), WorkersConfig(), steps=STEPS, save_every_steps=3))
    (tmp_path / "settings.json").write_text(json.dumps(plain))
    folders = [tmp_path / name for name in ("first", "second")]
    jobs = []
    for seed, folder in enumerate(folders):
        shutil.copytree(tokens, folder / "tokens")
        (folder / "settings.json").write_text(json.dumps(plain))
        words = ["--config", "settings.json", "--loop.seed", str(seed)]
        jobs.append(start_command("pretrain", *words, cwd=folder, address=cluster))
    results = [json.loads(job.communicate(timeout=240)[0].splitlines()[-1]) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], results
    assert [Path(result["out"]) for result in results] == [folder / "model" for folder in folders]
    client, curves = open_client(mlflow_uri), []
    for folder, result in zip(folders, results, strict=True):
        run = folder / "model"
        run_id = json.loads((run / STATE_NAME).read_text())["run_id"]
        assert run_id == result["mlflow_run_id"] and client.get_run(run_id).data.tags["tokenreel.out"] == str(run)
        losses = [row["loss"] for row in read_journal(run / "metrics.jsonl")]
        assert [one.value for one in client.get_metric_history(run_id, "loss")] == losses
        assert json.loads((run / "config.json").read_text())["tokens"] == str(folder / "tokens")
        curves.append(losses)
    assert len(curves[0]) == STEPS and curves[0] != curves[1]

    # The saved config is the same run, wherever it is read.
    job = start_command("pretrain", "--config", "../first/model/config.json", cwd=folders[1], address=cluster)
    again = json.loads(job.communicate(timeout=240)[0].splitlines()[-1])
    assert (again["out"], again["mlflow_run_id"]) == (results[0]["out"], results[0]["mlflow_run_id"])

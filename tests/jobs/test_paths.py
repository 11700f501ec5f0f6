"""Paths behind the command line are absolute, whatever folder the process, or a reader of its config, is in."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from jobs import cli
from jobs.config import load_config, save_config
from jobs.mlflow_store import resolve_tracking_uri
from jobs.paths import absolute_paths
from jobs.result import JobResult
from jobs.workers import WorkersConfig
from pipeline.loader import LoaderConfig

COMMANDS = {
    "shard": "videos/*.mp4 clips --root videos --plan plan.json",
    "tokenize": "clips tokens --tokenizer run --plan plan.json",
    "train-tokenizer": "clips run --workers.mirror mirror --perceptual dvae --objective.perceptual-weight 0.1",
    "pretrain": "debug --tokens tokens --out run --continue-from old --loader.keep-list keep.txt --loader.cache.folder cache",
    "finetune": "debug tokens run --from-run old --loader.splits splits.parquet",
    "embed": "tokens run embeddings",
    "evaluate": "run more --tokens tokens",
    "dedup": "tokens keep",
    "verify": "clips",
    "inspect": "clips --page page.html",
    "plan": "videos --save plan.json --tokenizer run --cluster spec.toml --speeds speeds.json --root videos",
    "doctor": "--out out",
    "demo": "--out demo --corpus videos",
    "status": "project",
    "manifest": "ucf101 videos ucf101.csv",
    "import-dvae": "encoder.pkl decoder.pkl dvae",
}


def strings(config: Any) -> list[str]:
    """Every string and path in a config."""
    if dataclasses.is_dataclass(config):
        return [text for one in dataclasses.fields(config) for text in strings(getattr(config, one.name))]
    if isinstance(config, tuple):
        return [text for one in config for text in strings(one)]
    return [str(config)] if isinstance(config, str | Path) else []


@pytest.mark.parametrize("job", COMMANDS)
def test_a_job_gets_every_path_absolute(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []

    def run(config: Any) -> JobResult:
        seen.append(config)
        return JobResult(job=job, out="")

    monkeypatch.setattr(importlib.import_module(cli._JOBS[job].module), "run", run)
    words = shlex.split(COMMANDS[job])
    assert cli.run([job, *words]) == 0
    found = strings(seen[0])
    places = [word for word in words if not word.startswith("--") and word not in ("debug", "ucf101", "0.1")]
    assert [place for place in places if str(tmp_path / place) not in found] == []
    assert [place for place in places if place in found] == []


def test_every_option_that_is_a_place_is_in_the_commands_above() -> None:
    """A new path-like option must come to the test above: fields that hold a `Path` by type, or a place by their help."""
    names = set()

    def collect(kind: type) -> None:
        hints = get_type_hints(kind, include_extras=True)
        for one in dataclasses.fields(kind):
            hint = hints[one.name]
            parts = {hint, *get_args(hint), *(x for part in get_args(hint) for x in get_args(part))}
            if Path in parts or any(part == "a path or a URL" for part in parts if isinstance(part, str)):
                names.add(one.name)
            for part in parts:
                if dataclasses.is_dataclass(part) and isinstance(part, type):
                    collect(part)

    for job in COMMANDS:
        collect(getattr(importlib.import_module(cli._JOBS[job].module), cli._JOBS[job].config))
    words = {
        word[2:].rpartition(".")[2].replace("-", "_")
        for text in COMMANDS.values()
        for word in text.split()
        if word[:2] == "--"
    }
    positional = {
        "corpus",
        "out",
        "clips",
        "tokens",
        "run",
        "more_runs",
        "dataset",
        "project",
        "root",
        "encoder",
        "decoder",
    }
    assert names <= words | positional


def test_urls_and_nothing_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for mirror in ("", "s3://bucket/mirror", "/abs/mirror"):
        config = WorkersConfig(mirror=mirror)
        assert absolute_paths(config) is config
    assert absolute_paths(WorkersConfig(mirror="mirror")).mirror == str(tmp_path / "mirror")


def test_a_saved_config_means_the_same_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = save_config(tmp_path, LoaderConfig(keep_list=Path("keep.txt")))
    monkeypatch.chdir(tmp_path / "there")
    assert load_config(path, LoaderConfig).keep_list == tmp_path / "here" / "keep.txt"
    assert json.loads(path.read_text())["keep_list"] == str(tmp_path / "here" / "keep.txt")


@pytest.mark.parametrize(
    ("uri", "absolute"),
    [
        ("", "sqlite:///{}/mlflow.db"),
        ("sqlite:///runs.db", "sqlite:///{}/runs.db"),
        ("runs", "{}/runs"),
        ("sqlite:////abs/runs.db", "sqlite:////abs/runs.db"),
        ("http://host:5000", "http://host:5000"),
        ("file:///abs/runs", "file:///abs/runs"),
        ("databricks", "databricks"),
    ],
)
def test_the_store_of_mlflow_is_where_the_command_began(
    uri: str, absolute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert resolve_tracking_uri() == absolute.format(tmp_path)

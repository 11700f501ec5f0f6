"""A run's model in MLflow's registry: uploaded once for each content, under all its aliases."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from jobs.mlflow_store import digest_text
from jobs.spool import clean_name

_METRICS_A_CALL = 1000
_MODEL_FILES = ("config.json", "model.safetensors")
"""What makes a model another one. The files that MLflow writes beside them hold a new UUID and time after each export."""


def register(
    client: Any,
    run_id: str,
    alias: str,
    model: dict[str, str],
    known: dict[str, str],
    tags: dict[str, str],
    description: str,
) -> None:
    """Bring `alias` of the registered model up to date with its folder. Raises whatever MLflow raises.

    Args:
        model: its `name` and `folder`.
        known: digest of what is there under each NAME@ALIAS; updated.
        tags: of the run; those of ours go to the version, so that it leads back to its corpus.

    Raises:
        FileNotFoundError: the folder holds no model.
    """
    from mlflow.exceptions import MlflowException

    name, folder = model["name"], Path(model["folder"])
    if not any((folder / one).is_file() for one in _MODEL_FILES):
        raise FileNotFoundError(f"{folder} holds none of {', '.join(_MODEL_FILES)}")
    digest = digest_model(folder)
    if known.get(f"{name}@{alias}") == digest:
        return
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    same = [one for one in versions if one.name == name and one.tags.get("tokenreel.digest") == digest]
    if same:
        version = same[0]
    else:
        # A version must keep its bytes: the model of a run that was continued goes to a folder of its own.
        where = f"{alias}_model-{digest[:8]}" if f"{name}@{alias}" in known else f"{alias}_model"
        client.log_artifacts(run_id, str(folder), where)
        source = f"{client.get_run(run_id).info.artifact_uri}/{where}"
        lineage = {key: value for key, value in tags.items() if key.startswith("tokenreel.")}
        version = client.create_model_version(
            name, source, run_id, {**lineage, "tokenreel.digest": digest}, description=description
        )
    client.set_registered_model_alias(name, alias, version.version)
    known[f"{name}@{alias}"] = digest


def note_verdict(client: Any, run_id: str, spool: dict[str, Any], description: str) -> None:
    """Put a run's final numbers on the versions of its own model or, of an evaluation, on the evaluated run and its versions."""
    from mlflow.entities import Metric

    ending, is_evaluation = spool["ending"], spool["tags"]["tokenreel.job"] == "evaluate"
    prefix = "evaluate/" if is_evaluation else ""
    numbers = {clean_name(f"{prefix}{name}"): float(value) for name, value in ending["summary"].items()}
    evaluated = [one["run_id"] for one in spool["inputs"] if one["context"] == "model" and one["run_id"]]
    for run in evaluated if is_evaluation else [run_id]:
        if is_evaluation:
            metrics = [Metric(name, value, ending["time_ms"], 0) for name, value in numbers.items()]
            client.log_batch(run, metrics=metrics[:_METRICS_A_CALL])
        for version in client.search_model_versions(f"run_id = '{run}'"):
            for name, value in numbers.items():
                client.set_model_version_tag(version.name, version.version, name, f"{value:.6g}")
            if not is_evaluation:
                client.update_model_version(version.name, version.version, description)


def digest_model(folder: Path) -> str:
    """Digest of a model's folder: the same for each export of the same weights, config and set of files."""
    files = {str(path.relative_to(folder)): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    contents = [
        _hash_content(folder / name, files[name].st_size, files[name].st_mtime_ns)
        for name in _MODEL_FILES
        if name in files
    ]
    return digest_text([list(files), contents])


@functools.lru_cache(maxsize=8)
def _hash_content(path: Path, size_bytes: int, mtime_ns: int) -> str:
    """SHA-256 of a file; its size and time are there so that a large one is not read again at each pass of the shipper."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

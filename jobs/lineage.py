"""A run's inputs as MLflow keeps them."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MAX_INPUT_TAG = 500


def to_inputs(inputs: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """MLflow's form of the inputs of a spool, each a `jobs.tracking.DatasetInput` as a dict."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    for one in inputs:
        scheme = urllib.parse.urlsplit(one["uri"]).scheme
        key = "url" if scheme in ("http", "https") else "uri"
        dataset = Dataset(
            name=one["name"][:500] or "dataset",
            digest=one["fingerprint"][:36],
            source_type=scheme if scheme in ("s3", "gs", "http", "https") else "local",
            source=json.dumps({key: one["uri"]}),  # credentials in it were refused when it was opened
            profile=json.dumps(one["totals"]) if one["totals"] else None,
        )
        tags = {
            "mlflow.data.context": one["context"],
            "tokenreel.parent_fingerprint": one["parent_fingerprint"],
            "tokenreel.parent_run_id": one["run_id"],
        }
        yield DatasetInput(dataset, [InputTag(k, v[:_MAX_INPUT_TAG]) for k, v in tags.items() if v])

"""What a stage will make and take, and how that compares with what it did."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jobs.config import from_plain
from jobs.planning.estimate import Estimate, schedule_s
from jobs.planning.probe import Made, Sample
from pipeline.errors import ConfigError
from pipeline.ledger import Ledger
from pipeline.tar_writer import tar_end_bytes

_FORMAT = 1
_COMPARED = ("planned", "committed", "rejected", "tar_bytes", "frames", "tokens", "wall_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePrediction:
    """One stage, on a whole cluster.

    fingerprint: of the dataset that it will make. Counts are of samples, as in the books; tar_bytes, frames and tokens as in
    the totals of `dataset.json` (tokens: 0 for clips).
    cpu_hours, gpu_hours: in which one CPU or GPU works, or a CPU waits for storage.
    wall_s: from the job's start to the end of its last shard; planning is not in it.
    bound_by: what decides wall_s: "cpus", "gpus", or "last shard", while which others have nothing to do.
    largest_shard_bytes: of its tars.
    relative_error: standard error over the value, of what the sample leaves open about committed, tar_bytes and cpu_hours
        (encoding aside); without those that too few videos were measured for.
    """

    fingerprint: str
    num_shards: int
    planned: int
    committed: int
    filtered: dict[str, int]
    rejected: dict[str, int]
    tar_bytes: int
    frames: int
    tokens: int
    cpu_hours: float
    gpu_hours: float
    wall_s: float
    bound_by: str
    largest_shard_bytes: int
    relative_error: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """What works on a stage. cpu_slowness: how many times as long one of num_cpus takes as those of the probe. batch_s: of
    one GPU, or of one CPU without any, by side of the frames in px."""

    num_cpus: int
    cpu_slowness: float
    num_gpus: int = 0
    batch_s: Mapping[int, float] = field(default_factory=dict)


def predict_shard(
    fingerprint: str, estimate: Estimate, sample: Sample, plan_books: Ledger, devices: Devices
) -> StagePrediction:
    """The shard stage, of measured videos; `plan_books` are of what the plan refused."""
    made = [one.clips for _, one in sorted(sample.probed.items())]
    shards_s = estimate.by_shard(_column(made, lambda one: one.seconds)) * devices.cpu_slowness
    busy_s, last_s = shards_s.sum() / devices.num_cpus, schedule_s(shards_s, devices.num_cpus)
    return StagePrediction(
        **_content(fingerprint, estimate, made, plan_books),
        tokens=0,
        cpu_hours=shards_s.sum() / 3600,
        gpu_hours=0.0,
        wall_s=sample.connect_s + sample.worker_s + last_s,
        bound_by="last shard" if last_s > 1.2 * busy_s else "cpus",
    )


def predict_tokenize(
    fingerprint: str,
    estimate: Estimate,
    sample: Sample,
    devices: Devices,
    *,
    sizes_px: list[int],
    batch_frames: int,
) -> StagePrediction:
    """The tokenize stage, of measured videos.

    GPUs encode while CPUs decode; without GPUs, CPUs share their time. A shard's batches are encoded one after the other, and
    its last one is padded.

    Args:
        sizes_px: side of each view of a clip.
    """
    probed = [one for _, one in sorted(sample.probed.items())]
    made = [one.tokens or _NOTHING for one in probed]
    views = len(sizes_px)
    frames = estimate.by_shard(_column(made, lambda one: one.frames)) / views
    num_batches = {side: np.ceil(frames * sizes_px.count(side) / batch_frames) for side in set(sizes_px)}
    encode_s = sum((number * devices.batch_s[side] for side, number in num_batches.items()), np.zeros(len(frames)))
    decode_s = estimate.total(_column(made, lambda one: one.seconds)) * devices.cpu_slowness
    num_encoders = devices.num_gpus or devices.num_cpus
    on_cpus_s = decode_s if devices.num_gpus else decode_s + encode_s.sum()
    busy_s, last_s = on_cpus_s / devices.num_cpus, schedule_s(encode_s, num_encoders)
    even_s = encode_s.sum() / num_encoders
    slower = "gpus" if devices.num_gpus else "cpus"
    return StagePrediction(
        **_content(fingerprint, estimate, made, Ledger()),
        tokens=round(estimate.total(_column(probed, lambda one: one.num_tokens))),
        cpu_hours=on_cpus_s / 3600,
        gpu_hours=encode_s.sum() / 3600 if devices.num_gpus else 0.0,
        wall_s=sample.connect_s + sample.worker_s + sample.encoder_s + max(busy_s, last_s),
        bound_by="cpus" if busy_s >= last_s else "last shard" if last_s > 1.2 * even_s else slower,
    )


_NOTHING = Made(seconds=0.0, books=Ledger(), member_bytes=0, frames=0)


def _column(rows: list[Any], value: Callable[[Any], float]) -> np.ndarray:
    return np.array([value(row) for row in rows], float)


def _content(fingerprint: str, estimate: Estimate, made: list[Made], plan_books: Ledger) -> dict[str, Any]:
    """Those fields of a prediction that do not depend on the cluster. The books balance, although each count is rounded."""
    committed = _column(made, lambda one: one.books.committed)
    books = {
        outcome: {
            name: round(estimate.total(_column(made, lambda one: getattr(one.books, outcome)[name])))  # noqa: B023 (called at once)
            for name in sorted(set().union(*(getattr(one.books, outcome) for one in made)))
        }
        for outcome in ("filtered", "rejected")
    }
    books["rejected"] = dict(sorted((Counter(books["rejected"]) + plan_books.rejected).items()))
    members = _column(made, lambda one: one.member_bytes)
    tars = [round(size) + tar_end_bytes(round(size)) for size in estimate.by_shard(members)]
    num_committed = round(estimate.total(committed))
    seconds = _column(made, lambda one: one.seconds)
    return {
        "fingerprint": fingerprint,
        "num_shards": len(tars),
        "planned": num_committed + sum(books["filtered"].values()) + sum(books["rejected"].values()),
        "committed": num_committed,
        **books,
        "tar_bytes": sum(tars),
        "frames": round(estimate.total(_column(made, lambda one: one.frames))),
        "largest_shard_bytes": max(tars, default=0),
        "relative_error": {
            name: round(error, 4)
            for name, values in (("committed", committed), ("tar_bytes", members), ("cpu_hours", seconds))
            if not math.isnan(error := estimate.relative_error(values))
        },
    }


def to_plain(stages: Mapping[str, StagePrediction]) -> dict[str, Any]:
    """What `read_prediction` finds in the file of a plan, beside the rest of it."""
    return {"format": _FORMAT, "stages": {name: asdict(stage) for name, stage in stages.items()}}


def read_prediction(path: Path, stage: str, fingerprint: str) -> StagePrediction:
    """What the plan in a file says of a stage that makes the dataset `fingerprint`.

    Raises:
        ConfigError: no plan there, none of this stage, or one of other inputs or settings.
    """
    try:
        plain = json.loads(path.read_text())
        if plain["format"] != _FORMAT:
            raise ValueError(f"format {plain['format']}, this tokenreel reads {_FORMAT}")
        stages = plain["stages"]
        row = stages.get(stage)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"plan {path} cannot be read: {error}; give what `tokenreel plan --save` wrote") from None
    if row is None:
        raise ConfigError(f"plan {path} says nothing of {stage}, only of {', '.join(stages)}; plan with --tokenizer")
    found = from_plain(row, StagePrediction, f"{path}, stages.{stage}")
    if found.fingerprint != fingerprint:
        raise ConfigError(
            f"plan {path} is of another dataset, {found.fingerprint}; this command makes {fingerprint}. Plan again with the "
            f"corpus and the options of this command, or leave --plan out"
        )
    return found


def compare(predicted: StagePrediction, actual: Mapping[str, Any]) -> dict[str, float]:
    """Predicted over actual, of figures that are there and not 0."""
    said = {**asdict(predicted), "rejected": sum(predicted.rejected.values())}
    return {name: round(said[name] / actual[name], 4) for name in _COMPARED if actual.get(name)}

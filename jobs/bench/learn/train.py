"""One arm with one seed: pre-trained by the product's loop in this process, then measured on every task."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from threadpoolctl import threadpool_limits

from jobs.bench.learn.arms import Arm
from jobs.bench.learn.measure import TaskTokens, draw_share, embed, read_task
from jobs.bench.learn.tasks import NUM_FRAMES
from jobs.config import to_plain
from jobs.evaluation.attentive import attentive_probe
from jobs.evaluation.frozen import ProbeResult, knn_probe, linear_probe, make_result
from jobs.journal import JOURNAL_NAME, read_journal
from jobs.loop import Context, LoopConfig, Precision, train
from jobs.step import seed_everything
from models.classifier import VimpacClassifier
from models.optim import OptimConfig
from models.vimpac import VimpacBackbone, VimpacObjective
from pipeline.dataset import read_index, read_meta
from pipeline.files import write_atomic
from pipeline.keep_list import to_parquet
from pipeline.loader import CacheConfig, LoaderConfig, TokenLoader
from pipeline.order import hash_keys

RESULT_NAME = "result.json"
SETTINGS_NAME = "settings.json"
_PROBES: Mapping[str, Callable[..., ProbeResult]] = {
    "linear": linear_probe,
    "knn": knn_probe,
    "attentive": attentive_probe,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What an arm may cost."""

    steps: int = 400
    """Optimiser steps of pre-training; every arm but `longer` takes as many."""
    batch_size: int = 32
    """Clips of a step."""
    lr: float = 5e-3
    """Peak learning rate of pre-training."""
    precision: Precision = "fp32"
    """Of all networks here. bf16 is twice as fast where the CPU has instructions for it, half as fast where not."""
    shares: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the training labels that probes get."""
    probes: tuple[Literal["linear", "knn", "attentive"], ...] = ("linear", "knn")
    """Probes on frozen features; the attentive one takes some seconds a task and share."""
    finetune_tasks: tuple[str, ...] = ("pen-digit", "digit-direction", "digit-collision", "film-camera", "film-speed")
    """Tasks to fine-tune on; frozen features are measured on all."""
    finetune_shares: tuple[float, ...] = (1.0,)
    """Shares of the training labels that fine-tuning gets."""
    finetune_steps: int = 100
    """Optimiser steps of fine-tuning, at every share of the labels."""
    finetune_lr: float = 1e-3
    """Peak learning rate of fine-tuning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmRun:
    """An arm with its seed and what it reads; `finetune` says whether it is also fine-tuned."""

    arm: Arm
    seed: int
    tokens: Path
    manifests: tuple[Path, ...]
    folder: Path
    finetune: bool
    budget: Budget = field(default_factory=Budget)


def run_arm(run: ArmRun) -> None:
    """Write `settings.json`, pre-train, measure, and write `result.json`: where that is, nothing is left to do."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(run.folder / SETTINGS_NAME, json.dumps(settings_of(run)).encode())
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many arms at a time as there are cores are faster than threads that share them
    try:
        _run_arm(run)
    finally:
        torch.set_num_threads(num_threads)


def _run_arm(run: ArmRun) -> None:
    started_s = time.monotonic()
    backbone = pretrain(run)
    pretrain_s = time.monotonic() - started_s
    shape, pad = (NUM_FRAMES, *run.arm.backbone.shape[1:]), run.arm.backbone.pad_id
    rows: list[dict[str, Any]] = []
    for manifest in run.manifests:
        task = read_task(run.tokens, manifest, shape, pad)
        rows += _probe(task, backbone, run)
        if run.finetune and task.name in run.budget.finetune_tasks:
            rows += _finetune(task, backbone, run)
    curve = read_journal(run.folder / JOURNAL_NAME) if run.arm.objective is not None else []
    last = list(curve)[-50:]
    accuracies = [row["masked_token_accuracy"] for row in last if "masked_token_accuracy" in row]
    result = {
        "arm": run.arm.name,
        "seed": run.seed,
        "masked_token_accuracy": float(np.mean(accuracies)) if accuracies else None,
        "pretrain_s": round(pretrain_s, 1),
        "measure_s": round(time.monotonic() - started_s - pretrain_s, 1),
        "rows": rows,
    }
    write_atomic(run.folder / RESULT_NAME, (json.dumps(result, indent=1) + "\n").encode())


def settings_of(run: ArmRun) -> dict[str, Any]:
    """What decides the result of a run, as plain JSON."""
    plain = to_plain(run)
    content = read_meta(run.tokens).fingerprint
    return {name: plain[name] for name in ("arm", "seed", "finetune", "budget")} | {"tokens": content}


def pretrain(run: ArmRun) -> VimpacBackbone:
    """The backbone after pre-training, or as it was drawn where the arm has none; resumes from the last checkpoint."""
    run.folder.mkdir(parents=True, exist_ok=True)
    arm, budget = run.arm, run.budget
    seed_everything(run.seed, -1, 0)  # so that an arm without pre-training is where the others with its seed began
    backbone = VimpacBackbone(arm.backbone)
    if arm.objective is None:
        return backbone.eval()
    objective = VimpacObjective(backbone, arm.objective)
    config = LoaderConfig(
        batch_size=budget.batch_size,
        seed=run.seed,
        keep_list=keep_part(run) if arm.corpus_share < 1 else None,
        cache=CacheConfig(folder=run.folder.parent / ".cache"),
    )
    loader = TokenLoader(
        run.tokens,
        config,
        window=arm.backbone.shape,
        num_views=2 if arm.objective.alpha else 1,
        pad=arm.backbone.pad_id,
        rank=0,
        world_size=1,
    )
    steps = budget.steps * arm.length
    loop = LoopConfig(
        steps=steps,
        save_every_steps=max(1, steps // 2),
        picture_every_steps=0,
        precision=budget.precision,
        seed=run.seed,
    )
    train(objective, loader, Context(run=run.folder), loop, OptimConfig(lr=budget.lr))
    return objective.backbone.eval()


def keep_part(run: ArmRun) -> Path:
    """A keep list of a part of the training clips; a smaller part is within a larger one."""
    path = run.folder / "keep.parquet"
    keys = read_index(run.tokens, ["key"])["key"].to_pylist()
    places = hash_keys([f"{run.seed}:{key}" for key in keys]) / 2**64
    kept = [key for key, place in zip(keys, places, strict=True) if place < run.arm.corpus_share]
    path.write_bytes(to_parquet(pa.table({"key": kept}), read_meta(run.tokens)))
    return path


def _probe(task: TaskTokens, backbone: VimpacBackbone, run: ArmRun) -> list[dict[str, Any]]:
    embedded = embed(backbone, task.tokens, run.budget.precision)
    rows = []
    for share in run.budget.shares:
        chosen = draw_share(task, share, run.seed)
        for name in run.budget.probes:
            source = embedded.frames if name == "attentive" else embedded.pooled
            parts = [
                task.features(source, "train", chosen),
                task.features(source, "val"),
                task.features(source, "test"),
            ]
            with threadpool_limits(1):
                result = _PROBES[name](*parts, seed=run.seed)
            rows.append(_row(task, name, share, result))
    return rows


def _row(task: TaskTokens, method: str, share: float, result: ProbeResult) -> dict[str, Any]:
    return {
        "task": task.name,
        "method": method,
        "share": share,
        "accuracy": result.accuracy,
        "val_accuracy": result.val_accuracy,
        "interval": [result.interval.low, result.interval.high],
    }


class _Labelled:
    """Batches of some labelled clips of a task, in memory: epochs of another order each."""

    unit = "clips"

    def __init__(self, task: TaskTokens, rows: np.ndarray, batch_size: int, seed: int) -> None:
        self._task, self._rows, self._seed, self.units_per_step = task, rows, seed, batch_size

    def batch(self, step: int) -> Mapping[str, Any]:
        first, size = step * self.units_per_step, len(self._rows)
        places = np.arange(first, first + self.units_per_step)
        orders = {e: np.random.default_rng([self._seed, 6, e]).permutation(size) for e in np.unique(places // size)}
        rows = self._rows[[orders[place // size][place % size] for place in places]]
        return {
            "tokens": torch.from_numpy(self._task.tokens[rows].astype(np.int64)),
            "labels": torch.from_numpy(self._task.labels[rows]),
            "keys": [str(row) for row in rows],
        }


def _finetune(task: TaskTokens, backbone: VimpacBackbone, run: ArmRun) -> list[dict[str, Any]]:
    budget, rows = run.budget, []
    # One window spans the whole clip, at a lower frame rate than in pre-training, as in the paper.
    task = replace(task, tokens=task.tokens[:, :: NUM_FRAMES // run.arm.backbone.num_frames])
    for share in budget.finetune_shares:
        seed_everything(run.seed, -1, 0)
        own = VimpacBackbone(run.arm.backbone)
        own.load_state_dict(backbone.state_dict())
        classifier = VimpacClassifier(own, task.classes)
        folder = run.folder / "finetune" / f"{task.name}-{share:g}"
        batches = _Labelled(task, draw_share(task, share, run.seed), budget.batch_size, run.seed)
        loop = LoopConfig(
            steps=budget.finetune_steps,
            save_every_steps=budget.finetune_steps,
            keep_checkpoints=1,
            picture_every_steps=0,
            precision=budget.precision,
            seed=run.seed,
        )
        optim = OptimConfig(lr=budget.finetune_lr, betas=(0.9, 0.999), weight_decay=0.01)
        train(classifier, batches, Context(run=folder), loop, optim)
        classifier.eval()
        hits = {
            split: _classify(classifier, task.tokens[task.of(split)], budget.precision) == task.labels[task.of(split)]
            for split in ("val", "test")
        }
        result = make_result(
            "finetune",
            hits["test"],
            task.groups[task.of("test")],
            seed=run.seed,
            val_accuracy=float(hits["val"].mean()),
        )
        rows.append(_row(task, "finetune", share, result))
    return rows


@torch.inference_mode()
def _classify(
    classifier: VimpacClassifier, tokens: np.ndarray, precision: Precision, batch_size: int = 64
) -> np.ndarray:
    """(n,) class numbers."""
    found = []
    for first in range(0, len(tokens), batch_size):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = classifier.logits(
                torch.from_numpy(tokens[first : first + batch_size].astype(np.int64)), padded=False
            )
        found.append(logits.argmax(-1).numpy())
    return np.concatenate(found)

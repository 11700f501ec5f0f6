"""A small labelled token dataset whose classes can be told apart, and a fine-tuned run on it without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.checkpoint import list_checkpoints
from jobs.config import save_config
from jobs.finetune import FinetuneConfig, MultiClipConfig, build
from jobs.finetune_recipes import debug
from jobs.journal import read_journal
from jobs.loop import Context, LoopConfig, seed_everything, train
from jobs.model_folder import write_model
from jobs.tracking import DatasetInput
from jobs.training import _open_run
from jobs.workers import WorkersConfig
from models.optim import OptimConfig
from models.vimpac import VimpacConfig
from pipeline.dataset import create_or_resume, finish, read_meta
from pipeline.labelled import LabelledConfig
from pipeline.ledger import Ledger
from pipeline.schema import Split
from tests.pipeline.datasets import add_codes, describe, make_row, open_writer

torch.set_num_threads(1)  # tiny tensors gain nothing from more, and wait for each other on a busy machine

CLASSES = ("jump", "run", "sit")
CODEBOOK_SIZE = 64
VIEWS = ("8c", "8cf", "8s", "8of10c")
NETWORK = VimpacConfig(
    layers=1,
    hidden=32,
    heads=4,
    head_dim=8,
    mlp=32,
    num_frames=3,
    grid_height=2,
    grid_width=2,
    codebook_size=CODEBOOK_SIZE,
    dropout=0.0,
)


def make_labelled_tokens(
    folder: Path,
    per_split: dict[Split, int],
    *,
    grid: tuple[int, int] = (2, 2),
    views: tuple[str, ...] = VIEWS,
    tokenizer: str = "t" * 32,
) -> Path:
    """`per_split` clips of each class, 12 frames at 16 fps, each in all `views`; two clips a video. A class has codes of its
    own: 20 n and 20 n + 1 for class n."""
    rng = np.random.default_rng(0)
    extra = {"tokenizer": {"codebook_size": CODEBOOK_SIZE, "fingerprint": tokenizer}}
    meta = create_or_resume(folder, describe(num_shards=1, extra=extra))
    writer = open_writer(folder)
    clip = 0
    for split, count in per_split.items():
        for number in range(count * len(CLASSES)):
            label = number % len(CLASSES)
            # Clips of one video follow each other within their class.
            video = f"{clip - number + label + (number // len(CLASSES) // 2) * len(CLASSES):016x}"
            key = f"{video}-{clip:05d}"
            for view in views:
                row = make_row(
                    f"{key}-{view}" if view else key,
                    12,
                    label=CLASSES[label],
                    split=split,
                    clip_key=key,
                    view=view,
                    fps=16.0,
                    source=f"{CLASSES[label]}/{clip}.mp4",
                    height=grid[0],
                    width=grid[1],
                )
                codes = rng.integers(20 * label, 20 * label + 2, (12, *grid)).astype(np.uint16)
                add_codes(writer, row, codes)
            clip += 1
    writer.commit(clip * len(views), [])
    finish(folder, meta, Ledger())
    return folder


def make_config(tokens: Path, out: Path, **changes: Any) -> FinetuneConfig:
    """Learns the classes of `make_labelled_tokens` within its 24 steps."""
    values: dict[str, Any] = {
        "backbone": NETWORK,
        "optim": OptimConfig(lr=0.04, betas=(0.9, 0.999)),
        "loader": LabelledConfig(batch_size=12, fps=8.0),
        "loop": LoopConfig(steps=24, save_every_steps=8, picture_every_steps=0, keep_checkpoints=9),
        "workers": WorkersConfig(),
        "test": MultiClipConfig(num_clips=2),
    }
    return replace(debug(), tokens=str(tokens), out=out, **{**values, **changes})


def open_run(config: Any) -> None:
    """The folder of a run on its tokens, as a job opens it."""
    meta = read_meta(config.tokens)
    tokens = DatasetInput(name="tokens", fingerprint=meta.fingerprint, uri=config.tokens, content=meta.content)
    _open_run(config.out, config, [tokens], meta.extra["tokenizer"]["fingerprint"])


def finetune(config: FinetuneConfig, classes: tuple[str, ...] = CLASSES) -> list[dict[str, Any]]:
    """What a worker does, and the run folder that the job leaves, without Ray; returns the rows of metrics.jsonl."""
    from jobs.finetune import load_classifier

    open_run(config)
    save_config(config.out, config)
    seed_everything(config.loop.seed, -1, 0)
    context = Context(run=config.out)
    task = build(config, context)
    train(task.objective, task.batches, context, config.loop, config.optim, task.draw, task.validate)
    write_model(config.out / "model", load_classifier(config, classes, list_checkpoints(config.out)[-1]), config.out)
    return list(read_journal(config.out / "metrics.jsonl"))

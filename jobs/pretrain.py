"""`tokenreel pretrain RECIPE`: a token dataset to a pre-trained model."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from jobs.checkpoint import list_folders, load_ema, load_weights, read_cursor, read_tensors, write_checkpoint
from jobs.checkpoint_checks import Expected, whole_checkpoints
from jobs.config import CONFIG_NAME, load_config
from jobs.loop import Context, LoopConfig
from jobs.model_folder import add_mlflow_model, load_model, write_model
from jobs.paths import PathOrUrl
from jobs.pictures import overlay_mask, save_png_grid
from jobs.result import JobResult
from jobs.run_tokens import check_tokenizer
from jobs.token_origin import load_kept_tokenizer
from jobs.tracking import DatasetInput
from jobs.training import Task, read_run_fingerprint, run_training
from jobs.workers import WorkersConfig
from models.optim import OptimConfig, lr_at
from models.stage2 import resize_moments, resize_positions
from models.vimpac import VimpacBackbone, VimpacConfig, VimpacObjective, VimpacObjectiveConfig
from pipeline.dataset import Place, read_meta
from pipeline.errors import ConfigError
from pipeline.keep_list import keep_list_digest
from pipeline.loader import LoaderConfig, TokenLoader
from pipeline.storage import Store

log = logging.getLogger(__name__)
_PICTURE_CLIPS = 4
NUM_VIEWS = 2
"""Clips a video in one batch; the contrastive loss compares them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Pre-train VIMPAC on tokens: masked token prediction and contrast between two clips of a video.

    Run the same command again after a crash: it continues from its last checkpoint with the same losses.
    """

    tokens: PathOrUrl
    """Token dataset, made by `tokenreel tokenize`; a path, or s3://, gs://, abfs://."""
    out: Path
    """Folder of the run; the model ends up in its model/."""
    continue_from: Path | None = None
    """Folder of a finished run whose weights, optimiser state and step this one starts from, maybe on a finer grid."""
    recipe: tyro.conf.Suppress[str] = "custom"
    backbone: VimpacConfig = field(default_factory=VimpacConfig)
    objective: VimpacObjectiveConfig = field(default_factory=VimpacObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    register_as: str = ""
    """Name in the MLflow model registry. The last checkpoint becomes its alias `final`, and the one with the lowest mean
    loss over the loop.save_every_steps before it `best`; empty registers nothing."""


def run(config: PretrainConfig) -> JobResult:
    source = Store.at(config.tokens)
    meta = read_meta(source, kind="tokens", complete=True)
    codebook_size = meta.extra["tokenizer"]["codebook_size"]
    if codebook_size != config.backbone.codebook_size:
        raise ConfigError(
            f"{config.tokens} has codes of a codebook of {codebook_size}; recipe {config.recipe} expects "
            f"{config.backbone.codebook_size}. Pass --backbone.codebook-size {codebook_size}"
        )
    make_loader(config, rank=0, world_size=config.workers.fewest)  # a wrong setting fails here, not on the workers
    assert meta.totals is not None
    totals = {name: float(meta.totals[name]) for name in ("committed", "frames", "hours")}
    tokens = DatasetInput(
        name=source.name,
        fingerprint=meta.fingerprint,
        uri=source.url,
        totals=totals,
        content=meta.content,
    )
    inputs = [tokens]
    if config.continue_from is not None:
        check_source(config, config.continue_from)
        continued = read_run_fingerprint(config.continue_from)
        uri = str(config.continue_from.resolve())
        inputs.append(
            DatasetInput(name=config.continue_from.name, fingerprint=continued, uri=uri, context="continued run")
        )
    loader = config.loader
    if loader.keep_list is not None:
        place = loader.keep_list.resolve()
        inputs.append(
            DatasetInput(name=place.name, fingerprint=keep_list_digest(place), uri=str(place), context="keep list")
        )
        loader = replace(loader, keep_list=place)
    return run_training(
        "pretrain",
        config.out,
        config,
        functools.partial(build, replace(config, tokens=source.url, loader=loader)),
        inputs,
        functools.partial(_export, config),
        functools.partial(_conclude, config),
        name=f"pretrain {config.recipe} {config.out.name}",
        num_parts=config.loader.batch_size,
        make_objective=functools.partial(make_objective, config),
        tokenizer=meta.extra["tokenizer"]["fingerprint"],
        register_as=config.register_as,
        begin=None if config.continue_from is None else functools.partial(continue_run, config, config.continue_from),
    )


def check_source(config: PretrainConfig, run: Path) -> None:
    """Check that `config` can continue the finished `run`: only the grid, the masks and the data may differ.

    A finished run's last checkpoint is a function of its settings and inputs, so its fingerprint stands for it.

    Raises:
        ConfigError: names what differs, with both values.
    """
    if not (run / CONFIG_NAME).exists() or not list_folders(run):
        raise ConfigError(f"continue_from: {run} holds no pre-training run with a checkpoint; give the --out of one")
    source = load_config(run / CONFIG_NAME, PretrainConfig)
    step = read_cursor(whole_checkpoints(run, expected_checkpoints(source))[-1]).step
    if step < source.loop.steps:
        raise ConfigError(f"continue_from: {run} has done {step} of {source.loop.steps} steps; finish it first")
    if step >= config.loop.steps:
        raise ConfigError(
            f"continue_from: {run} has done {step} steps, and loop.steps = {config.loop.steps} counts them too; allowed: "
            f"more than {step}"
        )
    here = _parts(config)
    differences = [
        f"{name} = {old!r} (here {here[name]!r})" for name, old in _parts(source).items() if old != here[name]
    ]
    if differences:
        raise ConfigError(f"continue_from: {run} has another network or other codes: {'; '.join(differences)}")
    check_tokenizer(run, source.tokens, config.tokens)
    before = lr_at(step, source.loop.num_schedule_steps, source.optim)
    after = lr_at(step, config.loop.num_schedule_steps, config.optim)
    if before != after:
        log.warning("the learning rate changes from %.3g to %.3g where %s is continued", before, after, run)


def _parts(config: PretrainConfig) -> dict[str, Any]:
    """What decides which parameters there are and what they compute, but for the grid."""
    same = ("codebook_size", "hidden", "layers", "heads", "head_dim", "mlp", "num_frames", "layout", "norm")
    task = config.objective
    return {
        **{f"backbone.{name}": getattr(config.backbone, name) for name in same},
        "masked prediction": task.mlm_weight > 0,
        "contrast": task.alpha > 0,
        "contrastive head (layers, hidden, out)": (task.head_layers, task.head_hidden, task.head_out)
        if task.alpha
        else None,
    }


def continue_run(config: PretrainConfig, run: Path) -> None:
    """Write the first checkpoint of `config.out`: the last one of `run`, resized to the grid of `config`.

    The step and the digest of consumed keys go on, so the learning rate and the order of the data do too.
    """
    source = load_config(run / CONFIG_NAME, PretrainConfig)
    checkpoint = whole_checkpoints(run, expected_checkpoints(source))[-1]
    weights, moments = read_tensors(checkpoint)
    grid = config.backbone.grid_height, config.backbone.grid_width
    with torch.device("meta"):  # its names are all that is needed
        objective = make_objective(config)
    cursor = replace(read_cursor(checkpoint), recent_loss=None)  # of another task, which says nothing about this one
    write_checkpoint(config.out, resize_positions(weights, grid), resize_moments(moments, objective, grid), cursor)


def make_objective(config: PretrainConfig) -> VimpacObjective:
    return VimpacObjective(VimpacBackbone(config.backbone), config.objective)


def expected_checkpoints(config: PretrainConfig) -> Expected:
    """What the checkpoints of a run hold."""
    return Expected.of(functools.partial(make_objective, config), config.loop.steps, ema=config.loop.ema_decay > 0)


def make_loader(config: PretrainConfig, *, rank: int, world_size: int) -> TokenLoader:
    shape, pad = config.backbone.shape, config.backbone.pad_id
    return TokenLoader(
        config.tokens, config.loader, window=shape, num_views=NUM_VIEWS, pad=pad, rank=rank, world_size=world_size
    )


def load_objective(config: PretrainConfig, checkpoint: Path) -> VimpacObjective:
    """The trained objective of a run, in eval mode; the running average of its weights, if the run kept one."""
    objective = make_objective(config)
    load_weights(checkpoint, objective)
    if config.loop.ema_decay:
        load_ema(checkpoint, objective)
    return objective.eval()


def build(config: PretrainConfig, context: Context) -> Task:
    """What a worker trains."""
    batches = make_loader(config, rank=context.rank, world_size=context.world_size)
    objective = make_objective(config)
    fixed = batches.batch(0)
    tokens, seeds = fixed["tokens"][:_PICTURE_CLIPS, 0], fixed["seeds"][:_PICTURE_CLIPS, 0]

    def draw(module: nn.Module, step: int) -> None:
        assert isinstance(module, VimpacObjective)
        if not config.objective.mlm_weight:
            return
        rows = draw_predictions(module, tokens.to(context.device), seeds.to(context.device), config.tokens)
        labels = ["tokens", "masked", "predicted"]
        save_png_grid(context.run / "pictures" / f"predictions_{step:08d}.png", rows, labels)

    return Task(objective=objective, batches=batches, draw=draw)


def draw_predictions(
    objective: VimpacObjective, tokens: torch.Tensor, seeds: torch.Tensor, dataset: Place
) -> list[list[Any]]:
    """For each clip of `tokens` (n t h w): its frames as the tokenizer decodes them, the same masked, and predicted.

    Returns:
        n rows of three uint8 arrays (t H W c).
    """
    tokenizer = load_kept_tokenizer(dataset, tokens.device)
    mask = objective.draw_masks(tokens, seeds)
    predicted = objective.predict(tokens, mask)
    rows = []
    for clip, hidden, guess in zip(tokens, mask, predicted, strict=True):
        # PAD has no picture; the clip's real frames stand at its start.
        length = max(1, int((clip != objective.backbone.config.pad_id).all(-1).all(-1).sum()))
        frames = tokenizer.decode(clip[:length].clamp(max=tokenizer.codebook_size - 1)).cpu().numpy()
        filled = tokenizer.decode(guess[:length].clamp(max=tokenizer.codebook_size - 1)).cpu().numpy()
        rows.append([frames, overlay_mask(frames, hidden[:length].cpu().numpy()), filled])
    return rows


def _export(config: PretrainConfig, checkpoint: Path, folder: Path) -> None:
    """Write the checkpoint's objective as a model folder; also as one of MLflow's where it will be registered."""
    objective = load_objective(config, checkpoint)
    write_model(folder, objective, config.out)
    if config.register_as:
        try:
            add_mlflow_model(folder, objective)
        except Exception as error:  # MLflow and torch.export are no reason to lose a finished run
            log.warning("%s is no MLflow model: %s", folder, error)


def _conclude(config: PretrainConfig) -> dict[str, Any]:
    objective = load_model(config.out / "model")
    return {"backbone_parameters": sum(parameter.numel() for parameter in objective.backbone.parameters())}

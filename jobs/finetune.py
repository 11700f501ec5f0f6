"""`tokenreel finetune RECIPE`: a labelled token dataset to an action classifier, from a pre-trained model or from scratch."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import nn

from jobs.checkpoint import (
    STATE_NAME,
    Cursor,
    best_checkpoint,
    list_checkpoints,
    list_folders,
    load_ema,
    load_weights,
    read_cursor,
    write_checkpoint,
)
from jobs.checkpoint_checks import Expected, find_damage, whole_checkpoints
from jobs.config import CONFIG_NAME, load_config
from jobs.evaluation.confusion import draw_confusion
from jobs.evaluation.metrics import confusion_matrix
from jobs.loop import Context, Fractions, LoopConfig, Precision, seed_everything
from jobs.model_folder import add_mlflow_model, write_model
from jobs.paths import PathOrUrl
from jobs.pictures import save_picture
from jobs.pretrain import PretrainConfig, expected_checkpoints, load_objective
from jobs.result import JobResult
from jobs.run_files import DamagedRun
from jobs.run_tokens import check_tokenizer
from jobs.tracking import DatasetInput
from jobs.training import Task, read_run_fingerprint, run_training
from jobs.workers import WorkersConfig
from models.classifier import VimpacClassifier, load_pretrained
from models.optim import OptimConfig
from models.vimpac import VimpacBackbone, VimpacConfig
from pipeline.dataset import read_meta
from pipeline.errors import ConfigError
from pipeline.labelled import LabelledBatches, LabelledClips, LabelledConfig
from pipeline.storage import Store
from pipeline.views import ViewChoice

log = logging.getLogger(__name__)
PLAIN = ViewChoice(crops=("center",), resized=False, flip=False)
"""The view that validation looks at."""
_NETWORK = ("codebook_size", "hidden", "layers", "heads", "head_dim", "mlp", "layout", "norm")
"""What a pre-trained backbone decides; the size of the input and dropout may differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiClipConfig:
    """How `tokenreel evaluate` tests this model; nothing that trains depends on it."""

    num_clips: int = 10
    """Windows of a video, evenly from its start to its end; the softmax outputs of all windows and views are averaged."""
    views: ViewChoice = field(default_factory=lambda: ViewChoice(resized=False, flip=False))

    def __post_init__(self) -> None:
        if self.num_clips < 1:
            raise ConfigError(f"test.num_clips = {self.num_clips}: must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Train an action classifier on labelled tokens: one linear layer on CLS, zero at the start, and the backbone below it.

    Labels are those of the training split. The validation split, where there is one, is measured at each checkpoint, and says
    which of them is the best; the test split is left to `tokenreel evaluate`.
    Run the same command again after a crash: it continues from its last checkpoint with the same losses.
    """

    tokens: Annotated[PathOrUrl, tyro.conf.Positional, tyro.conf.arg(metavar="TOKENS")]
    """Token dataset with labels, made by `tokenreel tokenize`; a path, or s3://, gs://, abfs://."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the run; the last model ends up in its model/."""
    from_run: Path | None = None
    """Folder of a pre-training run, whose last checkpoint this one starts from, or one of its checkpoints. The network is then
    that of the run; number of frames and grid are those of `backbone`, and positions are interpolated. None: from scratch."""
    frozen: bool = False
    """Train the linear layer alone, on the features of the backbone as it is."""
    epochs: float = 0.0
    """Passes over the training clips, of which loop.steps is made; 0: loop.steps as it is."""
    recipe: tyro.conf.Suppress[str] = "custom"
    backbone: VimpacConfig = field(default_factory=VimpacConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LabelledConfig = field(default_factory=LabelledConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    test: MultiClipConfig = field(default_factory=MultiClipConfig)
    register_as: str = ""
    """Name in the MLflow model registry. The last checkpoint becomes its alias `final`, and the one with the highest accuracy on
    the validation split `best`; empty registers nothing."""

    def __post_init__(self) -> None:
        if self.epochs < 0 or (self.epochs and self.loop.schedule_steps is not None):
            raise ConfigError(
                f"epochs = {self.epochs}: must be 0 or more, and 0 with loop.schedule_steps = {self.loop.schedule_steps}"
            )


def run(config: FinetuneConfig) -> JobResult:
    source = Store.at(config.tokens)
    meta = read_meta(source, kind="tokens", complete=True)
    inputs = [DatasetInput(name=source.name, fingerprint=meta.fingerprint, uri=source.url, content=meta.content)]
    begin = None
    if config.from_run is not None:
        pretrained, checkpoint = find_source(config.from_run)
        config = replace(config, backbone=_take_network(config.backbone, pretrained.backbone))
        folder = checkpoint.parent.parent
        check_tokenizer(folder, pretrained.tokens, config.tokens)
        inputs.append(
            DatasetInput(
                name=folder.name,
                fingerprint=read_run_fingerprint(folder),
                uri=str(folder.resolve()),
                context="pre-trained run",
                content=f"step {read_cursor(checkpoint).step}",
            )
        )
        begin = functools.partial(_start_from, config, pretrained, checkpoint)
    codebook_size = meta.extra["tokenizer"]["codebook_size"]
    if codebook_size != config.backbone.codebook_size:
        raise ConfigError(
            f"{config.tokens} has codes of a codebook of {codebook_size}; {config.from_run or f'recipe {config.recipe}'} expects "
            f"{config.backbone.codebook_size}. Tokenize with the tokenizer of the pre-trained run, or from scratch pass "
            f"--backbone.codebook-size {codebook_size}"
        )
    clips = open_clips(config)
    classes = clips.classes()
    for split in ("val", "test"):
        clips.class_numbers(clips.of_split(split), classes)
    num_train = len(clips.of_split("train"))
    if config.epochs:
        steps = max(1, math.ceil(config.epochs * num_train / config.loader.batch_size))
        config = replace(config, loop=replace(config.loop, steps=steps))
    LabelledBatches(clips, config.loader, rank=0, world_size=config.workers.fewest)  # wrong settings fail here
    if config.loop.parallel == "fsdp" and len(clips.of_split("val")):
        raise ConfigError(
            "loop.parallel = fsdp cannot measure the validation split; allowed: ddp, or tokens without one"
        )
    log.info("%d training clips of %d classes, %d steps", num_train, len(classes), config.loop.steps)
    loader = config.loader
    if loader.splits is not None:
        place = loader.splits.resolve()
        digest = hashlib.sha256(place.read_bytes()).hexdigest()[:32]
        inputs.append(DatasetInput(name=place.name, fingerprint=digest, uri=str(place), context="labels and splits"))
        loader = replace(loader, splits=place)
    return run_training(
        "finetune",
        config.out,
        config,
        functools.partial(build, replace(config, tokens=source.url, loader=loader)),
        inputs,
        functools.partial(_export, config, classes),
        functools.partial(_conclude, config, classes),
        name=f"finetune {config.recipe} {config.out.name}",
        num_parts=config.loader.batch_size,
        make_objective=functools.partial(make_classifier, config, classes),
        tokenizer=meta.extra["tokenizer"]["fingerprint"],
        register_as=config.register_as,
        begin=None if begin is None else functools.partial(begin, classes),
    )


def find_source(place: Path) -> tuple[PretrainConfig, Path]:
    """The config of the pre-training run that `place` names, and its checkpoint: the last one, where `place` is the run.

    Raises:
        ConfigError: `place` is neither a run nor one of its checkpoints.
        DamagedRun: that checkpoint is damaged, or every one of the run.
    """
    is_checkpoint = (place / STATE_NAME).exists()
    folder = place.resolve().parent.parent if is_checkpoint else place
    if not (folder / CONFIG_NAME).exists() or not list_folders(folder):
        raise ConfigError(
            f"from_run: {place} holds no pre-training run with a checkpoint; give the --out of `tokenreel pretrain`, or one of "
            "its checkpoints/"
        )
    config = load_config(folder / CONFIG_NAME, PretrainConfig)
    expected = expected_checkpoints(config)
    if not is_checkpoint:
        return config, whole_checkpoints(folder, expected)[-1]
    if trouble := find_damage(place, expected):
        raise DamagedRun(f"from_run: {trouble}. Give another checkpoint, or the run")
    return config, place


def _take_network(wanted: VimpacConfig, pretrained: VimpacConfig) -> VimpacConfig:
    return replace(wanted, **{name: getattr(pretrained, name) for name in _NETWORK})


def _start_from(config: FinetuneConfig, pretrained: PretrainConfig, checkpoint: Path, classes: tuple[str, ...]) -> None:
    """Write the checkpoint that the run begins with: the pre-trained backbone, resized, and a zero head."""
    seed_everything(config.loop.seed, -1, 0)
    classifier = make_classifier(config, classes)
    load_pretrained(classifier.backbone, load_objective(pretrained, checkpoint).state_dict())
    write_checkpoint(config.out, classifier.state_dict(), {}, Cursor())


def open_clips(config: FinetuneConfig) -> LabelledClips:
    return LabelledClips(config.tokens, config.loader, config.backbone.shape, config.backbone.pad_id)


def expected_checkpoints_of(config: FinetuneConfig, classes: tuple[str, ...]) -> Expected:
    """What the checkpoints of a run hold."""
    make = functools.partial(make_classifier, config, classes)
    return Expected.of(make, config.loop.steps, ema=config.loop.ema_decay > 0)


def make_classifier(config: FinetuneConfig, classes: tuple[str, ...]) -> VimpacClassifier:
    return VimpacClassifier(VimpacBackbone(config.backbone), classes, frozen=config.frozen)


def load_classifier(config: FinetuneConfig, classes: tuple[str, ...], checkpoint: Path) -> VimpacClassifier:
    """The trained classifier of a run, in eval mode; the running average of its weights, if the run kept one."""
    classifier = make_classifier(config, classes)
    load_weights(checkpoint, classifier)
    if config.loop.ema_decay:
        load_ema(checkpoint, classifier)
    return classifier.eval()


class _Batches:
    """`LabelledBatches` as the loop takes them: "tokens" (b t h w) and "labels" (b), int64, and "keys"."""

    unit = "tokens"

    def __init__(self, clips: LabelledClips, config: FinetuneConfig, context: Context) -> None:
        self._batches = LabelledBatches(clips, config.loader, rank=context.rank, world_size=context.world_size)
        self.units_per_step = config.loader.batch_size * math.prod(config.backbone.shape)

    def batch(self, step: int) -> dict[str, Any]:
        windows, labels, keys = self._batches.read(step)
        return {"tokens": torch.from_numpy(windows.astype(np.int64)), "labels": torch.from_numpy(labels), "keys": keys}


def build(config: FinetuneConfig, context: Context) -> Task:
    """What a worker trains."""
    clips = open_clips(config)
    classes = clips.classes()
    # The loader's thread reads through its own reader while this one is used.
    batches, held_out = _Batches(open_clips(config), config, context), clips.of_split("val")
    labels = clips.class_numbers(held_out, classes)
    batch_size = config.loop.micro_batch or config.loader.batch_size // context.world_size
    precision = config.loop.precision

    def validate(module: nn.Module) -> Fractions:
        assert isinstance(module, VimpacClassifier)
        share = slice(context.rank, None, context.world_size)
        mine, truth = held_out[share], labels[share]
        probabilities = predict(module, clips, mine, PLAIN, 1, batch_size, precision)
        right = probabilities[np.arange(len(mine)), truth]
        count = float(len(mine))
        return {
            "val_loss": (float(-np.log(np.maximum(right, 1e-12)).sum()), count),
            "val_accuracy": (float((probabilities.argmax(axis=1) == truth).sum()), count),
        }

    def draw(module: nn.Module, step: int) -> None:
        assert isinstance(module, VimpacClassifier)
        if not len(held_out):
            return
        predicted = predict(module, clips, held_out, PLAIN, 1, batch_size, precision).argmax(axis=1)
        picture = draw_confusion(confusion_matrix(labels, predicted, len(classes)), classes)
        save_picture(context.run / "pictures" / f"val_confusion_{step:08d}.png", picture)

    return Task(
        objective=make_classifier(config, classes),
        batches=batches,
        draw=draw,
        validate=validate if len(held_out) else None,
    )


@torch.inference_mode()
def predict(
    classifier: VimpacClassifier,
    clips: LabelledClips,
    numbers: np.ndarray,
    views: ViewChoice,
    num_windows: int,
    batch_size: int,
    precision: Precision = "fp32",
) -> np.ndarray:
    """(n c) float64 probabilities of the classes of clips `numbers`: the mean softmax over their windows and views.

    Args:
        num_windows: of each view, spread evenly over the clip.
        batch_size: windows that are computed at a time, on the classifier's device.
    """
    device, pad = classifier.head.weight.device, classifier.backbone.config.pad_id
    sums = np.zeros((len(numbers), len(classifier.classes)))
    place, rows, starts = clips.spread(numbers, views, num_windows)
    for first in range(0, len(place), batch_size):
        part = slice(first, first + batch_size)
        windows = clips.read(rows[part], starts[part])
        tokens = torch.from_numpy(windows.astype(np.int64)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = classifier.logits(tokens, padded=bool((windows == pad).any()))
        np.add.at(sums, place[part], logits.double().softmax(dim=-1).cpu().numpy())
    totals: np.ndarray = sums / sums.sum(axis=1, keepdims=True)
    return totals


def _export(config: FinetuneConfig, classes: tuple[str, ...], checkpoint: Path, folder: Path) -> None:
    """Write the checkpoint's classifier as a model folder; also as one of MLflow's where it will be registered."""
    classifier = load_classifier(config, classes, checkpoint)
    write_model(folder, classifier, config.out)
    if config.register_as:
        try:
            add_mlflow_model(folder, classifier)
        except Exception as error:  # MLflow and torch.export are no reason to lose a finished run
            log.warning("%s is no MLflow model: %s", folder, error)


def _conclude(config: FinetuneConfig, classes: tuple[str, ...]) -> dict[str, Any]:
    figures: dict[str, Any] = {"classes": len(classes)}
    best = best_checkpoint(config.out)
    for name, checkpoint in (("best", best), ("last", list_checkpoints(config.out)[-1])):
        if (accuracy := read_cursor(checkpoint).val_accuracy) is not None:
            figures[f"{name}_val_accuracy"] = accuracy
    return figures | ({"best_step": read_cursor(best).step} if len(figures) > 1 else {})

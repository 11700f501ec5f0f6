"""The folder of a model, pre-trained or a classifier, that our own loader and MLflow's both read; nothing in it is a pickle of
ours.

model/
  model.safetensors, config.json    weights of backbone and heads, and what to build them into: `load_model`,
                                    `load_classifier`; a classifier's labels stand there too, by class number
  run_config.json                   the resolved config of the run
  MLmodel, data/model.pt2, ...      the backbone, or the classifier, as a traced graph: `mlflow.pytorch.load_model`
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jobs.checkpoint import check_tensors, specs_of
from jobs.config import CONFIG_NAME, from_plain
from jobs.mirror import MARKER_NAME, TOKENIZER_KEY
from jobs.run_files import DamagedRun, read_object
from models.classifier import VimpacClassifier
from models.vimpac import VimpacBackbone, VimpacConfig, VimpacObjective, VimpacObjectiveConfig
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
_WEIGHTS = "model.safetensors"
_DESCRIPTION = "config.json"
_RUN_CONFIG = "run_config.json"


def write_model(folder: Path, objective: VimpacObjective | VimpacClassifier, run: Path) -> None:
    """Write the weights of `objective`, its description, and the config of `run`."""
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in objective.state_dict().items()}, folder / _WEIGHTS)
    own: dict[str, Any] = (
        {"kind": "vimpac-classifier", "classes": list(objective.classes)}
        if isinstance(objective, VimpacClassifier)
        else {"kind": "vimpac", "objective": asdict(objective.config)}
    )
    description = {**own, "backbone": asdict(objective.backbone.config)}
    if (run / MARKER_NAME).exists() and (tokenizer := read_object(run / MARKER_NAME).get(TOKENIZER_KEY)):
        description["tokenizer"] = tokenizer  # whose codes it takes
    (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    shutil.copyfile(run / CONFIG_NAME, folder / _RUN_CONFIG)


def load_model(folder: Path) -> VimpacObjective:
    """The objective that `write_model` wrote, in eval mode; its `backbone` is the pre-trained network.

    Raises:
        ConfigError: `folder` holds no such model.
        DamagedRun: weights that do not fit the description.
    """
    try:
        description = read_object(folder / _DESCRIPTION)
        backbone = from_plain(description["backbone"], VimpacConfig, str(folder / _DESCRIPTION))
        config = from_plain(description["objective"], VimpacObjectiveConfig, str(folder / _DESCRIPTION))
    except (DamagedRun, ConfigError, KeyError) as error:
        raise ConfigError(
            f"{folder} holds no pre-trained model; give the model/ of `tokenreel pretrain`: {error}"
        ) from error
    return _load(folder, lambda: VimpacObjective(VimpacBackbone(backbone), config))


def read_tokenizer(folder: Path) -> str:
    """The fingerprint of the tokenizer whose codes a model takes; "" where a release before did not note it.

    Raises:
        DamagedRun: its description is damaged.
    """
    return str(read_object(folder / _DESCRIPTION).get("tokenizer", ""))


def _load(folder: Path, make: Callable[[], M]) -> M:
    """What `make` builds, in eval mode, with the weights in `folder`. A file that does not fit costs no memory."""
    try:
        with torch.device("meta"):
            expected = specs_of(make().state_dict())
    except RuntimeError as error:
        raise DamagedRun(f"{folder / _DESCRIPTION} describes a network that cannot be: {error}") from error
    check_tensors(folder / _WEIGHTS, expected)
    module = make()
    module.load_state_dict(load_file(folder / _WEIGHTS))
    return module.eval()


def read_classes(folder: Path) -> tuple[str, ...]:
    """The labels of a classifier, by class number.

    Raises:
        ConfigError: `folder` holds no classifier.
    """
    try:
        classes = read_object(folder / _DESCRIPTION)["classes"]
        if not (isinstance(classes, list) and classes and all(isinstance(one, str) for one in classes)):
            raise ValueError(f"{folder / _DESCRIPTION}: classes are no list of labels")
        return tuple(classes)
    except (DamagedRun, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} holds no classifier; give the model/ of `tokenreel finetune`: {error}") from error


def load_classifier(folder: Path) -> VimpacClassifier:
    """The classifier that `write_model` wrote, in eval mode.

    Raises:
        ConfigError: `folder` holds no such model.
        DamagedRun: weights that do not fit the description.
    """
    classes = read_classes(folder)
    try:
        plain = read_object(folder / _DESCRIPTION)["backbone"]
        backbone = from_plain(plain, VimpacConfig, str(folder / _DESCRIPTION))
    except (ConfigError, KeyError) as error:
        raise ConfigError(f"{folder} holds no classifier; give the model/ of `tokenreel finetune`: {error}") from error
    return _load(folder, lambda: VimpacClassifier(VimpacBackbone(backbone), classes))


class Features(nn.Module):
    """The backbone with one tensor as its output, as MLflow wants it: tokens (n t h w) -> (n 1+t*h*w d), CLS first."""

    def __init__(self, backbone: VimpacBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.backbone(tokens, padded=True)  # a traced graph cannot look first
        return torch.cat([features.cls[:, None], features.tokens.flatten(1, 3)], dim=1)


class Probabilities(nn.Module):
    """A classifier for MLflow: tokens (n t h w) -> probabilities (n c) of its classes."""

    def __init__(self, classifier: VimpacClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier.logits(tokens, padded=True).softmax(dim=-1)


def add_mlflow_model(folder: Path, objective: VimpacObjective | VimpacClassifier) -> None:
    """Make `folder` an MLflow model too, with a signature, that gives `Features`, or the `Probabilities` of a classifier, for
    any number of clips.

    The graph is stored as `torch.export` writes it, the one format of MLflow's that loads with
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false. That is for whoever loads models of others to set: MLflow's default is true.
    """
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    backbone = objective.backbone.config
    example = torch.zeros(2, *backbone.shape, dtype=torch.int64).numpy()
    graph: nn.Module
    shape: tuple[int, ...]
    if isinstance(objective, VimpacClassifier):
        graph, shape = Probabilities(objective), (-1, len(objective.classes))
    else:
        graph, shape = Features(objective.backbone), (-1, 1 + math.prod(backbone.shape), backbone.hidden)
    signature = ModelSignature(
        Schema([TensorSpec(example.dtype, (-1, *backbone.shape))]),
        Schema([TensorSpec(torch.zeros(0).numpy().dtype, shape)]),
    )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        place = Path(scratch) / "model"
        mlflow.pytorch.save_model(
            graph.eval(),
            str(place),
            signature=signature,
            input_example=example,
            serialization_format="pt2",
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"mlflow=={mlflow.__version__}"],
        )
        shutil.copytree(place, folder, dirs_exist_ok=True)

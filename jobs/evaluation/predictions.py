"""What a fine-tuned classifier predicts for many clips: in this process, or by copies of it side by side on Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from jobs.cluster import connect, place_models
from jobs.finetune import FinetuneConfig, MultiClipConfig, load_classifier, open_clips, predict
from jobs.loop import Precision
from jobs.progress import Progress
from pipeline.storage import Store

_BATCHES_PER_PART = 8
"""Enough that a part's last batch, which may not be full, costs little; few enough that no worker waits long for the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictorSpec:
    """Which classifier predicts, what of each clip it sees, and how; it travels to Ray's workers.

    batch_size: windows that are computed at a time.
    """

    trained: FinetuneConfig
    classes: tuple[str, ...]
    checkpoint: Path
    windows: MultiClipConfig
    batch_size: int
    precision: Precision

    def located(self) -> PredictorSpec:
        """The same with absolute paths, as a worker is in another folder."""
        loader = self.trained.loader
        if loader.splits is not None:
            loader = replace(loader, splits=loader.splits.resolve())
        trained = replace(self.trained, tokens=Store.at(self.trained.tokens).url, loader=loader)
        return replace(self, trained=trained, checkpoint=self.checkpoint.resolve())


class Predictor:
    """A classifier on this process's first GPU, where it has one, and the clips that it reads."""

    def __init__(self, spec: PredictorSpec, num_threads: int | None = None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._spec, self._clips = spec, open_clips(spec.trained)
        self._classifier = load_classifier(spec.trained, spec.classes, spec.checkpoint)
        self._classifier.to("cuda" if torch.cuda.is_available() else "cpu")

    def predict(self, numbers: np.ndarray) -> np.ndarray:
        """(n c) float64 probabilities of the classes of clips `numbers`."""
        spec, windows = self._spec, self._spec.windows
        return predict(
            self._classifier, self._clips, numbers, windows.views, windows.num_clips, spec.batch_size, spec.precision
        )


def predict_clips(spec: PredictorSpec, numbers: np.ndarray, num_models: int) -> np.ndarray:
    """(n c) float64 probabilities of clips `numbers`.

    Args:
        num_models: copies side by side on Ray; 0: as many as the cluster has GPUs or, without any, CPUs; 1: in this process.

    Raises:
        ConfigError, DatasetError, OSError: as `predict` raises them, from wherever it ran.
    """
    parts = split_parts(numbers, spec)
    with Progress("evaluate", "clips", len(numbers)) as bar, _predicted(spec, parts, num_models) as predicted:
        found = []
        for probabilities in predicted:
            found.append(probabilities)
            bar.advance(len(probabilities))
    return np.concatenate(found)


def split_parts(numbers: np.ndarray, spec: PredictorSpec) -> list[np.ndarray]:
    """Parts of whole clips, whose sizes do not depend on who computes them: nor then do the batches."""
    windows_per_clip = spec.windows.num_clips * len(spec.windows.views.crops)
    size = math.ceil(_BATCHES_PER_PART * spec.batch_size / windows_per_clip)
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


@contextmanager
def _predicted(spec: PredictorSpec, parts: list[np.ndarray], num_models: int) -> Iterator[Iterable[np.ndarray]]:
    """The predictions of each part, in order, as they are made."""
    if num_models == 1:
        yield map(Predictor(spec).predict, parts)
        return
    with connect():
        import ray
        from ray.util import ActorPool

        from pipeline.stages import raised_by_workers

        num_models, resources = place_models(num_models)
        # On CPUs one thread each: their threads would only get in each other's way.
        num_threads = None if "num_gpus" in resources else 1
        kind = ray.remote(Predictor).options(
            max_restarts=-1, max_task_retries=3, scheduling_strategy="SPREAD", **resources
        )
        place = ray.put(spec.located())
        pool = ActorPool([kind.remote(place, num_threads) for _ in range(min(num_models, len(parts)))])
        with raised_by_workers():
            yield pool.map(lambda predictor, part: predictor.predict.remote(part), parts)

"""`tokenreel evaluate` of fine-tuned runs: multi-clip, multi-crop accuracy on held-out labels, and how sure it is."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from jobs.checkpoint import best_of, read_cursor
from jobs.checkpoint_checks import whole_checkpoints
from jobs.config import CONFIG_NAME, load_config, to_plain
from jobs.evaluation.classification_report import Report, write_report
from jobs.evaluation.metrics import (
    bootstrap_interval,
    calibration_error,
    confusion_matrix,
    top_k_hits,
)
from jobs.evaluation.predictions import PredictorSpec, predict_clips
from jobs.finetune import FinetuneConfig, MultiClipConfig, expected_checkpoints_of, open_clips
from jobs.folder import lock_folder
from jobs.loop import Precision
from jobs.model_folder import read_classes
from jobs.result import JobResult
from jobs.run_files import DamagedRun, read_object
from jobs.run_tokens import find_tokens
from jobs.tracking import DatasetInput, Tracker
from jobs.training import read_run_fingerprint
from pipeline.dataset import read_meta
from pipeline.errors import ConfigError
from pipeline.labelled import LabelledClips
from pipeline.schema import Split, fingerprint
from pipeline.views import Place


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyConfig:
    """How a fine-tuned run is tested."""

    split: Split = "test"
    """Split to measure on. Which checkpoint that is was settled on the validation split before."""
    select: Literal["best", "last"] = "best"
    """Checkpoint: the one with the highest accuracy on the validation split (the last one, in a run without that split), or the
    last one."""
    num_clips: int | None = None
    """Windows of a video; None: as the run's recipe says (test.num_clips)."""
    crops: tuple[Place, ...] = ()
    """Crops whose outputs are averaged; none given: those of the run's recipe (test.views)."""
    num_bins: int = 15
    """Bins of confidence that the calibration error is a mean over."""
    resamples: int = 2000
    """Times that the videos are drawn again for the intervals of 95 %."""
    precision: Precision | None = None
    """Of the forward pass; None: that of the run's training (loop.precision). fp32 is exact, and slower where there are instructions for bf16."""
    num_models: int = 1
    """Copies of the model that predict side by side on Ray, one GPU each or, where there is none, one thread each; 0: as many as
    there are GPUs or CPUs; 1: the one in this process, without Ray, on its first GPU or all its CPUs."""

    def __post_init__(self) -> None:
        if min(self.num_clips or 1, self.num_bins, self.resamples) < 1 or self.num_clips == 0:
            raise ConfigError(
                f"classify: num_clips = {self.num_clips}, num_bins = {self.num_bins}, resamples = {self.resamples}: must be 1 or "
                "more"
            )
        if self.num_models < 0:
            raise ConfigError(f"classify.num_models = {self.num_models}: must be 0 or more")


def is_finetuned(run: Path) -> bool:
    """Whether `run` is the folder of a fine-tuned run."""
    try:
        return "from_run" in read_object(run / CONFIG_NAME)
    except DamagedRun:
        return False


def evaluate_runs(runs: Sequence[Path], tokens: str | None, batch_size: int, config: ClassifyConfig) -> JobResult:
    """Test each of `runs` and, of several, the mean: such as over the official splits of a data set.

    Each run has its own report in its `evaluation/`; the mean stands in that of the first.

    Args:
        tokens: token dataset to test on; None: that of each run.
        batch_size: windows that are computed at a time.
    """
    for run in runs:
        if not is_finetuned(run) or not (run / "model").exists():
            raise ConfigError(f"{run} holds no finished fine-tuned run; give the --out of `tokenreel finetune`")
    results = [_evaluate_run(run, tokens, batch_size, config) for run in runs]
    if len(runs) == 1:
        return results[0]
    figures = {"runs": [str(run) for run in runs], **mean_over_runs([result.figures for result in results])}
    path = _report_folder(runs[0], config) / "mean_over_runs.json"
    path.write_text(json.dumps({**figures, "each": [result.figures for result in results]}, indent=2) + "\n")
    tested = sum(result.committed for result in results)
    return replace(
        results[0],
        planned=tested,
        committed=tested,
        fingerprint=fingerprint(runs=[result.fingerprint for result in results]),
        elapsed_s=sum(result.elapsed_s for result in results),
        figures={**figures, "report": str(path)},
    )


def mean_over_runs(figures: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean of each accuracy and of the calibration error over runs, and its standard deviation (n - 1) as `NAME_std`."""
    found: dict[str, float] = {}
    for name in ("top1", "top5", "mean_class_accuracy", "calibration_error"):
        values = [one[name] for one in figures if name in one]
        if len(values) == len(figures):
            found |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values, ddof=1))}
    return found


def _evaluate_run(run: Path, tokens: str | None, batch_size: int, config: ClassifyConfig) -> JobResult:
    started_s = time.monotonic()
    trained = load_config(run / CONFIG_NAME, FinetuneConfig)
    source = find_tokens(run, trained.tokens, tokens)
    trained = replace(trained, tokens=source.url)
    meta = read_meta(source, kind="tokens", complete=True)
    clips, classes = open_clips(trained), read_classes(run / "model")
    chosen = clips.of_split(config.split)
    if not len(chosen):
        raise ConfigError(
            f"classify.split = {config.split}: {source} has no clip in it; give another split, or --tokens"
        )
    labels = clips.class_numbers(chosen, classes)
    whole = whole_checkpoints(run, expected_checkpoints_of(trained, classes))
    checkpoint, selected_by = _select(whole, config)
    views = replace(trained.test.views, crops=config.crops) if config.crops else trained.test.views
    windows = MultiClipConfig(num_clips=config.num_clips or trained.test.num_clips, views=views)
    out = _report_folder(run, config)
    run_digest = read_run_fingerprint(run)
    with (
        lock_folder(out),
        Tracker.open(
            out,
            job="evaluate",
            name=f"evaluate {run.name} {config.split}",
            params=to_plain(config),
            tags={"tokenreel.run": str(run), "tokenreel.model_fingerprint": run_digest},
            inputs=[
                DatasetInput(name=run.name, fingerprint=run_digest, uri=str(run.resolve()), context="model"),
                DatasetInput(name=source.name, fingerprint=meta.fingerprint, uri=source.url, context=config.split),
            ],
        ) as tracker,
    ):
        spec = PredictorSpec(
            trained=trained,
            classes=classes,
            checkpoint=checkpoint,
            windows=windows,
            batch_size=batch_size,
            precision=config.precision or trained.loop.precision,
        )
        probabilities = predict_clips(spec, chosen, config.num_models)
        report = measure(clips, chosen, labels, classes, probabilities, config)
        report.figures.update(
            split=config.split,
            checkpoint_step=read_cursor(checkpoint).step,
            selected_by=selected_by,
            num_clips=windows.num_clips,
            crops=list(views.crops),
            precision=spec.precision,
        )
        files = write_report(out, report, title=f"tokenreel: {run.name} on {config.split}")
        numbers = {name: value for name, value in report.figures.items() if isinstance(value, float)}
        tracker.finish("FINISHED", numbers, files)
        tracker.close()
        return JobResult(
            job="evaluate",
            out=str(out),
            planned=len(chosen),
            committed=len(chosen),
            fingerprint=fingerprint(model=run_digest, tokens=meta.fingerprint),
            mlflow_run_id=tracker.run_id or "",
            elapsed_s=time.monotonic() - started_s,
            figures={**report.figures, "page": str(files[0])},
        )


def _report_folder(run: Path, config: ClassifyConfig) -> Path:
    """A folder a split, and so an MLflow run a split."""
    return run / ("evaluation" if config.split == "test" else f"evaluation-{config.split}")


def _select(checkpoints: Sequence[Path], config: ClassifyConfig) -> tuple[Path, str]:
    """The checkpoint to test, and what it was selected by: never the split that it is tested on, unless that is val."""
    best = best_of(checkpoints)
    if config.select == "best" and read_cursor(best).val_accuracy is not None:
        return best, "accuracy on the validation split"
    return checkpoints[-1], "being the last"


def measure(
    clips: LabelledClips,
    chosen: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    probabilities: np.ndarray,
    config: ClassifyConfig,
) -> Report:
    """All figures of a test.

    Args:
        chosen: (n,) numbers of the clips that were tested. labels: (n,) their class numbers.
        probabilities: (n c) of each clip.
    """
    predicted = probabilities.argmax(axis=1)
    videos = clips.video_ids[chosen].astype(str)
    confusion = confusion_matrix(labels, predicted, len(classes))
    counts = np.bincount(labels, minlength=len(classes))
    hits = top_k_hits(probabilities, labels, 1)
    # A hit weighted so that the mean over all clips is the mean over classes.
    values = {"top1": hits, "mean_class_accuracy": hits * (len(labels) / (np.count_nonzero(counts) * counts[labels]))}
    if len(classes) > 5:
        values["top5"] = top_k_hits(probabilities, labels, 5)
    calibration = calibration_error(probabilities, labels, config.num_bins)
    figures: dict[str, Any] = {"clips": len(chosen), "videos": len(set(videos.tolist())), "classes": len(classes)}
    for name, value in values.items():
        interval = bootstrap_interval(value, videos, num_resamples=config.resamples)
        figures |= {name: float(value.mean()), f"{name}_low": interval.low, f"{name}_high": interval.high}
    in_training = Counter(clips.labels[clips.of_split("train")].tolist())
    most = max(classes, key=lambda label: in_training[label])
    figures |= {
        "calibration_error": calibration.error,
        "majority": float(counts[classes.index(most)] / len(labels)),
        "chance": 1 / len(classes),
    }
    predictions = pa.table(
        {
            "key": clips.keys[chosen].tolist(),
            "source": clips.sources[chosen].tolist(),
            "video_id": videos.tolist(),
            "label": [classes[number] for number in labels],
            "predicted": [classes[number] for number in predicted],
            "confidence": probabilities.max(axis=1),
            "probability_of_label": probabilities[np.arange(len(labels)), labels],
        }
    )
    return Report(
        classes=classes, figures=figures, predictions=predictions, confusion=confusion, calibration=calibration
    )

"""`tokenreel evaluate`: what a pre-trained model has learnt, against simple baselines and the same network untrained."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from jobs.checkpoint import list_folders
from jobs.checkpoint_checks import whole_checkpoints
from jobs.config import CONFIG_NAME, load_config, to_plain
from jobs.contact_sheet import Row, Section, Strip, write_contact_sheet
from jobs.evaluation.classification import ClassifyConfig, evaluate_runs, is_finetuned
from jobs.evaluation.label_probes import describe_labels, measure_labels
from jobs.evaluation.probes import make_tasks, probe, read_views
from jobs.folder import lock_folder
from jobs.loop import seed_everything
from jobs.paths import PathOrUrl
from jobs.pretrain import PretrainConfig, draw_predictions, expected_checkpoints, load_objective
from jobs.result import JobResult
from jobs.run_tokens import find_tokens
from jobs.token_origin import original_frames
from jobs.tracking import DatasetInput, Tracker
from jobs.training import read_run_fingerprint
from jobs.window_embedder import WindowEmbedder
from models.vimpac import VimpacBackbone, VimpacObjective
from pipeline.dataset import DatasetMeta, find_parent, read_index, read_meta
from pipeline.embedding import EmbedSettings
from pipeline.errors import ConfigError
from pipeline.loader import WindowReader
from pipeline.order import draw_seeds
from pipeline.schema import Reject, Split, fingerprint
from pipeline.storage import Store

log = logging.getLogger(__name__)
_SHEET_CLIPS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Measure a trained model, and write a page to look at.

    Pre-trained: masked-token accuracy against the unigram baseline, and frozen-feature probes against the same network untrained,
    probes and searches by the labels of the tokens, if any.
    Fine-tuned: accuracy on the test split over several windows and crops, with intervals, by class, and its calibration.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, made by `tokenreel pretrain` or `tokenreel finetune`."""
    more_runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ()
    """Further fine-tuned runs, such as of the other official splits: each is tested, and the mean reported."""
    tokens: PathOrUrl | None = None
    """Token dataset to measure on; by default the one that the run was trained on."""
    max_windows: int = 256
    """Windows, at most, that each figure of a pre-trained model is measured on."""
    max_clips: int = 2048
    """Labelled clips, at most, that features are probed on where the tokens have labels."""
    batch_size: int = 32
    """Windows that go through the model at a time."""
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)

    def __post_init__(self) -> None:
        if min(self.max_windows, self.max_clips, self.batch_size) < 1:
            raise ConfigError(
                f"max_windows = {self.max_windows}, max_clips = {self.max_clips} and batch_size = {self.batch_size} must be 1 "
                "or more"
            )


def run(config: EvaluateConfig) -> JobResult:
    if is_finetuned(config.run):
        return evaluate_runs((config.run, *config.more_runs), config.tokens, config.batch_size, config.classify)
    if config.more_runs or config.classify != ClassifyConfig():
        raise ConfigError(f"several runs and classify options are for fine-tuned runs; {config.run} is none")
    started_s = time.monotonic()
    trained = load_run(config.run)
    tokens = find_tokens(config.run, trained.tokens, config.tokens)
    meta = read_meta(tokens, kind="tokens", complete=True)
    objective = load_objective(trained, whole_checkpoints(config.run, expected_checkpoints(trained))[-1])
    seed_everything(trained.loop.seed, -1, 0)  # as the run began, so that "untrained" is its own starting point
    untrained = VimpacObjective(VimpacBackbone(trained.backbone), trained.objective).eval()
    if torch.cuda.is_available():
        objective.cuda()
        untrained.cuda()
    out = config.run / "evaluation"
    run_digest = read_run_fingerprint(config.run)
    inputs = [
        DatasetInput(name=config.run.name, fingerprint=run_digest, uri=str(config.run.resolve()), context="model"),
        DatasetInput(name=tokens.name, fingerprint=meta.fingerprint, uri=tokens.url, context="evaluation"),
    ]
    tags = {"tokenreel.run": str(config.run), "tokenreel.model_fingerprint": run_digest}
    with (
        lock_folder(out),
        Tracker.open(
            out, job="evaluate", name=f"evaluate {config.run.name}", params=to_plain(config), tags=tags, inputs=inputs
        ) as tracker,
    ):
        figures: dict[str, Any] = {}
        if trained.objective.mlm_weight:
            figures |= _measure_prediction(objective, tokens, config)
        figures["probes"] = _measure_probes(objective, untrained, tokens, config)
        labels = measure_labels(
            objective.backbone,
            untrained.backbone,
            _reader(objective, tokens),
            max_clips=config.max_clips,
            batch_size=config.batch_size,
        )
        if labels:
            figures["labels"] = labels
        sheet = out / "contact_sheet.html"
        _write_sheet(sheet, objective, trained, tokens, meta, figures)
        (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n")
        summary = {name: value for name, value in figures.items() if isinstance(value, float)}
        for name, row in figures["probes"].items():
            summary |= {f"probe_{name}_{key}": row[key] for key in ("pretrained", "untrained", "majority")}
        for name, row in labels.items():
            summary |= {f"label_{name}_{key}".replace("@", "_at_"): v for key, v in row.items() if isinstance(v, float)}
        tracker.finish("FINISHED", summary, [sheet, out / "results.json"])
        tracker.close()
        done = len(figures["probes"])
        return JobResult(
            job="evaluate",
            out=str(out),
            planned=done,
            committed=done,
            fingerprint=fingerprint(model=run_digest, tokens=meta.fingerprint),
            mlflow_run_id=tracker.run_id or "",
            elapsed_s=time.monotonic() - started_s,
            figures={**figures, "contact_sheet": str(sheet)},
        )


def load_run(run: Path) -> PretrainConfig:
    """The config of a finished pre-training run.

    Raises:
        ConfigError: `run` is no such folder.
    """
    if not (run / CONFIG_NAME).exists() or not list_folders(run):
        raise ConfigError(
            f"{run} holds no pre-training run with a checkpoint; give the --out of `tokenreel pretrain` or `tokenreel finetune`"
        )
    return load_config(run / CONFIG_NAME, PretrainConfig)


def _reader(objective: VimpacObjective, tokens: Store, split: Split | None = None) -> WindowReader:
    backbone = objective.backbone.config
    return WindowReader(tokens, split or "all", backbone.shape, backbone.pad_id)


def draw_samples(num_samples: int, max_windows: int) -> np.ndarray:
    """Numbers of the samples to predict, each up to eight times: in an order of their own, as neighbours are often of one video."""
    order = np.random.default_rng(0).permutation(num_samples)
    return np.resize(order, min(max_windows, 8 * num_samples))


@torch.inference_mode()
def _measure_prediction(objective: VimpacObjective, tokens: Store, config: EvaluateConfig) -> dict[str, Any]:
    """Accuracy at masked positions, and the best that naming one code everywhere could reach on the same positions."""
    codebook_size, device = objective.backbone.config.codebook_size, next(objective.parameters()).device
    has_val = "val" in read_index(tokens, ["split"])["split"].to_pylist()
    split: Split = "val" if has_val else "train"
    reader = _reader(objective, tokens, split)
    samples = draw_samples(len(reader), config.max_windows)
    rounds = np.arange(len(samples)) // len(reader)
    seeds = draw_seeds(0, rounds, reader.key_hashes[samples], 0)
    starts = (
        draw_seeds(0, rounds, reader.key_hashes[samples], 1) % reader.num_starts(samples).astype(np.uint64)
    ).astype(np.int64)
    hits = 0
    hidden_codes = np.zeros(codebook_size, np.int64)
    for first in range(0, len(samples), config.batch_size):
        part = slice(first, first + config.batch_size)
        clips = torch.from_numpy(reader.read(samples[part], starts[part]).astype(np.int64))
        mask = objective.draw_masks(clips, torch.from_numpy(seeds[part].view(np.int64)))
        predicted = objective.predict(clips.to(device), mask.to(device)).cpu()
        hits += int((predicted == clips)[mask].sum())
        hidden_codes += np.bincount(clips[mask].numpy(), minlength=codebook_size)
    masked = int(hidden_codes.sum())
    return {
        "eval_split": split,
        "masked_tokens": masked,
        "masked_token_accuracy": hits / max(1, masked),
        "unigram_accuracy": int(hidden_codes.max()) / max(1, masked),
    }


def _measure_probes(
    objective: VimpacObjective, untrained: VimpacObjective, tokens: Store, config: EvaluateConfig
) -> dict[str, dict[str, Any]]:
    views, videos, times_s = read_views(_reader(objective, tokens), config.max_windows)
    settings = EmbedSettings(batch_windows=config.batch_size)
    features = {
        name: {view: WindowEmbedder(module.backbone, settings).all(windows) for view, windows in views.items()}
        for name, module in (("pretrained", objective), ("untrained", untrained))
    }
    rows = {}
    for task in make_tasks(videos, times_s):
        row: dict[str, Any] = {"question": task.question, "split_by": task.split_by}
        for name in features:
            result, most_frequent = probe(task, features[name])
            row |= {name: result.accuracy, f"{name}_interval": [result.interval.low, result.interval.high]}
            row |= {"majority": most_frequent.accuracy, "tested": len(result.hits)}
        rows[task.name] = row
    return rows


def _write_sheet(
    path: Path,
    objective: VimpacObjective,
    trained: PretrainConfig,
    tokens: Store,
    meta: DatasetMeta,
    figures: dict[str, Any],
) -> None:
    reader = _reader(objective, tokens)
    rows = _choose_rows(reader)
    starts = (reader.num_starts(rows) - 1) // 2  # from the middle: films begin with black
    clips = torch.from_numpy(reader.read(rows, starts).astype(np.int64))
    seeds = torch.from_numpy(draw_seeds(1, np.zeros(len(rows), np.int64), reader.key_hashes[rows], 0).view(np.int64))
    device = next(objective.parameters()).device
    drawn = (
        draw_predictions(objective, clips.to(device), seeds.to(device), tokens) if trained.objective.mlm_weight else []
    )
    reconstructions, predictions = [], []
    for place, sample in enumerate(rows):
        row = reader.index.slice(int(sample), 1).to_pylist()[0]
        caption = f"{row['source']}, {row['start_s'] + starts[place] / row['fps']:.1f} s, {row['split']}"
        strips = [
            Strip(label="original", frames=frames, role="original")
            for frames in _originals(tokens, meta, row, int(starts[place]), reader.num_frames)
        ]
        if drawn:
            decoded, masked, predicted = drawn[place]
            reconstructions.append(
                Row(
                    caption=caption,
                    strips=[*strips, Strip(label="reconstruction", frames=decoded, role="reconstruction")],
                )
            )
            predictions.append(
                Row(
                    caption=caption,
                    strips=[
                        Strip(label="reconstruction", frames=decoded, role="reconstruction"),
                        Strip(label="masked", frames=masked, role="masked"),
                        Strip(label="predicted", frames=predicted, role="predicted"),
                    ],
                )
            )
    sections = [
        *([describe_labels(figures["labels"])] if "labels" in figures else []),
        Section(
            heading="Tokenizer",
            note="What is left of each frame after it went through the codes.",
            rows=reconstructions,
        ),
        Section(
            heading="Masked prediction",
            note="Hatched blocks are hidden from the model, which fills in the likeliest code of each position by itself.",
            rows=predictions,
        ),
    ]
    write_contact_sheet(
        path,
        title=f"tokenreel: {trained.recipe}",
        facts=_facts(trained, figures),
        sections=[s for s in sections if s.rows or s.table],
    )


def _facts(trained: PretrainConfig, figures: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("recipe", trained.recipe), ("steps", str(trained.loop.steps))]
    if "masked_token_accuracy" in figures:
        facts.append(
            (
                f"masked-token accuracy ({figures['eval_split']})",
                f"{figures['masked_token_accuracy']:.1%}, unigram {figures['unigram_accuracy']:.1%}",
            )
        )
    for name, row in figures["probes"].items():
        facts.append(
            (
                f"probe: {name}",
                f"{row['pretrained']:.1%}, untrained {row['untrained']:.1%}, majority {row['majority']:.1%}",
            )
        )
    return facts


def _choose_rows(reader: WindowReader) -> np.ndarray:
    """One sample each of up to `_SHEET_CLIPS` videos."""
    _, first = np.unique(np.array(reader.index["video_id"].to_pylist()), return_index=True)
    return np.sort(first)[np.unique(np.linspace(0, len(first) - 1, min(_SHEET_CLIPS, len(first))).astype(int))]


def _originals(
    tokens: Store, meta: DatasetMeta, row: dict[str, Any], start: int, num_frames: int
) -> Sequence[np.ndarray]:
    """The window's frames as they were before the tokenizer, where its clip dataset is still at hand."""
    clips = find_parent(tokens, meta)
    if clips is None:
        return []
    frames = original_frames(clips, meta, row)
    return [] if isinstance(frames, Reject) else [frames[start : start + num_frames]]

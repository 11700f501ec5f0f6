"""Frozen features against the labels of a token dataset, beside baselines that have learnt nothing.

Shapes: n windows; t h w token grid; s tokens that the attentive probe sees; d width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from jobs.contact_sheet import Section, Table
from jobs.evaluation.attentive import attentive_probe
from jobs.evaluation.frozen import (
    Features,
    ProbeResult,
    compare,
    hold_out,
    knn_probe,
    linear_probe,
    majority,
    retrieval,
)
from jobs.window_embedder import WindowEmbedder
from models.vimpac import VimpacBackbone
from pipeline.embedding import EmbedSettings
from pipeline.loader import WindowReader

log = logging.getLogger(__name__)
_VAL_SHARE = 0.2
_CELLS = 4
"""The attentive probe sees each frame as so many by so many cells, means of tokens; all tokens would take gigabytes."""
Splits = tuple[np.ndarray, np.ndarray, np.ndarray]


def measure_labels(
    pretrained: VimpacBackbone, untrained: VimpacBackbone, reader: WindowReader, *, max_clips: int, batch_size: int
) -> dict[str, Any]:
    """What probes read from features of the middle window of labelled clips; {} where labels allow no test.

    Features: of the pre-trained network; of the untrained one; of the pre-trained one that sees only the window's middle
    frame, in every place (`single_frame`); and how often each code stands in the window (`token_histogram`).

    Returns:
        for "linear", "knn", "attentive" (the two networks alone) and the measures of `retrieval`: the figure of each kind of
        features, with its 95 % interval over source videos under NAME_interval; `chance`, which is that of the most
        frequent label or of a random ranking; `difference` of pre-trained against untrained, paired, with its interval.
        "rows": how many each split has.
    """
    labels = np.array([label or "" for label in reader.index["label"].to_pylist()])
    known = np.flatnonzero(labels != "")
    samples = np.sort(known[np.random.default_rng(0).permutation(len(known))[:max_clips]])
    videos = np.array(reader.index["video_id"].to_pylist())[samples]
    numbers = np.unique(labels[samples], return_inverse=True)[1]
    splits = draw_splits(np.array(reader.index["split"].to_pylist())[samples], videos)
    if min(map(len, splits)) == 0 or len(np.unique(numbers[splits[0]])) < 2:
        if len(known):
            log.info(
                "evaluate: labels are not probed: %d labelled clips train, %d validate, %d test, and two or more labels must "
                "be among the first",
                *map(len, splits),
            )
        return {}
    windows = reader.read(samples, (reader.num_starts(samples) - 1) // 2)
    settings = EmbedSettings(batch_windows=batch_size)
    networks = {"pretrained": WindowEmbedder(pretrained, settings), "untrained": WindowEmbedder(untrained, settings)}
    pooled = {name: model.all(windows) for name, model in networks.items()}
    pooled["single_frame"] = networks["pretrained"].all(_middle_frame(windows, networks["pretrained"].pad))
    pooled["token_histogram"] = token_histogram(windows, pretrained.config.codebook_size)
    cells = {
        "pretrained": token_cells(pretrained, windows, batch_size),
        "untrained": token_cells(untrained, windows, batch_size),
    }

    def split(values: np.ndarray) -> list[Features]:
        whole = Features(values=values, labels=numbers, groups=videos)
        return [whole.select(rows) for rows in splits]

    probes: dict[str, tuple[Callable[..., ProbeResult], dict[str, np.ndarray]]] = {
        "linear": (linear_probe, pooled),
        "attentive": (attentive_probe, cells),
        "knn": (knn_probe, pooled),
    }
    train, _, test = split(pooled["pretrained"])
    chance = majority(train, test)
    rows = {
        probe: _row({name: measure(*split(values)) for name, values in features.items()}, chance)
        for probe, (measure, features) in probes.items()
    }
    if _has_pairs(test):
        found = {name: retrieval(*split(values)[::2]) for name, values in pooled.items()}
        for measure_name in [name for name in found["pretrained"] if not name.startswith("chance:")]:
            by_chance = found["pretrained"][f"chance:{measure_name}"]
            rows[measure_name] = _row({name: one[measure_name] for name, one in found.items()}, by_chance)
    return {**rows, "rows": dict(zip(("train", "val", "test"), map(len, splits), strict=True))}


def draw_splits(splits: np.ndarray, videos: np.ndarray) -> Splits:
    """Rows of train, val and test: those of the index, where it has all three. Otherwise `test`, or without it `val`, tests, and a
    fifth of the training videos is val. A split may be empty."""
    train, val, test = (np.flatnonzero(splits == name) for name in ("train", "val", "test"))
    if len(val) and len(test):
        return train, val, test
    test = test if len(test) else val
    if len(np.unique(videos[train])) < 2:
        return train, train[:0], test
    rest, val = hold_out(videos[train], _VAL_SHARE, seed=0)
    return train[rest], train[val], test


def token_histogram(windows: np.ndarray, codebook_size: int) -> np.ndarray:
    """Share of each code (n codebook_size) float32 in windows (n t h w): what pixels say without place, time or network."""
    counts = np.zeros((len(windows), codebook_size), np.float32)
    for row, window in zip(counts, windows, strict=True):
        row += np.bincount(window[window < codebook_size].ravel(), minlength=codebook_size)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


@torch.inference_mode()
def token_cells(backbone: VimpacBackbone, windows: np.ndarray, batch_size: int) -> np.ndarray:
    """Token features (n s d) float16 of windows (n t h w) for the attentive probe: CLS, then the means of up to 4 x 4 cells of
    each frame."""
    device, parts = next(backbone.parameters()).device, []
    for first in range(0, len(windows), batch_size):
        features = backbone(torch.from_numpy(windows[first : first + batch_size].astype(np.int64)).to(device))
        _, t, h, w, _ = features.tokens.shape
        grid = rearrange(features.tokens, "n t h w d -> (n t) d h w")
        cells = F.adaptive_avg_pool2d(grid, (min(_CELLS, h), min(_CELLS, w)))
        cells = rearrange(cells, "(n t) d h w -> n (t h w) d", t=t)
        parts.append(torch.cat([features.cls[:, None], cells], dim=1).half().cpu().numpy())
    return np.concatenate(parts)


def describe_labels(figures: dict[str, Any]) -> Section:
    """The table of `measure_labels` for a page."""
    names = ("pretrained", "untrained", "single_frame", "token_histogram", "chance", "difference")
    columns = (
        "measure",
        "pre-trained",
        "untrained",
        "single frame",
        "token histogram",
        "chance",
        "pre-trained − untrained",
    )
    lines = [(measure, *(_cell(row, name) for name in names)) for measure, row in figures.items() if measure != "rows"]
    rows = figures["rows"]
    return Section(
        heading="Labels on frozen features",
        note=f"Middle windows of {rows['train']:,} clips to fit, {rows['val']:,} to choose settings, {rows['test']:,} to "
        "test, with 95 % intervals over source videos. knn and the searches go by cosine similarity; a search is for another "
        "video of the same label.",
        table=Table(columns=columns, lines=lines),
    )


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    low, high = row.get(f"{name}_interval", (None, None))
    return f"{row[name]:.1%}" + ("" if low is None else f" [{low:.1%}, {high:.1%}]")


def _row(results: dict[str, ProbeResult], chance: ProbeResult) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, result in results.items():
        row |= {name: result.accuracy, f"{name}_interval": [result.interval.low, result.interval.high]}
        if result.chosen:
            row[f"{name}_chosen"] = result.chosen
    compared = compare(results["pretrained"], results["untrained"])
    row |= {"chance": chance.accuracy, "difference": compared.difference}
    row["difference_interval"] = [compared.interval.low, compared.interval.high]
    return row


def _middle_frame(windows: np.ndarray, pad: int) -> np.ndarray:
    """Windows in which every frame is the middle one of those that are not PAD."""
    lengths = (windows != pad).any(axis=(2, 3)).sum(axis=1)
    middle = windows[np.arange(len(windows)), np.maximum(lengths - 1, 0) // 2]
    return np.repeat(middle[:, None], windows.shape[1], axis=1)


def _has_pairs(rows: Features) -> bool:
    """Whether some label has two source videos."""
    pairs = np.unique(np.stack([rows.labels, np.unique(rows.groups, return_inverse=True)[1]]), axis=1)
    return bool((np.bincount(pairs[0]) > 1).any())

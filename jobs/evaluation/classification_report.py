"""The report of a tested classifier: a page, numbers, a picture of the confusion matrix, and every prediction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.contact_sheet import Section, Table, write_contact_sheet
from jobs.evaluation.confusion import draw_confusion
from jobs.evaluation.metrics import Calibration, class_accuracies
from jobs.pictures import save_picture


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a test found out.

    figures: single numbers and short texts, which stand in the job's result.
    predictions: a row a clip.
    confusion: (c c) counts; row is the label.
    """

    classes: tuple[str, ...]
    figures: dict[str, Any]
    predictions: pa.Table
    confusion: np.ndarray
    calibration: Calibration


def write_report(out: Path, report: Report, *, title: str) -> list[Path]:
    """Write the page, the numbers, the picture and the predictions; returns their paths in this order."""
    files = [out / name for name in ("report.html", "results.json", "confusion.png", "predictions.parquet")]
    picture = draw_confusion(report.confusion, report.classes)
    per_class = _per_class(report)
    bins = _bins(report.calibration)
    results = {**report.figures, "per_class": per_class, "calibration": bins, "confusion": report.confusion.tolist()}
    files[1].write_text(json.dumps(results, indent=2) + "\n")
    save_picture(files[2], picture)
    pq.write_table(report.predictions, files[3])
    write_contact_sheet(
        files[0], title=title, facts=_facts(report.figures), sections=_sections(report, per_class, bins, picture)
    )
    return files


def _per_class(report: Report) -> list[dict[str, Any]]:
    """Of each class: its samples, the share that was right (None without samples), and what it is mistaken for most."""
    rows = []
    for number, accuracy in enumerate(class_accuracies(report.confusion).tolist()):
        mistakes = report.confusion[number].copy()
        mistakes[number] = 0
        worst = int(mistakes.argmax())
        rows.append(
            {
                "class": report.classes[number],
                "samples": int(report.confusion[number].sum()),
                "accuracy": None if np.isnan(accuracy) else accuracy,
                "mistaken_for": report.classes[worst] if mistakes[worst] else None,
                "mistaken": int(mistakes[worst]),
            }
        )
    return rows


def _bins(calibration: Calibration) -> list[dict[str, float]]:
    """The bins of confidence that hold samples."""
    return [
        {
            "low": float(calibration.edges[place]),
            "high": float(calibration.edges[place + 1]),
            "samples": int(calibration.counts[place]),
            "confidence": float(calibration.confidence[place]),
            "accuracy": float(calibration.accuracy[place]),
        }
        for place in np.flatnonzero(calibration.counts).tolist()
    ]


def _facts(figures: dict[str, Any]) -> list[tuple[str, str]]:
    names = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class accuracy"}
    accuracies = [
        (label, f"{figures[name]:.1%}, 95 % interval {figures[f'{name}_low']:.1%} to {figures[f'{name}_high']:.1%}")
        for name, label in names.items()
        if name in figures
    ]
    return [
        *accuracies,
        ("calibration error", f"{figures['calibration_error']:.1%}"),
        ("majority, chance", f"{figures['majority']:.1%}, {figures['chance']:.1%}"),
        ("tested", f"{figures['clips']} clips of {figures['videos']} videos, split {figures['split']}"),
        ("windows a clip", f"{figures['num_clips']} x crops {', '.join(figures['crops'])}, in {figures['precision']}"),
        ("checkpoint", f"step {figures['checkpoint_step']}, chosen by {figures['selected_by']}"),
    ]


def _sections(
    report: Report, per_class: list[dict[str, Any]], bins: list[dict[str, float]], picture: np.ndarray
) -> list[Section]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    ordered = sorted(per_class, key=lambda row: (row["accuracy"] is None, row["accuracy"]))
    class_lines = [
        (
            row["class"],
            str(row["samples"]),
            share(row["accuracy"]),
            f"{row['mistaken_for']} ({row['mistaken']})" if row["mistaken_for"] else "",
        )
        for row in ordered
    ]
    bin_lines = [
        (
            f"{row['low']:.0%} to {row['high']:.0%}",
            str(row["samples"]),
            share(row["confidence"]),
            share(row["accuracy"]),
        )
        for row in bins
    ]
    return [
        Section(
            heading="Confusion",
            note="Each row is a label; what lies off the diagonal was taken for the class of that column.",
            picture=picture,
        ),
        Section(
            heading="Classes",
            note="The hardest first: samples, the share that was right, and what the class was mistaken for most often.",
            table=Table(columns=("class", "samples", "accuracy", "mistaken for"), lines=class_lines),
        ),
        Section(
            heading="Calibration",
            note="Where confidence exceeds accuracy, the model is surer than it should be.",
            table=Table(columns=("confidence", "samples", "mean confidence", "accuracy"), lines=bin_lines),
        ),
    ]

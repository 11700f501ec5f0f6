"""The results of the arms as one table and one plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jobs.bench.learn.arms import BASE, NONE, TABLES

# 97.5 % points of Student's t with 1 to 9 degrees of freedom: of so few seeds a normal interval would promise too much.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Estimate(NamedTuple):
    """Mean over seeds and half of its 95 % interval, by Student's t; NaN where there is one seed."""

    mean: float
    margin: float

    def is_above(self, other: Estimate) -> bool:
        """Whether the two intervals do not overlap, this one above."""
        return self.mean - self.margin > other.mean + other.margin

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}" + ("" if math.isnan(self.margin) else f" ± {100 * self.margin:.1f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Of the results of several seeds."""
    count = len(values)
    if count < 2:
        return Estimate(float(values[0]), math.nan)
    t = _T[count - 2] if count - 2 < len(_T) else 1.96
    return Estimate(float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(count))


Key = tuple[str, str, str, float]
"""(arm, task, method, share of labels)."""


def collect(results: Sequence[Mapping[str, Any]]) -> dict[Key, Estimate]:
    """What `result.json` files say, over seeds."""
    found: dict[Key, list[float]] = {}
    for result in results:
        for row in result["rows"]:
            key = (result["arm"], row["task"], row["method"], row["share"])
            found.setdefault(key, []).append(row["accuracy"])
    return {key: estimate(values) for key, values in found.items()}


def wins(estimates: Mapping[Key, Estimate], arm: str, method: str, share: float) -> list[str]:
    """Tasks on which `arm` is above no pre-training with intervals that do not overlap."""
    tasks = sorted({key[1] for key in estimates})
    pairs = {task: [estimates.get((name, task, method, share)) for name in (arm, NONE)] for task in tasks}
    return [task for task, (ours, none) in pairs.items() if ours and none and ours.is_above(none)]


def write_table(path: Path, benchmark: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """A Markdown page: baselines, then a table for each method and share of labels, a row an arm."""
    estimates = collect(results)
    tasks = [task for task in benchmark["tasks"] if any(key[1] == task for key in estimates)]
    lines = [
        "# Results of `tokenreel bench learn ablations`",
        "",
        f"Accuracy on test in %, mean over seeds ± half of its 95 % interval; **bold** where that lies wholly above `{NONE}`'s.",
        "",
    ]
    lines += _rows("Baselines on pixels", tasks, {
        name: [f"{100 * benchmark['baselines'][task][name]:.1f}" for task in tasks]
        for name in next(iter(benchmark["baselines"].values()))
    })  # fmt: skip
    arms = list(dict.fromkeys(result["arm"] for result in results))
    for method, share in sorted({key[2:] for key in estimates}):
        cells = {
            arm: [_cell(estimates, (arm, task, method, share)) for task in tasks]
            for arm in arms
            if any((arm, task, method, share) in estimates for task in tasks)
        }
        lines += _rows(f"{method}, {100 * share:g} % of labels", tasks, cells)
    lines += [
        "## Cost",
        "",
        "| arm | seed | pre-training, s | measuring, s | masked-token accuracy, % |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        hit = result["masked_token_accuracy"]
        shown = "" if hit is None else f"{100 * hit:.1f}"
        lines.append(
            f"| {result['arm']} | {result['seed']} | {result['pretrain_s']} | {result['measure_s']} | {shown} |"
        )
    path.write_text("\n".join(lines) + "\n")


def _cell(estimates: Mapping[Key, Estimate], key: Key) -> str:
    if key not in estimates:
        return ""
    none = estimates.get((NONE, *key[1:]))
    return f"**{estimates[key]}**" if none and estimates[key].is_above(none) else str(estimates[key])


def _rows(heading: str, columns: Sequence[str], cells: Mapping[str, Sequence[str]]) -> list[str]:
    head = [f"## {heading}", "", f"| | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    return [*head, *(f"| {name} | {' | '.join(row)} |" for name, row in cells.items()), ""]


def write_plot(path: Path, benchmark: Mapping[str, Any], results: Sequence[Mapping[str, Any]], share: float) -> None:
    """A picture: of each ablation its arms side by side, a point a task, by linear probe at `share` of the labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    estimates = collect(results)
    present = {key[0] for key in estimates}
    tables = {title: [arm for arm in arms if arm in present] for title, arms in TABLES.items()}
    first = next(iter(TABLES))  # which alone may show no more than pre-training against none
    tables = {
        title: arms for title, arms in tables.items() if len(arms) > 1 and (title == first or {*arms} - {NONE, BASE})
    }
    tasks = [task for task in benchmark["tasks"] if any(key[1] == task for key in estimates)]
    figure = Figure(figsize=(6 * max(1, min(3, len(tables))), 4.5 * max(1, -(-len(tables) // 3))), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, arms) in enumerate(tables.items(), 1):
        axes = figure.add_subplot(-(-len(tables) // 3), min(3, len(tables)), place)
        for task in tasks:
            found = [estimates.get((arm, task, "linear", share), Estimate(math.nan, math.nan)) for arm in arms]
            means, margins = [100 * one.mean for one in found], [100 * np.nan_to_num(one.margin) for one in found]
            axes.errorbar(range(len(arms)), means, yerr=margins, marker="o", capsize=3, label=task)
        axes.set_xticks(range(len(arms)), arms)
        axes.set_title(title)
        axes.set_ylabel("linear probe, accuracy on test, %")
    if tables:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=100)

"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.planning.prediction import StagePrediction


def format_plan(figures: Mapping[str, Any], stages: Mapping[str, StagePrediction]) -> str:
    """A table of the stages, with what it rests on; warnings are not in it."""
    corpus, sample, cluster, total = (figures[name] for name in ("corpus", "sample", "cluster", "total"))
    price = cluster["price_per_hour"]
    lines = [
        f"  corpus   {corpus['videos']:,} videos, {_bytes(corpus['bytes'])}; {sum(corpus['refused'].values()):,} inputs refused",
        f"  measured {sample['videos']:,} videos, {_bytes(sample['bytes'])}, on {sum(sample['cpus'].values())} CPUs",
        f"  cluster  {cluster['cpus']:,} CPUs, {cluster['gpus']:,} GPUs, {price:,.2f} an hour",
        f"  {'stage':<9} {'samples':>11} {'filtered':>9} {'rejected':>9} {'shards':>8} {'bytes':>10} {'tokens':>15} {'CPU hours':>10}"
        f" {'GPU hours':>10} {'hours':>8} {'cost':>10}",
    ]
    for name, one in stages.items():
        tokens = f"{one.tokens:,}" if one.tokens else ""
        hours = one.wall_s / 3600
        lines.append(
            f"  {name:<9} {one.committed:>11,} {sum(one.filtered.values()):>9,} {sum(one.rejected.values()):>9,} "
            f"{one.num_shards:>8,} {_bytes(one.tar_bytes):>10} {tokens:>15} {one.cpu_hours:>10.3g} {one.gpu_hours:>10.3g} "
            f"{hours:>8.3g} {hours * price:>10,.2f}"
        )
    lines.append(
        f"  total    {total['wall_hours']:.3g} hours, {total['cost']:,.2f}, planning ({total['planning_s']:.1f} s) included"
    )
    for name, one in stages.items():
        parts = [f"{count:,} {why}" for why, count in {**one.filtered, **one.rejected}.items() if count]
        errors = [f"{figure} ± {error:.0%}" for figure, error in one.relative_error.items() if error]
        lines.append(
            f"  {name}: bound by {one.bound_by}; {', '.join([*parts, *errors]) or 'no failures, all was measured'}"
        )
    if "tokenize" not in stages:
        lines.append("  tokenize: not planned; name a --tokenizer")
    return "\n".join(lines)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError

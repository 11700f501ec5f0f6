"""`tokenreel inspect`: a page about a dataset, for a person: totals, distributions with example frames, rejects."""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro

from jobs.contact_sheet import Histogram, Row, Section, Strip, Table, write_contact_sheet
from jobs.folder import work_folder
from jobs.paths import PathOrUrl
from jobs.result import JobResult
from pipeline.dataset import DatasetMeta, read_index, read_meta, read_rejects
from pipeline.decode import FrameConfig
from pipeline.errors import ConfigError
from pipeline.quality import QualityThresholds
from pipeline.schema import SCORES, Reject
from pipeline.shards import read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clip

log = logging.getLogger(__name__)

_COLUMNS = [
    "key",
    "source",
    "start_s",
    "end_s",
    "num_frames",
    "height",
    "width",
    "fps",
    *(f"score_{n}" for n in SCORES),
]
_STRIP_FRAMES = 8
_EXAMPLES_OF_A_CLASS = 3
_SCORE_NOTES = {
    "black": "Share of frames that are black.",
    "frozen": "Share of frames that show nothing new.",
    "letterbox": "Share of the picture that black bars take.",
    "brightness": "Mean brightness, 0 black to 1 white.",
    "sharpness": "Variance of the Laplacian in grey levels squared: low is blurred.",
    "motion": "Mean change of a pixel in an eighth of a second, 0 to 1.",
    "cuts_per_min": "Cuts a minute.",
}
_REASON_CHARS = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Write a page about a dataset that any browser shows without a server.

    Of clips: totals, distributions of the scores with example frames. Of tokens: how codes are used, size against its
    bounds, static share, reconstructions beside the frames. Of embeddings: a map. Of all: rejects by class with their reasons.
    """

    dataset: Annotated[PathOrUrl, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """Clip, token or embedding dataset: a path, or s3://, gs://, abfs://."""
    page: Path | None = None
    """HTML file to write; by default inspect.html in the dataset's folder."""
    examples: int = 5
    """Example clips of each distribution, from its lowest value to its highest."""
    bins: int = 40
    """Bars of a histogram."""
    sample_tokens: int = 10**9
    """Tokens that the statistics of a token dataset are taken from, by whole shards drawn at random; the page says so."""
    sample_clips: int = 32
    """Clips of a token dataset, drawn at random, that are decoded again and compared with their frames; of an embedding
    dataset, that the map has a frame of."""
    sample_points: int = 20_000
    """Rows of an embedding dataset, drawn at random, that are on the map."""

    def __post_init__(self) -> None:
        if self.examples < 0 or self.bins < 1:
            raise ConfigError(f"examples = {self.examples} must be 0 or more, bins = {self.bins} 1 or more")
        if self.sample_tokens < 1 or self.sample_clips < 0:
            raise ConfigError(
                f"sample_tokens = {self.sample_tokens} must be 1 or more, sample_clips = {self.sample_clips} 0 or more"
            )
        if self.sample_points < 1:
            raise ConfigError(f"sample_points = {self.sample_points}: must be 1 or more")


def run(config: InspectConfig) -> JobResult:
    started_s = time.monotonic()
    store = Store.at(config.dataset)
    meta = read_meta(store)
    figures: dict[str, Any] = {}
    if meta.kind == "tokens":
        from jobs import inspect_tokens  # it loads torch, which a page about clips does without

        index = read_index(store, inspect_tokens.COLUMNS)
        facts, sections, figures = inspect_tokens.describe(store, meta, index, config)
    elif meta.kind == "embeddings":
        from jobs import inspect_embeddings

        index, facts, sections, figures = inspect_embeddings.describe(store, meta, config)
    else:
        index = read_index(store, _COLUMNS)
        facts, sections = _facts(meta), list(_distributions(store, index, config))
    facts = [
        ("fingerprint", meta.fingerprint),
        ("rows" if meta.kind == "embeddings" else "clips", f"{len(index):,}"),
        ("shards", f"{meta.num_shards:,}"),
        *facts,
    ]
    if meta.totals is None:
        facts.append(("state", "unfinished: the job that writes it is running or was broken off"))
    sections += _rejects(store)
    page = config.page or work_folder(store) / "inspect.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_contact_sheet(page, title=f"{store.name}: {meta.kind}", facts=facts, sections=sections)
    log.info(f"inspect: {len(index)} rows; open {page.absolute()} in a browser")
    return JobResult(
        job="inspect",
        out=store.url,
        planned=len(index),
        committed=len(index),
        fingerprint=meta.fingerprint,
        elapsed_s=time.monotonic() - started_s,
        figures={
            "page": str(page.absolute()),
            "page_bytes": page.stat().st_size,
            "num_sections": len(sections),
            **figures,
        },
    )


def _facts(meta: DatasetMeta) -> list[tuple[str, str]]:
    totals = meta.totals
    if totals is None:
        return []
    facts = [(name, f"{totals[name]:,}") for name in ("videos", "frames")]
    facts += [("hours", f"{totals['hours']:,.3f}"), ("size", f"{totals['payload_bytes'] / 1e9:,.3f} GB")]
    for name in ("codec", "ext", "source_codec", "source_container"):
        counts = totals.get(f"samples_by_{name}", {})
        facts.append((name.replace("_", " "), ", ".join(f"{value} {count:,}" for value, count in counts.items())))
    return facts


def _distributions(store: Store, index: pa.Table, config: InspectConfig) -> Iterator[Section]:
    if not len(index):
        return
    start, end = index["start_s"].to_numpy(), index["end_s"].to_numpy()
    short_side = np.minimum(index["height"].to_numpy(), index["width"].to_numpy())
    show = functools.partial(_example, store, index)
    yield distribution(config, "duration", "Seconds of a clip.", end - start, show, "s")
    yield distribution(config, "short side", "Shorter side of a stored frame.", short_side, show, "px")
    for name in SCORES:
        values = index[f"score_{name}"].to_numpy(zero_copy_only=False).astype(np.float64)
        if not np.isnan(values).all():
            note = f"{_SCORE_NOTES[name]} {_name_options(name)}"
            yield distribution(config, name, note, values, show)


def _name_options(score: str) -> str:
    """The options that filter by a score later on."""
    names = [one.name for one in fields(QualityThresholds) if one.name[4:] == score]
    options = " and ".join(f"--keep.{name.replace('_', '-')}" for name in names)
    return f"tokenize filters by it with {options}, and decodes nothing again."


def distribution(
    config: InspectConfig,
    name: str,
    note: str,
    values: np.ndarray,
    show: Callable[[int, str], Row],
    unit: str = "",
) -> Section:
    """A histogram of `values` (NaN where unknown), and examples from the lowest to the highest.

    Args:
        show: place in `values` and the value in words to the figure of an example.
    """
    known = np.flatnonzero(~np.isnan(values))
    ordered = known[np.argsort(values[known], kind="stable")]
    places = np.unique(np.linspace(0, len(ordered) - 1, min(config.examples, len(ordered))).round().astype(int))
    rows = [show(int(row), f"{name} {values[row]:.4g} {unit}".strip()) for row in ordered[places]]
    counts, edges = np.histogram(values[known], bins=config.bins)
    return Section(
        heading=name, note=note, rows=rows, histogram=Histogram(edges=edges.tolist(), counts=counts.tolist(), unit=unit)
    )


def _example(store: Store, index: pa.Table, place: int, value: str) -> Row:
    row = index.slice(place, 1).to_pylist()[0]
    caption = f"{value} · {row['source']} [{row['start_s']:.2f}, {row['end_s']:.2f}) s · {row['key']}"
    frames = _frames(store, row)
    if isinstance(frames, Reject):
        return Row(caption=f"{caption} · cannot be shown: {frames.reason}", strips=())
    return Row(caption=caption, strips=[Strip(label="frames", frames=frames)])


def _frames(store: Store, row: dict[str, Any]) -> np.ndarray | Reject:
    """A few frames over the whole clip; decoding as few as the strip shows keeps a page of many clips quick."""
    whole = next(one for one in read_shard_rows(store, row["shard"]) if one["key"] == row["key"])
    fps = max(0.01, _STRIP_FRAMES / max(0.1, row["end_s"] - row["start_s"]))
    frames = replace(FrameConfig(), fps=min(fps, row["fps"]))
    return decode_clip(store, whole, TokenizeSettings(frames=frames))


def _rejects(store: Store) -> list[Section]:
    counts: Counter[tuple[str, str, str]] = Counter()
    examples: dict[tuple[str, str, str], list[Reject]] = {}
    for reject in read_rejects(store):
        kind = (reject.outcome, reject.reject_class, reject.stage)
        counts[kind] += 1
        if len(examples.setdefault(kind, [])) < _EXAMPLES_OF_A_CLASS:
            examples[kind].append(reject)
    if not counts:
        return []
    lines = [_describe(kind, count, examples[kind]) for kind, count in counts.most_common()]
    note = "Every input that is in no shard. All of them, with what ffmpeg said, stand in rejects/*.parquet."
    columns = ("outcome", "class", "stage", "count", "examples")
    return [Section(heading="rejects", note=note, table=Table(columns=columns, lines=lines))]


def _describe(kind: tuple[str, str, str], count: int, examples: Sequence[Reject]) -> tuple[str, ...]:
    return (*kind, f"{count:,}", "; ".join(f"{one.path}: {one.reason[:_REASON_CHARS]}" for one in examples))

"""What `tokenreel inspect` shows of a token dataset: how codes are used, what they cost on disk, what they keep of a frame."""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from jobs.contact_sheet import Histogram, Row, Section, Strip, Table
from jobs.inspect import InspectConfig, distribution
from jobs.token_origin import load_kept_tokenizer, original_frames
from pipeline.dataset import DatasetMeta, codebook_size, find_parent
from pipeline.schema import Reject
from pipeline.shards import read_payload
from pipeline.storage import Store
from pipeline.token_statistics import Scan, TokenStatistics, sample_shards, scan_tokens
from pipeline.untrusted import parse_codes

COLUMNS = ["key", "source", "start_s", "end_s", "offset", "size", "sha256", "num_frames", "height", "width"]
COLUMNS += ["view", "clip_sha256"]
_STRIP_FRAMES = 8
_DECODE_THREADS = 4


def describe(
    store: Store, meta: DatasetMeta, index: pa.Table, config: InspectConfig
) -> tuple[list[tuple[str, str]], list[Section], dict[str, Any]]:
    """Facts and sections of the page, and figures for the result.

    Raises:
        DatasetError: tokens are not what the index says.
    """
    codebook_size = meta.extra["tokenizer"]["codebook_size"]
    scan = scan_tokens(store, index, codebook_size, shards=sample_shards(index, config.sample_tokens))
    num_tokens = int(np.sum(index["size"].to_numpy())) // 2
    facts = [
        ("frames", f"{np.sum(index['num_frames'].to_numpy()):,}"),
        ("tokens", f"{num_tokens:,}"),
        ("hours", f"{np.sum(index['end_s'].to_numpy() - index['start_s'].to_numpy()) / 3600:,.3f}"),
        ("tokenizer", meta.extra["tokenizer"]["fingerprint"]),
        ("perplexity", f"{scan.total.perplexity:,.1f} of {codebook_size:,}"),
        ("codes used", f"{scan.total.used_share:.1%}"),
        ("static share", f"{scan.total.static_share:.1%}"),
    ]
    if len(scan.rows) < len(index):
        share = f"{scan.total.num_tokens:,} tokens, {len(scan.rows):,} of {len(index):,} clips, by whole shards"
        facts.append(("statistics are of a sample", share))
    reconstructor = _Reconstructor(store, meta, index)
    sections = [
        _sizes(meta, num_tokens, scan.total),
        _code_use(scan.total, config.bins),
        _sources(scan),
        _static(scan, reconstructor, len(index), config),
    ]
    quality, figures = _reconstructions(reconstructor, index, config)
    figures = {**scan.total.summary(), "dataset_tokens": num_tokens, "clips_read": len(scan.rows), **figures}
    return facts, [*sections, *quality], figures


def _sizes(meta: DatasetMeta, num_tokens: int, statistics: TokenStatistics) -> Section:
    packed_bits = math.ceil(math.log2(len(statistics.uses)))
    sizes = [("as stored, 16 bits a token", num_tokens * 2.0)]
    if meta.totals is not None:
        sizes.insert(0, ("tar files, with headers and KEY.json", float(meta.totals["tar_bytes"])))
    sizes.append((f"packed, {packed_bits} bits a token", num_tokens * packed_bits / 8))
    sizes.append(("bound by code use alone: its entropy", num_tokens * statistics.entropy_bits / 8))
    lines = [
        (name, _bytes(size), f"{8 * size / max(1, num_tokens):.2f}", f"{size / max(1, num_tokens * 2):.1%}")
        for name, size in sizes
    ]
    return Section(
        heading="size on disk",
        note=f"{packed_bits} bits tell {len(statistics.uses):,} codes apart. No code of single tokens goes below the entropy; one that "
        "looks at neighbours could. tokenreel bench layout measures what a smaller layout costs when windows are read.",
        table=Table(columns=("layout", "size", "bits a token", "of 16 bits"), lines=lines),
    )


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.4g} {unit}"


def _code_use(statistics: TokenStatistics, bins: int) -> Section:
    uses = np.sort(statistics.uses)[::-1]
    edges = np.linspace(0, len(uses), min(bins, len(uses)) + 1).round().astype(int)
    return Section(
        heading="code use",
        note="Codes from the most used on the left to the least used. Codes used evenly would make a level line; a long empty "
        "tail is a codebook that is larger than it needs to be, or a tokenizer that collapsed.",
        histogram=Histogram(edges=edges.tolist(), counts=np.add.reduceat(uses, edges[:-1]).tolist(), unit="codes"),
    )


def _sources(scan: Scan) -> Section:
    lines = [_source_line(name, one, scan.total) for name, one in scan.by_source.items()]
    columns = ("clips", "frames", "of all tokens", "perplexity", "codes used", "static share", "source")
    return Section(
        heading="sources",
        note="Folders of the corpus, the largest first; a video that lies in no folder stands for itself. A source of low "
        "perplexity or of many static tokens teaches a model little for its size.",
        table=Table(columns=columns, lines=[*lines, _source_line("all", scan.total, scan.total)]),
    )


def _source_line(name: str, one: TokenStatistics, total: TokenStatistics) -> tuple[str, ...]:
    return (
        f"{one.num_clips:,}",
        f"{one.num_frames:,}",
        f"{one.num_tokens / max(1, total.num_tokens):.1%}",
        f"{one.perplexity:,.1f}",
        f"{np.count_nonzero(one.uses):,}",
        f"{one.static_share:.1%}",
        name,
    )


def _static(scan: Scan, reconstructor: _Reconstructor, num_clips: int, config: InspectConfig) -> Section:
    values = np.full(num_clips, np.nan)
    values[scan.rows] = scan.static_share
    return distribution(
        config,
        "static share",
        "Share of a clip's tokens that equal the one before them at the same place. Near 1 is a still picture; models learn "
        "nothing of motion there.",
        values,
        reconstructor.row,
    )


def _reconstructions(
    reconstructor: _Reconstructor, index: pa.Table, config: InspectConfig
) -> tuple[list[Section], dict[str, Any]]:
    """PSNR of a sample of clips, with pictures of the worst and the median."""
    if reconstructor.parent is None:
        note = (
            "The clip dataset that the tokens were made from is not at hand, so there is nothing to compare them with."
        )
        return [Section(heading="PSNR", note=note)], {}
    order = np.random.default_rng(0).permutation(len(index))[: config.sample_clips]
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:  # ffmpeg decodes beside the tokenizer
        measured = list(pool.map(reconstructor.psnr_db, order.tolist()))
    values = np.full(len(index), np.nan)
    values[order] = measured
    known = order[~np.isnan(values[order])]
    if not len(known):
        return [Section(heading="PSNR", note="No clip of the sample could be decoded again.")], {}
    known = known[np.argsort(values[known], kind="stable")]
    figures = {
        "clips_reconstructed": len(known),
        "psnr_db_min": round(float(values[known[0]]), 2),
        "psnr_db_median": round(float(values[known[len(known) // 2]]), 2),
        "psnr_db_max": round(float(values[known[-1]]), 2),
    }
    section = distribution(
        config,
        "PSNR",
        f"Of up to {_STRIP_FRAMES} reconstructed frames a clip against the frames that were tokenized, for {len(known)} clips "
        "drawn at random; the examples go from the worst to the best.",
        values,
        reconstructor.row,
        "dB",
    )
    return [section], figures


class _Reconstructor:
    """Frames of samples beside what their tokens decode to; each is decoded once.

    parent: the clip dataset, or None where it is not at hand.
    """

    def __init__(self, store: Store, meta: DatasetMeta, index: pa.Table) -> None:
        self._store, self._meta, self._index = store, meta, index
        self._tokenizer = load_kept_tokenizer(store)
        self.parent = find_parent(store, meta)
        self._pair = functools.lru_cache(maxsize=None)(
            self._make_pair
        )  # eight frames each, of as many clips as are shown

    def row(self, place: int, value: str) -> Row:
        """The figure of one sample: the original above its reconstruction."""
        row = self._row(place)
        original, decoded = self._pair(place)
        caption = f"{value} · {row['source']} [{row['start_s']:.2f}, {row['end_s']:.2f}) s · {row['key']}"
        strips = [Strip(label="reconstruction", frames=decoded, role="reconstruction")]
        if isinstance(original, np.ndarray):
            strips.insert(0, Strip(label="original", frames=original))
            if not value.startswith("PSNR"):
                caption += f" · PSNR {_psnr_db(original, decoded):.4g} dB"
        elif original is not None:
            caption += f" · the original cannot be shown: {original.reason}"
        return Row(caption=caption, strips=strips)

    def psnr_db(self, place: int) -> float:
        """In dB over the frames that are shown; NaN where the original cannot be had."""
        original, decoded = self._pair(place)
        return _psnr_db(original, decoded) if isinstance(original, np.ndarray) else math.nan

    def _row(self, place: int) -> dict[str, Any]:
        row: dict[str, Any] = self._index.slice(place, 1).to_pylist()[0]
        return row

    def _make_pair(self, place: int) -> tuple[np.ndarray | Reject | None, np.ndarray]:
        """Some frames over the whole clip (t h w c), and the same of its tokens."""
        row = self._row(place)
        where, size = self._store.where(row["tar"]), codebook_size(self._meta)
        codes = parse_codes(read_payload(self._store, row), row, size, where)
        shown = np.unique(np.linspace(0, len(codes) - 1, _STRIP_FRAMES).round().astype(int))
        with torch.inference_mode():
            decoded = self._tokenizer.decode(torch.from_numpy(codes[shown])).numpy()
        if self.parent is None:
            return None, decoded
        original = original_frames(self.parent, self._meta, row)
        if isinstance(original, np.ndarray):
            if len(original) != len(codes):
                reason = f"it decodes to {len(original)} frames here, and has tokens of {len(codes)}"
                return Reject(path=row["source"], stage="tokenize", reject_class="corrupt", reason=reason), decoded
            original = original[shown]
        return original, decoded


def _psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    """At most 100 dB, for frames that are equal."""
    error = np.mean((first.astype(np.float64) - second) ** 2)
    return float(10 * np.log10(255.0**2 / max(error, 255.0**2 * 1e-10)))

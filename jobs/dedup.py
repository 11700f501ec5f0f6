"""`tokenreel dedup`: near-duplicates in a token dataset, and the list of samples to keep."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from threadpoolctl import threadpool_limits

from jobs.config import CONFIG_NAME, to_plain, to_text
from jobs.folder import lock_folder, work_folder
from jobs.paths import PathOrUrl
from jobs.progress import Progress
from jobs.result import JobResult
from jobs.tracking import DatasetInput, Tracker
from pipeline.alignment import Film, match
from pipeline.dataset import DatasetMeta, read_index, read_meta
from pipeline.errors import ConfigError, DatasetError
from pipeline.keep_list import to_parquet
from pipeline.near_duplicates import (
    Choice,
    NearDuplicateConfig,
    Sketcher,
    choose_kept,
    find_candidates,
    stride_of,
)
from pipeline.shards import read_payload
from pipeline.storage import Store
from pipeline.untrusted import open_member, parse_codes

log = logging.getLogger(__name__)

GROUPS_NAME = "groups.parquet"
KEEP_NAME = "keep.parquet"
_COLUMNS = ["key", "video_id", "source", "start_s", "end_s", "split", "num_frames", "height", "width", "fps"]
_COLUMNS += ["clip_key", "view"]
_PLACE = ["offset", "size", "sha256"]
_FILMS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupConfig:
    """Find near-duplicate samples from their tokens alone: encoded anew, scaled, cropped, shifted in time, letterboxed,
    brightened. Writes groups.parquet (who is whose duplicate) and keep.parquet, which training takes as
    `--loader.keep-list`.

    Of a group the longest sample stays, or its validation samples where it has some. What does not move is left alone.
    """

    tokens: Annotated[PathOrUrl, tyro.conf.Positional, tyro.conf.arg(metavar="TOKENS")]
    """Token dataset: a path, or s3://, gs://, abfs://."""
    out: Annotated[PathOrUrl | None, tyro.conf.Positional, tyro.conf.arg(metavar="[OUT]")] = None
    """Folder to write to; by default `dedup` in the dataset's folder."""
    settings: Annotated[NearDuplicateConfig, tyro.conf.arg(name="")] = field(default_factory=NearDuplicateConfig)


@dataclass(frozen=True, slots=True)
class Found:
    """What `find` found. pairs: int64 (n, 2) rows of the index that were compared, with their `scores` and `offsets_s`, the
    seconds of the first that pass before the second begins; num_crowded: keys that too many samples share; keys_cpu_s and
    compare_cpu_s: CPU time of the pass over all samples, reading and sorting included, and of the comparisons."""

    pairs: np.ndarray
    scores: np.ndarray
    offsets_s: np.ndarray
    num_crowded: int
    keys_cpu_s: float
    compare_cpu_s: float


def run(config: DedupConfig) -> JobResult:
    started_s = time.monotonic()
    store = Store.at(config.tokens)
    meta = read_meta(store, kind="tokens", complete=True)
    if not config.out and not store.is_local:
        raise ConfigError(
            f"{store}: say where to write, as the second word; only for a local dataset there is a default"
        )
    out = Store.at(config.out or store.path("dedup"))
    if out.exists("dataset.json"):
        raise ConfigError(f"{out} holds a dataset; choose another folder to write to")
    source = DatasetInput(name=store.name, fingerprint=meta.fingerprint, uri=store.url, content=meta.content)
    work = work_folder(out)
    with lock_folder(work):
        tracker = Tracker.open(
            work, job="dedup", name=f"dedup {store.name}", params=to_plain(config),
            tags={"tokenreel.fingerprint": meta.fingerprint, "tokenreel.out": out.url}, inputs=[source],
        )  # fmt: skip
        with tracker:
            out.write(CONFIG_NAME, to_text(config).encode())
            figures = _dedup(config, store, meta, out, work / ".keys")
            numbers = {name: float(value) for name, value in figures.items()}
            tracker.finish("FINISHED", numbers, [work / CONFIG_NAME] if out.is_local else [])
    log.info(
        f"dedup: {figures['duplicates']} of {figures['samples']} samples are near-duplicates, in {figures['groups']} groups; "
        f"train with --loader.keep-list {out.where(KEEP_NAME)}"
    )
    return JobResult(
        job="dedup",
        out=out.url,
        planned=figures["samples"],
        committed=figures["samples"] - figures["duplicates"],
        filtered=figures["duplicates"],
        fingerprint=meta.fingerprint,
        mlflow_run_id=tracker.run_id or "",
        elapsed_s=time.monotonic() - started_s,
        figures=figures,
    )


def _dedup(config: DedupConfig, store: Store, meta: DatasetMeta, out: Store, scratch: Path) -> dict[str, Any]:
    samples = read_index(store, [*_COLUMNS, *_PLACE]).combine_chunks()
    # Views of one clip are each other's near-duplicates on purpose: one of them speaks for all.
    index = samples.filter(pc.equal(samples["view"], pc.min(samples["view"]))).combine_chunks()
    found = find(store, meta, index, config.settings, scratch)
    near = found.scores >= config.settings.min_score
    pairs, scores, offsets_s = found.pairs[near], found.scores[near], found.offsets_s[near]
    is_val = pc.not_equal(index["split"], "train").to_numpy()  # test is held out as well
    choice = choose_kept(pairs, scores, is_val, index["num_frames"].to_numpy(), index["key"].to_pylist())
    groups = _groups(index, choice, pairs, scores, offsets_s)
    stays = choice.duplicate_of < 0
    out.write(GROUPS_NAME, to_parquet(groups, meta))
    kept_clips = index["clip_key"].filter(pa.array(stays))
    out.write(KEEP_NAME, to_parquet(samples.select(["key"]).filter(pc.is_in(samples["clip_key"], kept_clips)), meta))
    num_samples, num_duplicates = len(index), int((~stays).sum())
    return {
        "samples": num_samples,
        "groups": len(np.unique(choice.leader[~stays])),
        "duplicates": num_duplicates,
        "duplicate_share": round(num_duplicates / max(1, num_samples), 6),
        "across_splits": int((~stays & ~is_val & is_val[choice.duplicate_of]).sum()),
        "compared_pairs": len(found.pairs),
        "crowded_keys": found.num_crowded,
    }


# The matrices are small: threads cost more than they bring, most of all on busy cores.
@threadpool_limits.wrap(limits=1)
def find(store: Store, meta: DatasetMeta, index: pa.Table, settings: NearDuplicateConfig, scratch: Path) -> Found:
    """Compare the samples of `index` (all rows, in their order) that share enough keys.

    Every shard is read once; then the samples of pairs once more, in the order of pairs. Memory does not grow with the tokens.

    Args:
        scratch: folder for temporary files, some 5 kB a sample.

    Raises:
        DatasetError: a shard is damaged.
    """
    codebook_size = meta.extra["tokenizer"]["codebook_size"]
    fps = index["fps"].to_numpy()
    if not len(index):
        return Found(np.empty((0, 2), np.int64), np.empty(0), np.empty(0), 0, 0.0, 0.0)
    chosen = np.unique(np.linspace(0, len(index) - 1, min(settings.learn_samples, len(index))).astype(int))
    learnt = ((codes, fps[sample]) for sample, codes in _stream(store, index, chosen, codebook_size))
    sketcher = Sketcher.learn(learnt, codebook_size, settings.num_bands)
    started_cpu_s = time.process_time()
    shutil.rmtree(scratch, ignore_errors=True)  # of a job that was killed
    try:
        with Progress("dedup: keys", "samples", len(index)) as bar:

            def keys() -> Iterator[np.ndarray]:
                for sample, codes in _stream(store, index, np.arange(len(index)), codebook_size):
                    yield sketcher.keys(codes, fps[sample])
                    bar.advance(1)

            pairs, num_crowded = find_candidates(keys(), scratch, settings)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    keys_cpu_s = time.process_time() - started_cpu_s

    @functools.lru_cache(_FILMS)
    def film(sample: int) -> Film:
        row = index.slice(sample, 1).to_pylist()[0]
        codes = parse_codes(read_payload(store, row), row, codebook_size, store.where(row["tar"]))
        return sketcher.film(codes, row["fps"])

    scores, offsets_s = np.zeros(len(pairs)), np.zeros(len(pairs))
    with Progress("dedup: compare", "pairs", len(pairs)) as bar:
        for row, (one, other) in enumerate(pairs.tolist()):
            scores[row], offset = match(film(one), film(other), settings.min_overlap, sketcher.floor)
            offsets_s[row] = offset * stride_of(fps[one]) / fps[one]
            bar.advance(1)
    compare_cpu_s = time.process_time() - started_cpu_s - keys_cpu_s
    return Found(pairs, scores, offsets_s, num_crowded, keys_cpu_s, compare_cpu_s)


def _stream(store: Store, index: pa.Table, samples: np.ndarray, codebook_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Number and codes (t h w) of these rows of `index`, in its order, each tar opened once."""
    shards, tars, offsets, sizes = (index[name].to_numpy()[samples] for name in ("shard", "tar", "offset", "size"))
    shapes = np.stack([index[name].to_numpy()[samples] for name in ("num_frames", "height", "width")], axis=1)
    for shard in np.unique(shards).tolist():
        places = np.flatnonzero(shards == shard).tolist()
        with ExitStack() as stack:
            files = {tar: stack.enter_context(open_member(store, tar)) for tar in set(tars[places])}
            for place in places:
                data = os.pread(files[tars[place]].fileno(), int(sizes[place]), int(offsets[place]))
                key = index["key"][int(samples[place])].as_py()
                if len(data) != sizes[place]:
                    raise DatasetError(
                        f"{store.where(tars[place])}: sample {key} is cut off; run `tokenreel verify {store}`"
                    )
                num_frames, height, width = shapes[place].tolist()
                row = {"key": key, "num_frames": num_frames, "height": height, "width": width}
                yield int(samples[place]), parse_codes(data, row, codebook_size, store.where(tars[place]))


def _groups(index: pa.Table, choice: Choice, pairs: np.ndarray, scores: np.ndarray, offsets_s: np.ndarray) -> pa.Table:
    """One row for each sample that has a near-duplicate, the kept one of a group first."""
    dropped = np.flatnonzero(choice.duplicate_of >= 0)
    members = np.union1d(dropped, choice.leader[dropped])
    is_dropped = choice.duplicate_of[members] >= 0
    match_of = choice.match[members]
    begins_second = pairs[match_of, 1] == members if len(pairs) else is_dropped
    offset_s = np.where(begins_second, 1, -1) * offsets_s[match_of] if len(pairs) else np.zeros(len(members))
    keys = index["key"].take(choice.leader[members])
    columns = {
        "group": keys,
        "kept": pa.array(~is_dropped),
        **{name: index[name].take(members) for name in ("key", "split", "video_id", "source", "start_s", "end_s")},
        "duplicate_of": pa.array(
            index["key"].take(np.maximum(0, choice.duplicate_of[members])).to_pylist(), mask=~is_dropped
        ),
        "score": pa.array(scores[match_of] if len(pairs) else np.zeros(len(members)), mask=~is_dropped),
        "offset_s": pa.array(offset_s, mask=~is_dropped),
    }
    return pa.table(columns).sort_by([("group", "ascending"), ("kept", "descending"), ("key", "ascending")])

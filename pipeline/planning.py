"""The plan of a shard job: every input of a corpus, dealt to shards, before any work starts.

The order is that of a hash of the paths: it depends neither on the file system nor on the manifest's order, and spreads
neighbours in a folder over shards, so that a shard is a fair sample. Nothing here grows with the corpus but files in
the working folder: rows are spread over files by that hash, and each file is sorted in memory.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus import open_corpus, reject
from pipeline.duplicates import find_duplicates
from pipeline.errors import ConfigError, DatasetError
from pipeline.ledger import Ledger
from pipeline.plan_file import PLAN_NAME, TableDigest, TableWriter
from pipeline.plan_order import Totals, first_rows, order_rows, read_ordered
from pipeline.schema import PLAN_SCHEMA, REJECT_SCHEMA
from pipeline.spill import Spill, hash_texts, is_new
from pipeline.storage import Store

log = logging.getLogger(__name__)

_REJECTS_NAME = "rejects.parquet"


class _Clips(Protocol):
    @property
    def mode(self) -> str: ...


class PlanSettings(Protocol):
    """What planning needs of `ShardSettings`."""

    @property
    def clips(self) -> _Clips: ...
    @property
    def include(self) -> str: ...
    @property
    def videos_per_shard(self) -> int: ...
    @property
    def shard_bytes(self) -> int | None: ...
    @property
    def shards_multiple_of(self) -> int: ...
    @property
    def duplicates(self) -> Literal["drop", "keep"]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """All work of a shard job, known before any of it starts: item i becomes shard i, in [0, num_shards).

    root: what the paths are relative to, for `Store.at`.
    path: `plan.parquet` (PLAN_SCHEMA); rejects: `rejects.parquet` (REJECT_SCHEMA), None without any.
    num_videos, num_inputs: distinct files, and rows (files or spans of them), in `path`.
    num_bytes: of the files, as far as their sizes are known.
    inputs_digest: 32 hex digits over the rows and the rejects' paths and classes, not over the shards they went to.
    ledger: the books of `rejects`.
    """

    root: str
    path: Path
    rejects: Path | None
    num_shards: int
    num_videos: int
    num_inputs: int
    num_bytes: int
    inputs_digest: str
    ledger: Ledger


def plan_shards(
    corpus: str | Path,
    settings: PlanSettings,
    workdir: Path,
    *,
    root: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ShardPlan:
    """Write the plan of `corpus` to `workdir`, the same bytes for the same corpus, and return what is in it.

    All rows of a video go to one shard. Files of a local corpus are looked at here (size, time, links); those of an
    object store only where `duplicates = drop` needs a size that the manifest does not give.

    Args:
        corpus, root: see `open_corpus`.
        workdir: an existing folder with room for some 300 bytes a row, three times.
        on_progress: told how many rows were listed so far.

    Raises:
        ConfigError: there is no such corpus, it is empty, or it does not fit the settings.
        DatasetError: a row that was read is neither in the plan nor rejected.
        TransientIO: the storage failed on every attempt.
    """
    opened = open_corpus(corpus, root=root, include=settings.include, spans=settings.clips.mode == "manifest")
    with TemporaryDirectory(prefix=".plan-", dir=workdir) as name:
        scratch = Path(name)
        rows, num_rows = Spill(scratch / "rows"), 0
        for table in opened.tables:
            rows.add(table.append_column("key", pa.array(hash_texts(table["path"].to_pylist()))))
            num_rows += len(table)
            if on_progress:
                on_progress(num_rows)
        if not num_rows:
            raise ConfigError(f"corpus {corpus}: no file in it matches {settings.include!r}; check it or --include")
        ordered = scratch / "ordered.arrow"
        totals = order_rows(rows, opened.store, ordered, need_sizes=settings.duplicates == "drop")
        if totals.num_unsized and settings.duplicates == "drop":
            log.warning(
                f"corpus {corpus}: the sizes of {totals.num_unsized} videos are unknown, so that copies among them are not "
                "found; add a column size_bytes to the manifest"
            )
        doubles = _Doubles(opened.store, ordered, scratch, totals) if settings.duplicates == "drop" else None
        deal = _Deal(totals, settings)
        writer, bad = TableWriter(scratch / PLAN_NAME, PLAN_SCHEMA), TableWriter(scratch / _REJECTS_NAME, REJECT_SCHEMA)
        digests = TableDigest(PLAN_SCHEMA.names[1:]), TableDigest(("path", "reject_class"))
        num_inputs, rejected = 0, Counter[str]()
        for table in read_ordered(ordered):
            table = doubles.mark(table) if doubles else table
            is_good = pc.is_null(table["reject_class"])
            good, rejects = table.filter(is_good), _to_rejects(table.filter(pc.invert(is_good)))
            rejected.update(rejects["reject_class"].to_pylist())
            writer.add(deal.shards_of(good))
            bad.add(rejects)
            digests[0].update(good)
            digests[1].update(rejects)
            num_inputs += len(good)
        if num_inputs + rejected.total() != num_rows:
            raise DatasetError(
                f"corpus {corpus}: {num_rows} rows were read, but {num_inputs} planned and {rejected.total()} rejected"
            )
        writer.close()
        bad.close()
        (scratch / PLAN_NAME).replace(workdir / PLAN_NAME)
        (workdir / _REJECTS_NAME).unlink(missing_ok=True)
        if rejected:
            (scratch / _REJECTS_NAME).replace(workdir / _REJECTS_NAME)
    return ShardPlan(
        root=opened.store.url,
        path=workdir / PLAN_NAME,
        rejects=workdir / _REJECTS_NAME if rejected else None,
        num_shards=deal.num_shards,
        num_videos=totals.num_videos,
        num_inputs=num_inputs,
        num_bytes=totals.num_bytes,
        inputs_digest=hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()[:32],
        ledger=Ledger(planned=rejected.total(), rejected=rejected),
    )


class _Deal:
    """Videos in the order of the plan to shards of nearly equal weight: a cut of their cumulated weight.

    Raises:
        ConfigError: shards are made by bytes, and a size is unknown.
    """

    def __init__(self, totals: Totals, settings: PlanSettings) -> None:
        self._by_bytes = settings.shard_bytes is not None
        if self._by_bytes and totals.num_unsized:
            raise ConfigError(
                f"shard_bytes = {settings.shard_bytes}: the sizes of {totals.num_unsized} videos are unknown; add a column "
                "size_bytes to the manifest, or leave shard_bytes out to count videos"
            )
        weight = totals.num_bytes if self._by_bytes else totals.num_videos
        num = max(-(-weight // (settings.shard_bytes or settings.videos_per_shard)), int(totals.num_videos > 0))
        self.num_shards = -(-num // settings.shards_multiple_of) * settings.shards_multiple_of
        # A video goes where its middle is; in halves, so that all is exact in integers.
        self._starts = np.array(
            [-(-2 * shard * weight // self.num_shards) for shard in range(self.num_shards)], np.int64
        )
        self._done = 0

    def shards_of(self, table: pa.Table) -> pa.Table:
        """The next rows of the plan with the number of their shard; schema PLAN_SCHEMA."""
        is_first = is_new(table["path"])
        videos = table.filter(pa.array(is_first))
        weights = videos["size_bytes"].to_numpy() if self._by_bytes else np.ones(len(videos), np.int64)
        ends = self._done + np.cumsum(weights, dtype=np.int64)
        shards = np.searchsorted(self._starts, 2 * ends - weights, side="right") - 1
        self._done = int(ends[-1]) if len(ends) else self._done
        column = pa.array(shards[np.cumsum(is_first) - 1] if len(table) else shards, pa.int32())
        return table.append_column("shard", column).select(PLAN_SCHEMA.names)


class _Doubles:
    """The files that are copies of others, in the order of the plan; `totals` is told that they go."""

    def __init__(self, store: Store, ordered: Path, scratch: Path, totals: Totals) -> None:
        videos = (first_rows(table.filter(pc.is_null(table["reject_class"]))) for table in read_ordered(ordered))
        spill = Spill(scratch / "doubles")
        for table in find_duplicates(store, videos, scratch / "duplicates"):
            spill.add(table.append_column("key", pa.array(hash_texts(table["path"].to_pylist()))))
            totals.num_videos -= len(table)
            totals.num_bytes -= pc.sum(table["size_bytes"]).as_py() or 0
        self._tables = spill.read()
        self._waiting: pa.Table | None = next(self._tables, None)

    def mark(self, table: pa.Table) -> pa.Table:
        """`table`, the next rows of the plan, with the rows of copies rejected."""
        last = table["key"][-1]
        reasons: dict[str, str] = {}
        while self._waiting is not None:
            is_due = pc.less_equal(self._waiting["key"], last)
            for row in self._waiting.filter(is_due).to_pylist():
                reasons[row["path"]] = f"the same {row['size_bytes']} bytes as {row['first']}"
            self._waiting = self._waiting.filter(pc.invert(is_due))
            if len(self._waiting):
                break
            self._waiting = next(self._tables, None)
        if not reasons:
            return table
        paths = table["path"].to_pylist()
        why = pa.array([reasons.get(path) for path in paths], pa.string())
        return reject(table, pc.is_valid(why), "duplicate", why)


def _to_rejects(table: pa.Table) -> pa.Table:
    columns = {"key": "", "stage": "plan", "outcome": "rejected", "attempts": 1, "stderr": ""}
    same = {
        name: pa.repeat(pa.scalar(value, REJECT_SCHEMA.field(name).type), len(table)) for name, value in columns.items()
    }
    return pa.table([same[name] if name in same else table[name] for name in REJECT_SCHEMA.names], schema=REJECT_SCHEMA)

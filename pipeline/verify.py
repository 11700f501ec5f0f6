"""A dataset against itself: every byte against the index, and the books against the files."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa

from pipeline.dataset import (
    PLAN_REJECTS,
    DatasetMeta,
    Place,
    codebook_size,
    digest_contents,
    list_split,
    listed_shards,
    read_meta,
    read_rejects_file,
    split_name,
)  # fmt: skip
from pipeline.decode import open_bytes
from pipeline.embedding import hash_vector, vectors_of
from pipeline.errors import BadVideo, ConfigError, DatasetError, TokenreelError, TransientIO
from pipeline.ffmpeg import FfmpegLimits
from pipeline.ledger import Ledger
from pipeline.parquet import parse_parquet
from pipeline.schema import SPLITS
from pipeline.shards import (
    ADDED,
    ShardInfo,
    digest_rows,
    index_name,
    read_shard_info,
    read_shard_rows,
    rejects_name,
    sample_info,
    tar_name,
)
from pipeline.storage import CHUNK_BYTES, LOCAL_TROUBLE, Store
from pipeline.stored import count_frames, count_packets
from pipeline.strays import find_strays
from pipeline.tar_writer import tar_end_bytes, tar_header
from pipeline.untrusted import MAX_JSON_BYTES, MAX_TABLE_BYTES, check_codes, open_member, read_member

_MOST_NAMED = 100
"""Missing shards that are named, each in a line."""
# What reading a file can raise in which any byte may be wrong.
_DAMAGE = (
    TokenreelError, pa.ArrowException, OSError, ArithmeticError, AttributeError, LookupError, MemoryError, TypeError,
    ValueError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """One line for a person, and the shard that making it again would heal; None where that would not help."""

    text: str
    shard: int | None = None


def verify(
    place: Place, parent: Place | None = None, *, deep: bool = False, limits: FfmpegLimits | None = None
) -> Iterator[Problem]:
    """Yield every problem: bytes, index, books, splits, duplicates, stale, foreign or half-written files.

    Storage that cannot be reached is no problem of the dataset: its errors (`TransientIO`, `PermissionError`) are raised.

    Args:
        parent: the dataset that this one was made from; its shards tell which shards are stale.
        deep: decode every clip, and compare how many frames it shows with what the index says.
        limits: of ffmpeg, for clips.
    """
    store = Store.at(place)
    meta = read_meta(store)
    seen = _Seen()
    books = Ledger()
    indexed, contents = {PLAN_REJECTS}, []
    numbers = listed_shards(store)
    for shard in numbers:
        try:
            info = read_shard_info(store, shard)
            if info is None:
                raise DatasetError(f"{store.where(index_name(shard))} was removed meanwhile")
            books += info.ledger
            indexed |= {rejects_name(shard), *(tar_name(shard, split) for split in info.tars)}
            contents.append(info.content)
            if info.shard not in (shard, -1):  # format 3 does not say it
                yield Problem(
                    f"{store.where(index_name(shard))}: of shard {info.shard:06d}, which was put in its place", shard
                )
            if info.fingerprint != meta.fingerprint:
                yield Problem(
                    f"{store.where(index_name(shard))}: foreign, of dataset {info.fingerprint}, not {meta.fingerprint}",
                    shard,
                )
            yield from _verify_parent(store, shard, info, parent)
            check = _Check(store, meta, seen, deep, limits or FfmpegLimits())
            verify_shard = _verify_embeddings if meta.kind == "embeddings" else _verify_shard
            for text in verify_shard(check, shard, info):
                yield Problem(text, shard)
        except _DAMAGE as error:
            _raise_unless_damage(error)
            indexed |= {rejects_name(shard), *(tar_name(shard, split) for split in ("", *SPLITS))}
            yield Problem(f"{store}: shard {shard:06d} cannot be read: {error}", shard)
    there = {shard for shard in numbers if shard < meta.num_shards}
    missing = (shard for shard in range(meta.num_shards) if shard not in there)
    for shard in itertools.islice(missing, _MOST_NAMED):
        yield Problem(f"{store}: shard {shard:06d} is missing", shard)
    if meta.num_shards - len(there) > _MOST_NAMED:
        yield Problem(f"{store}: {meta.num_shards - len(there)} of {meta.num_shards} shards are missing in all")
    for shard in numbers:
        if shard >= meta.num_shards:
            yield Problem(
                f"{store}: shard {shard:06d} is foreign, the plan has {meta.num_shards} shards; delete "
                f"{index_name(shard)} and the files that it counts"
            )
    yield from (Problem(text) for text in find_strays(store, indexed))
    yield from (Problem(f"{store}: {text}") for text in seen.clashes())
    yield from (Problem(text) for text in _verify_books(store, meta, books))
    yield from (Problem(text) for text in _verify_totals(store, meta, contents))


@dataclass(slots=True)
class _Seen:
    """Videos and where they stand: 17 bytes each, so that a corpus of any size fits."""

    video_ids: array[int] = field(default_factory=lambda: array("Q"))
    shards: array[int] = field(default_factory=lambda: array("l"))
    splits: array[int] = field(default_factory=lambda: array("b"))

    def add(self, shard: int, video_id: str, split: str) -> None:
        self.video_ids.append(int(video_id, 16))
        self.shards.append(shard)
        self.splits.append(SPLITS.index(split) if split in SPLITS else -1)

    def clashes(self) -> Iterator[str]:
        """Videos in two shards, or in two splits."""
        ids, shards, splits = (
            np.frombuffer(column, column.typecode) for column in (self.video_ids, self.shards, self.splits)
        )
        order = np.lexsort((shards, ids))
        ids, shards, splits = ids[order], shards[order], splits[order]
        same = ids[1:] == ids[:-1]
        for row in np.flatnonzero(same & (shards[1:] != shards[:-1])):
            yield f"video {ids[row]:016x} stands in shard {shards[row]:06d} and in {shards[row + 1]:06d}: a duplicate"
        for row in np.flatnonzero(same & (splits[1:] != splits[:-1])):
            yield f"video {ids[row]:016x} stands in two splits"


@dataclass(frozen=True, slots=True)
class _Check:
    """What all shards are checked with."""

    store: Store
    meta: DatasetMeta
    seen: _Seen
    deep: bool
    limits: FfmpegLimits


def _raise_unless_damage(error: BaseException) -> None:
    """A storage that cannot be reached says nothing about what is in it, and a repair would delete good shards."""
    if isinstance(error, TransientIO | PermissionError | MemoryError) or (
        isinstance(error, OSError) and error.errno in LOCAL_TROUBLE
    ):
        raise error


def _verify_parent(store: Store, shard: int, info: ShardInfo, parent: Place | None) -> Iterator[Problem]:
    if parent is None:
        return
    try:
        theirs = read_shard_info(Store.at(parent), shard)
    except DatasetError as error:
        yield Problem(str(error))
        return
    if theirs is None or theirs.content != info.parent_content:
        yield Problem(f"{store}: shard {shard:06d} is stale, {parent} has other samples in its place now", shard)


def _verify_shard(check: _Check, shard: int, info: ShardInfo) -> Iterator[str]:
    store = check.store
    yield from _verify_rejects(store, shard, info)
    rows = read_shard_rows(store, shard)
    index = store.where(index_name(shard))
    yield from _verify_rows(index, shard, rows, info, check.seen)
    if digest_rows(rows) != info.content:
        yield f"{index}: keys or hashes are not the ones that were committed"
    if astray := sorted({row["tar"] for row in rows} - {tar_name(shard, split) for split in info.tars}):
        yield f"{index}: samples in {astray[0]}, which was not committed"
    for split, tar_bytes in info.tars.items():
        name = tar_name(shard, split)
        yield from _verify_tar(check, name, tar_bytes, [row for row in rows if row["tar"] == name])


def _verify_tar(check: _Check, name: str, tar_bytes: int, rows: list[dict[str, Any]]) -> Iterator[str]:
    store = check.store
    entry, where = store.stat(name), store.where(name)
    if entry is None:
        yield f"{where}: missing, though its index counts it"
        return
    if entry.size_bytes != tar_bytes:
        yield f"{where}: {entry.size_bytes} bytes; {tar_bytes} were committed"
    with open_member(store, name) as tar:
        for row in rows:
            if _hash_range(tar, row["offset"], row["size"]) != row["sha256"]:
                yield f"{where}: the bytes of sample {row['key']} are not the ones that were committed"
            elif check.meta.kind == "tokens":
                yield from (f"{where}: {text}" for text in _verify_codes(check.meta, tar, row))
            else:
                yield from (f"{where}: {text}" for text in _verify_counts(check, tar, row))
            if not _says(tar, row):
                yield f"{where}: the JSON of sample {row['key']} does not say what its index says"
        yield from (f"{where}: {text}" for text in _verify_layout(tar, rows))


def _verify_codes(meta: DatasetMeta, tar: IO[bytes], row: dict[str, Any]) -> Iterator[str]:
    try:
        codes = np.frombuffer(os.pread(tar.fileno(), row["size"], row["offset"]), "<u2")
        check_codes(codes, codebook_size(meta), f"sample {row['key']}")
    except (DatasetError, ValueError) as error:
        yield str(error)


def _verify_counts(check: _Check, tar: IO[bytes], row: dict[str, Any]) -> Iterator[str]:
    """What the index says of a clip against its bytes, which are the ones that were committed."""
    stated = row.get("num_packets")
    is_old = check.meta.schema_version == 3
    if stated is None and not is_old and not check.deep:
        return
    try:
        with open_bytes(os.pread(tar.fileno(), row["size"], row["offset"])) as clip:
            if is_old:  # it said what should have been there
                found = count_packets(clip, check.limits)
                if found < row["num_frames"]:
                    yield (
                        f"clip {row['key']} of {row['source']} is short: it holds {found} pictures of the {row['num_frames']} that its "
                        "index says"
                    )
            elif stated is not None and (found := count_packets(clip, check.limits)) != stated:
                yield f"sample {row['key']} holds {found} packets; its index says num_packets = {stated}"
            if check.deep and (found := count_frames(clip, check.limits)) != row["num_frames"]:
                yield f"sample {row['key']} shows {found} frames; its index says num_frames = {row['num_frames']}"
    except BadVideo as bad:
        yield f"sample {row['key']} cannot be counted: {bad}"


def _verify_rows(index: str, shard: int, rows: list[dict[str, Any]], info: ShardInfo, seen: _Seen) -> Iterator[str]:
    if len(rows) != info.ledger.committed:
        yield f"{index}: {len(rows)} rows; its books say {info.ledger.committed}"
    if [row["key"] for row in rows] != sorted({row["key"] for row in rows}):
        yield f"{index}: keys stand twice or out of order"
    for video_id, split in {(row["video_id"], row["split"]) for row in rows}:
        seen.add(shard, video_id, split)


def _verify_embeddings(check: _Check, shard: int, info: ShardInfo) -> Iterator[str]:
    """A shard that is its index file alone."""
    store, seen = check.store, check.seen
    yield from _verify_rejects(store, shard, info)
    index = store.where(index_name(shard))
    table = parse_parquet(read_member(store, index_name(shard), MAX_TABLE_BYTES))
    vectors, rows = vectors_of(table), table.drop_columns(["embedding"]).to_pylist()
    yield from _verify_rows(index, shard, rows, info, seen)
    if digest_rows(rows) != info.content:
        yield f"{index}: keys or hashes are not the ones that were committed"
    for row, vector in zip(rows, vectors, strict=True):
        if hash_vector(vector) != row["sha256"]:
            yield f"{index}: the embedding of {row['key']} is not the one that was committed"


def _verify_rejects(store: Store, shard: int, info: ShardInfo) -> Iterator[str]:
    name, found = rejects_name(shard), Ledger(planned=info.ledger.planned, committed=info.ledger.committed)
    try:
        found.add_rejects(read_rejects_file(store, name))
    except FileNotFoundError:
        pass
    except _DAMAGE as error:
        _raise_unless_damage(error)
        yield f"{store.where(name)}: cannot be read: {error}"
        return
    if found != info.ledger:
        yield f"{store.where(name)}: the index says {info.ledger.to_json()}, its rows say {found.to_json()}"


def _verify_layout(tar: IO[bytes], rows: list[dict[str, Any]]) -> Iterator[str]:
    """What no hash covers, the bytes between the payloads, against the ones that a writer of these rows writes."""
    position = 0
    for row in sorted(rows, key=lambda row: int(row["offset"])):
        ext, lead = (row["ext"], b"") if "ext" in row else ("tokens.npy", _npy_header(row))
        members = ((ext, lead, row["offset"], row["size"]), ("json", b"", row["json_offset"], row["json_size"]))
        for suffix, lead, offset, size in members:
            before = tar_header(f"{row['key']}.{suffix}", len(lead) + size) + lead
            if offset != position + len(before):
                yield "its members are not the samples of its index"
                return
            padding = -(len(lead) + size) % tarfile.BLOCKSIZE
            if os.pread(tar.fileno(), len(before), position) != before:
                yield f"the header of {row['key']}.{suffix} is not the one that was committed"
            if os.pread(tar.fileno(), padding, offset + size).strip(b"\0"):
                yield f"there is something behind {row['key']}.{suffix}"
            position = offset + size + padding
    if os.pread(tar.fileno(), 2**20, position) != bytes(tar_end_bytes(position)):
        yield "its end is not the one that was committed"


def _npy_header(row: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    shape = (row["num_frames"], row["height"], row["width"])
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u2", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _hash_range(file: IO[bytes], offset: int, size: int) -> str:
    hasher = hashlib.sha256()
    while size > 0 and (chunk := os.pread(file.fileno(), min(CHUNK_BYTES, size), offset)):
        hasher.update(chunk)
        offset, size = offset + len(chunk), size - len(chunk)
    return hasher.hexdigest()


def _says(tar: IO[bytes], row: dict[str, Any]) -> bool:
    known = {name: value for name, value in row.items() if name not in ADDED}
    try:
        return bool(json.loads(os.pread(tar.fileno(), row["json_size"], row["json_offset"])) == sample_info(known))
    except ValueError:
        return False


def _verify_books(store: Store, meta: DatasetMeta, shards: Ledger) -> Iterator[str]:
    if meta.totals is None:
        yield f"{store}: unfinished; run the command that writes it again"
        return
    refused = Ledger()
    try:
        if store.exists(PLAN_REJECTS):
            refused.add_rejects(read_rejects_file(store, PLAN_REJECTS))
    except _DAMAGE as error:
        _raise_unless_damage(error)
        yield f"{store.where(PLAN_REJECTS)}: cannot be read: {error}"
        return
    refused.planned = refused.rejected.total() + refused.filtered.total()
    found, books = shards + refused, Ledger.from_json(meta.totals)
    if found != books:
        yield f"{store}: dataset.json says {books.to_json()}, the files say {found.to_json()}"
    try:
        books.check()
    except DatasetError as error:
        yield f"{store}: {error}"


def _verify_totals(store: Store, meta: DatasetMeta, contents: list[str]) -> Iterator[str]:
    """What `dataset.json` and the lists of tars say of shards that could all be read."""
    if meta.totals is None or len(contents) < meta.num_shards:
        return
    if digest_contents(contents) != meta.content:
        yield f"{store}: its shards are not those that dataset.json sums up: one was exchanged, or two of them for each other"
    for split in SPLITS if meta.schema_version > 3 and meta.kind != "embeddings" else ():
        name, wanted = split_name(split), list_split(meta, split).encode()
        try:
            listed = read_member(store, name, max(len(wanted), MAX_JSON_BYTES)) if store.exists(name) else b""
        except DatasetError as error:
            yield str(error)
            continue
        if listed != wanted:
            yield f"{store.where(name)}: not the tars of split {split}; run the command that writes the dataset again"


def shards_at_fault(place: Place, problems: list[Problem]) -> list[int]:
    """The shards that `problems` name, which the job that wrote the dataset can make again.

    Raises:
        ConfigError: a problem is no shard's, and would stay.
    """
    shards = sorted({problem.shard for problem in problems if problem.shard is not None})
    if not shards:
        raise ConfigError(
            f"{Store.at(place)}: no shard is at fault, so there is none to make again; see the problems above"
        )
    return shards

"""A dataset against itself: every byte against the index, and the books against the files."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset import DatasetMeta, read_meta, read_payload, read_rejects, sample_info, shard_info, shard_path
from pipeline.errors import DatasetError
from pipeline.ledger import Ledger


def verify(folder: Path) -> Iterator[str]:
    """Yield one line for every problem: bytes, index, books, splits, duplicates, foreign or half-written files."""
    meta = read_meta(folder)
    shards: dict[int, Ledger] = {}
    keys: dict[str, int] = {}
    splits: dict[str, str] = {}
    index_files = sorted((folder / "index").glob("[0-9]*.parquet"))
    for path in index_files:
        try:
            info = shard_info(path)
        except DatasetError as error:
            yield str(error)
            continue
        shard = int(path.stem)
        shards[shard] = Ledger.from_json(info)
        if info["fingerprint"] != meta.fingerprint:
            yield f"{path}: belongs to dataset {info['fingerprint']}, not to {meta.fingerprint}"
        yield from _verify_shard(folder, path, info, keys, splits)
    yield from (f"{folder}: shard {s:06d} is missing" for s in sorted(set(range(meta.num_shards)) - set(shards)))
    indexed = {f"{s:06d}.tar" for s in shards}
    for path in sorted((folder / "shards").iterdir()):
        if path.name not in indexed:
            yield f"{path}: no index counts it (left by a broken-off job, or foreign); readers ignore it"
    yield from _verify_books(folder, meta, shards)


def _verify_shard(
    folder: Path, index_path: Path, info: dict[str, Any], keys: dict[str, int], splits: dict[str, str]
) -> Iterator[str]:
    shard = int(index_path.stem)
    tar_path = shard_path(folder, shard)
    if not tar_path.exists():
        yield f"{tar_path}: missing, though {index_path.name} counts it"
        return
    if tar_path.stat().st_size != info["tar_bytes"]:
        yield f"{tar_path}: {tar_path.stat().st_size} bytes; {info['tar_bytes']} were committed"
    try:
        rows = pq.read_table(index_path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        yield f"{index_path}: cannot be read: {error}"
        return
    if len(rows) != info["committed"]:
        yield f"{index_path}: {len(rows)} rows; its books say {info['committed']}"
    for row in rows:
        if row["key"] in keys:
            yield f"{tar_path}: key {row['key']} stands in shard {keys[row['key']]:06d} too"
        keys[row["key"]] = shard
        if splits.setdefault(row["video_id"], row["split"]) != row["split"]:
            yield f"{tar_path}: video {row['video_id']} stands in both splits"
        try:
            read_payload(folder, {**row, "shard": shard})
            _check_json(tar_path, row)
        except (DatasetError, OSError) as error:
            yield str(error)
    try:
        with tarfile.open(tar_path) as tar:
            names = {member.name.partition(".")[0] for member in tar}
    except tarfile.TarError as error:
        yield f"{tar_path}: not a readable tar: {error}"
        return
    if names != {row["key"] for row in rows}:
        yield f"{tar_path}: its members are not the samples of its index"


def _check_json(tar_path: Path, row: dict[str, Any]) -> None:
    with tar_path.open("rb") as file:
        data = os.pread(file.fileno(), row["json_size"], row["json_offset"])
    try:
        same = json.loads(data) == sample_info(row)
    except ValueError:
        same = False
    if not same:
        raise DatasetError(f"{tar_path}: the JSON of sample {row['key']} does not say what its index says")


def _verify_books(folder: Path, meta: DatasetMeta, shards: dict[int, Ledger]) -> Iterator[str]:
    try:
        rejects = read_rejects(folder)
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        yield f"{folder / 'rejects'}: cannot be read: {error}"
        return
    found = Ledger()
    found.add_rejects(rejects)
    if meta.totals is None:
        yield f"{folder}: unfinished; run the command that writes it again"
        return
    books = Ledger.from_json(meta.totals)
    found.planned, found.committed = books.planned, sum(ledger.committed for ledger in shards.values())
    if found != books:
        yield f"{folder}: dataset.json says {books.to_json()}, the files say {found.to_json()}"
    try:
        books.check()
    except DatasetError as error:
        yield f"{folder}: {error}"

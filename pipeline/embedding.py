"""The embed stage without Ray: token samples to windows, and their embeddings to one committed shard, a Parquet file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from pipeline.dataset import DatasetMeta, codebook_size, read_meta
from pipeline.errors import BadVideo, ConfigError, DatasetError, TransientIO
from pipeline.internal import as_bad_video
from pipeline.ledger import Ledger
from pipeline.schema import EMBEDDING_SCHEMA, SCORES, Reject, identify_dataset
from pipeline.shards import (
    ShardInfo,
    Written,
    check_row,
    digest_rows,
    index_name,
    index_schema,
    read_shard_info,
    read_shard_rows,
    rejects_name,
    to_parquet,
    write_rejects,
)
from pipeline.storage import LOCAL_TROUBLE, Store
from pipeline.untrusted import open_member

_CARRIED = ("clip_key", "view", "video_id", "source", "fps", "caption", "label", "split", "extra")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedSettings:
    """What decides the content of an embedding dataset, beside its tokens and its model."""

    rows: Literal["clip", "window"] = "clip"
    """A row for each token sample, the mean over its windows, or a row for each window."""
    stride_frames: int | None = None
    """Frames between the beginnings of two windows; by default as many as a window has, so that none overlap. Frames behind the
    last whole window are left out."""
    pool: Literal["cls", "mean", "cls-mean-drift"] = "cls-mean-drift"
    """What of the network's output: CLS; the mean over tokens; or CLS, that mean, and how frames change along time, three times
    as wide."""
    layer: int | None = None
    """Whose output it is: 1 is the first layer; by default the network's own, after its last norm."""
    batch_windows: int = 32
    """Windows that are embedded together; part of the identity, because rounding may depend on it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward pass; vectors are stored in float32. bf16 is faster where the device has instructions for it."""

    def __post_init__(self) -> None:
        if self.rows not in ("clip", "window"):
            raise ConfigError(f"rows = {self.rows!r}: allowed are clip, window")
        if self.pool not in ("cls", "mean", "cls-mean-drift"):
            raise ConfigError(f"pool = {self.pool!r}: allowed are cls, mean, cls-mean-drift")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision = {self.precision!r}: allowed are fp32, bf16")
        for name in ("stride_frames", "layer", "batch_windows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} = {value}: must be 1 or more")


class Embed(Protocol):
    """A model as this stage needs it; the caller of this package brings it.

    window: (t, h, w) of what it takes. pad: token that stands where a sample is shorter than t. width: d.
    """

    window: tuple[int, int, int]
    pad: int
    width: int

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """uint16 (b t h w) to float32 (b d)."""
        ...


def describe_embeddings(tokens: DatasetMeta, config: dict[str, Any], model: dict[str, Any]) -> DatasetMeta:
    """The identity of the embedding dataset that `config` and a model make of `tokens`.

    Args:
        model: plain JSON with its `fingerprint`, `window` and `width`.
    """
    config = {**config, "model": model["fingerprint"]}
    return DatasetMeta(
        kind="embeddings",
        fingerprint=identify_dataset(kind="embeddings", parent=tokens.fingerprint, config=config),
        config=config,
        parent_fingerprint=tokens.fingerprint,
        inputs_digest="",
        num_shards=tokens.num_shards,
        extra={"model": model},
    )


def write_embedding_shard(
    tokens: Store, out: Store, dataset_fingerprint: str, shard: int, embed: Embed, settings: EmbedSettings
) -> Written:
    """Embed the samples of one token shard that have the model's grid, and commit their rows.

    A sample whose bytes are not those that were committed becomes a reject, as does one for which anything else goes wrong.

    Raises:
        OSError: the shard's tar cannot be read at all.
        DatasetError: the model gave embeddings for another number of windows than it got; nothing was committed.
    """
    parent = read_shard_info(tokens, shard)
    assert parent is not None
    samples = [row for row in read_shard_rows(tokens, shard) if (row["height"], row["width"]) == embed.window[1:]]
    rejects: list[Reject] = []
    rows: list[dict[str, Any]] = []
    values: list[np.ndarray] = []
    with ExitStack() as stack:
        files = {name: stack.enter_context(open_member(tokens, name)) for name in {sample["tar"] for sample in samples}}
        size = codebook_size(read_meta(tokens))
        for sample, starts, vectors in _embed_samples(files, samples, rejects, embed, settings, size):
            try:
                made = _rows(sample, starts, vectors, embed, settings)
            except Exception as error:
                rejects.append(_reject(sample, as_bad_video(error)))
                continue
            rows += [row for row, _ in made]
            values += [vector for _, vector in made]
    planned = len(rows) + len(rejects)
    info = _commit(out, dataset_fingerprint, shard, embed.width, rows, values, rejects, planned, parent.content)
    return Written(info, sum(sample["size"] for sample in samples))


def hash_vector(vector: np.ndarray) -> str:
    """The `sha256` of a row: of its embedding as little-endian float32."""
    return hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()


def vectors_of(table: pa.Table) -> np.ndarray:
    """The column `embedding` as (n d) float32; d is 0 where there are no rows."""
    flat = [chunk.flatten().to_numpy() for chunk in table["embedding"].chunks]
    if not len(table):
        return np.empty((0, 0), np.float32)
    return np.concatenate(flat).reshape(len(table), -1)


def _embed_samples(
    files: dict[str, IO[bytes]],
    samples: list[dict[str, Any]],
    rejects: list[Reject],
    embed: Embed,
    settings: EmbedSettings,
    num_codes: int,
) -> Iterator[tuple[dict[str, Any], list[int], np.ndarray]]:
    """(sample, first frame of each window, vectors (windows d)) of each sample in order; windows of many share a batch.

    Every batch has exactly `batch_windows` windows (the last one is padded), so that rounding does not depend on how far a
    broken-off run came.
    """
    waiting: list[tuple[dict[str, Any], list[int]]] = []
    windows: list[np.ndarray] = []
    vectors = np.empty((0, embed.width), np.float32)

    def known() -> Iterator[tuple[dict[str, Any], list[int], np.ndarray]]:
        nonlocal vectors
        while waiting and len(waiting[0][1]) <= len(vectors):
            sample, starts = waiting.pop(0)
            yield sample, starts, vectors[: len(starts)]
            vectors = vectors[len(starts) :]

    for sample in samples:
        try:
            codes = _read_codes(files[sample["tar"]], sample)
            if (highest := int(codes.max(initial=0))) >= num_codes:
                raise BadVideo("corrupt", f"code {highest} of a codebook of {num_codes}")
            starts = list(range(0, max(1, len(codes) - embed.window[0] + 1), settings.stride_frames or embed.window[0]))
            cut = [_cut(codes, start, embed) for start in starts]
        except Exception as error:
            rejects.append(_reject(sample, as_bad_video(error)))
            continue
        waiting.append((sample, starts))
        for window in cut:
            windows.append(window)
            if len(windows) == settings.batch_windows:
                vectors = np.concatenate([vectors, _run(embed, windows, settings.batch_windows)])
                windows = []
        yield from known()
    if windows:
        vectors = np.concatenate([vectors, _run(embed, windows, settings.batch_windows)])
    yield from known()


def _run(embed: Embed, windows: list[np.ndarray], batch_windows: int) -> np.ndarray:
    found = embed(np.stack(windows + windows[-1:] * (batch_windows - len(windows))))
    if found.shape != (batch_windows, embed.width) or found.dtype != np.float32:
        raise DatasetError(
            f"the model gave {found.dtype} {found.shape} for {batch_windows} windows; float32 "
            f"{(batch_windows, embed.width)} was expected"
        )
    return found[: len(windows)]


def _reject(sample: dict[str, Any], bad: BadVideo) -> Reject:
    return Reject(
        path=sample["source"],
        key=sample["key"],
        stage="embed",
        reject_class=bad.reject_class,
        reason=bad.reason,
        stderr=bad.stderr,
    )


def _read_codes(file: IO[bytes], sample: dict[str, Any]) -> np.ndarray:
    try:
        data = os.pread(file.fileno(), sample["size"], sample["offset"])
    except OSError as error:
        if error.errno in LOCAL_TROUBLE:
            raise
        raise TransientIO(f"the tokens cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sample["sha256"]:
        raise BadVideo("corrupt", "the bytes of the tokens are not the ones that were committed")
    return np.frombuffer(data, "<u2").reshape(sample["num_frames"], sample["height"], sample["width"])


def _cut(codes: np.ndarray, start: int, embed: Embed) -> np.ndarray:
    window = np.full(embed.window, embed.pad, np.uint16)
    frames = codes[start : start + len(window)]
    window[: len(frames)] = frames
    return window


def _rows(
    sample: dict[str, Any], starts: list[int], vectors: np.ndarray, embed: Embed, settings: EmbedSettings
) -> list[tuple[dict[str, Any], np.ndarray]]:
    """The rows of a sample, each with its vector."""
    if settings.rows == "clip":
        row = _row(sample, sample["key"], 0, sample["num_frames"], len(starts))
        made = [(row, vectors.mean(axis=0, dtype=np.float64).astype(np.float32))]
    else:
        made = [
            (
                _row(
                    sample,
                    f"{sample['key']}-w{start:06d}",
                    start,
                    min(embed.window[0], sample["num_frames"] - start),
                    1,
                ),
                vector,
            )
            for start, vector in zip(starts, vectors, strict=True)
        ]
    for row, _ in made:
        check_row(row, EMBEDDING_SCHEMA)
    return made


def _row(sample: dict[str, Any], key: str, first_frame: int, num_frames: int, num_windows: int) -> dict[str, Any]:
    """What a row says of frames `[first_frame, first_frame + num_frames)` of a sample."""
    start_s = sample["start_s"] + first_frame / sample["fps"]
    is_whole = first_frame == 0 and num_frames == sample["num_frames"]
    return {
        "key": key,
        "sample_key": sample["key"],
        **{name: sample[name] for name in (*_CARRIED, *(f"score_{score}" for score in SCORES))},
        "start_s": start_s,
        "end_s": sample["end_s"] if is_whole else min(sample["end_s"], start_s + num_frames / sample["fps"]),
        "first_frame": first_frame,
        "num_frames": num_frames,
        "num_windows": num_windows,
    }


def _commit(
    out: Store,
    dataset_fingerprint: str,
    shard: int,
    width: int,
    rows: list[dict[str, Any]],
    values: list[np.ndarray],
    rejects: list[Reject],
    planned: int,
    parent_content: str,
) -> ShardInfo:
    ledger = Ledger(planned=planned, committed=len(rows))
    ledger.add_rejects(rejects)
    ledger.check()
    order = sorted(range(len(rows)), key=lambda place: str(rows[place]["key"]))
    rows, values = [rows[place] for place in order], [values[place] for place in order]
    for row, vector in zip(rows, values, strict=True):
        row["sha256"] = hash_vector(vector)
    info = ShardInfo(
        fingerprint=dataset_fingerprint,
        shard=shard,
        tars={},
        content=digest_rows(rows),
        parent_content=parent_content,
        ledger=ledger,
        totals={
            "videos": len({row["video_id"] for row in rows}),
            "seconds": round(sum(row["end_s"] - row["start_s"] for row in rows), 3),
            "frames": sum(row["num_frames"] for row in rows),
            "payload_bytes": 4 * width * len(rows),
        },
    )
    flat = pa.array(np.concatenate(values) if values else np.empty(0, np.float32))
    table = pa.Table.from_pylist(rows, schema=index_schema("embeddings", info))
    table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, width))
    # A shard that is made again stops counting before its rejects change.
    out.remove(index_name(shard))
    write_rejects(out, rejects_name(shard), rejects)
    out.write(index_name(shard), to_parquet(table))
    return info

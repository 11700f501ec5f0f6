"""`tokenreel bench layout`: what smaller ways to store tokens would save on disk, and what they cost when windows are read."""

from __future__ import annotations

import itertools
import logging
import math
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from jobs.paths import PathOrUrl
from jobs.result import JobResult
from pipeline.dataset import read_index, read_meta
from pipeline.errors import ConfigError
from pipeline.shards import read_payload
from pipeline.storage import Store
from pipeline.token_statistics import sample_shards

log = logging.getLogger(__name__)
_OFFSET_BYTES = 4
"""What the place of a block of varying size takes in a table that a reader would need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchLayoutConfig:
    """Write the tokens of a dataset in five layouts to a temporary folder, and read random windows of each in turn.

    The page cache is warm, as nothing but the layout shall count. Each window is one read; those of a batch are decoded
    together where the layout allows it, as a loader could do.
    """

    tokens: Annotated[PathOrUrl, tyro.conf.Positional, tyro.conf.arg(metavar="TOKENS")]
    """Token dataset: a path, or s3://, gs://, abfs://."""
    window_frames: int = 5
    """Frames of a window."""
    batch_windows: int = 64
    """Windows that are decoded together."""
    batches: int = 32
    """Batches a round reads from each layout."""
    repeats: int = 5
    """Rounds, after one that only warms up."""
    sample_tokens: int = 20_000_000
    """Tokens to take, by whole shards."""

    def __post_init__(self) -> None:
        for name in ("window_frames", "batch_windows", "batches", "repeats", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A way to store the codes of a clip, (t n) uint16, as blocks that can be read one by one.

    block_frames: frames of a block; 0 makes the whole clip one.
    pack: codes (f n) of a block to bytes; unpack: bytes and n to (f n) uint16.
    joint: neighbouring blocks unpack as one, for every frame takes the same number of bytes.
    """

    name: str
    block_frames: int
    pack: Callable[[np.ndarray], bytes]
    unpack: Callable[[bytes, int], np.ndarray]
    joint: bool = False


def run(config: BenchLayoutConfig) -> JobResult:
    """A table with one row a layout: bytes a token, tables of offsets included, and microseconds a window."""
    started_s = time.monotonic()
    store = Store.at(config.tokens)
    meta = read_meta(store, kind="tokens")
    clips = _read_clips(store, config)
    starts = [
        (clip, start) for clip, codes in enumerate(clips) for start in range(len(codes) - config.window_frames + 1)
    ]
    if not starts:
        raise ConfigError(f"window_frames = {config.window_frames}: no clip of {store} is that long")
    drawn = np.random.default_rng(0).integers(0, len(starts), (config.batches, config.batch_windows))
    batches = [[starts[place] for place in batch] for batch in drawn]
    with tempfile.TemporaryDirectory(prefix="tokenreel-bench-") as folder:
        files = [
            _File(Path(folder) / str(place), layout, clips, config.window_frames)
            for place, layout in enumerate(layouts(meta.extra["tokenizer"]["codebook_size"]))
        ]
        times: list[list[float]] = [[] for _ in files]
        for turn in range(config.repeats + 1):
            for taken, file in zip(times, files, strict=True):
                begun_s = time.perf_counter()
                read = [file.read(batch) for batch in batches]
                taken.append(time.perf_counter() - begun_s)
                if not turn:  # the first round only warms up
                    taken.clear()
                    _check(read, clips, batches)
    num_tokens = sum(codes.size for codes in clips)
    table = [
        {
            "layout": file.layout.name,
            "bytes_per_token": round(file.num_bytes / num_tokens, 4),
            "size_of_raw": round(file.num_bytes / files[0].num_bytes, 3),
            "window_us": round(statistics.median(taken) / drawn.size * 1e6, 2),
            "time_of_raw": round(statistics.median(a / b for a, b in zip(taken, times[0], strict=True)), 2),
        }
        for file, taken in zip(files, times, strict=True)
    ]
    for row in table:
        log.info("bench layout: %s", row)
    return JobResult(
        job="bench layout",
        out=store.url,
        planned=len(table),
        committed=len(table),
        fingerprint=meta.fingerprint,
        elapsed_s=time.monotonic() - started_s,
        figures={"tokens": num_tokens, "clips": len(clips), "window_frames": config.window_frames, "table": table},
    )


def layouts(codebook_size: int) -> list[Layout]:
    """The layouts that are compared; the first is the one that datasets have."""
    bits = max(1, math.ceil(math.log2(codebook_size)))
    zstd = pa.Codec("zstd")

    def zstd_unpack(data: bytes, num_codes: int) -> np.ndarray:
        # The size comes first, as pyarrow does not read it out of the frame.
        size = int.from_bytes(data[:4], "little")
        return np.frombuffer(zstd.decompress(memoryview(data)[4:], size), np.uint16).reshape(-1, num_codes)

    def zstd_pack(codes: np.ndarray) -> bytes:
        raw = codes.tobytes()
        return len(raw).to_bytes(4, "little") + zstd.compress(raw, asbytes=True)

    return [
        Layout(
            name="uint16",
            block_frames=1,
            pack=np.ndarray.tobytes,
            unpack=lambda data, num_codes: np.frombuffer(data, np.uint16).reshape(-1, num_codes),
            joint=True,
        ),
        Layout(
            name=f"packed, {bits} bits",
            block_frames=1,
            pack=lambda codes: pack_bits(codes, bits),
            unpack=lambda data, num_codes: unpack_bits(data, num_codes, bits),
            joint=True,
        ),
        Layout(
            name="deflate, each frame",
            block_frames=1,
            pack=lambda codes: zlib.compress(codes.tobytes(), 6),
            unpack=lambda data, num_codes: np.frombuffer(zlib.decompress(data), np.uint16).reshape(-1, num_codes),
        ),
        Layout(name="zstd, each frame", block_frames=1, pack=zstd_pack, unpack=zstd_unpack),
        Layout(name="zstd, 16 frames", block_frames=16, pack=zstd_pack, unpack=zstd_unpack),
        Layout(name="zstd, whole clip", block_frames=0, pack=zstd_pack, unpack=zstd_unpack),
    ]


def pack_bits(codes: np.ndarray, bits: int) -> bytes:
    """Codes (f n), each below 2^bits, as f frames of ceil(n / 8) * bits bytes, the lowest bits first."""
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))
    planes = (padded[..., None] >> np.arange(bits, dtype=np.uint16)) & 1
    return np.packbits(planes.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little").tobytes()


def unpack_bits(data: bytes, num_codes: int, bits: int) -> np.ndarray:
    """The inverse of `pack_bits`: (f num_codes) uint16."""
    groups = np.frombuffer(data, np.uint8).reshape(-1, bits)  # eight codes each
    out = np.empty((len(groups), 8), np.uint16)
    wide = np.zeros((bits + 2, len(groups)), np.uint32)
    wide[:bits] = groups.T
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        value = wide[byte] | wide[byte + 1] << 8 | wide[byte + 2] << 16
        out[:, place] = (value >> shift) & (2**bits - 1)
    return out.reshape(-1, -(-num_codes // 8) * 8)[:, :num_codes]


class _File:
    """The clips in one layout, in one file, of which windows are read by their clip and first frame."""

    def __init__(self, path: Path, layout: Layout, clips: Sequence[np.ndarray], window_frames: int) -> None:
        self.layout, self._window_frames, self._num_codes = layout, window_frames, clips[0].shape[1]
        self._offsets: list[list[int]] = []
        with path.open("wb") as file:
            for codes in clips:
                step = layout.block_frames or len(codes)
                offsets = [file.tell()]
                for first in range(0, len(codes), step):
                    file.write(layout.pack(codes[first : first + step]))
                    offsets.append(file.tell())
                self._offsets.append(offsets)
        varying = 0 if layout.joint or not layout.block_frames else sum(map(len, self._offsets))
        self.num_bytes = path.stat().st_size + varying * _OFFSET_BYTES
        self._file = path.open("rb", buffering=0)

    def read(self, batch: Sequence[tuple[int, int]]) -> np.ndarray:
        """(b f n) uint16, the windows of a batch of (clip, first frame)."""
        if self.layout.joint:
            data = b"".join(self._read_blocks(clip, start, start + self._window_frames) for clip, start in batch)
            return self.layout.unpack(data, self._num_codes).reshape(len(batch), self._window_frames, -1)
        return np.stack([self._read_window(clip, start) for clip, start in batch])

    def _read_window(self, clip: int, start: int) -> np.ndarray:
        step = self.layout.block_frames
        first, last = (start // step, (start + self._window_frames - 1) // step + 1) if step else (0, 1)
        data, offsets = self._read_blocks(clip, first, last), self._offsets[clip][first : last + 1]
        cuts = [offset - offsets[0] for offset in offsets]
        blocks = [self.layout.unpack(data[a:b], self._num_codes) for a, b in itertools.pairwise(cuts)]
        frames = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
        return frames[start - first * step :][: self._window_frames]

    def _read_blocks(self, clip: int, first: int, last: int) -> bytes:
        begin, end = self._offsets[clip][first], self._offsets[clip][last]
        return os.pread(self._file.fileno(), end - begin, begin)


def _check(read: list[np.ndarray], clips: list[np.ndarray], batches: list[list[tuple[int, int]]]) -> None:
    """A layout that gave other codes would have been measured at something else."""
    for windows, batch in zip(read, batches, strict=True):
        for window, (clip, start) in zip(windows, batch, strict=True):
            assert np.array_equal(window, clips[clip][start : start + len(window)])


def _read_clips(store: Store, config: BenchLayoutConfig) -> list[np.ndarray]:
    """Codes (t n) uint16 of all clips in the sampled shards."""
    index = read_index(store, ["key", "offset", "size", "sha256", "num_frames"])
    shards: list[Any] = sample_shards(index, config.sample_tokens)
    rows = index.filter(pc.is_in(index["shard"], pa.array(shards, pa.int32()))).to_pylist()
    clips = [np.frombuffer(read_payload(store, row), np.uint16).reshape(row["num_frames"], -1) for row in rows]
    if len(sizes := {codes.shape[1] for codes in clips}) > 1:
        raise ConfigError(f"{store} has frames of {sorted(sizes)} tokens; layouts are compared on frames of one size")
    return clips

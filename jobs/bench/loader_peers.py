"""Other loaders of the same content, as straightforwardly as their manuals have it; they end in the same batches as ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

Peer = Literal["webdataset", "mosaicml-streaming", "mosaicml-streaming-random", "litdata", "pread"]
Batches = Iterator[tuple[torch.Tensor, list[str]]]
"""Endless: tokens (b, 2, t, h, w) int64 and the keys of the samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What every loader reads: `samples` (n, f, h, w) uint16, which stand in the token dataset `folder` under `keys`."""

    folder: Path
    samples: np.ndarray
    keys: list[str]
    window_frames: int
    batch_size: int


INSTALL: dict[Peer, str] = {
    "webdataset": "pip install webdataset",
    "mosaicml-streaming": "pip install mosaicml-streaming, with the torchvision that belongs to this torch",
    "mosaicml-streaming-random": "pip install mosaicml-streaming, with the torchvision that belongs to this torch",
    "litdata": "pip install litdata",
    "pread": "part of Python",
}


def read_webdataset(content: Content, folder: Path) -> Batches:
    """Plain WebDataset over the tars of the token dataset: shuffled shards, a buffer of samples, decoded as numpy."""
    import webdataset as wds

    urls = [str(content.folder / line) for line in (content.folder / "splits" / "train.txt").read_text().splitlines()]
    samples = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(256).decode().repeat()
    return _collate(content, ((one["tokens.npy"], one["__key__"]) for one in samples))


def iterate_streaming(content: Content, folder: Path) -> Batches:
    """mosaicml-streaming, iterated with its own shuffle."""
    dataset = _open_streaming(content, folder)

    def samples() -> Iterator[tuple[np.ndarray, str]]:
        while True:
            for one in dataset:
                yield one["tokens"], one["key"]

    return _collate(content, samples())


def index_streaming(content: Content, folder: Path) -> Batches:
    """mosaicml-streaming by number of the sample, drawn at random."""
    dataset = _open_streaming(content, folder)
    draw = np.random.default_rng(0)

    def samples() -> Iterator[tuple[np.ndarray, str]]:
        while True:
            for number in draw.permutation(len(content.keys)).tolist():
                one = dataset[number]
                yield one["tokens"], one["key"]

    return _collate(content, samples())


def iterate_litdata(content: Content, folder: Path) -> Batches:
    """litdata, iterated with its own shuffle."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, key in enumerate(content.keys):
        writer.add_item(number, {"tokens": content.samples[number], "key": key})
    writer.done()
    writer.merge()
    dataset = StreamingDataset(str(folder), shuffle=True)

    def samples() -> Iterator[tuple[np.ndarray, str]]:
        while True:
            for one in dataset:
                yield one["tokens"], one["key"]

    return _collate(content, samples())


def read_windows(content: Content, folder: Path) -> Batches:
    """What a naive loader by index does: one `os.pread` of each window from one file of all samples."""
    path = folder / "samples.bin"
    content.samples.tofile(path)
    descriptor = os.open(path, os.O_RDONLY)
    frame_bytes = content.samples[0, 0].nbytes
    window_bytes = content.window_frames * frame_bytes
    shape = (content.window_frames, *content.samples.shape[2:])
    draw = np.random.default_rng(0)

    def read(number: int, start: int) -> np.ndarray:
        offset = number * content.samples[0].nbytes + start * frame_bytes
        return np.frombuffer(os.pread(descriptor, window_bytes, offset), np.uint16).reshape(shape)

    while True:
        numbers = draw.integers(len(content.keys), size=content.batch_size).tolist()
        starts = draw.integers(content.samples.shape[1] - content.window_frames + 1, size=(content.batch_size, 2))
        pairs = [
            np.stack([read(number, start) for start in pair])
            for number, pair in zip(numbers, starts.tolist(), strict=True)
        ]
        yield torch.from_numpy(np.stack(pairs).astype(np.int64)), [content.keys[number] for number in numbers]


PEERS: dict[Peer, Callable[[Content, Path], Batches]] = {
    "webdataset": read_webdataset,
    "mosaicml-streaming": iterate_streaming,
    "mosaicml-streaming-random": index_streaming,
    "litdata": iterate_litdata,
    "pread": read_windows,
}


def _open_streaming(content: Content, folder: Path) -> Any:
    from streaming import MDSWriter, StreamingDataset

    shape = ",".join(map(str, content.samples.shape[1:]))
    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{shape}", "key": "str"}) as writer:
        for number, key in enumerate(content.keys):
            writer.write({"tokens": content.samples[number], "key": key})
    return StreamingDataset(local=str(folder), shuffle=True, batch_size=content.batch_size)


def _collate(content: Content, samples: Iterator[tuple[np.ndarray, str]]) -> Batches:
    """Batches of two random windows of each sample."""
    draw = np.random.default_rng(0)
    t = content.window_frames
    while True:
        pairs, keys = [], []
        for _ in range(content.batch_size):
            tokens, key = next(samples)
            tokens = np.asarray(tokens)
            starts = draw.integers(len(tokens) - t + 1, size=2).tolist()
            pairs.append(np.stack([tokens[start : start + t] for start in starts]))
            keys.append(key)
        yield torch.from_numpy(np.stack(pairs).astype(np.int64)), keys

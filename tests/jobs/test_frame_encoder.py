"""Memory that runs out for real, in a process whose address space is limited: the batch is halved, and the codes stay."""

from __future__ import annotations

import logging
import multiprocessing
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.frame_encoder import FrameEncoder
from models.tokenizers.vqvae import Vqvae, VqvaeConfig
from pipeline.errors import ConfigError

BATCH = 64


def make_tokenizer(folder: Path) -> Path:
    torch.manual_seed(0)
    Vqvae(VqvaeConfig(channels=32, codebook_size=64)).save(folder)
    return folder


def frames_of(size_px: int, number: int = BATCH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, size_px, size_px, 3), np.uint8)


def encode_in_little_memory(folder: Path, size_px: int, room_bytes: int, answer: multiprocessing.Queue) -> None:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    encode = FrameEncoder(folder, "cpu", "fp32")
    encode(frames_of(16, 1))  # what torch allocates once
    frames = frames_of(size_px)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room_bytes, -1))
    result: list | str
    try:
        result = [encode(frames) for _ in range(2)]
    except ConfigError as error:
        result = str(error)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    answer.put((result, messages))


def run_in_little_memory(folder: Path, size_px: int, room_bytes: int) -> tuple[list | str, list[str]]:
    """The codes of two calls, or the error, and what was said."""
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.Queue = context.Queue()
    process = context.Process(target=encode_in_little_memory, args=(folder, size_px, room_bytes, answer))
    process.start()
    result = answer.get(timeout=60)
    process.join()
    return result


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path)
    codes, messages = run_in_little_memory(folder, 512, 300 * 2**20)
    assert not isinstance(codes, str), codes
    for found in codes:
        np.testing.assert_array_equal(found, FrameEncoder(folder, "cpu", "fp32")(frames_of(512)))
    # Said once a halving; the second call begins with what fitted.
    assert messages and len(messages) == len(set(messages)) <= 6
    assert "out of memory on cpu with 64 frames of 512 px; goes on with 32 at a time" in messages[0]


def test_not_even_one_frame(tmp_path: Path) -> None:
    error, messages = run_in_little_memory(make_tokenizer(tmp_path), 512, 2**20)
    assert "does not suffice to encode one frame of 512 px" in error and "frames.size_px" in error
    assert len(messages) == 6  # 64 to 1


def test_other_errors_are_not_memory(tmp_path: Path) -> None:
    encode = FrameEncoder(make_tokenizer(tmp_path), "cpu", "fp32")
    with pytest.raises(ValueError, match="multiples of 8"):
        encode(frames_of(12))

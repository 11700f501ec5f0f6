"""A tokenizer as the tokenize stage uses it: batches of frames in, codes out, whatever memory there is."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from models.tokenizers.base import Precision, Tokenizer, load_tokenizer
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)


class FrameEncoder:
    """Frames uint8 (b h w c) to codes uint16 (b h w) on one device; safe to call from several threads.

    Where memory runs out, the batch is encoded in halves from then on, and a warning says so.

    Raises:
        ConfigError: memory does not suffice for one frame.
    """

    def __init__(self, tokenizer: Tokenizer | Path, device: str, precision: Precision) -> None:
        if device == "cpu":
            torch.set_num_threads(1)  # one encoder a CPU: their threads would only get in each other's way
        self._device = device
        self._tokenizer = (
            tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer, device, precision)
        )
        self._most_frames: dict[int, int] = {}  # by frame size in px

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        side = frames.shape[1]
        while True:
            most = self._most_frames.get(side, len(frames))
            try:
                parts = [self._encode(frames[start : start + most]) for start in range(0, len(frames), most)]
                return np.concatenate(parts)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve(side, most, error)

    def _encode(self, frames: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(frames)
        if self._device != "cpu":
            batch = batch.pin_memory().to(self._device, non_blocking=True)
        with torch.inference_mode():
            return self._tokenizer.encode(batch).cpu().numpy()

    def _halve(self, side: int, most: int, error: BaseException) -> None:
        if most == 1:
            raise ConfigError(
                f"memory on {self._device} does not suffice to encode one frame of {side} px ({error}); lower "
                "frames.size_px or precision, or take a device with more memory"
            ) from error
        if self._device != "cpu":
            torch.cuda.empty_cache()
        # Another thread may have halved it already.
        self._most_frames[side] = min(most // 2, self._most_frames.get(side, most))
        log.warning(
            f"encoder: out of memory on {self._device} with {most} frames of {side} px; goes on with "
            f"{self._most_frames[side]} at a time"
        )


def _is_out_of_memory(error: BaseException) -> bool:
    # On CPUs these are plain RuntimeErrors: of torch's allocator, and of oneDNN where it has no room for its code.
    words = ("not enough memory", "can't allocate memory", "could not create a", "could not execute a primitive")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)

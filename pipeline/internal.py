"""Errors that nobody foresaw, contained to the one input that raised them."""

from __future__ import annotations

import re
import traceback

from pipeline.errors import BadVideo, ConfigError, DatasetError, OutputError, TransientIO
from pipeline.storage import LOCAL_TROUBLE

INTERNAL = "internal"
"""Class of the rejects that are a defect of ours; any of them makes a job's exit code 1."""
_TRACEBACK_CHARS = 4000


def as_bad_video(error: Exception) -> BadVideo:
    """Why an input is no sample, from what working on it raised. What was not foreseen becomes class `internal`, with its
    traceback in place of what ffmpeg said.

    Raises:
        Exception: the error itself, where it says nothing about the input: this machine's trouble (a full disk, no memory), an
            output that cannot be written, a damaged dataset, a wrong setting.
    """
    if isinstance(error, BadVideo):
        return error
    if isinstance(error, TransientIO):
        return BadVideo("storage", str(error))
    is_local = isinstance(error, OSError) and error.errno in LOCAL_TROUBLE
    if is_local or isinstance(error, MemoryError | OutputError | DatasetError | ConfigError):
        raise error
    reason = f"a defect of tokenreel, please report it with this row's stderr: {type(error).__name__}: {error}"
    return BadVideo(INTERNAL, _same_in_every_run(reason)[:500], _same_in_every_run(_format(error))[-_TRACEBACK_CHARS:])


def _format(error: Exception) -> str:
    # Of a recursion without end a part is enough.
    return "".join(traceback.format_exception(error, limit=-20)).rstrip()


def _same_in_every_run(text: str) -> str:
    return re.sub(r"0x[0-9a-f]{6,}", "0x…", text)

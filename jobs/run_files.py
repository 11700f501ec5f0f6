"""Files of a run's folder, which may be damaged, or somebody else's: none is followed out of the run, and none is read
without a bound."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from pipeline.errors import TokenreelError

MAX_JSON_BYTES = 16 * 2**20


class DamagedRun(TokenreelError):
    """A file of a run is not what its job wrote, by damage or because it is another run's; the message names the file and a
    way out. The CLI exits with 1."""


def regular_size(path: Path) -> int:
    """The bytes of the regular file `path`.

    Raises:
        DamagedRun: it is missing, a link, or no file.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise DamagedRun(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        raise DamagedRun(f"{path} is {kind}; a run holds its own files")
    return status.st_size


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        DamagedRun: there is no such file, or it is a link, too large, or holds something else.
    """
    if (size := regular_size(path)) > max_bytes:
        raise DamagedRun(f"{path} has {size} bytes; at most {max_bytes} are allowed")
    try:
        # Not through a link that took its place meanwhile, and without waiting for a pipe that did.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            return parse_object(file.read(max_bytes), str(path))
    except OSError as error:
        raise DamagedRun(f"{path} cannot be read: {error.strerror}") from error


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `data` holds; `where` names its source in the `DamagedRun` that is raised otherwise."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedRun(f"{where} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise DamagedRun(f"{where} is damaged: it holds a JSON {type(value).__name__}, not an object")
    return value


def refuse_links(run: Path) -> None:
    """Raise `DamagedRun` where an entry of the folder `run` or of its `checkpoints/` is a link, or neither file nor folder.

    Jobs write into a run, and delete old checkpoints; through a link they would do so elsewhere.
    """
    for folder in (run, run / "checkpoints"):
        try:
            entries = sorted(folder.iterdir())
        except FileNotFoundError:
            continue
        except NotADirectoryError as error:
            raise DamagedRun(f"{folder} is no folder") from error
        for entry in entries:
            mode = entry.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise DamagedRun(f"{entry} is a link, which may lead out of the run; replace it by what it leads to")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise DamagedRun(f"{entry} is neither a file nor a folder; delete it")

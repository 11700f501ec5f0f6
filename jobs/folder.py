"""Where a job keeps its own files, and one job a folder at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.storage import Store


def work_folder(out: Store) -> Path:
    """The local folder for what a job writes beside its dataset (journal, lock, MLflow's spool): the dataset's own, or,
    where that is in an object store, one under `.tokenreel` in the current folder."""
    if out.is_local:
        return out.path()
    return Path(".tokenreel").absolute() / f"{out.name}-{hashlib.sha256(out.url.encode()).hexdigest()[:8]}"


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for the body; the lock goes with the process, however that ends.

    The folder is made if it is missing, and goes again where the body, refused, put nothing into it.

    Raises:
        ConfigError: another job holds it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # Not through a link, which in a folder of somebody else's may lead to a file that this would empty.
    with open(folder / ".lock", "w", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another job is writing to it; wait for it, or choose another folder"
            ) from None
        try:
            yield
        finally:
            if is_new and [path.name for path in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()

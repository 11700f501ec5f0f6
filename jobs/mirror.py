"""A copy of a run's checkpoints in a store, from which the run goes on where its folder is lost.

STORE/checkpoints/00000100/     as in the run's folder; its state.json comes last and goes first
STORE/run.json, mlflow_*.json   who the run is, so that it stays the same one for us and for MLflow
STORE/metrics.jsonl             the curve up to the newest checkpoint
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from jobs.checkpoint import STATE_NAME, list_checkpoints
from jobs.journal import JOURNAL_NAME
from jobs.spool import SPOOL_NAME
from jobs.spool import STATE_NAME as MLFLOW_STATE_NAME
from pipeline.errors import ConfigError
from pipeline.storage import Store

log = logging.getLogger(__name__)

MARKER_NAME = "run.json"
"""The settings and inputs that a run's folder is bound to."""
_IDENTITY = (MARKER_NAME, SPOOL_NAME, MLFLOW_STATE_NAME)


class Mirror:
    """Copies checkpoints to `place`, a path or URL as `Store.at` takes it, and fetches them from there."""

    def __init__(self, place: str) -> None:
        self._store = Store.at(place)

    def list(self) -> list[str]:
        """Names of the whole checkpoints, oldest first."""
        entries = self._store.walk("checkpoints")
        return sorted(entry.name.split("/")[1] for entry in entries if entry.name.endswith(f"/{STATE_NAME}"))

    def push(self, checkpoint: Path) -> None:
        """Copy a whole checkpoint, then delete the copies of those that its run has no longer."""
        run = checkpoint.parent.parent
        self._remove(checkpoint.name)  # a step that a resumed run did again
        for file in sorted(checkpoint.iterdir()):
            if file.name != STATE_NAME:
                self._upload(file, f"checkpoints/{checkpoint.name}/{file.name}")
        for name in (*_IDENTITY, JOURNAL_NAME):
            if (run / name).exists():
                self._store.write(name, (run / name).read_bytes())
        self._store.write(f"checkpoints/{checkpoint.name}/{STATE_NAME}", (checkpoint / STATE_NAME).read_bytes())
        kept = {path.name for path in list_checkpoints(run)}
        for name in self.list():
            if name not in kept:
                self._remove(name)

    def push_or_warn(self, checkpoint: Path) -> None:
        """Like `push`, but a store that is away stops no training: the next checkpoint is tried again."""
        try:
            self.push(checkpoint)
        except Exception as error:
            log.warning("no copy of %s in %s: %s. Training goes on", checkpoint, self._store, error)

    def pull_identity(self, run: Path) -> None:
        """Fetch who the run is, where `run` does not know it.

        Raises:
            ConfigError: the store holds another run than the folder.
        """
        for name in _IDENTITY:
            if not (run / name).exists() and self._store.exists(name):
                self._download(name, run / name)
        if self._store.exists(MARKER_NAME) and self._store.read(MARKER_NAME) != (run / MARKER_NAME).read_bytes():
            raise ConfigError(f"workers.mirror = {self._store} holds another run than {run}; choose another one")

    def pull(self, run: Path) -> None:
        """Fetch every checkpoint that `run` lacks, and the curve where a newer one came."""
        newest_here = max((path.name for path in list_checkpoints(run)), default="")
        names = self.list()
        for name in names:
            self.fetch(run, name)
        if names and names[-1] > newest_here:
            self._download(JOURNAL_NAME, run / JOURNAL_NAME)

    def fetch(self, run: Path, name: str) -> None:
        """Fetch the checkpoint `name` where `run` lacks it; several workers of a node may do so at once."""
        final = run / "checkpoints" / name
        if (final / STATE_NAME).exists():
            return
        temporary = final.with_name(f".{name}.{os.getpid()}.fetched.tmp")
        temporary.mkdir(parents=True)
        for entry in self._store.list(f"checkpoints/{name}"):
            self._download(entry.name, temporary / Path(entry.name).name)
        try:
            temporary.rename(final)
        except OSError:  # another worker was faster
            shutil.rmtree(temporary)
            if not (final / STATE_NAME).exists():
                raise

    def _remove(self, name: str) -> None:
        self._store.remove(f"checkpoints/{name}/{STATE_NAME}")
        for entry in self._store.list(f"checkpoints/{name}"):
            self._store.remove(entry.name)

    def _upload(self, file: Path, name: str) -> None:
        """Put a copy of `file` into the store. An upload takes its file away, so it gets a second name of it."""
        if self._store.is_local:
            scratch = self._store.scratch(name)
            shutil.copyfile(file, scratch)
        else:
            scratch = file.with_name(f".{file.name}.upload")
            scratch.unlink(missing_ok=True)
            os.link(file, scratch)
        try:
            self._store.put(scratch, name)
        finally:
            scratch.unlink(missing_ok=True)

    def _download(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with self._store.open(name) as remote, temporary.open("wb") as file:
            shutil.copyfileobj(remote, file, 1 << 20)
        temporary.replace(path)

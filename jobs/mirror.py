"""A copy of a run's checkpoints in a store, from which the run goes on where its folder is lost.

STORE/checkpoints/00000100/     as in the run's folder; its state.json comes last and goes first
STORE/run.json, mlflow_*.json   who the run is, so that it stays the same one for us and for MLflow
STORE/metrics.jsonl             the curve up to the newest checkpoint

Driver and workers may have no disk in common: what one of them needs of another's folder goes through the store.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from jobs.checkpoint import MODEL_NAME, OPTIMIZER_NAME, STATE_NAME, is_checkpoint_name, list_checkpoints
from jobs.journal import JOURNAL_NAME, last_row
from jobs.run_files import MAX_JSON_BYTES, DamagedRun, parse_object, read_object
from jobs.spool import SPOOL_NAME
from jobs.spool import STATE_NAME as MLFLOW_STATE_NAME
from pipeline.errors import ConfigError
from pipeline.storage import Store

log = logging.getLogger(__name__)

MARKER_NAME = "run.json"
"""The settings and inputs that a run's folder is bound to."""
TOKENIZER_KEY = "tokenizer_fingerprint"
"""Where it names the tokenizer that made the tokens; "tokenizer" is a setting of train-tokenizer."""
_MLFLOW = (SPOOL_NAME, MLFLOW_STATE_NAME)


class Mirror:
    """Copies checkpoints to `place`, a path or URL as `Store.at` takes it, and fetches them from there."""

    def __init__(self, place: str) -> None:
        self._store = Store.at(place)

    def __str__(self) -> str:
        return str(self._store)

    def list(self) -> list[str]:
        """Names of the whole checkpoints, oldest first."""
        parts = (entry.name.split("/") for entry in self._store.walk("checkpoints"))
        names = (part[1] for part in parts if len(part) == 3 and part[2] == STATE_NAME)
        return sorted(filter(is_checkpoint_name, names), key=int)

    def push(self, checkpoint: Path) -> None:
        """Copy a whole checkpoint, then delete the copies of those that its run has no longer."""
        run = checkpoint.parent.parent
        self.remove(checkpoint.name)  # a step that a resumed run did again
        for file in sorted(checkpoint.iterdir()):
            if file.name != STATE_NAME:
                self._upload(file, f"checkpoints/{checkpoint.name}/{file.name}")
        self._push_files(run, MARKER_NAME, *_MLFLOW, JOURNAL_NAME)
        self._store.write(f"checkpoints/{checkpoint.name}/{STATE_NAME}", (checkpoint / STATE_NAME).read_bytes())
        kept = {path.name for path in list_checkpoints(run)}
        for name in self.list():
            if name not in kept:
                self.remove(name)

    def push_or_warn(self, checkpoint: Path) -> None:
        """Like `push`, but a store that is away stops no training: the next checkpoint is tried again."""
        try:
            self.push(checkpoint)
        except Exception as error:
            log.warning("no copy of %s in %s: %s. Training goes on", checkpoint, self._store, error)

    def push_newest(self, run: Path) -> None:
        """Copy the newest checkpoint of `run` where the store lacks it: the one that the run starts from, or one whose
        writer died before the copy was whole. Call `pull` first: what `run` has not, the store loses."""
        here = list_checkpoints(run)
        if here and here[-1].name not in self.list():
            self.push(here[-1])

    def push_identity(self, run: Path) -> None:
        """Copy who the run is. The driver does, which alone knows it: the workers may have another disk."""
        self._push_files(run, MARKER_NAME, *_MLFLOW)

    def push_identity_or_warn(self, run: Path) -> None:
        """Like `push_identity`, but a store that is away stops nothing."""
        try:
            self.push_identity(run)
        except Exception as error:
            log.warning("no copy of %s's MLflow run id in %s: %s", run, self._store, error)

    def pull_identity(self, run: Path) -> None:
        """Fetch who the run is, for us and for MLflow, where `run` does not know it.

        Raises:
            ConfigError: as `pull_marker`.
        """
        self.pull_marker(run)
        for name in _MLFLOW:
            if not (run / name).exists() and self._store.exists(name):
                self._download(name, run / name, MAX_JSON_BYTES)

    def pull_marker(self, run: Path) -> None:
        """Fetch the settings and inputs that the run is bound to, where `run` does not know them.

        Raises:
            ConfigError: the store holds another run than the folder, or either has checkpoints that it does not say whose
                they are.
            DamagedRun: either says it in a file that is damaged.
        """
        here = run / MARKER_NAME
        if not self._store.exists(MARKER_NAME):
            if self.list():
                raise ConfigError(
                    f"workers.mirror = {self._store} holds checkpoints, and no {MARKER_NAME} that says of which run; choose "
                    f"another place, or, where they are those of {run}, copy its {MARKER_NAME} there"
                )
            return
        if not here.exists():
            if list_checkpoints(run):
                raise ConfigError(
                    f"{run} holds checkpoints, and no {MARKER_NAME} that says of which run; delete it, and those of "
                    f"workers.mirror = {self._store} come there"
                )
            self._download(MARKER_NAME, here, MAX_JSON_BYTES)
        theirs = self._store.where(MARKER_NAME)
        try:
            ours = read_object(here)
        except DamagedRun as error:
            raise DamagedRun(f"{error}. Where {theirs} is whole, copy it there") from error
        try:
            self._check_size(MARKER_NAME, MAX_JSON_BYTES)
            with self._open(MARKER_NAME) as file:
                copy = parse_object(file.read(), theirs)
        except DamagedRun as error:
            raise DamagedRun(f"{error}. Copy {here} there") from error
        if copy != ours:
            raise ConfigError(
                f"workers.mirror = {self._store} holds another run than {run}; choose another one, or delete {run}, where it is what "
                "an older run left"
            )

    def pull(self, run: Path, max_bytes: Mapping[str, int]) -> None:
        """Fetch every checkpoint that `run` lacks, and the curve where its own does not reach the newest of them.

        Args:
            max_bytes: as for `fetch`. A checkpoint with a larger file, or without one of them, is left out with a warning.
        """
        names = self.list()
        row = last_row(run / JOURNAL_NAME)
        # The checkpoint alone may be here: each worker fetches it, and only the first one has the curve.
        is_behind = bool(names) and (row is None or row["step"] < int(names[-1]))
        if is_behind and self._store.exists(JOURNAL_NAME):  # the checkpoint that a run starts from has no curve
            self._download(JOURNAL_NAME, run / JOURNAL_NAME)
        for name in names:
            try:
                self.fetch(run, name, max_bytes)
            except DamagedRun as error:
                log.warning("damaged checkpoint: %s. It is left where it is, and not used", error)

    def fetch(self, run: Path, name: str, max_bytes: Mapping[str, int]) -> None:
        """Fetch the checkpoint `name` where `run` lacks it; several workers of a node may do so at once.

        Args:
            max_bytes: the most that each file of a checkpoint can have, by name.

        Raises:
            DamagedRun: the store's copy lacks a file, or one is larger. Nothing was fetched.
        """
        final = run / "checkpoints" / name
        if (final / STATE_NAME).exists():
            return
        for file in (MODEL_NAME, OPTIMIZER_NAME, STATE_NAME):
            self._check_size(f"checkpoints/{name}/{file}", max_bytes[file])
        temporary = final.with_name(f".{name}.{os.getpid()}.fetched.tmp")
        temporary.mkdir(parents=True)
        try:
            for file in (MODEL_NAME, OPTIMIZER_NAME, STATE_NAME):
                self._download(f"checkpoints/{name}/{file}", temporary / file)
        except DamagedRun:
            shutil.rmtree(temporary)
            raise
        try:
            temporary.rename(final)
        except OSError:  # another worker was faster
            shutil.rmtree(temporary)
            if not (final / STATE_NAME).exists():
                raise

    def _push_files(self, run: Path, *names: str) -> None:
        for name in names:
            if (run / name).exists():
                self._store.write(name, (run / name).read_bytes())

    def remove(self, name: str) -> None:
        """Delete the copy of the checkpoint `name`."""
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

    def _open(self, name: str) -> IO[bytes]:
        try:
            return self._store.open(name)
        except OSError as error:
            if error.errno != errno.EINVAL:  # how a folder's store refuses what is no file
                raise
            raise DamagedRun(f"{self._store.where(name)}: {error.strerror}") from error

    def _check_size(self, name: str, max_bytes: int) -> None:
        entry = self._store.stat(name)
        size = None if entry is None else entry.size_bytes
        if size is None or size > max_bytes:
            problem = "is missing" if size is None else f"has {size} bytes; at most {max_bytes} are allowed"
            raise DamagedRun(f"{self._store.where(name)} {problem}")

    def _download(self, name: str, path: Path, max_bytes: int | None = None) -> None:
        if max_bytes is not None:
            self._check_size(name, max_bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with self._open(name) as remote, temporary.open("wb") as file:
            shutil.copyfileobj(remote, file, 1 << 20)
        temporary.replace(path)

"""How driver and workers come to have the same run in their folders: on one disk, or through the run's mirror."""

from __future__ import annotations

import logging
import shutil
import socket
from pathlib import Path

import torch.distributed as dist

from jobs.checkpoint import discard, list_checkpoints
from jobs.checkpoint_checks import Expected, find_damage, require_whole, set_damaged_aside
from jobs.loop import Context
from jobs.mirror import MARKER_NAME, Mirror
from jobs.run_files import DamagedRun
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)


def agree_on_folder(marker: bytes, mirror: Mirror | None, context: Context) -> str:
    """Why some worker cannot train in its folder, the same on all of them; empty where each has the driver's folder, whose
    `run.json` is `marker`, or one of its own for what the mirror holds."""
    run, host, trouble = context.run, socket.gethostname(), ""
    try:
        if mirror is not None:
            mirror.pull_marker(run)
        if not (run / MARKER_NAME).exists() or (run / MARKER_NAME).read_bytes() != marker:
            trouble = (
                f"{run} on {host} is another folder than the driver's. Put --out on a file system that all nodes share, or give "
                "--workers.mirror"
                if mirror is None
                else f"workers.mirror = {mirror}: {host} does not find there what the driver put there. Give a URL, or a folder "
                "that all nodes share"
            )
    except (ConfigError, DamagedRun) as error:
        trouble = f"{host}: {error}"
    troubles = [trouble] * context.world_size
    if context.world_size > 1:
        dist.all_gather_object(troubles, trouble)
    return next(filter(None, troubles), "")


def settle_checkpoints(run: Path, expected: Expected, mirror: Mirror | None = None) -> None:
    """Fetch what `run` lacks of its mirror, and leave whole checkpoints only: a damaged one is set aside, and replaced by its
    copy in the mirror where that is whole; else it goes there too. A warning names it, and what the run goes on from.

    Raises:
        DamagedRun: a link in the run, or there were checkpoints and none is whole.
    """
    if mirror is not None:
        mirror.pull(run, expected.max_bytes())
    for aside, trouble in set_damaged_aside(run, expected).items():
        name = aside.name.removeprefix("damaged-")
        if mirror is not None and name in mirror.list():
            if _fetch_whole(mirror, run, name, expected):
                log.warning("damaged checkpoint: %s. Its copy in %s takes its place", trouble, mirror)
                shutil.rmtree(aside)
                continue
            mirror.remove(name)
        newest = next(reversed(list_checkpoints(run)), "none")
        log.warning("damaged checkpoint: %s. It is set aside as %s; the newest whole one is %s", trouble, aside, newest)
    require_whole(run)


def _fetch_whole(mirror: Mirror, run: Path, name: str, expected: Expected) -> bool:
    """Fetch the checkpoint `name` where `run` lacks it; whether it is whole. Of a damaged one nothing stays."""
    try:
        mirror.fetch(run, name, expected.max_bytes())
    except DamagedRun as error:
        log.warning("damaged checkpoint: %s", error)
        return False
    path = run / "checkpoints" / name
    if trouble := find_damage(path, expected):
        log.warning("damaged checkpoint in %s: %s", mirror, trouble)
        discard(path)
    return not trouble


def settle_start(mirror: Mirror, context: Context, expected: Expected) -> None:
    """Make the folders of all workers agree on the newest checkpoint, wherever they lie.

    Raises:
        DamagedRun: no checkpoint is whole.
    """
    run = context.run
    newest: list[str | None] = [None]
    if context.rank == 0:
        settle_checkpoints(run, expected, mirror)
        mirror.push_newest(run)
        here = list_checkpoints(run)
        newest = [here[-1].name if here else ""]
    if context.world_size > 1:
        dist.broadcast_object_list(newest)
    assert newest[0] is not None
    if newest[0] and context.rank > 0:
        set_damaged_aside(run, expected)
        if not _fetch_whole(mirror, run, newest[0], expected):
            raise DamagedRun(
                f"{run} on {socket.gethostname()}: the copy of checkpoint {newest[0]} in {mirror} is damaged"
            )
    for path in list_checkpoints(run):
        if path.name > newest[0]:
            discard(path)


def explain_absence(out: Path, mirror: Mirror | None) -> str:
    """Why the driver has no last checkpoint although the workers saved it."""
    if mirror is None:
        return (
            f"{out}: the workers did all steps, but their checkpoints are on another disk. Put --out on a file system that all "
            "nodes share, or give --workers.mirror"
        )
    return (
        f"{out}: the workers did all steps, but could not copy the last checkpoint to workers.mirror = {mirror}; their logs say "
        "why. The same command copies it, or does again what the mirror lacks where their disk is lost"
    )

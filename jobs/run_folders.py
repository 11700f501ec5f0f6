"""How driver and workers come to have the same run in their folders: on one disk, or through the run's mirror."""

from __future__ import annotations

import socket
from pathlib import Path

import torch.distributed as dist

from jobs.checkpoint import discard, list_checkpoints
from jobs.loop import Context
from jobs.mirror import MARKER_NAME, Mirror
from pipeline.errors import ConfigError


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
    except ConfigError as error:
        trouble = f"{host}: {error}"
    troubles = [trouble] * context.world_size
    if context.world_size > 1:
        dist.all_gather_object(troubles, trouble)
    return next(filter(None, troubles), "")


def settle_start(mirror: Mirror, context: Context) -> None:
    """Make the folders of all workers agree on the newest checkpoint, wherever they lie."""
    run = context.run
    newest: list[str | None] = [None]
    if context.rank == 0:
        mirror.pull(run)
        mirror.push_newest(run)
        here = list_checkpoints(run)
        newest = [here[-1].name if here else ""]
    if context.world_size > 1:
        dist.broadcast_object_list(newest)
    assert newest[0] is not None
    if newest[0]:
        mirror.fetch(run, newest[0])
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

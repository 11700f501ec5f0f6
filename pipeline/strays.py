"""What lies in the folders of a dataset and is no part of it."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator

from pipeline.dataset import split_name
from pipeline.schema import SPLITS
from pipeline.shards import parse_index_name
from pipeline.storage import Store
from pipeline.untrusted import link_out

_FOLDERS = ("shards", "index", "rejects", "splits")


def find_strays(store: Store, counted: Collection[str]) -> Iterator[str]:
    """One line for each file that no index counts, and for each folder, link out of the dataset, pipe or device.

    Args:
        counted: names of the files that belong to shards.
    """
    known = {*counted, *map(split_name, SPLITS)}
    for folder in _FOLDERS:
        names = _scan(store, folder) if store.is_local else ((entry.name, "") for entry in store.walk(folder))
        for name, oddity in names:
            if oddity:
                yield f"{store.where(name)}: {oddity}"
            elif folder == "index" and parse_index_name(name) is not None:
                continue
            elif name not in known:
                yield f"{store.where(name)}: no index counts it (broken off, or foreign); delete it"


def _scan(store: Store, folder: str) -> Iterator[tuple[str, str]]:
    """(name, what is odd about it) of everything in a local folder; hidden files are the writers' own."""
    here = store.path(folder)
    if here.is_symlink() and (target := link_out(store, folder)):
        yield folder, f"a link out of the dataset, to {target}; put the files here"
    try:
        found = sorted(here.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        yield folder, f"{error.strerror}; it must be a folder"
        return
    for one in found:
        name = f"{folder}/{one.name}"
        if one.name.startswith("."):
            continue
        if one.is_symlink() and (target := link_out(store, name)):
            yield name, f"a link out of the dataset, to {target}; put the file itself here"
        elif one.is_dir():
            yield name, "a folder, which no job of tokenreel makes here; delete it"
        elif not one.is_file():
            yield (
                name,
                "neither a file nor a folder (a named pipe, a device, a link to nowhere or to itself); delete it",
            )
        else:
            yield name, ""

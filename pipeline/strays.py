"""What lies in the folders of a dataset and is no part of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pipeline.dataset import split_name
from pipeline.schema import SPLITS
from pipeline.storage import Store

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
            elif folder == "index" and name.rpartition("/")[2].removesuffix(".parquet").isdecimal():
                continue
            elif name not in known:
                yield f"{store.where(name)}: no index counts it (broken off, or foreign); delete it"


def _scan(store: Store, folder: str) -> Iterator[tuple[str, str]]:
    """(name, what is odd about it) of everything in a local folder; hidden files are the writers' own."""
    root, here = store.path().resolve(), store.path(folder)
    if here.is_symlink() and not here.resolve().is_relative_to(root):
        yield folder, f"a link out of the dataset, to {here.resolve()}; put the files here"
    try:
        found = sorted(here.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for one in found:
        name = f"{folder}/{one.name}"
        if one.name.startswith("."):
            continue
        if one.is_symlink() and not one.resolve().is_relative_to(root):
            yield name, f"a link out of the dataset, to {one.resolve()}; put the file itself here"
        elif one.is_dir():
            yield name, "a folder, which no job of tokenreel makes here; delete it"
        elif not one.is_file():
            yield name, "neither a file nor a folder (a named pipe, a device, a link to nowhere); delete it"
        else:
            yield name, ""

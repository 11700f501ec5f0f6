"""Paths of a job's options, absolute from the first line on.

What a person types is relative to the folder that the command starts in. A process may change its folder later, its
threads see that at once, and a saved config is read from anywhere; so nothing behind the command line has a relative path.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.patterns import pattern_part

T = TypeVar("T")
_MARK = "a path or a URL"
PathOrUrl = Annotated[str, _MARK]
"""A field of a config that holds a path, a glob of paths, or SCHEME://...; "" is no place."""


def absolute_paths(config: T) -> T:
    """`config`, a dataclass, with each `Path` and each local `PathOrUrl` in it, at any depth, made absolute.

    URLs and empty strings stay as they are. Links are not resolved: the path is the one that was typed.
    """
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    hints = get_type_hints(type(config), include_extras=True)
    values = {one.name: getattr(config, one.name) for one in dataclasses.fields(config) if one.init}
    changed = {name: found for name, value in values.items() if (found := _absolute(value, hints[name])) != value}
    return dataclasses.replace(config, **changed) if changed else config


def _absolute(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return absolute_paths(value)
    if isinstance(value, Path):
        return value.absolute()
    if isinstance(value, tuple):
        kinds = get_args(hint)
        return tuple(_absolute(one, kinds[0] if kinds else None) for one in value)
    if isinstance(value, str) and _is_place(hint):
        return _absolute_place(value)
    return value


def _is_place(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return _MARK in hint.__metadata__ or _is_place(get_args(hint)[0])
    return get_origin(hint) in (Union, UnionType) and any(map(_is_place, get_args(hint)))


def _absolute_place(place: str) -> str:
    # A glob in a folder whose own name looks like one would become another glob.
    if not place or "://" in place or (pattern_part(place) and pattern_part(str(Path().absolute()))):
        return place
    return str(Path(place).absolute())

"""Config dataclasses to plain JSON and back, strictly: an unknown name is an error, never ignored."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from jobs.paths import absolute_paths
from jobs.run_files import DamagedRun, read_object
from pipeline.errors import ConfigError

T = TypeVar("T")
CONFIG_NAME = "config.json"


def to_plain(config: Any) -> dict[str, Any]:
    """`config` as JSON knows it: nested dicts, lists for tuples, strings for paths."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return plain


def save_config(folder: Path, config: Any) -> Path:
    """Write `folder/config.json`, which `--config` reads back."""
    path = folder / CONFIG_NAME
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(to_text(config))
    return path


def to_text(config: Any) -> str:
    """What a `config.json` holds: absolute paths, so that it means the same in every folder."""
    return json.dumps(to_plain(absolute_paths(config)), indent=2) + "\n"


def load_config(path: Path, kind: type[T]) -> T:
    """The config that a file holds.

    Raises:
        ConfigError: no such file, a link, not JSON, an unknown name, or a value that is not allowed.
    """
    try:
        plain = read_object(path)
    except DamagedRun as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from error
    return from_plain(_renew(plain), kind, str(path))


_LEFT_OPEN = {
    "root": "",
    **dict.fromkeys(("stride_s", "shard_bytes", "fps", "num_encoders", "layer", "stride_frames"), 0),
}
"""Options to what they said for None in a `config.json` of the release that wrote format 3; no such value is allowed now."""


def _renew(plain: Any) -> Any:
    """A config of that release as one of this."""
    if not isinstance(plain, dict):
        return plain
    renamed = {"stride_frames" if name == "stride" else name: value for name, value in plain.items()}
    return {
        name: None if name in _LEFT_OPEN and value == _LEFT_OPEN[name] else _renew(value)
        for name, value in renamed.items()
    }


def from_plain(plain: dict[str, Any], kind: type[T], where: str) -> T:
    """The inverse of `to_plain`; `where` names the source in errors."""
    try:
        config = TypeAdapter(kind).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"config {where}: {place or kind.__name__}: {first['msg']}") from None
    if unknown := sorted(_names(plain) - _names(to_plain(config))):
        raise ConfigError(f"config {where}: unknown names {unknown}; allowed: {sorted(_names(to_plain(config)))}")
    return config


def _names(plain: Any, prefix: str = "") -> set[str]:
    if not isinstance(plain, dict):
        return {prefix}
    return {name for key, value in plain.items() for name in _names(value, f"{prefix}.{key}" if prefix else key)}

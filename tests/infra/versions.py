"""The versions that the project is tested with, and where its files for operation are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"


def pinned(package: str) -> str:
    """The version that constraints.txt gives `package`."""
    lines = (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    return next(version for name, _, version in lines if name.lower() == package.lower())


def image() -> str:
    """The project's own image, by the version in pyproject.toml."""
    import tomllib

    return f"tokenreel:{tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}"


def load(name: str) -> list[Any]:
    """The YAML documents of a file in infra/; a key that stands there twice is an error."""
    return list(yaml.load_all((INFRA / name).read_text(), _Strict))


def ray_start_options() -> set[str]:
    """The options that the installed `ray start` has."""
    from ray.scripts.scripts import start

    return {option for parameter in start.params for option in (*parameter.opts, *parameter.secondary_opts)}


class _Strict(yaml.SafeLoader):
    pass


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    assert len(keys) == len(set(map(str, keys))), f"a key stands twice: {keys}"
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)

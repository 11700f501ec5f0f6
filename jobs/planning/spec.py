"""SPEC of `tokenreel plan`: what a cluster is made of and costs, from a small JSON or TOML file."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config import from_plain
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """Nodes of one kind. cpus, gpus, price_per_hour, disk_gb: of one of them.

    cpu: its name, as `lscpu` gives it; "": as fast as those that the probe runs on.
    gpu: its name, as torch and `tokenreel bench tokenize` give it.
    price_per_hour: in any currency.
    disk_gb: free on its own disk for scratch files and the loader's cache; 0: not checked.
    """

    name: str
    count: int = 1
    cpus: int
    gpus: int = 0
    cpu: str = ""
    gpu: str = ""
    price_per_hour: float = 0.0
    disk_gb: float = 0.0

    def problem(self) -> str:
        """What is wrong with it; "" if nothing."""
        if self.count < 1 or self.cpus < 1 or self.gpus < 0:
            return f"count = {self.count} and cpus = {self.cpus} must be 1 or more, gpus = {self.gpus} 0 or more"
        if self.gpus and not self.gpu:
            return f"gpus = {self.gpus} needs gpu, their name as `tokenreel bench tokenize` prints it"
        if self.gpu and not self.gpus:
            return f"gpu = {self.gpu!r} needs gpus, how many a node has"
        for name in ("price_per_hour", "disk_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                return f"{name} = {getattr(self, name)}: must be 0 or more, and finite"
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSpec:
    """All nodes of a cluster, which work and cost from the start of the first stage to the end of the last."""

    nodes: tuple[Nodes, ...]

    @property
    def num_cpus(self) -> int:
        return sum(one.count * one.cpus for one in self.nodes)

    @property
    def num_gpus(self) -> int:
        return sum(one.count * one.gpus for one in self.nodes)

    @property
    def price_per_hour(self) -> float:
        return sum(one.count * one.price_per_hour for one in self.nodes)


def read_spec(path: Path) -> ClusterSpec:
    """The cluster that a file names: `nodes`, a list of `Nodes`.

    Raises:
        ConfigError: no such file, neither JSON nor TOML, or a field is unknown, missing or has a wrong value.
    """
    try:
        text = path.read_text()
        plain: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cluster {path} cannot be read: {error}; give a .json or .toml file with a list `nodes`"
        ) from None
    rows = plain.get("nodes") if isinstance(plain, dict) else None
    if not isinstance(rows, list) or not rows or len(plain) > 1 or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(
            f"cluster {path}: must hold `nodes` and nothing else, a list of one or more tables; a table has "
            f"{', '.join(Nodes.__slots__)}"
        )
    nodes = []
    for place, row in enumerate(rows):
        where = f"{path}, nodes[{place}]"
        nodes.append(from_plain(row, Nodes, where))
        if problem := nodes[-1].problem():
            raise ConfigError(f"config {where} ({nodes[-1].name}): {problem}")
    if len({one.name for one in nodes}) < len(nodes):
        raise ConfigError(f"cluster {path}: two of `nodes` have the same name")
    return ClusterSpec(nodes=tuple(nodes))

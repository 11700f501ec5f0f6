"""SPEC: both formats, and a clear word for every wrong field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.planning.spec import read_spec
from pipeline.errors import ConfigError

TOML = """
[[nodes]]
name = "decoders"
count = 8
cpus = 16
price_per_hour = 0.5

[[nodes]]
name = "encoders"
count = 2
cpus = 12
gpus = 4
gpu = "H100"
price_per_hour = 10
disk_gb = 500
"""


def test_both_formats(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(TOML)
    spec = read_spec(tmp_path / "spec.toml")
    assert (spec.num_cpus, spec.num_gpus, spec.price_per_hour) == (8 * 16 + 2 * 12, 8, 8 * 0.5 + 2 * 10)
    one = {"name": "all", "cpus": 4}
    (tmp_path / "spec.json").write_text(json.dumps({"nodes": [one]}))
    spec = read_spec(tmp_path / "spec.json")
    assert (spec.num_cpus, spec.num_gpus, spec.price_per_hour) == (4, 0, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cpus": 0}, "cpus = 0 must be 1 or more"),
        ({"count": 0}, "count = 0"),
        ({"gpus": -1}, "gpus = -1 0 or more"),
        ({"gpus": 2}, "gpus = 2 needs gpu"),
        ({"gpu": "H100"}, "gpu = 'H100' needs gpus"),
        ({"price_per_hour": -1}, "price_per_hour = -1.0: must be 0 or more"),
        ({"disk_gb": -1}, "disk_gb = -1.0: must be 0 or more"),
        ({"cpus": "many"}, r"nodes\[0\]: cpus: .*integer"),
        ({"cpu_count": 4}, r"nodes\[0\]: unknown names \['cpu_count'\]; allowed: .*'cpus'"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"nodes": [{"name": "a", "cpus": 4, **change}]}))
    with pytest.raises(ConfigError, match=words):
        read_spec(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read: .*give a .json or .toml file"),
        ("[]", "must hold `nodes` and nothing else"),
        ('{"nodes": []}', "must hold `nodes`"),
        ('{"nodes": [1]}', "must hold `nodes`"),
        ('{"nodes": [{"name": "a", "cpus": 1}], "region": "eu"}', "must hold `nodes` and nothing else"),
        ('{"nodes": [{"name": "a"}]}', r"nodes\[0\]: cpus: .*required"),
        ('{"nodes": [{"name": "a", "cpus": 1}, {"name": "a", "cpus": 2}]}', "two of `nodes` have the same name"),
    ],
)
def test_a_wrong_file_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_spec(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_spec(tmp_path / "spec.toml")

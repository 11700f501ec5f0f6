"""What makes a run another run: its settings and inputs, but not where a node keeps its copies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.training import _open_run
from pipeline.errors import ConfigError
from pipeline.loader import CacheConfig
from tests.conftest import small_pretrain_config


def test_another_cache_is_the_same_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = small_pretrain_config(tmp_path / "tokens", out)
    elsewhere = replace(config.loader, cache=CacheConfig(folder=tmp_path / "cache", max_bytes=5))
    assert _open_run(out, config, []) == _open_run(out, replace(config, loader=elsewhere), [])
    with pytest.raises(ConfigError, match=r"loader.distance = None \(now 3\)"):
        _open_run(out, replace(config, loader=replace(config.loader, distance=3)), [])

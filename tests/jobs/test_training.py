"""Who trains, and what makes a run another run; both are checked before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs import pretrain, training
from jobs.training import _open_run
from jobs.workers import WorkersConfig, usable_workers
from pipeline.errors import ConfigError
from pipeline.loader import CacheConfig
from pipeline.order import ORDER_VERSION
from tests.conftest import small_pretrain_config
from tests.e2e.training import make_config, make_tokens


@pytest.mark.parametrize(
    ("num_workers", "num_parts", "usable"), [(1, 1024, 1), (3, 1024, 2), (7, 1024, 4), (7, 12, 6), (9, 8, 8), (5, 7, 1)]
)
def test_as_many_workers_work_as_the_batch_divides_by(num_workers: int, num_parts: int, usable: int) -> None:
    assert usable_workers(num_workers, num_parts) == usable


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_workers": 0}, "num_workers = 0"),
        ({"max_failures": -1}, "max_failures = -1"),
        ({"max_preemptions": -1}, "max_preemptions = -1"),
        ({"resize_every_s": 0.0}, r"resize_every_s = 0\.0"),
        ({"num_workers": 2, "min_workers": 3}, "min_workers = 3; allowed: 1 to num_workers = 2"),
        ({"num_workers": 2, "min_workers": 0}, "min_workers = 0"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        WorkersConfig(**wrong)  # type: ignore[arg-type]


def test_a_batch_that_does_not_divide_by_the_fewest_workers_is_refused_before_any_work(tmp_path: Path) -> None:
    workers = WorkersConfig(num_workers=4, min_workers=3)
    with pytest.raises(ConfigError, match="batch_size = 4 does not divide by the 3 workers"):
        pretrain.run(make_config(make_tokens(tmp_path / "tokens"), tmp_path / "run", workers))
    assert not (tmp_path / "run").exists()


def test_what_makes_another_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = small_pretrain_config(tmp_path / "tokens", out)
    elsewhere = replace(config.loader, cache=CacheConfig(folder=tmp_path / "cache", max_bytes=5))
    assert _open_run(out, config, []) == _open_run(out, replace(config, loader=elsewhere), [])
    others = {"compile": "on", "recompute": True, "parallel": "fsdp", "fetch_every_steps": 7, "peak_tflops": 1.0}
    others |= {"keep_checkpoints": 1, "picture_every_steps": 3}
    for name, value in others.items():
        assert _open_run(out, config, []) == _open_run(
            out, replace(config, loop=replace(config.loop, **{name: value})), []
        )
    with pytest.raises(ConfigError, match=r"loop.micro_batch = None \(now 1\)"):
        _open_run(out, replace(config, loop=replace(config.loop, micro_batch=1)), [])
    with pytest.raises(ConfigError, match=r"loader.distance = None \(now 3\)"):
        _open_run(out, replace(config, loader=replace(config.loader, distance=3)), [])


def test_a_run_that_saw_its_samples_in_another_order_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_pretrain_config(tmp_path / "tokens", tmp_path / "run")
    monkeypatch.setattr(training, "ORDER_VERSION", 1)
    _open_run(tmp_path / "run", config, [])
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=rf"order_version = 1 \(now {ORDER_VERSION}\)"):
        _open_run(tmp_path / "run", config, [])

"""`tokenreel bench loop`: that it measures what it says."""

from __future__ import annotations

import pytest

from jobs.bench.loop import BenchLoopConfig, run
from jobs.mlflow_store import open_client
from pipeline.errors import ConfigError


def test_it_tracks_one_run_of_the_two_and_saves_behind_the_steps(
    mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "bench")
    config = BenchLoopConfig(batch_size=2, steps=3, warmup_steps=1, rounds=1, save_every_steps=1)
    figures = run(config).figures
    client = open_client(mlflow_uri)
    runs = client.search_runs([client.get_experiment_by_name("bench").experiment_id])
    assert len(runs) == 2  # of the round and of the one that is not counted; without tracking there is none
    for one in runs:
        assert [row.step for row in client.get_metric_history(one.info.run_id, "loss")] == [1, 2, 3]
    low, high = figures["overhead_share_range"]
    assert low <= figures["overhead_share"] <= high and figures["step_ms"] > 0
    assert figures["checkpoint_mb"] > 3 and min(figures["checkpoint_pause_ms"], figures["checkpoint_write_ms"]) > 0


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"steps": 6, "warmup_steps": 5}, {"device": "tpu"}])
def test_bad_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(reversed(wrong)))):
        BenchLoopConfig(**wrong)  # type: ignore[arg-type]

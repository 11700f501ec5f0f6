"""`tokenreel plan` against what shard and tokenize then do, on real videos."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import cost, plan, shard, tokenize
from jobs.cost import EncodeSpeed, Measured
from jobs.data_job import RejectPolicy
from jobs.mlflow_store import open_client
from jobs.plan import PlanConfig
from jobs.shard import ShardConfig
from models.tokenizers.base import load_tokenizer
from pipeline.decode import FrameConfig
from pipeline.errors import ConfigError
from pipeline.sharding import ShardSettings
from tests.conftest import Stages, small_shard_config, small_tokenize_config
from tests.corpora import real_clips

FRAMES = FrameConfig(fps=4.0, size_px=64)


def plan_of(stages: Stages, **changes: Any) -> PlanConfig:
    """For the stages' own run."""
    settings = small_shard_config(stages.corpus, stages.clips).settings
    base = PlanConfig(corpus=str(stages.corpus), tokenizer=stages.tokenizer, settings=settings, frames=FRAMES)
    return replace(base, **changes)


def test_where_all_was_measured_all_is_known(stages: Stages) -> None:
    """And the predicted datasets are the very ones that the stages made."""
    result = plan.run(plan_of(stages))
    assert (result.planned, result.committed, result.filtered) == (4, 4, 0)
    for name, stage in result.figures["stages"].items():
        made = stages.results[name]
        assert stage["fingerprint"] == made.fingerprint
        assert (stage["planned"], stage["committed"]) == (made.planned, made.committed)
        assert stage["filtered"] == made.figures["filtered_by_reason"] and stage["rejected"] == {}
        assert (stage["tar_bytes"], stage["frames"]) == (made.figures["tar_bytes"], made.figures["frames"])
        assert stage["cpu_hours"] > 0 and stage["wall_s"] > 0 and set(stage["relative_error"].values()) == {0}
    assert result.figures["stages"]["tokenize"]["tokens"] == stages.results["tokenize"].figures["tokens"]


def test_a_sample_tells_what_the_run_will_make(stages: Stages, mlflow_uri: str, tmp_path: Path) -> None:
    """Some of 14 inputs, of which 4 fail, are measured; the run is within 25 %, and MLflow says so."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, path in real_clips().items():
        if path.suffix in (".mp4", ".mkv", ".ogv", ".webm", ".3gp", ".mpg", ".mpeg"):  # the last two are the same bytes
            shutil.copy(path, folder / name.replace("/", "-"))
    for number in range(3):
        (folder / f"broken-{number}.mp4").write_bytes(bytes([number]) * 400_000)
    settings = ShardSettings(videos_per_shard=3)
    path = tmp_path / "plan.json"
    planned = plan.run(
        PlanConfig(
            corpus=str(folder), tokenizer=stages.tokenizer, settings=settings, frames=FRAMES, min_videos=9, save=path
        )
    )
    assert planned.committed <= 9 and json.loads(path.read_text())["stages"] == planned.figures["stages"]
    assert planned.figures["corpus"]["refused"] == {"duplicate": 1}
    assert planned.figures["stages"]["shard"]["rejected"].keys() == {"duplicate", "not-video"}
    assert any("would be rejected" in warning for warning in planned.figures["warnings"])

    clips, rejects = tmp_path / "clips", RejectPolicy(max_reject_fraction=1.0)
    made = shard.run(ShardConfig(corpus=str(folder), out=str(clips), settings=settings, rejects=rejects, plan=path))
    config = small_tokenize_config(clips, tmp_path / "tokens", stages.tokenizer)
    tokens = tokenize.run(replace(config, plan=path))
    for result, names in ((made, ("committed", "tar_bytes", "frames")), (tokens, ("committed", "tar_bytes", "tokens"))):
        ratios = result.figures["predicted_over_actual"]
        assert ratios["wall_s"] > 0
        for name in names:
            assert 0.75 < ratios[name] < 1.25, (result.job, name, ratios)
        logged = open_client(mlflow_uri).get_run(result.mlflow_run_id).data.metrics
        assert {name: logged[f"predicted_over_actual/{name}"] for name in ratios} == ratios
    assert made.figures["rejected_by_class"] == {"duplicate": 1, "not-video": 3}
    assert planned.figures["stages"]["shard"]["rejected"]["not-video"] in range(1, 7)

    again = shard.run(ShardConfig(corpus=str(folder), out=str(clips), settings=settings, rejects=rejects, plan=path))
    assert "wall_s" not in again.figures["predicted_over_actual"], "nothing was left to do"
    other = replace(settings, videos_per_shard=5)
    with pytest.raises(ConfigError, match="is of another dataset"):
        shard.run(ShardConfig(corpus=str(folder), out=str(tmp_path / "other"), settings=other, plan=path))


def test_a_cluster_with_gpus_is_planned_from_measured_speeds(stages: Stages, tmp_path: Path) -> None:
    spec, speeds = tmp_path / "spec.json", tmp_path / "speeds.json"
    nodes = {"name": "n", "count": 3, "cpus": 4, "gpus": 2, "gpu": "H100", "price_per_hour": 7}
    spec.write_text(json.dumps({"nodes": [nodes]}))
    config = plan_of(stages, cluster=spec, min_videos=1, budget_s=1e-9)
    with pytest.raises(ConfigError, match=r"no encoding speed of .* on 'H100'"):
        plan.run(config)
    tokenizer = repr(load_tokenizer(stages.tokenizer / "model").config)
    speed = EncodeSpeed(tokenizer=tokenizer, size_px=64, precision="fp32", frames_per_s=320, num_threads=1)
    cost.save(speeds, Measured(encode={"H100": [speed]}))
    config = replace(config, speeds=speeds, share=1.0, recipe="vimpac-small")
    result = plan.run(config)
    assert result.committed == 2 and result.filtered == 2, "one video a CPU, then the budget was spent"
    figures, stage = result.figures, result.figures["stages"]["tokenize"]
    assert (figures["cluster"]["cpus"], figures["cluster"]["gpus"]) == (12, 6)
    assert stage["tokens"] == pytest.approx(64 * stage["frames"], rel=0.01)
    batches = stage["gpu_hours"] * 3600 / 0.1
    assert batches == pytest.approx(round(batches)) and batches >= stage["frames"] / 32
    assert figures["total"]["cost"] == pytest.approx(21 * figures["total"]["wall_hours"])
    for words in ("2 of 4 drawn videos were measured", "4 shards for 12 CPUs", "a batch is 1024 videos"):
        assert any(words in warning for warning in figures["warnings"]), words


def test_without_a_tokenizer_shard_alone_is_planned(
    cluster: str, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        result = plan.run(PlanConfig(corpus=str(corpus), max_videos=1, min_videos=1, seed=1))
    assert result.figures["stages"].keys() == {"shard"} and result.committed == 1
    assert "tokenize: not planned; name a --tokenizer" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"share": 0.0}, "share = 0.0: must be in"),
        ({"min_videos": 0}, "min_videos = 0 must be 1 or more"),
        ({"min_videos": 9, "max_videos": 8}, "max_videos = 8 not less"),
        ({"budget_s": 0.0}, "budget_s = 0.0"),
        ({"recipe": "no-such"}, "no such recipe"),
        ({"batch_frames": 0}, "batch_frames = 0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PlanConfig(**{"corpus": "c", **changes})


def test_nothing_to_measure_and_no_speeds(tmp_path: Path) -> None:
    (tmp_path / "link.mp4").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"no video to measure; all are rejected: \{'unreadable': 1\}"):
        plan.run(PlanConfig(corpus=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"none.json: no such file"):
        plan.run(PlanConfig(corpus=str(tmp_path), speeds=tmp_path / "none.json"))

"""`tokenreel bench learn ablations` in a size of seconds: what it trains, what it writes, that it resumes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.bench.learn import digits, prepare
from jobs.bench.learn.ablations import LearnAblationsConfig, plan_runs, run
from jobs.bench.learn.arms import BASE, TABLES, make_arms, mean_block_share
from jobs.bench.learn.measure import draw_share, embed, read_task
from jobs.bench.learn.report import Estimate, estimate, write_table
from jobs.bench.learn.tasks import Counts
from jobs.bench.learn.train import Budget, keep_part, pretrain, run_arm
from jobs.config import to_plain
from jobs.journal import JOURNAL_NAME, read_journal
from jobs.mlflow_store import open_client
from models.masking import iid_masks
from models.tokenizers.vqvae import Vqvae, VqvaeConfig
from models.vimpac import VimpacConfig, VimpacObjectiveConfig
from pipeline.dataset import read_index
from pipeline.errors import ConfigError
from pipeline.verify import verify

CODES = 16
COUNTS = Counts(train=40, val=20, test=20)
BUDGET = Budget(
    steps=2,
    batch_size=4,
    shares=(0.1, 1.0),
    probes=("linear",),
    finetune_tasks=("digit-collision",),
    finetune_shares=(0.5, 1.0),
    finetune_steps=2,
)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` makes of two of the tasks, with a tokenizer that learnt nothing."""
    out = tmp_path_factory.mktemp("learn")
    config = prepare.LearnPrepareConfig(
        out=out, size_px=16, patch=8, codebook_size=CODES, pen=COUNTS, others=COUNTS, tokenizer_steps=(1,)
    )
    tasks = [task for task in digits.make_tasks(COUNTS, 16, seed=0) if task.name != "digit-first"]
    torch.manual_seed(0)
    tokenizer = Vqvae(VqvaeConfig(channels=8, codebook_size=CODES, code_dim=2))
    torch.nn.init.normal_(tokenizer.codebook.codes)
    tokenizer.eval().save(out / "tokenizers" / "s1" / "model")
    for task in tasks:
        prepare.write_manifest(out / "tasks" / f"{task.name}.csv", task)
    prepare.write_tokens(config, tasks, 1)
    (out / "prepare.json").write_text(json.dumps(to_plain(config)))
    page = {
        "tasks": {task.name: prepare.describe(task) for task in tasks},
        "baselines": {task.name: {"chance": 1 / len(task.classes)} for task in tasks},
    }
    (out / "benchmark.json").write_text(json.dumps(page))
    return out


def config_for(benchmark: Path, out: Path, *arms: str) -> LearnAblationsConfig:
    return LearnAblationsConfig(
        benchmark=benchmark, out=out, arms=arms, seeds=2, workers=1, layers=1, hidden=8, budget=BUDGET
    )


def test_tokens_carry_labels_and_splits(benchmark: Path) -> None:
    tokens = prepare.tokens_folder(benchmark, 1)
    assert list(verify(tokens)) == []
    rows = read_index(tokens).to_pylist()
    assert len(rows) == 160 and {row["split"] for row in rows} == {"train", "val", "test"}
    task = read_task(tokens, benchmark / "tasks" / "digit-direction.csv", (16, 2, 2), CODES + 1)
    assert len(task.labels) == 80 and len(task.of("test")) == 20 and set(task.classes) == set(digits.DIRECTIONS)
    by_source = {row["source"]: row for row in rows}
    source = by_source["digit-direction/000079"]
    assert source["split"] == "test" and source["label"] in digits.DIRECTIONS


def test_shares_of_labels_hold_every_class(benchmark: Path) -> None:
    task = read_task(
        prepare.tokens_folder(benchmark, 1), benchmark / "tasks" / "digit-direction.csv", (16, 2, 2), CODES + 1
    )
    one = draw_share(task, 0.01, seed=0)
    assert sorted(task.labels[one]) == list(range(8)) and set(task.splits[one]) == {"train"}
    assert len(draw_share(task, 1.0, seed=0)) == 40 and (draw_share(task, 0.01, seed=1) != one).any()


def test_arms_differ_from_the_base_in_one_thing() -> None:
    arms = make_arms(VimpacConfig(layers=1, hidden=16, heads=4, head_dim=4, mlp=64), VimpacObjectiveConfig(), 2)
    base = arms.pop(BASE)
    for arm in arms.values():
        names = {
            field.name for field in dataclasses.fields(arm) if getattr(arm, field.name) != getattr(base, field.name)
        }
        assert len(names - {"name"}) == 1, arm.name
    assert {name for table in TABLES.values() for name in table} == {BASE, *arms}
    share = arms["iid"].objective.iid_fraction  # type: ignore[union-attr]
    hidden = iid_masks(torch.arange(2000), (5, 16, 16), share).float().mean()
    assert float(hidden) == pytest.approx(mean_block_share((5, 16, 16), 5), abs=0.005) and abs(share - 0.145) < 0.005


def test_a_part_of_the_corpus_is_within_a_larger_one(benchmark: Path, tmp_path: Path) -> None:
    runs = plan_runs(config_for(benchmark, tmp_path, "corpus-1/4", "corpus-1/2"))
    kept = {}
    for one in runs[:2]:
        one.folder.mkdir(parents=True)
        kept[one.arm.name] = set(pq.read_table(keep_part(one))["key"].to_pylist())
    assert kept["corpus-1/4"] < kept["corpus-1/2"] and 50 < len(kept["corpus-1/2"]) < 110


def test_pretraining_moves_the_weights_that_none_begins_with(benchmark: Path, tmp_path: Path) -> None:
    runs = {one.arm.name: one for one in plan_runs(config_for(benchmark, tmp_path, "none", BASE)) if one.seed == 0}
    begun, moved = pretrain(runs["none"]), pretrain(runs[BASE])
    still = {name for name, value in begun.state_dict().items() if torch.equal(value, moved.state_dict()[name])}
    assert "token.weight" not in still and len(still) < 3
    again = pretrain(runs[BASE])  # from its last checkpoint, which is the end
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), moved.parameters(), strict=True))


def test_the_longer_arm_takes_more_steps(benchmark: Path, tmp_path: Path) -> None:
    runs = {one.arm.name: one for one in plan_runs(config_for(benchmark, tmp_path, "longer")) if one.seed == 0}
    pretrain(runs["longer"])
    rows = list(read_journal(runs["longer"].folder / JOURNAL_NAME))
    assert [row["step"] for row in rows] == list(range(1, 4 * BUDGET.steps + 1))


def test_the_probes_that_are_asked_for_are_fitted(benchmark: Path, tmp_path: Path) -> None:
    budget = dataclasses.replace(BUDGET, probes=("attentive", "knn"), shares=(1.0,))
    [one, _] = plan_runs(dataclasses.replace(config_for(benchmark, tmp_path, "none"), finetune_arms=(), budget=budget))
    run_arm(dataclasses.replace(one, manifests=one.manifests[:1]))
    rows = json.loads((one.folder / "result.json").read_text())["rows"]
    assert [(row["task"], row["method"]) for row in rows] == [
        ("digit-collision", "attentive"),
        ("digit-collision", "knn"),
    ]


def test_the_precision_is_that_of_training_and_of_features(benchmark: Path, tmp_path: Path) -> None:
    trained = {}
    for precision in ("fp32", "bf16"):
        config = config_for(benchmark, tmp_path / precision, BASE)
        [one, _] = plan_runs(dataclasses.replace(config, budget=dataclasses.replace(BUDGET, precision=precision)))
        trained[precision] = pretrain(one)
    fp32, bf16 = (torch.cat([one.flatten() for one in model.parameters()]) for model in trained.values())
    assert not torch.equal(fp32, bf16)
    tokens = np.random.default_rng(0).integers(0, CODES, (3, 16, 2, 2)).astype(np.uint16)
    exact, rounded = (embed(trained["fp32"], tokens, precision).pooled for precision in ("fp32", "bf16"))
    assert not np.array_equal(exact, rounded) and np.allclose(exact, rounded, atol=0.1)


def test_a_table_and_a_plot_and_more_arms_later(
    benchmark: Path, tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "learn")
    first = run(config_for(benchmark, tmp_path, "none"))
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")}
    assert first.planned == len(done) == 2
    second = run(config_for(benchmark, tmp_path, "none", BASE))
    assert second.planned == 4 and all(path.stat().st_mtime_ns == time for path, time in done.items())
    rows = json.loads((tmp_path / "runs" / f"{BASE}-seed1" / "result.json").read_text())["rows"]
    found = {(row["task"], row["method"], row["share"]) for row in rows}
    assert len(found) == len(rows) == 2 * 2 + 2
    assert ("digit-collision", "finetune", 0.5) in found and ("digit-direction", "finetune", 1.0) not in found
    table = (tmp_path / "results.md").read_text()
    assert "## linear, 10 % of labels" in table and f"| {BASE} |" in table and "±" in table
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    client = open_client(mlflow_uri)
    runs = client.search_runs([client.get_experiment_by_name("learn").experiment_id])
    parents = [one.data.tags.get("mlflow.parentRunId") for one in runs]
    assert len(runs) == 5 and set(parents) == {None, second.mlflow_run_id}
    other = dataclasses.replace(config_for(benchmark, tmp_path, "none"), budget=dataclasses.replace(BUDGET, steps=3))
    with pytest.raises(ConfigError, match="begun with other settings"):
        run(other)
    for path in (tmp_path / "runs").glob("*/result.json"):  # as if it had been broken off
        path.unlink()
    with pytest.raises(ConfigError, match="begun with other settings"):
        run(other)


def test_what_lies_above_no_pretraining_is_bold(tmp_path: Path) -> None:
    row = {"task": "t", "method": "linear", "share": 1.0}
    results = [
        {
            "arm": arm,
            "seed": seed,
            "rows": [{**row, "accuracy": accuracy + 0.01 * seed}],
            **dict.fromkeys(("pretrain_s", "measure_s", "masked_token_accuracy")),
        }
        for arm, accuracy in (("none", 0.5), ("masked", 0.8), ("iid", 0.52))
        for seed in range(3)
    ]
    page = {"tasks": {"t": {}}, "baselines": {"t": {"chance": 0.5}}}
    write_table(tmp_path / "results.md", page, results)
    table = (tmp_path / "results.md").read_text()
    assert (
        "| masked | **81.0 ± 2.5** |" in table and "| iid | 53.0 ± 2.5 |" in table and "| none | 51.0 ± 2.5 |" in table
    )


def test_unknown_arms_are_refused(benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'neither'.*allowed: none"):
        run(config_for(benchmark, tmp_path, "neither"))
    with pytest.raises(ConfigError, match="prepare"):
        run(config_for(tmp_path, tmp_path / "out"))


def test_intervals_over_seeds_are_students() -> None:
    found = estimate([0.5, 0.6, 0.7])
    assert found.mean == pytest.approx(0.6) and found.margin == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert found.is_above(Estimate(0.3, 0.04)) and not found.is_above(Estimate(0.3, 0.06))
    assert not estimate([0.9]).is_above(Estimate(0.1, 0.0)) and str(estimate([0.9])) == "90.0"
    assert np.isnan(estimate([0.9]).margin)

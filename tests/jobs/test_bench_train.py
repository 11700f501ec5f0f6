"""bench train: both steps compute one loss, the tables are whole, and a machine that has torch alone can run it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.bench import train
from jobs.bench.plain_vimpac import PlainVimpac, loop_masks
from jobs.bench.train import BenchTrainConfig, attend_written_out, make_objective, run
from jobs.recipes import find_recipe
from models.masking import block_masks
from models.vimpac import SIZES
from pipeline.errors import ConfigError
from tests.models.test_vimpac import TINY, make_batch, make_loud_backbone

ROOT = Path(__file__).resolve().parents[2]


def test_the_straightforward_step_computes_our_loss() -> None:
    objective = make_objective(TINY, "small")
    objective.backbone.load_state_dict(make_loud_backbone().state_dict())
    batch = make_batch()
    ours = torch.stack(list(objective(batch)["losses"].values())).sum()
    ours.backward()
    grads = {name: parameter.grad.clone() for name, parameter in objective.mlm_head.named_parameters()}
    token_grad = objective.backbone.token.weight.grad.clone()
    objective.zero_grad()
    plain = PlainVimpac(objective)
    loss = plain(batch)
    torch.testing.assert_close(loss, ours)
    loss.backward()
    torch.testing.assert_close(plain.embedding.token.weight.grad, token_grad, rtol=1e-3, atol=1e-5)
    for name, parameter in plain.mlm_head.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-5)


def test_masks_by_loops_are_ours() -> None:
    seeds = torch.arange(20) * 7919
    assert torch.equal(loop_masks(seeds.tolist(), (5, 16, 16), 5), block_masks(seeds, (5, 16, 16), 5))


def test_attention_written_out_is_that_of_torch() -> None:
    q, k, v = torch.randn(3, 7, 2, 17, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attend_written_out(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SIZES", {"small": replace(TINY, dropout=0.1)})
    config = BenchTrainConfig(videos=2, repeats=1, layers=1, steps_per_round=2, peak_tflops=2.0, compile="off")
    result = run(config)
    assert result.status == "done" and result.figures["layers"] == 1
    steps = {row["way"]: row for row in result.figures["steps"]}
    assert list(steps) == ["ours", "plain"] and steps["plain"]["times_plain"] == 1
    for row in steps.values():
        assert row["clips_per_s"] == pytest.approx(4 / row["step_s"], rel=0.02)
        assert row["tokens_per_s"] == pytest.approx(4 * 72 / row["step_s"], rel=0.02)
        assert row["mfu"] == pytest.approx(row["tflops_per_s"] / 2, rel=0.02)
    lines = {(row["axes"], row["positions"], row["way"]): row["ms"] for row in result.figures["lines"]}
    assert {key[:2] for key in lines} == {("t", 4), ("h", 5)} and all(ms > 0 for ms in lines.values())
    assert {key[2] for key in lines} == {
        *("sdpa", "sdpa with a mask", "sdpa with dropout", "sdpa math", "written out", "written out with dropout"),
    }


def test_a_machine_with_torch_alone_can_measure() -> None:
    program = (
        "import sys, jobs.bench.train as t; from dataclasses import replace\n"
        "tiny = replace(t.SIZES['small'], hidden=32, heads=4, head_dim=8, mlp=32, codebook_size=50)\n"
        "t.SIZES = {'small': tiny}\n"
        "found = t.measure(t.BenchTrainConfig(videos=1, layers=1, repeats=1, compile='off'))\n"
        "assert len(found['steps']) == 2\n"
        "print(sorted({'ray', 'mlflow', 'pyarrow', 'tyro', 'pydantic', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("setting", [{"videos": 0}, {"repeats": 0}, {"steps_per_round": 0}, {"layers": 0}])
def test_bad_settings_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(setting))} = 0: must be 1 or more"):
        BenchTrainConfig(**setting)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_trained_is_what_the_recipe_trains(size: str) -> None:
    with torch.device("meta"):
        assert make_objective(SIZES[size], size).config == find_recipe(f"vimpac-{size}").objective

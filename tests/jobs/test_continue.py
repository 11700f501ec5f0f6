"""A second stage: it goes on from the first one's weights, moments, step and keys, and resumes from its own."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import training
from jobs.checkpoint import list_checkpoints, read_cursor, read_tensors
from jobs.config import save_config
from jobs.journal import read_journal
from jobs.loop import Context, LoopConfig, seed_everything, train
from jobs.pretrain import PretrainConfig, check_source, continue_run
from models.optim import OptimConfig, lr_at
from models.stage2 import resize_positions
from models.vimpac import VimpacBackbone, VimpacConfig, VimpacObjective, VimpacObjectiveConfig
from pipeline.errors import ConfigError
from tests.e2e.training import make_tokens

OPTIM = OptimConfig(lr=0.01, warmup_share=0.25)
STEPS, ALL_STEPS = 4, 8


def make_config(out: Path, grid: int = 4, **loop: Any) -> PretrainConfig:
    return PretrainConfig(
        tokens=str(out.parent / "tokens"),
        out=out,
        backbone=VimpacConfig(
            layers=1,
            hidden=16,
            heads=2,
            head_dim=8,
            mlp=32,
            num_frames=3,
            codebook_size=20,
            grid_height=grid,
            grid_width=grid,
        ),
        objective=VimpacObjectiveConfig(head_hidden=16, head_out=8),
        optim=OPTIM,
        loop=LoopConfig(
            **{"steps": ALL_STEPS, "save_every_steps": 2, "keep_checkpoints": 9, "picture_every_steps": 0, **loop}
        ),
    )


class Clips:
    unit, units_per_step = "tokens", 1

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def batch(self, step: int) -> dict[str, Any]:
        tokens = torch.randint(20, (4, 2, *self.shape), generator=torch.Generator().manual_seed(step))
        seeds = torch.arange(8).view(4, 2) + 8 * step
        return {"tokens": tokens, "seeds": seeds, "keys": [f"{step}-{n}" for n in range(4)]}


def run_stage(config: PretrainConfig, clips: Clips | None = None) -> list[dict[str, Any]]:
    """What a worker does, without Ray; returns the rows of metrics.jsonl."""
    if not config.out.exists():
        training._open_run(config.out, config, [], "t" * 32)
    seed_everything(config.loop.seed, -1, 0)
    objective = VimpacObjective(VimpacBackbone(config.backbone), config.objective)
    train(objective, clips or Clips(config.backbone.shape), Context(run=config.out), config.loop, config.optim)
    return list(read_journal(config.out / "metrics.jsonl"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A finished stage one: 4 steps of a schedule of 8."""
    make_tokens(tmp_path / "tokens")
    config = make_config(tmp_path / "one", steps=STEPS, schedule_steps=ALL_STEPS)
    run_stage(config)
    return config.out


def test_two_stages_on_one_grid_are_one_run_bit_for_bit(source: Path, tmp_path: Path) -> None:
    whole = run_stage(make_config(tmp_path / "whole"))
    second = make_config(tmp_path / "two")
    continue_run(second, source)
    rows = [*read_journal(source / "metrics.jsonl"), *run_stage(second)]
    assert [(row["step"], row["loss"], row["lr"]) for row in rows] == [
        (row["step"], row["loss"], row["lr"]) for row in whole
    ]
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        ours, theirs = (list_checkpoints(tmp_path / run)[-1] / name for run in ("two", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_finer_grid_starts_from_the_source_and_keeps_its_schedule(source: Path, tmp_path: Path) -> None:
    second = make_config(tmp_path / "two", grid=8)
    check_source(second, source)
    continue_run(second, source)
    first, last = list_checkpoints(second.out)[0], list_checkpoints(source)[-1]
    assert first.name == "00000004" and read_cursor(first) == replace(read_cursor(last), recent_loss=None)
    weights, moments = read_tensors(first)
    old_weights, old_moments = read_tensors(last)
    expected = resize_positions(old_weights, (8, 8))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    grown = {name for name in moments if moments[name].shape != old_moments[name].shape}
    assert len(grown) == 4  # two moments of two positions
    rows = run_stage(second)
    assert [row["step"] for row in rows] == [5, 6, 7, 8]
    assert [row["lr"] for row in rows] == [lr_at(step, ALL_STEPS, OPTIM) for step in range(STEPS, ALL_STEPS)]


def test_a_broken_off_second_stage_resumes_from_its_own_checkpoints(source: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Dies(Clips):
        def batch(self, step: int) -> dict[str, Any]:
            if step == 7:
                raise Killed
            return super().batch(step)

    whole, broken = make_config(tmp_path / "whole", grid=8), make_config(tmp_path / "broken", grid=8)
    for config in (whole, broken):
        continue_run(config, source)
    rows = run_stage(whole)
    with pytest.raises(Killed):
        run_stage(broken, Dies(broken.backbone.shape))
    assert [path.name for path in list_checkpoints(broken.out)] == ["00000004", "00000006"]
    assert [row["loss"] for row in run_stage(broken)] == [row["loss"] for row in rows]


def change(config: PretrainConfig, part: str, **fields: Any) -> PretrainConfig:
    return replace(config, **{part: replace(getattr(config, part), **fields)})


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("backbone", {"hidden": 24}, r"backbone\.hidden = 16 \(here 24\)"),
        ("backbone", {"codebook_size": 30}, r"backbone\.codebook_size = 20 \(here 30\)"),
        ("backbone", {"layout": "T,H,W"}, r"backbone\.layout = 'T,H\|W' \(here 'T,H,W'\)"),
        ("backbone", {"num_frames": 6}, r"backbone\.num_frames = 3 \(here 6\)"),
        ("objective", {"alpha": 0.0}, r"contrast = True \(here False\)"),
        (
            "objective",
            {"head_out": 4},
            r"contrastive head \(layers, hidden, out\) = \(2, 16, 8\) \(here \(2, 16, 4\)\)",
        ),
        ("loop", {"steps": 4}, "has done 4 steps, and loop.steps = 4 counts them too"),
    ],
)
def test_another_network_is_refused(
    source: Path, tmp_path: Path, part: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_source(change(make_config(tmp_path / "two", grid=8), part, **fields), source)


def test_what_may_differ_is_accepted(source: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "two", grid=8)
    check_source(change(change(config, "objective", num_blocks=6, alpha=0.5), "backbone", dropout=0.0), source)


def test_tokens_of_another_tokenizer_are_refused(source: Path, tmp_path: Path) -> None:
    make_tokens(tmp_path / "others", "o" * 32)
    config = make_config(tmp_path / "two", grid=8)
    check_source(config, source)
    with pytest.raises(ConfigError, match=r"trained on other codes: tokenizer t{32} \(here o{32}\)"):
        check_source(replace(config, tokens=str(tmp_path / "others")), source)


def test_an_unfinished_run_or_none_is_refused(source: Path, tmp_path: Path) -> None:
    save_config(source, make_config(source, steps=5))
    with pytest.raises(ConfigError, match="has done 4 of 5 steps; finish it first"):
        check_source(make_config(tmp_path / "two"), source)
    with pytest.raises(ConfigError, match="holds no pre-training run"):
        check_source(make_config(tmp_path / "two"), tmp_path / "nothing")


def test_a_jump_of_the_learning_rate_is_told(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path / "two", grid=8)
    with caplog.at_level(logging.WARNING):
        check_source(config, source)
        assert "learning rate" not in caplog.text
        check_source(change(config, "optim", lr=0.1), source)
    assert "the learning rate changes from 0.00667 to 0.0667" in caplog.text


def test_a_schedule_shorter_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule_steps is 3; allowed: steps = 4 or more"):
        LoopConfig(steps=4, schedule_steps=3)

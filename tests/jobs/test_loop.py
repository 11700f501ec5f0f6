"""The loop without Ray: exact resume from every checkpoint, and every setting does what it says."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jobs.checkpoint import (
    CheckpointSaver,
    Cursor,
    best_checkpoint,
    list_checkpoints,
    load_weights,
    read_cursor,
    whole_state,
)
from jobs.journal import read_journal
from jobs.loop import Context, LoopConfig, NonFiniteLoss, train
from jobs.run_files import DamagedRun
from models.optim import OptimConfig

CONFIG = LoopConfig(steps=6, save_every_steps=2, keep_checkpoints=9, picture_every_steps=3)
OPTIM = OptimConfig(lr=0.05)


class Noisy(nn.Module):
    """A model with all that can break exactness: dropout, a running buffer, a channels-last weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(1))
        self.net(torch.zeros(2, 3, 5, 5))
        self.to(memory_format=torch.channels_last)

    def forward(self, batch: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
        loss = (self.net(batch["x"]) - 1).square().mean()
        return {"losses": {"square": loss}, "metrics": {"twice": 2 * loss.detach()}}


class Steps:
    unit, units_per_step = "samples", 4

    def batch(self, step: int) -> dict[str, Any]:
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        return {"x": x, "keys": [f"{step}-{n}" for n in range(4)]}


def run_loop(folder: Path, config: LoopConfig = CONFIG, **options: Any) -> list[dict[str, Any]]:
    train(Noisy(), Steps(), Context(run=folder), config, OPTIM, **options)
    return list(read_journal(folder / "metrics.jsonl"))


def losses(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_broken_off_run_continues_bit_for_bit(stop: int, tmp_path: Path) -> None:
    whole = run_loop(tmp_path / "whole")

    class Killed(Exception):
        pass

    class Dies(Steps):
        def batch(self, step: int) -> dict[str, Any]:
            if step == stop:
                raise Killed
            return super().batch(step)

    with pytest.raises(Killed):
        train(Noisy(), Dies(), Context(run=tmp_path / "broken"), CONFIG, OPTIM)
    assert losses(run_loop(tmp_path / "broken")) == losses(whole)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        ours, theirs = (list_checkpoints(tmp_path / run)[-1] / name for run in ("broken", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_half_written_checkpoint_is_not_one(tmp_path: Path) -> None:
    rows = run_loop(tmp_path / "whole")
    run_loop(tmp_path / "run")
    last = list_checkpoints(tmp_path / "run")[-1]
    (last / "state.json").unlink()
    assert list_checkpoints(tmp_path / "run")[-1].name == "00000004"
    assert losses(run_loop(tmp_path / "run")) == losses(rows)


def test_what_a_step_reports(tmp_path: Path) -> None:
    row = run_loop(tmp_path)[-1]
    assert row["loss"] == row["loss_square"] == pytest.approx(row["twice"] / 2)
    assert {"lr", "grad_norm", "step_s", "data_wait_share", "samples_per_s", "peak_memory_bytes"} <= row.keys()


@pytest.mark.parametrize("fetch_every_steps", [1, 3])
def test_a_step_lasts_as_long_as_its_work(fetch_every_steps: int, tmp_path: Path) -> None:
    class Slow(Noisy):
        def forward(self, batch: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
            time.sleep(0.01)
            return super().forward(batch)

    began_s = time.perf_counter()
    train(Slow(), Steps(), Context(run=tmp_path), replace(CONFIG, fetch_every_steps=fetch_every_steps), OPTIM)
    taken_s = time.perf_counter() - began_s
    rows = list(read_journal(tmp_path / "metrics.jsonl"))
    assert all(row["step_s"] >= 0.01 and row["samples_per_s"] == pytest.approx(4 / row["step_s"]) for row in rows)
    assert sum(row["step_s"] for row in rows) < taken_s


def test_whoever_watches_is_told_what_the_journal_holds(tmp_path: Path) -> None:
    told: list[dict[str, float]] = []
    context = Context(run=tmp_path, measured=lambda metrics: told.append(dict(metrics)))
    train(Noisy(), Steps(), context, CONFIG, OPTIM)
    rows = list(read_journal(tmp_path / "metrics.jsonl"))
    assert [(one["step"], one["loss"]) for one in told] == losses(rows)


def test_checkpoints_are_saved_as_often_and_kept_as_many_as_told(tmp_path: Path) -> None:
    run_loop(tmp_path / "all")
    assert [path.name for path in list_checkpoints(tmp_path / "all")] == ["00000002", "00000004", "00000006"]
    rows = run_loop(tmp_path / "few", replace(CONFIG, save_every_steps=2, keep_checkpoints=1))
    recent = {step: (rows[step - 2]["loss"] + rows[step - 1]["loss"]) / 2 for step in (2, 4, 6)}
    best = min(recent, key=recent.__getitem__)
    assert {int(path.name) for path in list_checkpoints(tmp_path / "few")} == {best, 6}
    assert int(best_checkpoint(tmp_path / "few").name) == best
    assert read_cursor(best_checkpoint(tmp_path / "few")).recent_loss == pytest.approx(recent[best])


def test_validation_before_each_checkpoint_says_which_is_best_and_changes_no_step(tmp_path: Path) -> None:
    plain = run_loop(tmp_path / "plain")
    found = iter([0.5, 0.75, 0.25])

    def validate(module: nn.Module) -> dict[str, tuple[float, float]]:
        assert not module.training and not torch.is_grad_enabled()
        torch.rand(3)  # what it draws is its own affair
        return {"val_loss": (3.0, 2.0), "val_accuracy": (8 * next(found), 8)}

    rows = run_loop(tmp_path / "run", replace(CONFIG, keep_checkpoints=1), validate=validate)
    assert losses([row for row in rows if "loss" in row]) == losses(plain)
    validated = [(row["step"], row["val_accuracy"], row["val_loss"]) for row in rows if "val_loss" in row]
    assert validated == [(2, 0.5, 1.5), (4, 0.75, 1.5), (6, 0.25, 1.5)]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["00000004", "00000006"]
    assert best_checkpoint(tmp_path / "run").name == "00000004"
    assert read_cursor(best_checkpoint(tmp_path / "run")).val_accuracy == 0.75
    with pytest.raises(ValueError, match="fsdp"):
        run_loop(tmp_path / "sharded", replace(CONFIG, parallel="fsdp"), validate=validate)


def test_a_worker_that_is_told_to_stop_does_not_validate_first(tmp_path: Path) -> None:
    context = Context(run=tmp_path, should_stop=lambda: True)
    cursor = train(Noisy(), Steps(), context, CONFIG, OPTIM, validate=lambda _: {"val_accuracy": (1.0, 1.0)})
    assert (cursor.step, cursor.val_accuracy) == (1, None)


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_worker_that_is_told_to_stop_saves_that_step_and_loses_none(stop: int, tmp_path: Path) -> None:
    whole = run_loop(tmp_path / "whole")
    asked = iter(range(1, 99))
    context = Context(run=tmp_path / "run", should_stop=lambda: next(asked) == stop)
    assert train(Noisy(), Steps(), context, CONFIG, OPTIM).step == stop
    assert read_cursor(list_checkpoints(tmp_path / "run")[-1]).step == stop
    assert [row["step"] for row in read_journal(tmp_path / "run" / "metrics.jsonl")] == list(range(1, stop + 1))
    assert losses(run_loop(tmp_path / "run")) == losses(whole)


def test_a_stop_is_noticed_where_numbers_are_fetched_and_then_loses_no_step_either(tmp_path: Path) -> None:
    whole = run_loop(tmp_path / "whole")
    config = replace(CONFIG, fetch_every_steps=5, save_every_steps=6, picture_every_steps=0)
    asked = iter(range(1, 99))
    context = Context(run=tmp_path / "run", should_stop=lambda: next(asked) == 2)
    assert train(Noisy(), Steps(), context, config, OPTIM).step == 5
    assert losses(run_loop(tmp_path / "run", config)) == losses(whole)


def test_saving_goes_on_behind_the_steps_one_at_a_time_and_is_waited_for_at_the_end(tmp_path: Path) -> None:
    saved: list[str] = []
    released = threading.Event()

    def hold(checkpoint: Path) -> None:
        assert released.wait(10)
        saved.append(checkpoint.name)

    class Releases(Steps):
        def batch(self, step: int) -> dict[str, Any]:
            if step == 3:  # asked for while step 3 runs, after the checkpoint of step 2 was begun
                assert not saved
                released.set()
            return super().batch(step)

    train(Noisy(), Releases(), Context(run=tmp_path, saved=hold), CONFIG, OPTIM)
    assert saved == ["00000002", "00000004", "00000006"]
    pauses = {
        row["step"]: row["checkpoint_pause_s"]
        for row in read_journal(tmp_path / "metrics.jsonl")
        if "checkpoint_pause_s" in row
    }
    assert pauses.keys() == {3, 5} and all(0 < pause < 5 for pause in pauses.values())


def test_a_checkpoint_holds_the_weights_of_its_step_whatever_the_next_steps_do(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    weight = model.weight.detach().clone()
    held = threading.Event()
    with CheckpointSaver(tmp_path, 9, lambda checkpoint: None) as saver:
        saver._pool.submit(held.wait, 10)  # the writer is busy, so the write comes after the change
        saver.save(*whole_state(model, optimizer), Cursor(step=1))
        with torch.no_grad():
            model.weight.zero_()
        held.set()
    load_weights(list_checkpoints(tmp_path)[-1], model)
    assert torch.equal(model.weight, weight)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_what_a_killed_one_left_goes(tmp_path: Path) -> None:
    run_loop(tmp_path)
    left = tmp_path / "checkpoints" / ".00000008.1.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")

    def fails(checkpoint: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train(Noisy(), Steps(), Context(run=tmp_path, saved=fails), replace(CONFIG, steps=8), OPTIM)
    assert not left.exists()


def test_pictures_are_drawn_in_eval_mode_and_change_no_loss(tmp_path: Path) -> None:
    drawn: list[tuple[int, bool]] = []

    def draw(module: nn.Module, step: int) -> None:
        torch.rand(7)  # moves the generator that dropout uses
        drawn.append((step, module.training))

    rows = run_loop(tmp_path / "drawn", draw=draw)
    assert drawn == [(3, False), (6, False)]
    assert losses(rows) == losses(run_loop(tmp_path / "plain", replace(CONFIG, picture_every_steps=0)))
    run_loop(tmp_path / "none", replace(CONFIG, picture_every_steps=0), draw=draw)
    assert len(drawn) == 2


def test_seed_and_precision_change_the_run(tmp_path: Path) -> None:
    plain = losses(run_loop(tmp_path / "plain"))
    assert losses(run_loop(tmp_path / "seed", replace(CONFIG, seed=1))) != plain
    bf16 = losses(run_loop(tmp_path / "bf16", replace(CONFIG, precision="bf16")))
    assert bf16 != plain
    assert bf16[0][1] == pytest.approx(plain[0][1], rel=0.05)


def test_a_non_finite_loss_stops_before_the_weights_change_and_names_step_and_batch(tmp_path: Path) -> None:
    class Explodes(Steps):
        def batch(self, step: int) -> dict[str, Any]:
            batch = super().batch(step)
            return {**batch, "x": batch["x"] * torch.inf} if step == 3 else batch

    model = Noisy()
    with pytest.raises(NonFiniteLoss, match=r"step 4.*3-0, 3-1"):
        train(model, Explodes(), Context(run=tmp_path), CONFIG, OPTIM)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert read_cursor(list_checkpoints(tmp_path)[-1]).step == 2


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run_loop(tmp_path)
    with pytest.raises(DamagedRun, match=r"model\.safetensors holds a tensor .* of another network"):
        load_weights(list_checkpoints(tmp_path)[-1], nn.Linear(1, 1))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"steps": 0}, {"save_every_steps": 0}, {"keep_checkpoints": 0}, {"picture_every_steps": -1}),
        *({"micro_batch": 0}, {"fetch_every_steps": 0}, {"peak_tflops": 0.0}, {"ema_decay": 1.0}),
        *({"parallel": "tp"}, {"compile": "yes"}),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoopConfig(**wrong)

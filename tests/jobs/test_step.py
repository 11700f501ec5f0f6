"""The step: micro-batches, sharding, averages, recomputing and compiling change what they say and no loss besides."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from jobs.checkpoint import list_checkpoints, load_ema, load_weights, read_tensors
from jobs.journal import read_journal
from jobs.loop import Context, LoopConfig, NonFiniteLoss, train
from jobs.step import Step, split
from models.optim import OptimConfig
from models.vimpac import VimpacObjective, VimpacObjectiveConfig
from tests.models.distributed import run_two_workers
from tests.models.test_vimpac import HEAD, TINY, make_batch, make_loud_backbone, make_objective

CONFIG = LoopConfig(steps=4, save_every_steps=4, picture_every_steps=0)
OPTIM = OptimConfig(lr=3e-3)
DROPOUT = replace(TINY, dropout=0.2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Clips:
    """Batches of 8 videos over all workers; some are padded, so that parts differ in their number of masked tokens."""

    unit, units_per_step = "tokens", 8 * 2 * 72

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rows = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)

    def batch(self, step: int) -> dict[str, Any]:
        batch = make_batch(videos=8)
        batch["tokens"] = (batch["tokens"] + step) % TINY.codebook_size
        batch["tokens"][:2, :, 1:] = TINY.pad_id
        return {name: value[self.rows] for name, value in batch.items()}


def loud_objective(config: VimpacObjectiveConfig = HEAD, backbone: Any = TINY) -> VimpacObjective:
    """Clips differ much in its eyes; of an untrained model's, batch norm would blow up the rounding."""
    objective = make_objective(backbone, config)
    objective.backbone.load_state_dict(make_loud_backbone(backbone).state_dict())
    return objective


def run_loop(folder: Path, config: LoopConfig = CONFIG, objective: nn.Module | None = None) -> list[dict[str, Any]]:
    train(objective or loud_objective(), Clips(), Context(run=folder), config, OPTIM)
    return list(read_journal(folder / "metrics.jsonl"))


def losses(rows: list[dict[str, Any]], name: str = "loss") -> list[float]:
    return [row[name] for row in rows]


@pytest.mark.parametrize("micro_batch", [3, 1])
def test_micro_batches_change_a_run_by_rounding_alone(micro_batch: int, tmp_path: Path) -> None:
    whole = run_loop(tmp_path / "whole")
    parts = run_loop(tmp_path / "parts", replace(CONFIG, micro_batch=micro_batch))
    for name in whole[0].keys() - {"step_s", "data_wait_share", "peak_memory_bytes", "lr"}:
        if not name.endswith("per_s"):
            assert losses(parts, name) == pytest.approx(losses(whole, name), rel=2e-3), name
    compared_in_parts = replace(HEAD, negatives="micro_batch")
    others = run_loop(tmp_path / "others", replace(CONFIG, micro_batch=micro_batch), loud_objective(compared_in_parts))
    assert losses(others, "loss_mlm")[0] == pytest.approx(losses(whole, "loss_mlm")[0])
    assert losses(others, "loss_contrastive")[0] != pytest.approx(losses(whole, "loss_contrastive")[0], rel=0.02)


def test_micro_batches_are_few_and_equal() -> None:
    objective, batch = make_objective(), Clips().batch(0)
    sizes = {limit: [len(part["tokens"]) for part in split(objective, batch, limit)] for limit in (None, 8, 7, 4, 3, 1)}
    assert sizes == {None: [8], 8: [8], 7: [4, 4], 4: [4, 4], 3: [2] * 4, 1: [1] * 8}
    plain = split(nn.Linear(1, 1), {"frames": torch.arange(6), "keys": list("abcdef")}, 3)
    assert [part["frames"].tolist() for part in plain] == [[0, 1, 2], [3, 4, 5]]


def test_the_look_ahead_meets_the_random_numbers_of_the_step(tmp_path: Path) -> None:
    """With dropout, each micro-batch finds its own CLS, bit for bit, where the look-ahead put it."""
    seen: list[bool] = []

    class Checked(VimpacObjective):
        def _contrast(self, cls: Tensor, part: Any) -> Any:
            seen.append(torch.equal(part["step_cls"][part["place"]], cls))
            return super()._contrast(cls, part)

    torch.manual_seed(0)
    objective = Checked(make_loud_backbone(DROPOUT), HEAD)
    run_loop(tmp_path, replace(CONFIG, micro_batch=2), objective)
    assert seen == [True] * 16  # four parts in each of four steps


def test_numbers_fetched_together_are_those_fetched_one_by_one(tmp_path: Path) -> None:
    each = run_loop(tmp_path / "each", replace(CONFIG, save_every_steps=3))
    together = run_loop(tmp_path / "together", replace(CONFIG, save_every_steps=3, fetch_every_steps=4))
    assert losses(together) == losses(each) and losses(together, "grad_norm") == losses(each, "grad_norm")
    # Three steps up to the checkpoint, one up to the end; times are means over them.
    assert len(set(losses(together, "step_s"))) == 2 and len(set(losses(each, "step_s"))) == 4
    states = [list_checkpoints(tmp_path / run)[-1] / "state.json" for run in ("each", "together")]
    assert states[0].read_text() == states[1].read_text()


@pytest.mark.parametrize("wrong", ["loss", "grad_norm"])
def test_a_non_finite_number_found_later_has_changed_no_weight(wrong: str, tmp_path: Path) -> None:
    """The step and its keys are named, and neither it nor the steps after it moved the weights."""

    class Fails(VimpacObjective):
        def forward(self, part: Any) -> Any:
            out = super().forward(part)
            if not part.get("cls_only") and int(part["tokens"][-1, 0, 0, 0, 0]) in (first + 2, first + 3):
                mlm = out["losses"]["mlm"]
                out["losses"]["mlm"] = mlm * torch.inf if wrong == "loss" else mlm + 0 * (mlm - mlm.detach()).sqrt()
            return out

    first = int(Clips().batch(0)["tokens"][-1, 0, 0, 0, 0])
    assert first + 5 < TINY.codebook_size
    objective = Fails(make_loud_backbone(), HEAD)
    objective.load_state_dict(loud_objective().state_dict())
    config = replace(CONFIG, steps=5, fetch_every_steps=5, micro_batch=4, save_every_steps=5)
    reference = loud_objective()
    two = replace(config, steps=2, schedule_steps=5)
    train(reference, Clips(), Context(run=tmp_path / "reference"), two, OPTIM)
    with pytest.raises(NonFiniteLoss, match=rf"^{wrong} is (nan|inf) at step 3; its batch: 0, 1, 2"):
        train(objective, Clips(), Context(run=tmp_path / "run"), config, OPTIM)
    for name, parameter in objective.named_parameters():
        assert torch.equal(parameter, dict(reference.named_parameters())[name]), name
    assert not list_checkpoints(tmp_path / "run")
    assert [row["step"] for row in read_journal(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_average_of_weights(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    objective = loud_objective()
    config = replace(CONFIG, save_every_steps=1, keep_checkpoints=9, ema_decay=0.7)
    rows = run_loop(tmp_path / "run", config, objective)
    assert losses(rows) == losses(run_loop(tmp_path / "plain"))
    for checkpoint in list_checkpoints(tmp_path / "run"):
        weights, _ = read_tensors(checkpoint)
        seen.append({name: weights[name] for name, _ in objective.named_parameters()})
    expected = seen[0]
    for weights in seen[1:]:
        expected = {name: 0.7 * average + 0.3 * weights[name] for name, average in expected.items()}
    found = make_objective()
    last = list_checkpoints(tmp_path / "run")[-1]
    load_weights(last, found)
    load_ema(last, found)
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name])
        assert not torch.equal(parameter, seen[-1][name]), name
    # A resumed run has the same average.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for checkpoint in list_checkpoints(tmp_path / "again")[2:]:
        shutil.rmtree(checkpoint)
    run_loop(tmp_path / "again", config)
    optimizers = [list_checkpoints(tmp_path / run)[-1] / "optimizer.safetensors" for run in ("run", "again")]
    assert optimizers[0].read_bytes() == optimizers[1].read_bytes()


def saved_bytes(objective: VimpacObjective, config: LoopConfig, folder: Path) -> tuple[int, float]:
    """What a step keeps for its backward pass, and its loss."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    step = Step(objective.train(), Context(run=folder), config, OPTIM)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        metrics, _ = step(split(objective, Clips().batch(0), None), 0).read()
    return sum(sizes), metrics["loss"]


def test_recomputing_keeps_less_and_changes_no_bit(tmp_path: Path) -> None:
    plain, loss = saved_bytes(loud_objective(backbone=DROPOUT), CONFIG, tmp_path)
    less, same = saved_bytes(loud_objective(backbone=DROPOUT), replace(CONFIG, recompute=True), tmp_path)
    assert same == loss and less < plain / 2
    runs = [
        run_loop(tmp_path / str(recompute), replace(CONFIG, recompute=recompute), loud_objective(backbone=DROPOUT))
        for recompute in (False, True)
    ]
    assert losses(runs[0]) == losses(runs[1]) and losses(runs[0], "grad_norm") == losses(runs[1], "grad_norm")


def test_layers_are_compiled_when_told_and_on_gpus(tmp_path: Path) -> None:
    """Which are; that they compute the same is for a machine with time, as compiling takes a minute."""
    for compile_layers, compiled in (("on", 2), ("off", 0), ("auto", 0)):
        objective = loud_objective()
        Step(objective, Context(run=tmp_path), replace(CONFIG, compile=compile_layers), OPTIM)
        assert sum(block._compiled_call_impl is not None for block in objective.blocks) == compiled


def test_a_share_of_the_peak_is_logged_where_there_is_one(tmp_path: Path) -> None:
    row = run_loop(tmp_path / "cpu", replace(CONFIG, steps=1))[-1]
    assert "mfu" not in row and row["clips_per_s"] == pytest.approx(16 / row["step_s"])
    told = run_loop(tmp_path / "told", replace(CONFIG, steps=1, peak_tflops=0.5))[-1]
    assert told["mfu"] == pytest.approx(told["tflops_per_s"] / 0.5)
    assert row["peak_memory_bytes"] > 1e8


@pytest.mark.parametrize("setting", [{"recompute": True}, {"compile": "on"}, {"parallel": "fsdp"}])
def test_what_needs_repeated_layers_is_refused_without(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear has no repeated blocks"):
        Step(nn.Linear(1, 1), Context(run=tmp_path), replace(CONFIG, **setting), OPTIM)


def two_workers(folder: str, rank: int) -> dict[str, list[float]]:
    settings: dict[str, dict[str, Any]] = {
        "ddp": {},
        "parts": {"micro_batch": 2},
        "fsdp": {"micro_batch": 2, "parallel": "fsdp"},
    }
    found = {}
    for name, setting in settings.items():
        run = Path(folder) / name
        context = Context(run=run, rank=rank, world_size=2)
        objective = loud_objective(backbone=TINY)
        drawn: list[float] = []
        config = replace(CONFIG, ema_decay=0.5, picture_every_steps=2, **setting)
        train(objective, Clips(rank, 2), context, config, OPTIM, lambda _, step, drawn=drawn: drawn.append(step))
        if rank == 0:
            found[name] = losses(list(read_journal(run / "metrics.jsonl")))
            found[f"{name} pictures"] = drawn
    # A run that began sharded goes on without, and the other way round.
    for name, setting in (("ddp", settings["fsdp"]), ("fsdp", settings["ddp"])):
        more = replace(CONFIG, steps=5, ema_decay=0.5, **setting)
        run = Path(folder) / name
        train(loud_objective(), Clips(rank, 2), Context(run=run, rank=rank, world_size=2), more, OPTIM)
        if rank == 0:
            found[f"{name} goes on"] = losses(list(read_journal(run / "metrics.jsonl")))
    return found


def test_two_workers_with_shards_and_parts_train_as_with_neither(tmp_path: Path) -> None:
    found, _ = run_two_workers(functools.partial(two_workers, str(tmp_path)), tmp_path)
    # Two workers as one, though one of them has the padded clips and so less to predict.
    assert found["ddp"] == pytest.approx(losses(run_loop(tmp_path / "alone")), rel=2e-3)
    for name in ("parts", "fsdp"):
        assert found[name] == pytest.approx(found["ddp"], rel=2e-3), name
        ours, theirs = (read_tensors(list_checkpoints(tmp_path / run)[0]) for run in (name, "ddp"))
        for part, whole in zip(ours, theirs, strict=True):
            assert part.keys() == whole.keys()
            assert all(part[key].shape == whole[key].shape for key in whole), name
    assert found["parts pictures"] == [2, 4] and found["fsdp pictures"] == []
    assert found["fsdp goes on"] == pytest.approx(found["ddp goes on"], rel=5e-3)
    assert len(found["ddp goes on"]) == 5


@pytest.mark.parametrize(
    ("capabilities", "precision", "is_warned"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, "bf16", True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, "fp32", False),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, "bf16", False),
        ({"architecture": "aarch64"}, "bf16", False),
    ],
)
def test_a_cpu_without_bf16_is_named(
    capabilities: dict[str, Any],
    precision: Literal["fp32", "bf16"],
    is_warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    Step(make_objective(), Context(run=tmp_path), replace(CONFIG, precision=precision), OPTIM)
    assert ("--loop.precision fp32" in caplog.text) == is_warned

"""The schedule, the parameter groups and clipping."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.optim import OptimConfig, build_optimizer, clip_gradients, lr_at, param_groups
from models.vimpac import VimpacBackbone, VimpacConfig

CONFIG = OptimConfig(lr=1.0, warmup_share=0.1)


def test_linear_schedule() -> None:
    rates = [lr_at(step, 100, CONFIG) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([1 - step / 90 for step in range(91)])
    assert lr_at(500, 100, CONFIG) == 0.0


def test_other_schedules() -> None:
    cosine = replace(CONFIG, schedule="cosine", final_lr=0.2)
    assert lr_at(10, 100, cosine) == 1.0
    assert lr_at(55, 100, cosine) == pytest.approx(0.6)
    assert lr_at(100, 100, cosine) == pytest.approx(0.2)
    assert lr_at(99, 100, replace(CONFIG, schedule="constant")) == 1.0
    assert lr_at(0, 100, replace(CONFIG, warmup_share=0.0)) == 1.0
    assert lr_at(0, 1, CONFIG) == 1.0


def test_only_matrices_decay() -> None:
    backbone = VimpacBackbone(VimpacConfig(layers=1, hidden=8, heads=2, head_dim=4, mlp=8, codebook_size=4))
    decay, rest = param_groups(backbone, 0.05)
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    assert all("bias" in names[id(p)] or "norm" in names[id(p)] for p in rest["params"])
    assert not any("bias" in names[id(p)] or "norm" in names[id(p)] for p in decay["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(names)


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    assert [len(group["params"]) for group in param_groups(module, 0.1)] == [1]


def test_optimizer_takes_every_setting() -> None:
    config = OptimConfig(lr=0.5, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.3)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    assert optimizer.defaults["lr"] == 0.5 and optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-5 and optimizer.defaults["fused"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize(("limit", "left"), [(1.0, 1.0), (10.0, 5.0), (None, 5.0)])
def test_clipping(limit: float | None, left: float) -> None:
    module = nn.Linear(2, 1, bias=False)
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(module, OptimConfig(clip_norm=limit)).item() == pytest.approx(5.0)
    assert module.weight.grad.norm().item() == pytest.approx(left, rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"warmup_share": 1.0}, "warmup_share is 1.0"),
        ({"schedule": "step"}, "schedule is 'step'; allowed: linear, cosine, constant"),
        ({"final_lr": 2.0}, "final_lr is 2.0"),
        ({"final_lr": 1e-4, "schedule": "constant"}, "stays at lr"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
    ],
)
def test_bad_settings_are_named(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**setting)  # type: ignore[arg-type]


def test_steps_outside_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match="step is -1 of 10"):
        lr_at(-1, 10, CONFIG)

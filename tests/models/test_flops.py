"""The FLOP formula against torch's own count of a training step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.flops import peak_flops, peak_of, training_flops
from models.vimpac import Layout
from tests.models.test_vimpac import HEAD, TINY, make_batch, make_objective

WIDE = replace(TINY, hidden=64, head_dim=24, mlp=96)  # heads x head_dim is not the width


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("tasks", [{}, {"alpha": 0.0}, {"mlm_weight": 0.0, "head_layers": 3}])
def test_formula_against_the_counter_of_torch(layout: Layout, tasks: dict[str, Any]) -> None:
    objective = make_objective(replace(WIDE, layout=layout), replace(HEAD, **tasks))
    batch = make_batch()
    # The counter knows no fused attention of CPUs; this one is made of plain products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = objective(batch)
        sum(out["losses"].values()).backward()  # type: ignore[union-attr]
    assert out["counts"]["flops"].item() == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert out["counts"]["clips"] == 8


def test_small_at_128_px() -> None:
    """By hand: 6 layers of 1,281 positions, projections 16 d^2 multiply-adds each and as many in the MLP."""
    from models.vimpac import SIZES, VimpacObjectiveConfig

    found = training_flops(SIZES["small"], VimpacObjectiveConfig(alpha=0.0), num_clips=1, num_masked=0, num_compared=0)
    assert found == pytest.approx(6 * 6 * 1281 * 16 * 512**2, rel=0.02)


def test_peaks_of_data_sheets() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16") == peak_of("NVIDIA H200", "fp16") == 989e12
    assert peak_of("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_of("NVIDIA L40S", "bf16") != peak_of("NVIDIA L4", "bf16") == 121e12
    assert (peak_of("NVIDIA L40", "bf16"), peak_of("NVIDIA L40", "fp32")) == (181e12, 90.5e12)
    assert (peak_of("NVIDIA H100 NVL", "bf16"), peak_of("NVIDIA H200 NVL", "fp32")) == (835e12, 60e12)
    assert peak_of("NVIDIA GH200 480GB", "bf16") == 989e12 and peak_of("NVIDIA A10G", "bf16") == 70e12
    assert peak_of("NVIDIA L40G", "bf16") is None  # in no row: better no utilisation than another GPU's
    assert peak_of("Some GPU", "bf16") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None

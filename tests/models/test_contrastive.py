"""Contrast: the loss against a loop, its chance level, and two workers against one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.contrastive import ContrastiveHead, SyncBatchNorm, contrastive_loss
from tests.models.distributed import run_two_workers


def naive_loss(a: Tensor, b: Tensor, temperature: float) -> float:
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    total = 0.0
    for anchors, others in ((a, b), (b, a)):
        for i in range(len(a)):
            positive = math.exp(float(anchors[i] @ others[i]) / temperature)
            other = sum(math.exp(float(anchors[i] @ others[j]) / temperature) for j in range(len(a)))
            own = sum(math.exp(float(anchors[i] @ anchors[j]) / temperature) for j in range(len(a)) if j != i)
            total -= math.log(positive / (other + own)) / len(a)
    return temperature * total


def test_loss_against_a_loop() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 8)
    assert contrastive_loss(a, b, 0.2).loss.item() == pytest.approx(naive_loss(a, b, 0.2), rel=1e-5)
    assert contrastive_loss(a, a, 0.2).accuracy == 1.0


def test_chance_level() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 128, 4096)  # wide, so that random cosines are near 0
    found = contrastive_loss(a, b, 0.2)
    assert found.loss.item() == pytest.approx(0.4 * math.log(2 * 128 - 1), abs=0.02)
    assert found.accuracy < 0.1


def test_one_pair_has_no_negatives() -> None:
    found = contrastive_loss(torch.ones(1, 4), torch.ones(1, 4), 0.2)
    assert found.loss == 0 and found.accuracy == 1


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_one_process_is_torch(training: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = SyncBatchNorm(5), nn.BatchNorm1d(5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(7, 5) * 3 + 2
    xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for _ in range(2):
        outs = [norm.train(training)(x) for norm, x in zip((ours, theirs), xs, strict=True)]
    for out in outs:
        (out**3).sum().backward()
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def head_and_loss(rank: int | None) -> dict[str, Tensor]:
    """Loss, accuracy and gradients on the rows of one worker, or on all rows where `rank` is None."""
    torch.manual_seed(0)
    head = ContrastiveHead(6, 3, 16, 8)
    views = torch.randn(2, 8, 6)
    rows = views if rank is None else views[:, 4 * rank : 4 * rank + 4]
    rows = rows.clone().requires_grad_()
    found = contrastive_loss(*head(rows.flatten(0, 1)).unflatten(0, (2, -1)), 0.2)
    found.loss.backward()
    grads = torch.cat([parameter.grad.flatten() for parameter in head.parameters()])  # type: ignore[union-attr]
    stats = torch.cat([buffer.flatten() for name, buffer in head.named_buffers() if "running" in name])
    assert rows.grad is not None
    return {"loss": found.loss, "accuracy": found.accuracy, "grads": grads, "input": rows.grad, "stats": stats}


def test_two_workers_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    whole, parts = head_and_loss(None), run_two_workers(head_and_loss, tmp_path)
    for name in ("loss", "accuracy", "grads"):  # what DDP averages
        mean = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(mean, whole[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        torch.cat([part["input"] for part in parts], 1) / 2, whole["input"], rtol=1e-4, atol=1e-6
    )
    for part in parts:
        torch.testing.assert_close(part["stats"], whole["stats"])

"""Contrast between two clips of a video over the batch of all workers: projection head, batch norm, loss.

Shapes: n pairs of this worker; N pairs of all workers; d width of the model; c features; o projected width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.distributed import gather_rows, rank, sum_over_workers


class SyncBatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows of all workers, forward and backward; N workers equal one worker with the whole batch.

    The same parameters, buffers and state_dict names as `nn.BatchNorm1d`. `nn.SyncBatchNorm` does this on GPUs only;
    this one runs on any backend (two all-reduces forward, two backward). In eval mode it starts no collective.
    """

    def forward(self, input: Tensor, update_statistics: bool = True) -> Tensor:
        """(n c) float32 -> (n c) float32."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        totals = sum_over_workers(torch.cat([input.sum(0), input.new_full((1,), len(input))]))
        count = totals[-1].detach()
        mean = totals[:-1] / count
        # Deviations from the common mean, not E[x^2] - E[x]^2: the difference of two large numbers loses digits.
        var = sum_over_workers((input - mean).square().sum(0)) / count
        if update_statistics:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), self.momentum)
        return (input - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class ContrastiveHead(nn.Sequential):
    """Projection of CLS: `layers` linear layers with SyncBatchNorm and ReLU between; the last has no bias.

    Args:
        width: d.
        layers: number of linear layers, >= 1. VIMPAC: 2 (small), 3 (large).
        hidden: width between them. VIMPAC: 2048 (small), 4096 (large).
        out: o. VIMPAC: 256.
    """

    def __init__(self, width: int, layers: int, hidden: int, out: int) -> None:
        parts: list[nn.Module] = []
        for _ in range(layers - 1):
            parts += [nn.Linear(width, hidden), SyncBatchNorm(hidden), nn.ReLU()]
            width = hidden
        super().__init__(*parts, nn.Linear(width, out, bias=False))

    def forward(self, input: Tensor, update_statistics: bool = True) -> Tensor:
        """(n d) -> (n o), in float32 whatever autocast says.

        The CLS vectors of an untrained model differ by less than bfloat16 resolves, and batch norm blows that up.

        Args:
            update_statistics: whether batch norm's running statistics, which eval mode uses, take this batch in.
        """
        with torch.autocast(input.device.type, enabled=False):
            x = input.float()
            for part in self:
                x = part(x, update_statistics) if isinstance(part, SyncBatchNorm) else part(x)
            return x


class Contrast(NamedTuple):
    """loss: scalar float32 with gradients. accuracy: share of anchors whose own pair scores highest, no gradient."""

    loss: Tensor
    accuracy: Tensor


def contrastive_loss(a: Tensor, b: Tensor, temperature: float, *, gather: bool = True) -> Contrast:
    """temperature * (CE_a + CE_b): each clip must find its pair among all clips of the other view and its own view.

    Both views are L2-normalised; each anchor has 1 positive and 2(N-1) negatives. The mean is over this worker's
    anchors, so the mean over workers (what DDP does to gradients) is exactly the loss and gradient of the full batch.
    At random embeddings it is about 2 * temperature * ln(2N - 1).

    Args:
        a, b: (n o) projections of the two clips, row i of both from one video; the same n on every worker.
        temperature: divides the cosine similarities, > 0.
        gather: compare over all workers (a collective); False compares within this worker.
    Source: VIMPAC (arXiv 2106.11250), section 3.4; CPC (van den Oord 2018) for the form.
    """
    n = len(a)
    a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
    all_a, all_b = (gather_rows(a), gather_rows(b)) if gather else (a, b)
    own = torch.arange(n, device=a.device) + (rank() * n if gather else 0)

    def scores(anchors: Tensor, others: Tensor, same: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            itself = F.one_hot(own, len(same)).bool()
            return torch.cat([anchors @ others.T, (anchors @ same.T).masked_fill(itself, -torch.inf)], 1) / temperature

    logits = torch.stack([scores(a, all_b, all_a), scores(b, all_a, all_b)])  # (2 n 2N)
    loss = temperature * sum(F.cross_entropy(view, own) for view in logits)
    assert isinstance(loss, Tensor)
    return Contrast(loss, (logits.detach().argmax(-1) == own).float().mean())

"""The attentive probe: one learned query looks at a clip's tokens, and a linear classifier at what it found.

Shapes: n rows; s tokens of a row; d width; c classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.evaluation.frozen import Features, ProbeResult, choose

WEIGHT_DECAYS = (1.0, 0.1, 0.01)
"""Of AdamW; the probe tries each."""
_STEPS = 300
_STEPS_BETWEEN_LOOKS = 60
_LEARNING_RATE = 1e-2
_BATCH_ROWS = 256


def attentive_probe(
    train: Features, val: Features, test: Features, *, seed: int = 0, device: str | torch.device = "cpu"
) -> ProbeResult:
    """Attention of one query over token features (n s d), then logistic regression.

    With one query and one head, projections of keys and values are a part of the query and of the classifier, so there are
    none. The query starts at zero, where the probe is linear on the mean of the tokens. Every `_STEPS_BETWEEN_LOOKS` of
    `_STEPS` steps at each of `WEIGHT_DECAYS` the validation split is looked at; it chooses both.

    Args:
        seed: of the order of rows, and of the bootstrap. On a CPU the result is the same for the same seed.

    Raises:
        ValueError: features are not (n s d), a split is empty, or `train` has fewer than two classes.
    """
    splits = (train, val, test)
    if any(np.ndim(one.values) != 3 or not len(one) for one in splits) or len(np.unique(train.labels)) < 2:
        raise ValueError(
            f"attentive_probe: splits are {', '.join(str(np.shape(one.values)) for one in splits)}, train has "
            f"{len(np.unique(train.labels))} labels; allowed: (n s d) with n of 1 or more, 2 labels or more"
        )

    def predictions() -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
        for weight_decay in WEIGHT_DECAYS:
            head = _Head(*_statistics(train.values), int(train.labels.max()) + 1).to(device)
            for step in _fit(head, train, weight_decay, seed):
                yield f"weight decay {weight_decay:g}, {step} steps", head.predict

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps are small: threads that share them wait for each other longer than they work
    try:
        return choose("attentive", predictions(), val, test, [val.values, test.values], seed=seed)
    finally:
        torch.set_num_threads(threads)


class _Head(nn.Module):
    """Token features (n s d) to logits (n c)."""

    def __init__(self, mean: Tensor, scale: Tensor, num_classes: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.query = nn.Parameter(torch.zeros(len(mean)))
        self.classifier = nn.Linear(len(mean), num_classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, values: np.ndarray) -> Tensor:
        tokens = torch.from_numpy(np.ascontiguousarray(values)).to(self.mean.device).float()
        tokens = (tokens - self.mean) * self.scale
        weights = (tokens @ self.query * len(self.query) ** -0.5).softmax(-1)
        logits: Tensor = self.classifier(torch.einsum("ns,nsd->nd", weights, tokens))
        return logits

    @torch.no_grad()
    def predict(self, values: np.ndarray) -> np.ndarray:
        """(n,) class numbers, a batch of rows at a time."""
        starts = range(0, len(values), _BATCH_ROWS)
        return np.concatenate([self(values[first : first + _BATCH_ROWS]).argmax(-1).cpu().numpy() for first in starts])


def _fit(head: _Head, train: Features, weight_decay: float, seed: int) -> Iterator[int]:
    """Train `head`, and say how many steps were taken whenever it is worth a look."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=_LEARNING_RATE, weight_decay=weight_decay)
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(np.asarray(train.labels, np.int64)).to(head.mean.device)
    order = np.empty(0, np.int64)
    for step in range(1, _STEPS + 1):
        if len(order) < min(_BATCH_ROWS, len(train)):
            order = rng.permutation(len(train))
        rows, order = np.sort(order[:_BATCH_ROWS]), order[_BATCH_ROWS:]
        optimizer.zero_grad()
        F.cross_entropy(head(train.values[rows]), labels[rows]).backward()
        optimizer.step()
        if step % _STEPS_BETWEEN_LOOKS == 0:
            yield step


def _statistics(values: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean (d) and one over the deviation (d) of all tokens of all rows, a batch of rows at a time; 0 where nothing varies."""
    count, total, squares = 0, np.zeros(values.shape[2]), np.zeros(values.shape[2])
    center = np.asarray(values[0], np.float64).mean(axis=0)  # squares of what is far from zero lose their digits
    for first in range(0, len(values), _BATCH_ROWS):
        tokens = np.asarray(values[first : first + _BATCH_ROWS], np.float64).reshape(-1, values.shape[2]) - center
        count, total, squares = count + len(tokens), total + tokens.sum(axis=0), squares + (tokens**2).sum(axis=0)
    mean = center + total / count
    deviation = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))
    varies = deviation > 1e-6 * np.maximum(np.abs(mean), 1e-6)
    scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
    return torch.from_numpy(mean).float(), torch.from_numpy(scale).float()

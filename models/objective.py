"""What the training loop and an objective, `forward(part) -> Output`, say to each other.

A worker's batch may be computed in parts (micro-batches), one after the other. The loop averages their losses and adds up
their gradients; an objective whose loss is no plain mean over samples makes up for that as `Splits`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn


class Fraction(NamedTuple):
    """A metric whose two scalars are summed over micro-batches and workers before they are divided; 0 of 0 is not logged."""

    part: Tensor
    whole: Tensor

    @property
    def value(self) -> Tensor:
        return self.part / self.whole


class Output(TypedDict):
    """losses: scalars with their weights applied; the loss is their sum. metrics: detached scalars, averaged, and fractions.
    counts: detached scalars, summed over micro-batches and workers and logged per second ("clips" as clips_per_s); of
    "flops" the loop makes the MFU."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor | Fraction]
    counts: dict[str, Tensor]


@runtime_checkable
class Splits(Protocol):
    """An objective that makes the micro-batches itself, as what one costs depends on the others."""

    def split(self, batch: Mapping[str, Any], num_parts: int) -> list[dict[str, Any]]:
        """A worker's batch as micro-batches of one size; runs on the host, while the step before is computed."""
        ...

    def look_ahead(
        self, parts: Sequence[dict[str, Any]], run: Callable[[int, dict[str, Any]], Any]
    ) -> Sequence[dict[str, Any]]:
        """The micro-batches of `split`, on the device, with what only the model can say of all of them.

        Args:
            run: `run(i, part)` is what `forward(part)` returns, without gradients and with the random numbers that the
                forward pass of part i will meet.
        """
        ...


@runtime_checkable
class HasBlocks(Protocol):
    """An objective with repeated blocks, the units that are recomputed, compiled and sharded."""

    @property
    def blocks(self) -> Sequence[nn.Module]: ...

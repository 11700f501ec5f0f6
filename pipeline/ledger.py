"""The books of a dataset: what was planned, and what became of it. They must add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import DatasetError
from pipeline.schema import Reject


@dataclass(kw_only=True, slots=True)
class Ledger:
    """Counts of samples. A video that fails before it is cut counts as the one sample it was planned as."""

    planned: int = 0
    committed: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def add_rejects(self, rejects: Iterable[Reject]) -> None:
        for reject in rejects:
            (self.rejected if reject.outcome == "rejected" else self.filtered)[reject.reject_class] += 1

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(
            planned=self.planned + other.planned,
            committed=self.committed + other.committed,
            filtered=self.filtered + other.filtered,
            rejected=self.rejected + other.rejected,
        )

    def check(self) -> None:
        """Raise `DatasetError` unless planned = committed + filtered + rejected."""
        filtered, rejected = self.filtered.total(), self.rejected.total()
        if self.planned != self.committed + filtered + rejected:
            raise DatasetError(
                f"the books do not balance: planned {self.planned} != committed {self.committed} + filtered {filtered} "
                f"+ rejected {rejected}; samples were lost or counted twice"
            )

    @property
    def reject_fraction(self) -> float:
        return self.rejected.total() / self.planned if self.planned else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "planned": self.planned,
            "committed": self.committed,
            "filtered": dict(sorted(self.filtered.items())),
            "rejected": dict(sorted(self.rejected.items())),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Ledger:
        return cls(
            planned=data["planned"],
            committed=data["committed"],
            filtered=Counter(data["filtered"]),
            rejected=Counter(data["rejected"]),
        )

"""What every job returns: the last line that it prints, for scripts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.ledger import Ledger

Status = Literal["done", "failed", "usage", "too-many-rejects"]
EXIT_CODES: dict[Status, int] = {"done": 0, "failed": 1, "usage": 2, "too-many-rejects": 3}


@dataclass(kw_only=True, slots=True)
class JobResult:
    """Outcome of a job. planned = committed + filtered + rejected, in the job's own unit (clips, steps, samples)."""

    job: str
    out: str
    status: Status = "done"
    planned: int = 0
    committed: int = 0
    filtered: int = 0
    rejected: int = 0
    fingerprint: str = ""
    mlflow_run_id: str = ""
    elapsed_s: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.status]

    def to_json(self) -> str:
        """One line; the job's own figures stand beside the common ones. Numbers JSON has no word for become null."""
        common = {name: getattr(self, name) for name in self.__slots__ if name not in ("figures", "elapsed_s")}
        return json.dumps(_finite({**common, "elapsed_s": round(self.elapsed_s, 3), **self.figures}), allow_nan=False)


def result_of_books(job: str, out: str, ledger: Ledger, status: Status, **figures: Any) -> JobResult:
    """The result of a data job, from its books."""
    return JobResult(
        job=job,
        out=out,
        status=status,
        planned=ledger.planned,
        committed=ledger.committed,
        filtered=ledger.filtered.total(),
        rejected=ledger.rejected.total(),
        figures={
            "filtered_by_reason": dict(sorted(ledger.filtered.items())),
            "rejected_by_class": dict(sorted(ledger.rejected.items())),
            "reject_fraction": round(ledger.reject_fraction, 6),
            **figures,
        },
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value

"""The books: sums keep the balance, and a lost sample is found."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DatasetError
from pipeline.ledger import Ledger
from pipeline.schema import REJECT_CLASSES, Reject

rejects = st.lists(
    st.builds(
        Reject,
        path=st.text(max_size=5),
        stage=st.just("shard"),
        reject_class=st.sampled_from([*REJECT_CLASSES, "too-short"]),
        reason=st.just(""),
        outcome=st.sampled_from(["rejected", "filtered"]),
    ),
    max_size=20,
)


def keep_books(committed: int, found: list[Reject]) -> Ledger:
    ledger = Ledger(planned=committed + len(found), committed=committed)
    ledger.add_rejects(found)
    return ledger


@settings(deadline=None)
@given(parts=st.lists(st.tuples(st.integers(0, 50), rejects), max_size=5))
def test_sums_balance_and_lose_nothing(parts: list[tuple[int, list[Reject]]]) -> None:
    ledger = sum((keep_books(*part) for part in parts), Ledger())
    ledger.check()
    everything = [reject for _, found in parts for reject in found]
    for outcome, counted in (("rejected", ledger.rejected), ("filtered", ledger.filtered)):
        assert counted == Counter(r.reject_class for r in everything if r.outcome == outcome)
    assert ledger.planned == ledger.committed + len(everything)
    assert Ledger.from_json(ledger.to_json()) == ledger
    rejected = sum(r.outcome == "rejected" for r in everything)
    assert ledger.reject_fraction == (rejected / ledger.planned if ledger.planned else 0)


@settings(deadline=None)
@given(committed=st.integers(0, 50), found=rejects, lost=st.integers(-50, 50).filter(bool))
def test_a_mismatch_raises(committed: int, found: list[Reject], lost: int) -> None:
    ledger = keep_books(committed, found)
    ledger.planned += lost
    with pytest.raises(DatasetError, match=f"planned {ledger.planned} != committed {committed}"):
        ledger.check()

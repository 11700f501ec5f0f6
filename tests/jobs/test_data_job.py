"""What a data job says at its end, by its books."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.data_job import DataJob, RejectPolicy
from pipeline.dataset import create_or_resume
from pipeline.errors import ConfigError
from pipeline.schema import Reject
from pipeline.storage import Store
from tests.pipeline.datasets import add_codes, describe, make_codes, make_row, open_writer


@pytest.mark.parametrize(
    ("classes", "max_fraction", "code"),
    [(["corrupt"], 0.6, 0), (["internal"], 0.6, 1), (["corrupt"], 0.1, 3), (["internal"], 0.1, 1)],
)
def test_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: list[str], max_fraction: float, code: int
) -> None:
    """A defect of ours is seen although all else is done and committed; what is done stays done."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")  # an MLflow that is away
    out, meta = tmp_path / "out", describe()
    create_or_resume(out, meta)
    writer = open_writer(out)
    add_codes(writer, make_row("a"), make_codes(0, 3))
    rejects = [Reject(path=f"{name}.mp4", stage="tokenize", reject_class=name, reason="x") for name in classes]
    writer.commit(1 + len(rejects), rejects)
    policy = RejectPolicy(max_reject_fraction=max_fraction, judge_after=1)
    for _ in range(2):  # the second time nothing is left to do
        with DataJob.open("tokenize", Store.at(out), meta, policy, [], policy=policy) as job:
            assert not job.todo
            result = job.finish()
        assert (result.exit_code, result.committed, result.rejected) == (code, 1, 1)
        assert ("class internal" in result.figures.get("error", "")) == (code == 1)
        assert result.figures["rejected_by_class"] == {classes[0]: 1}
    again = RejectPolicy(retry_rejects=("internal",))
    with DataJob.open("tokenize", Store.at(out), meta, again, [], policy=again) as job:
        assert job.todo == ([0] if classes == ["internal"] else [])


def test_unknown_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no class fast; allowed: .*internal"):
        RejectPolicy(retry_rejects=("fast",))

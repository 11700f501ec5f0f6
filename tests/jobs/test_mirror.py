"""A run's copy in a store: whole checkpoints only, and a lost folder comes back from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.checkpoint import list_checkpoints, read_cursor
from jobs.checkpoint_checks import Expected
from jobs.journal import read_journal
from jobs.loop import Context, train
from jobs.mirror import Mirror
from jobs.spool import STATE_NAME
from pipeline.errors import ConfigError
from tests.jobs.test_loop import CONFIG, OPTIM, Noisy, Steps, losses, run_loop
from tests.object_server import Fault, ObjectServer, serve_objects


@pytest.fixture(scope="module")
def objects() -> Iterator[ObjectServer]:
    with serve_objects() as server:
        yield server


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, objects: ObjectServer) -> str:
    if request.param == "folder":
        return str(tmp_path / "mirror")
    return objects.url(f"{objects.make_bucket(tmp_path.name.replace('_', '-')[:40].lower())}/run")


LIMITS = Expected.of(Noisy, CONFIG.steps, ema=False).max_bytes()


def run_with(run: Path, mirror: Mirror, batches: Steps | None = None) -> None:
    train(Noisy(), batches or Steps(), Context(run=run, saved=mirror.push_or_warn), CONFIG, OPTIM)


class Killed(Exception):
    pass


class Dies(Steps):
    def batch(self, step: int) -> dict[str, object]:
        if step == 5:
            raise Killed
        return super().batch(step)


def test_a_lost_folder_goes_on_from_the_store_bit_for_bit(place: str, tmp_path: Path) -> None:
    whole = run_loop(tmp_path / "whole")
    run, mirror = tmp_path / "run", Mirror(place)
    run.mkdir()
    (run / "run.json").write_text('{"a": 1}')
    with pytest.raises(Killed):
        run_with(run, mirror, Dies())
    shutil.rmtree(run)
    mirror.pull_identity(run)
    mirror.pull(run, LIMITS)
    assert [path.name for path in list_checkpoints(run)] == mirror.list() == ["00000002", "00000004"]
    assert json.loads((run / "run.json").read_text()) == {"a": 1}
    # The row of a step that was done meanwhile may have come along; the resume drops it.
    assert [row["step"] for row in read_journal(run / "metrics.jsonl")][:4] == [1, 2, 3, 4]
    run_with(run, mirror)
    assert losses(list(read_journal(run / "metrics.jsonl"))) == losses(whole)
    shutil.rmtree(run)
    mirror.pull(run, LIMITS)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        ours, theirs = (list_checkpoints(tmp_path / folder)[-1] / name for folder in ("run", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert not list(run.rglob(".*"))


def test_the_curve_comes_to_a_folder_that_has_the_checkpoint_alone(place: str, tmp_path: Path) -> None:
    """As on a node whose worker was not the first one, and now is."""
    mirror = Mirror(place)
    run_with(tmp_path / "run", mirror)
    mirror.fetch(tmp_path / "node", "00000006", LIMITS)
    mirror.pull(tmp_path / "node", LIMITS)
    assert [row["step"] for row in read_journal(tmp_path / "node" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_what_a_folder_of_another_run_knows_of_mlflow_is_not_mixed_up(tmp_path: Path) -> None:
    mirror, other = Mirror(str(tmp_path / "mirror")), tmp_path / "other"
    for folder in (tmp_path / "run", other):
        folder.mkdir()
        (folder / "run.json").write_text(f'{{"a": "{folder.name}"}}')
    (tmp_path / "run" / STATE_NAME).write_text('{"run_id": "1"}')
    mirror.push_identity(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds another run than"):
        mirror.pull_identity(other)
    assert [path.name for path in other.iterdir()] == ["run.json"]


def test_a_mirror_of_another_run_is_refused(tmp_path: Path) -> None:
    mirror = Mirror(str(tmp_path / "mirror"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(f'{{"a": "{name}"}}')
    run_with(tmp_path / "one", mirror)
    mirror.pull_identity(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"workers\.mirror = .*mirror holds another run than .*two"):
        mirror.pull_identity(tmp_path / "two")


def test_checkpoints_that_the_run_has_no_longer_leave_the_store(place: str, tmp_path: Path) -> None:
    mirror = Mirror(place)
    run_with(tmp_path / "run", mirror)
    shutil.rmtree(list_checkpoints(tmp_path / "run")[0])
    mirror.push(list_checkpoints(tmp_path / "run")[-1])
    assert mirror.list() == ["00000004", "00000006"]


def test_an_upload_that_breaks_off_leaves_no_checkpoint_and_stops_no_training(
    objects: ObjectServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = Mirror(objects.url(f"{objects.make_bucket('half')}/run"))
    objects.inject(Fault(kind="status", method="P*", target="/half/run/checkpoints/00000004/optimizer*", status=403))
    run_with(tmp_path / "run", mirror)
    assert mirror.list() == ["00000002", "00000006"]
    assert "no copy of" in caplog.text and "00000004" in caplog.text
    assert read_cursor(list_checkpoints(tmp_path / "run")[-1]).step == 6
    objects.heal()

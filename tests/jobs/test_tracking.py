from __future__ import annotations

import getpass
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import shipper
from jobs.journal import Journal, SystemSampler, read_journal
from jobs.mlflow_store import open_client, redact_uri
from jobs.spool import STATE_NAME
from jobs.tracking import DatasetInput, Tracker, read_run_id


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all tests here: MLflow takes seconds to create one."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def client(store: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setattr(shipper, "_POLL_S", 0.05)
    return open_client(store)


def open_tracker(out: Path, **kwargs: Any) -> Tracker:
    return Tracker.open(out, **{"job": "pretrain", "name": "tiny", "sample_system": False, **kwargs})


def register(out: Path, name: str, model: Path) -> None:
    tracker = open_tracker(out)
    tracker.register_model(name, model, "final")
    tracker.finish("FINISHED")
    assert tracker.close(60)


def read_steps(client: Any, out: Path, key: str) -> list[tuple[int, float]]:
    run_id = read_run_id(out)
    assert run_id
    return [(one.step, one.value) for one in client.get_metric_history(run_id, key)]


def test_journal_round_trip(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.log(1, {"loss": 0.5, "lr": 1e-4})
        journal.log(2, {"loss": float("nan"), "lr": float("inf")})
    rows = list(read_journal(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == 0.5 and abs(rows[0]["time_s"] - time.time()) < 60
    assert (rows[1]["loss"], rows[1]["lr"]) == ("nan", "inf")  # strict JSON


def test_journal_repairs_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1,"time_s":1.0,"a":1}\nrubbish\n{"step":2,"time_s":2.0,"a"')
    assert [row["step"] for row in read_journal(path)] == [1]
    with Journal(tmp_path) as journal:
        assert journal.last_step == 1
        journal.log(2, {"a": 3})
    assert [(row["step"], row["a"]) for row in read_journal(path)] == [(1, 1), (2, 3)]


@pytest.mark.parametrize("kept", [-1, 0, 3, 9, 100])
def test_truncate_after(tmp_path: Path, kept: int) -> None:
    with Journal(tmp_path) as journal:
        for step in range(10):
            journal.log(step, {"a": step})
        journal.truncate_after(kept)
        journal.log(kept + 1 if kept < 9 else 10, {"a": -1})
    steps = [row["step"] for row in read_journal(journal.path)]
    assert steps == [*range(min(kept, 9) + 1), min(kept, 9) + 1]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_log_never_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    journal.log(5, {"a": 1})
    journal.log(4, {"a": 1})
    journal.log(6, {"step": 1})
    journal.log(6, {"a": "many"})  # type: ignore[dict-item]
    journal.close()
    journal.log(7, {"a": 1})
    assert len(list(read_journal(journal.path))) == 1
    assert len(caplog.records) == 1 and "truncate_after" in caplog.text  # at most one a minute


def test_journal_imports_no_mlflow(tmp_path: Path) -> None:
    code = "import sys, jobs.journal, jobs.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_system_sampler(tmp_path: Path) -> None:
    sampler = SystemSampler(tmp_path, node="node-0", interval_s=0.05).start()
    time.sleep(0.5)
    sampler.stop()
    rows = list(read_journal(tmp_path / "system.node-0.jsonl"))
    assert rows and rows[0]["step"] == 0
    assert 0 <= rows[-1]["system/node-0/cpu_utilization_percentage"] <= 100


def test_run_holds_everything(tmp_path: Path, client: Any) -> None:
    parent = tmp_path / "clips"
    with open_tracker(parent, job="shard", name="clips", tags={"tokenreel.fingerprint": "a" * 32}):
        pass
    out, config, weights = tmp_path / "out", tmp_path / "config.json", tmp_path / "weights"
    config.write_text("{}")
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"0" * 100)
    params = {"optim": {"lr": 3e-4}, "odd name!": "x" * 7000, **{f"p{i}": i for i in range(250)}}
    source = DatasetInput(name="clips", fingerprint="a" * 32, uri=str(parent), totals={"samples": 3})
    with open_tracker(out, params=params, inputs=[source]) as tracker:
        with Journal(out) as journal:
            for step in range(1500):
                journal.log(step, {"loss": 1 / (step + 1), "train/grad norm": float("nan")})
        (out / "pictures").mkdir()
        (out / "pictures" / "reconstructions_00000100.png").write_bytes(b"png")
        tracker.tag({"tokenreel.fingerprint": "b" * 32})
        tracker.register_model("tiny", weights, "final")
        tracker.register_model("tiny", weights, "best")
        tracker.finish("FINISHED", {"val/accuracy": 0.5}, [config, tmp_path / "missing.html"])
        assert tracker.close()
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "tiny"
    assert len(run.data.params) == 252 and run.data.params["optim.lr"] == "0.0003"
    assert len(run.data.params["odd name_"]) == 6000
    assert run.data.tags["tokenreel.job"] == "pretrain"
    assert run.data.tags["tokenreel.fingerprint"] == "b" * 32
    assert run.data.tags["tokenreel.parent_fingerprint"] == "a" * 32
    assert run.data.tags["tokenreel.parent_run_id"] == read_run_id(parent)
    assert run.inputs.dataset_inputs[0].dataset.digest == "a" * 32
    assert [step for step, _ in read_steps(client, out, "loss")] == list(range(1500))
    history = client.get_metric_history(tracker.run_id, "loss")
    rows = list(read_journal(out / "metrics.jsonl"))
    assert [one.timestamp for one in history] == [int(row["time_s"] * 1000) for row in rows]
    assert run.data.metrics["val/accuracy"] == 0.5
    names = {
        file.path for path in (None, "pictures", "final_model") for file in client.list_artifacts(run.info.run_id, path)
    }
    assert names >= {"config.json", "pictures/reconstructions_00000100.png", "final_model/model.safetensors"}
    (version,) = client.search_model_versions("name = 'tiny'")
    assert version.run_id == tracker.run_id and version.tags["tokenreel.parent_fingerprint"] == "a" * 32
    assert {client.get_model_version_by_alias("tiny", alias).version for alias in ("final", "best")} == {
        version.version
    }

    import mlflow

    mlflow.set_registry_uri(os.environ["MLFLOW_TRACKING_URI"])
    loaded = mlflow.artifacts.download_artifacts(f"models:/tiny/{version.version}", dst_path=str(tmp_path / "loaded"))
    assert (Path(loaded) / "model.safetensors").stat().st_size == 100


@pytest.mark.parametrize("damage", ["none", "state lost", "state damaged"])
def test_restart_continues_the_run(tmp_path: Path, client: Any, damage: str) -> None:
    with pytest.raises(RuntimeError), open_tracker(tmp_path, params={"lr": 1}) as first:
        with Journal(tmp_path) as journal:
            for step in range(20):
                journal.log(step, {"loss": step})
        raise RuntimeError("worker lost")
    assert client.get_run(first.run_id).info.status == "FAILED"
    if damage == "state lost":
        (tmp_path / STATE_NAME).unlink()
    elif damage == "state damaged":
        (tmp_path / STATE_NAME).write_text('{"run_id": ')
    with open_tracker(tmp_path, params={"lr": 2}) as second, Journal(tmp_path) as journal:
        journal.truncate_after(9)  # the checkpoint was at step 9: steps 10..19 are run again
        for step in range(10, 30):
            journal.log(step, {"loss": 100 + step})
    assert second.run_id == first.run_id
    run = client.get_run(second.run_id)
    assert run.info.status == "FINISHED" and run.data.params["lr"] == "1"
    assert json.loads(run.data.tags["tokenreel.changed_params"]) == {"lr": "2"}
    history = read_steps(client, tmp_path, "loss")
    if damage == "none":
        assert history == [(s, s) for s in range(20)] + [(s, 100 + s) for s in range(20, 30)]
    else:  # the last shipped steps are forgotten: known rows are dropped by MLflow, repeated steps are there twice
        assert {step for step, _ in history} == set(range(30)) and len(history) == 40


def test_deleted_run_is_made_again(tmp_path: Path, client: Any) -> None:
    with open_tracker(tmp_path) as first, Journal(tmp_path) as journal:
        journal.log(0, {"loss": 1})
    client.delete_run(first.run_id)
    with open_tracker(tmp_path) as second:
        pass
    assert second.run_id != first.run_id
    assert read_steps(client, tmp_path, "loss") == [(0, 1)]


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "sqlite:////nowhere/at/all/mlflow.db", "corrupt", "locked", "bogus://x"]
)
def test_broken_store_never_raises(
    tmp_path: Path, uri: str, store: str, client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "mlflow.db"
    if uri == "corrupt":
        database.write_bytes(b"this is no database" * 1000)
    elif uri == "locked":
        import sqlite3

        lock = sqlite3.connect(database)
        lock.execute("CREATE TABLE t (a)")
        lock.execute("BEGIN EXCLUSIVE")
    out = tmp_path / "out"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}" if uri in ("corrupt", "locked") else uri)
    start_s = time.monotonic()
    tracker = open_tracker(out)
    assert time.monotonic() - start_s < 0.5
    with Journal(out) as journal:
        times_s = []
        for step in range(1000):
            before_s = time.perf_counter()
            journal.log(step, {"loss": 1.0, "lr": 0.1})
            times_s.append(time.perf_counter() - before_s)
    assert sorted(times_s)[500] < 0.001
    tracker.finish("FINISHED", {"accuracy": 1.0})
    start_s = time.monotonic()
    assert tracker.close(timeout_s=6) is False
    assert time.monotonic() - start_s < 7 and tracker.run_id is None
    assert sum("is not taking data" in record.message for record in caplog.records) == 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    again = open_tracker(out)
    again.finish("FINISHED", {"accuracy": 1.0})
    assert again.close(timeout_s=60)
    assert len(read_steps(client, out, "loss")) == 1000
    assert client.get_run(read_run_id(out)).info.status == "FINISHED"


def test_what_a_killed_driver_left_is_shipped_by_its_next_start(tmp_path: Path, client: Any) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from jobs.journal import Journal;"
        "from jobs.tracking import Tracker; out = Path(sys.argv[1]);"
        "Tracker.open(out, job='shard', name='x', sample_system=False);"
        "[Journal(out).log(s, {'a': s}) for s in range(5)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step":5,"time_')
    again = open_tracker(tmp_path)
    again.finish("FINISHED")
    assert again.close(timeout_s=60)
    assert [step for step, _ in read_steps(client, tmp_path, "a")] == list(range(5))
    assert client.get_run(read_run_id(tmp_path)).info.status == "FINISHED"


class Server:
    """A real `mlflow server` on loopback that can be taken away and brought back on the same port."""

    def __init__(self, folder: Path, store: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder, self._store = folder, store
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["-m", "mlflow", "server", "--backend-store-uri", self._store, "--port", str(self.port)]
        artifacts = ["--artifacts-destination", str(self._folder / "artifacts"), "--workers", "1"]
        self._process = subprocess.Popen(
            [sys.executable, *command, *artifacts],
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path, store: str) -> Iterator[Server]:
    server = Server(tmp_path, store)
    yield server
    server.stop()


def test_server_away_for_the_whole_job_and_back(
    tmp_path: Path, client: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "away")
    monkeypatch.setattr(shipper, "_BACKOFF_MAX_S", 0.5)
    out, final, best = tmp_path / "out", tmp_path / "final", tmp_path / "best"
    for weights in (final, best):
        weights.mkdir()
        (weights / "model.safetensors").write_bytes(weights.name.encode())
    (out / "pictures").mkdir(parents=True)
    (out / "pictures" / "predictions_00000004.png").write_bytes(b"png")
    with open_tracker(out, params={"optim": {"lr": 0.5}}) as first:  # nobody listens from beginning to end
        with Journal(out) as journal:
            for step in range(10):
                journal.log(step, {"loss": step})
        first.register_model("away", final, "final")
        first.register_model("away", best, "best")
    assert first.run_id is None
    tracker = open_tracker(out, params={"optim": {"lr": 0.5}})  # the same command again, still nobody
    tracker.register_model("away", final, "final")
    tracker.register_model("away", best, "best")
    with Journal(out) as journal:
        for step in range(10, 20):
            journal.log(step, {"loss": step})
        server.start()
        deadline_s = time.monotonic() + 120
        while tracker.run_id is None and time.monotonic() < deadline_s:
            time.sleep(0.1)
        for step in range(20, 30):
            journal.log(step, {"loss": step})
    tracker.finish("FINISHED")
    assert tracker.close(60)
    assert read_steps(client, out, "loss") == [(step, step) for step in range(30)]
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.data.params["optim.lr"] == "0.5"
    served = open_client(server.uri)
    assert [file.path for file in served.list_artifacts(tracker.run_id, "pictures")] == [
        "pictures/predictions_00000004.png"
    ]
    for alias in ("final", "best"):
        assert served.get_model_version_by_alias("away", alias).run_id == tracker.run_id
        path = served.download_artifacts(tracker.run_id, f"{alias}_model/model.safetensors", str(tmp_path))
        assert Path(path).read_text() == alias


def test_a_run_that_goes_on_registers_its_new_model_beside_the_old_one(tmp_path: Path, client: Any) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    model.mkdir()
    versions = []
    for steps in ("one", "two"):
        (model / "model.safetensors").write_text(steps)
        register(out, "longer", model)
        versions.append(client.get_model_version_by_alias("longer", "final"))
    assert [
        Path(client.download_artifacts(one.run_id, Path(one.source).name), "model.safetensors").read_text()
        for one in versions
    ] == ["one", "two"]


@pytest.mark.parametrize("is_state_lost", [False, True])
def test_the_same_model_exported_again_is_no_new_version(tmp_path: Path, client: Any, is_state_lost: bool) -> None:
    out, model, name = tmp_path / "out", tmp_path / "model", f"again-{is_state_lost}"
    model.mkdir()
    for export in ("first", "second"):
        (model / "model.safetensors").write_bytes(b"weights")
        (model / "config.json").write_text("{}")
        (model / "MLmodel").write_text(f"model_uuid: {export}")
        os.utime(model / "model.safetensors", (1, 1) if export == "first" else (2, 2))
        register(out, name, model)
        if is_state_lost:
            (out / STATE_NAME).unlink()
    assert len(client.search_model_versions(f"name = '{name}'")) == 1
    (model / "config.json").write_text('{"layers": 2}')
    register(out, name, model)
    assert len(client.search_model_versions(f"name = '{name}'")) == 2


def test_a_model_is_not_registered_while_it_is_written_again(tmp_path: Path, client: Any) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    register(out, "rewritten", model)
    tracker = open_tracker(out)
    (model / "model.safetensors").write_bytes(b"wei")  # an export that has just begun
    tracker.finish("FINISHED")
    assert tracker.close(60)
    assert len(client.search_model_versions("name = 'rewritten'")) == 1


def test_two_jobs_make_one_store(tmp_path: Path) -> None:
    code = (
        "import logging, sys; from pathlib import Path; from jobs.tracking import Tracker; logging.basicConfig();"
        "tracker = Tracker.open(Path(sys.argv[1]), job='shard', name='x', sample_system=False);"
        "tracker.finish('FINISHED'); sys.exit(not tracker.close(60))"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], env=environment, stderr=subprocess.PIPE)
        for name in ("one", "two")
    ]
    for job in jobs:
        _, stderr = job.communicate(timeout=90)
        assert job.returncode == 0 and b"WARNING" not in stderr, stderr.decode()
    assert len({read_run_id(tmp_path / name) for name in ("one", "two")}) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "one", "two"]


def test_no_password_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    with open_tracker(tmp_path):
        pass
    assert "hunter2" not in caplog.text
    assert all("hunter2" not in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://u:p@h/db", "postgresql://h/db"),
        ("postgresql://u:a/b+c=@h:5432/db", "postgresql://h:5432/db"),
        ("postgresql://h/db?user=me&password=p&sslmode=on", "postgresql://h/db?user=...&password=...&sslmode=on"),
        ("no answer from http://me:p@h:5000/ (me@work)", "no answer from http://h:5000/ (me@work)"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://h:5000/", "http://h:5000/"),
    ],
)
def test_users_and_passwords_are_cut_out_of_uris(uri: str, shown: str) -> None:
    assert redact_uri(uri) == shown


@pytest.mark.parametrize(
    ("place", "has_boto3", "way_out"),
    [
        ("s3://nobodys-bucket-of-tokenreel/runs", False, "install boto3"),
        ("s3://nobodys-other-bucket-of-tokenreel/runs", True, "the same command sends them"),
        ("file:///proc/nobody/writes/here", True, "the same command sends them"),
    ],
)
def test_a_store_that_refuses_files_keeps_no_run_open(
    place: str,
    has_boto3: bool,
    way_out: str,
    tmp_path: Path,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """S3 without credentials or boto3, and a folder that cannot be written."""
    if not has_boto3:
        monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    client.create_experiment(tmp_path.name, artifact_location=place)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "masks_00000001.png").write_bytes(b"png")
    (tmp_path / "model.safetensors").write_bytes(b"0")
    with open_tracker(tmp_path) as tracker, Journal(tmp_path) as journal:
        journal.log(1, {"loss": 1.0})
        tracker.register_model("refused", tmp_path, "final")
        tracker.finish("FINISHED", {"accuracy": 0.5}, [tmp_path / "model.safetensors"])
        assert not tracker.close(60)
    run = client.get_run(read_run_id(tmp_path))
    assert run.info.status == "FINISHED" and run.data.metrics == {"loss": 1.0, "accuracy": 0.5}
    assert "and not its pictures" in caplog.text and way_out in caplog.text
    assert "does not have pictures, files, final model" in caplog.text


def test_a_deleted_experiment_is_named_with_the_way_back(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "deleted")
    with open_tracker(tmp_path / "first"):
        pass
    experiment = client.get_experiment_by_name("deleted").experiment_id
    client.delete_experiment(experiment)
    with open_tracker(tmp_path / "second") as tracker:
        assert not tracker.close(10)
    assert f"mlflow experiments restore --experiment-id {experiment}" in caplog.text
    assert "MLFLOW_EXPERIMENT_NAME" in caplog.text


def test_a_page_says_who_made_what_from_what_and_how_it_came_out(tmp_path: Path, client: Any) -> None:
    tokens, model = tmp_path / "tokens", tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"0")
    with open_tracker(tokens, job="tokenize", tags={"tokenreel.out": str(tokens)}):
        pass
    source = DatasetInput(name="to*kens", fingerprint="a" * 32, uri=str(tokens))
    with open_tracker(model, inputs=[source]) as tracker:
        tracker.register_model("described", model, "final")
        tracker.finish("FINISHED", {"loss_end": 2.5})
    trained = DatasetInput(name="model", fingerprint="b" * 32, uri=str(model), context="model")
    with open_tracker(model / "evaluation", job="evaluate", inputs=[trained]) as tracker:
        tracker.finish("FINISHED", {"probe@5": 0.75})
    run = client.get_run(read_run_id(model))
    tags, parent = run.data.tags, client.get_run(read_run_id(tokens))
    assert tags["mlflow.user"] == getpass.getuser() and tags["mlflow.source.name"] == "tokenreel pretrain"
    root = Path(__file__).parent.parent.parent
    if (root / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        assert tags["mlflow.source.git.commit"] == head.stdout.strip()
    note = tags["mlflow.note.content"]
    link = f"[to\\*kens](#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id})"
    assert link in note and "| loss_end | 2.5 |" in note
    assert f"-> `{tokens}`" in parent.data.tags["mlflow.note.content"]
    assert run.data.metrics["evaluate/probe_5"] == 0.75
    (version,) = client.search_model_versions("name = 'described'")
    assert version.description == note
    assert version.tags["loss_end"] == "2.5" and version.tags["evaluate/probe_5"] == "0.75"


def test_what_a_person_wrote_about_a_run_stays(tmp_path: Path, client: Any) -> None:
    with open_tracker(tmp_path):
        pass
    client.set_tag(read_run_id(tmp_path), "mlflow.note.content", "mine")
    with open_tracker(tmp_path) as tracker:
        tracker.finish("FINISHED", {"loss": 1.0})
    assert client.get_run(read_run_id(tmp_path)).data.tags["mlflow.note.content"] == "mine"

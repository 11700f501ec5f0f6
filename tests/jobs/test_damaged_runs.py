"""Every file of a run, damaged in every way, through every job that reads it: an older whole checkpoint is used with a warning
that names both, or the file is named; nothing is loaded, followed or allocated that a damaged or foreign file asks for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from jobs import embed, evaluate, training
from jobs.checkpoint import Cursor, list_checkpoints, whole_state, write_checkpoint
from jobs.config import load_config, save_config
from jobs.embed import EmbedConfig
from jobs.evaluate import EvaluateConfig
from jobs.finetune import find_source
from jobs.journal import read_journal
from jobs.loop import Context, LoopConfig
from jobs.mirror import Mirror
from jobs.model_folder import load_model, write_model
from jobs.pretrain import PretrainConfig, check_source, make_objective
from jobs.result import JobResult
from jobs.run_files import DamagedRun
from jobs.training import Task, run_training
from jobs.workers import WorkersConfig
from models.optim import OptimConfig, build_optimizer
from pipeline.errors import ConfigError, TokenreelError
from tests.e2e import training as tiny
from tests.jobs.test_loop import OPTIM, Noisy, Steps, losses, run_loop

Damage = Callable[[Path], None]
LOOP = LoopConfig(steps=6, save_every_steps=2, keep_checkpoints=9, picture_every_steps=0)


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_link(path: Path) -> None:
    """To a whole file, outside."""
    outside = path.parents[3] / f"outside-{path.name}"
    shutil.move(path, outside)
    path.symlink_to(outside)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**40)


def change_json(**changes: Any) -> Damage:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes})) and None


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(path: Path) -> None:
        tensors = load(path.read_bytes())
        change(tensors)
        save_file(tensors, path)

    return damage


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name, value in tensors.items() if value.is_floating_point() and value.ndim)
    tensors[name].view(-1)[0] = torch.nan


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name, value in tensors.items() if value.ndim)
    tensors[name] = torch.zeros(*tensors[name].shape, 2)


FILES: dict[str, Damage] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b"") and None,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-5]) and None,
    "huge": make_huge,
    "a pipe": make_fifo,
    "a link": make_link,
    "a folder": make_folder,
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00{}" * 9) and None,
}
JSON: dict[str, Damage] = FILES | {
    "a list": lambda path: path.write_text("[1]") and None,
    "a number": lambda path: path.write_text("7") and None,
    "deep": lambda path: path.write_text("[" * 10_000) and None,
    "another object": lambda path: path.write_text("{}") and None,
}
STATE: dict[str, Damage] = JSON | {
    "another field": change_json(momentum=1),
    "another step": change_json(step=3),
    "beyond the run": change_json(step=10**30),
    "a step of text": change_json(step="4"),
    "a step that is true": change_json(step=True),
    "a digest of a number": change_json(keys_digest=7),
    "a loss of NaN": change_json(recent_loss=float("nan")),
    "an accuracy of 7": change_json(val_accuracy=7),
}
TENSORS: dict[str, Damage] = FILES | {
    "NaN": change_tensors(spoil),
    "another shape": change_tensors(reshape),
    "another name": change_tensors(lambda tensors: tensors.update(other=tensors.popitem()[1])),
    "no tensors": lambda path: save_file({}, path),
    "a header of 2**62": lambda path: path.write_bytes((2**62).to_bytes(8, "little") + b"{}") and None,
    "a pickle": lambda path: torch.save(load(path.read_bytes()), path),
}
IN_A_CHECKPOINT = [
    *(("state.json", name) for name in STATE),
    *((file, name) for file in ("model.safetensors", "optimizer.safetensors") for name in TENSORS),
]


def damage_file(path: Path, how: str) -> None:
    ({"state.json": STATE}.get(path.name) or (TENSORS if path.suffix == ".safetensors" else JSON))[how](path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    out: Path
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    loop: LoopConfig = LOOP
    optim: OptimConfig = field(default_factory=lambda: OPTIM)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One worker, in the driver's process, without Ray."""

    def make_trainer(out: Path, workers: WorkersConfig, settings: dict[str, Any], resources: object) -> Any:
        context = Context(run=out)
        return SimpleNamespace(fit=lambda: SimpleNamespace(return_value=training._train(settings, context)))

    monkeypatch.setattr(training, "_make_trainer", make_trainer)
    monkeypatch.setattr(training, "_choose_resources", lambda workers: {})
    monkeypatch.setattr(training, "connect", contextlib.nullcontext)
    monkeypatch.setattr(training.Tracker, "open", lambda *args, **options: contextlib.nullcontext(NoTracker()))


class NoTracker:
    run_id = ""

    def finish(self, *args: object) -> None: ...


def run(config: Config) -> JobResult:
    def build(context: Context) -> Task:
        return Task(objective=Noisy(), batches=Steps(), draw=lambda module, step: None)

    def export(checkpoint: Path, folder: Path) -> None:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)

    return run_training(
        "train", config.out, config, build, [], export, dict, name="tiny", num_parts=4, make_objective=Noisy
    )


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed after step 5 of 6; checkpoints of 2 and 4 steps."""
    folder = tmp_path_factory.mktemp("broken") / "runs" / "run"
    training._open_run(folder, Config(out=folder), [])
    run_loop(folder, replace(LOOP, steps=5, schedule_steps=6))
    shutil.rmtree(folder / "checkpoints" / "00000005")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    return losses(run_loop(tmp_path_factory.mktemp("whole"), LOOP))


@pytest.mark.parametrize(("file", "how"), IN_A_CHECKPOINT)
@pytest.mark.usefixtures("here")
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    file: str,
    how: str,
    broken_off: Path,
    whole: list[tuple[int, float]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = Path(shutil.copytree(broken_off, tmp_path / "runs" / "run"))
    damage_file(out / "checkpoints" / "00000004" / file, how)
    assert run(Config(out=out)).committed == 6
    assert losses(list(read_journal(out / "metrics.jsonl"))) == whole
    aside = out / "checkpoints" / "damaged-00000004"
    assert aside.is_dir()
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"00000004/{file}" in warning and str(aside) in warning and "the newest whole one is" in warning
    assert str(out / "checkpoints" / "00000002") in warning


@pytest.mark.usefixtures("here")
def test_a_run_without_a_whole_checkpoint_says_what_to_delete_and_keeps_its_curve(
    broken_off: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(broken_off, tmp_path / "runs" / "run"))
    curve = (out / "metrics.jsonl").read_bytes()
    for checkpoint in list_checkpoints(out):
        damage_file(checkpoint / "model.safetensors", "cut off")
    for _ in range(2):  # and says so again
        with pytest.raises(DamagedRun, match=r"damaged-00000002.*damaged-00000004.*delete \S+checkpoints") as caught:
            run(Config(out=out))
        assert "same command" not in str(caught.value) and (out / "metrics.jsonl").read_bytes() == curve


@pytest.mark.parametrize("is_copy_whole", [True, False])
@pytest.mark.usefixtures("here")
def test_the_copy_in_the_mirror_takes_the_place_where_it_is_whole(
    is_copy_whole: bool,
    broken_off: Path,
    whole: list[tuple[int, float]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = Path(shutil.copytree(broken_off, tmp_path / "runs" / "run"))
    mirror = Path(shutil.copytree(broken_off, tmp_path / "runs" / "mirror"))
    damage_file(out / "checkpoints" / "00000004" / "model.safetensors", "NaN")
    if not is_copy_whole:
        damage_file(mirror / "checkpoints" / "00000004" / "optimizer.safetensors", "cut off")
    assert run(Config(out=out, workers=WorkersConfig(mirror=str(mirror)))).committed == 6
    assert losses(list(read_journal(out / "metrics.jsonl"))) == whole
    assert ("takes its place" in caplog.text) == is_copy_whole
    assert (out / "checkpoints" / "damaged-00000004").exists() != is_copy_whole


@pytest.mark.parametrize(
    ("file", "how"),
    [(file, how) for file, how in IN_A_CHECKPOINT if how in ("missing", "huge", "a pipe", "a folder", "cut off")],
)
@pytest.mark.usefixtures("here")
def test_a_damaged_copy_is_not_used_where_the_run_is_lost(
    file: str, how: str, broken_off: Path, whole: list[tuple[int, float]], tmp_path: Path
) -> None:
    mirror = Path(shutil.copytree(broken_off, tmp_path / "runs" / "mirror"))
    damage_file(mirror / "checkpoints" / "00000004" / file, how)
    out = tmp_path / "runs" / "run"
    assert run(Config(out=out, workers=WorkersConfig(mirror=str(mirror)))).committed == 6
    assert losses(list(read_journal(out / "metrics.jsonl"))) == whole
    assert Mirror(str(mirror)).list()[-1] == "00000006"


@pytest.mark.parametrize("how", JSON)
@pytest.mark.usefixtures("here")
def test_a_damaged_identity_is_named_before_anything_is_written(how: str, broken_off: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(broken_off, tmp_path / "runs" / "run"))
    damage_file(out / "run.json", how)
    before = sorted((path, path.lstat().st_mtime_ns) for path in out.rglob("*") if path.is_file())
    with pytest.raises(TokenreelError, match=r"run\.json|holds other files") as caught:
        run(Config(out=out))
    assert "same command" not in str(caught.value)
    after = sorted(
        (path, path.lstat().st_mtime_ns) for path in out.rglob("*") if path.is_file() and path.name != ".lock"
    )
    assert after == before


@pytest.mark.parametrize("how", [how for how in JSON if how not in ("missing", "a link")])
@pytest.mark.usefixtures("here")
def test_a_damaged_identity_in_the_mirror_is_named(how: str, broken_off: Path, tmp_path: Path) -> None:
    mirror = Path(shutil.copytree(broken_off, tmp_path / "runs" / "mirror"))
    out = Path(shutil.copytree(broken_off, tmp_path / "runs" / "run"))
    damage_file(mirror / "run.json", how)
    with pytest.raises(TokenreelError, match=r"mirror"):
        run(Config(out=out, workers=WorkersConfig(mirror=str(mirror))))


@pytest.mark.parametrize("entry", ["checkpoints", "metrics.jsonl", "model", "checkpoints/00000004"])
@pytest.mark.usefixtures("here")
def test_nothing_is_written_through_a_link_out_of_a_run(entry: str, broken_off: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(broken_off, tmp_path / "runs" / "run"))
    outside = tmp_path / "outside"
    if (out / entry).exists():
        shutil.move(out / entry, outside)
    else:
        outside.mkdir()
    (out / entry).symlink_to(outside)
    with pytest.raises(DamagedRun, match=f"{entry} is a link"):
        run(Config(out=out))


@pytest.mark.usefixtures("here")
def test_a_curve_with_odd_values_ends_nothing(broken_off: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(broken_off, tmp_path / "runs" / "run"))
    rows = ['{"step":1,"time_s":1.0,"loss":null}', '{"step":2,"time_s":1.0,"loss":[1]}', '{"step":"x"}', "[]", "{"]
    (out / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert run(Config(out=out)).committed == 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run of 2 steps, with checkpoints of both, and its model; never trained, as nobody looks."""
    folder = tmp_path_factory.mktemp("finished")
    tokens = tiny.make_tokens(folder / "tokens")
    config = tiny.make_config(tokens, folder / "runs" / "run", WorkersConfig(), layers=1, steps=2, save_every_steps=1)
    objective = make_objective(config)
    optimizer = build_optimizer(objective, config.optim)
    sum(parameter.sum() for parameter in objective.parameters()).backward()
    optimizer.step()
    meta = training.DatasetInput(name="tokens", fingerprint="f" * 32, uri=str(tokens))
    training._open_run(config.out, config, [meta], "t" * 32)
    for step in (1, 2):
        write_checkpoint(config.out, *whole_state(objective, optimizer), Cursor(step=step, keys_digest="0" * 16))
    write_model(config.out / "model", objective, config.out)
    return config.out


@pytest.mark.parametrize(("file", "how"), IN_A_CHECKPOINT)
def test_readers_take_the_checkpoint_before_a_damaged_one(
    file: str,
    how: str,
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "runs" / "run"))
    newest, older = out / "checkpoints" / "00000002", out / "checkpoints" / "00000001"
    damage_file(newest / file, how)
    assert find_source(out)[1] == older
    assert f"00000002/{file}" in caplog.text and str(older) in caplog.text
    with pytest.raises(TokenreelError, match=rf"00000002/{file}|holds no pre-training run"):
        find_source(newest)  # the very one that was asked for is never another
    loaded: list[Path] = []

    def load(config: PretrainConfig, checkpoint: Path) -> None:
        loaded.append(checkpoint)
        raise InterruptedError  # what comes after is no reader of checkpoints

    monkeypatch.setattr(evaluate, "load_objective", load)
    with pytest.raises(InterruptedError):
        evaluate.run(EvaluateConfig(run=out))
    assert loaded == [older]
    with pytest.raises(ConfigError, match="has done 1 of 2 steps; finish it first"):
        config = load_config(out / "config.json", PretrainConfig)
        check_source(replace(config, out=tmp_path / "next", loop=replace(config.loop, steps=4)), out)
    damage_file(older / file, "cut off")
    for read in (lambda: find_source(out), lambda: evaluate.run(EvaluateConfig(run=out))):
        with pytest.raises(DamagedRun, match=rf"no whole checkpoint: .*00000001/{file}"):
            read()


@pytest.mark.parametrize(
    ("file", "how"),
    [("model.safetensors", how) for how in TENSORS] + [("config.json", how) for how in JSON],
)
def test_a_damaged_model_is_named(file: str, how: str, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "runs" / "run"))
    tokens = str(finished.parents[1] / "tokens")
    damage_file(out / "model" / file, how)
    with pytest.raises(TokenreelError, match=rf"{file}|holds no pre-trained model"):
        embed.run(EmbedConfig(tokens=tokens, run=out, out=str(tmp_path / "embeddings")))


@pytest.mark.parametrize(
    "field", [{"layers": 10**9}, {"hidden": 2**40}, {"hidden": "wide"}, {"heads": None}, {"norm": 7}]
)
def test_a_description_of_another_network_costs_no_memory(
    field: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "runs" / "run"))
    description = json.loads((out / "model" / "config.json").read_text())
    description["backbone"] |= field
    (out / "model" / "config.json").write_text(json.dumps(description))
    with pytest.raises(TokenreelError, match=str(out / "model")):
        load_model(out / "model")


@pytest.mark.parametrize("file", ["run.json", "config.json"])
@pytest.mark.parametrize("how", JSON)
def test_a_damaged_run_is_named_by_its_readers(file: str, how: str, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "runs" / "run"))
    damage_file(out / file, how)
    with pytest.raises(TokenreelError, match=rf"{file}|holds no pre-training run"):
        evaluate.run(EvaluateConfig(run=out))


class TestTokens:
    """The tokens of a run are known by fingerprint, wherever their path leads today."""

    @pytest.fixture
    def out(self, finished: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(finished, tmp_path / "runs" / "run"))

    def test_other_tokens_at_the_path_of_the_runs_are_not_measured_on(self, out: Path, tmp_path: Path) -> None:
        config = load_config(out / "config.json", PretrainConfig)
        other = tiny.make_token_dataset(tmp_path / "tokens", [[8]], fingerprint="o" * 32, extra=EXTRA)
        save_config(out, replace(config, tokens=str(other)))
        with pytest.raises(ConfigError, match=r"fingerprint o{32}, and is not what .* was trained on; give --tokens"):
            evaluate.run(EvaluateConfig(run=out))

    def test_a_relative_path_of_an_earlier_release_is_found_or_refused(
        self, out: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**plain, "tokens": "tokens"}))
        (tmp_path / "there").mkdir()
        monkeypatch.chdir(tmp_path / "there")
        with pytest.raises(
            ConfigError, match=r"is not a dataset.*\(tokens, relative, in .*config\.json\).*give --tokens"
        ):
            evaluate.run(EvaluateConfig(run=out))
        tiny.make_tokens(
            tmp_path / "there" / "tokens", "o" * 32
        )  # as in the issue: another tokenizer, at the same path
        with pytest.raises(ConfigError, match=r"trained on other codes: tokenizer t{32} \(here o{32}\)"):
            evaluate.run(EvaluateConfig(run=out, tokens="tokens"))
        monkeypatch.chdir(finished.parents[1])
        monkeypatch.setattr(evaluate, "load_objective", lambda *args: pytest.fail("found"))
        with pytest.raises(pytest.fail.Exception, match="found"):
            evaluate.run(EvaluateConfig(run=out))

    def test_embed_always_checks(self, out: Path, tmp_path: Path) -> None:
        other = tiny.make_tokens(tmp_path / "others", "o" * 32)
        config = EmbedConfig(tokens=str(other), run=out, out=str(tmp_path / "embeddings"))
        with pytest.raises(ConfigError, match=r"trained on other codes: tokenizer t{32} \(here o{32}\)"):
            embed.run(config)
        # An earlier release noted no tokenizer; then the run's tokens say it, or nothing does.
        for path in (out / "run.json", out / "model" / "config.json"):
            path.write_text(
                json.dumps(
                    {
                        k: v
                        for k, v in json.loads(path.read_text()).items()
                        if k not in ("tokenizer", "tokenizer_fingerprint")
                    }
                )
            )
        with pytest.raises(ConfigError, match=r"trained on other codes: tokenizer t{32} \(here o{32}\)"):
            embed.run(config)
        plain = json.loads((out / "model" / "run_config.json").read_text())
        (out / "model" / "run_config.json").write_text(json.dumps({**plain, "tokens": str(tmp_path / "gone")}))
        with pytest.raises(ConfigError, match=r"did not note its tokenizer\. Run the command that trained it again"):
            embed.run(config)


EXTRA = {"tokenizer": {"codebook_size": tiny.CODEBOOK_SIZE, "fingerprint": "t" * 32}}

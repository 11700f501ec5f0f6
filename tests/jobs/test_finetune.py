"""Fine-tuning without Ray: what it learns, resumes and starts from, and that each setting has an effect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import finetune as job
from jobs.checkpoint import Cursor, best_checkpoint, discard, list_checkpoints, read_cursor, write_checkpoint
from jobs.config import save_config
from jobs.finetune import FinetuneConfig, MultiClipConfig, find_source, load_classifier
from jobs.model_folder import load_classifier as load_model
from jobs.model_folder import load_model as load_pretrained_model
from jobs.pretrain import PretrainConfig
from jobs.training import _open_run
from models.stage2 import resize_positions
from models.vimpac import VimpacBackbone, VimpacObjective, VimpacObjectiveConfig
from pipeline.errors import ConfigError
from pipeline.labelled import LabelledConfig
from tests.jobs.labelled_tokens import CLASSES, NETWORK, finetune, make_config, make_labelled_tokens, open_run


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune") / "tokens"
    return make_labelled_tokens(folder, {"train": 8, "val": 4, "test": 4})


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def accuracies(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["val_accuracy"] for row in rows if "val_accuracy" in row}


def test_it_learns_and_says_so_of_the_validation_split(tokens: Path, tmp_path: Path) -> None:
    config = make_config(tokens, tmp_path / "run")
    config = replace(config, loop=replace(config.loop, picture_every_steps=12))
    rows = finetune(config)
    assert losses(rows)[0] == pytest.approx(1.0986, abs=1e-3)  # log 3: every class is equally likely at first
    assert losses(rows)[-1] < 0.75 and rows[0].keys() >= {
        "accuracy",
        "loss_classification",
        "clips_per_s",
        "tokens_per_s",
    }
    assert accuracies(rows).keys() == {8, 16, 24} and accuracies(rows)[24] == 1.0
    assert read_cursor(best_checkpoint(config.out)).val_accuracy == 1.0
    assert {path.name for path in (config.out / "pictures").iterdir()} == {
        "val_confusion_00000012.png",
        "val_confusion_00000024.png",
    }
    model = load_model(config.out / "model")
    assert model.classes == CLASSES and not model.training
    codes = torch.full((1, *NETWORK.shape), 25)
    assert model.classes[int(model.logits(codes).argmax())] == "run"
    with pytest.raises(ConfigError, match="holds no pre-trained model"):
        load_pretrained_model(config.out / "model")
    with pytest.raises(ConfigError, match="holds no classifier"):
        load_model(tokens)


def test_a_resumed_run_has_the_same_losses_bit_for_bit(tokens: Path, tmp_path: Path) -> None:
    backbone = replace(NETWORK, dropout=0.1)
    whole = finetune(make_config(tokens, tmp_path / "whole", backbone=backbone))
    broken = make_config(tokens, tmp_path / "broken", backbone=backbone)
    finetune(broken)
    discard(list_checkpoints(broken.out)[-1])  # back to step 16
    rows = finetune(broken)
    assert losses(rows) == losses(whole) and accuracies(rows) == accuracies(whole)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        ours, theirs = (list_checkpoints(tmp_path / run)[-1] / name for run in ("broken", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.fixture(scope="module")
def pretrained(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run of one checkpoint, of another network and grid."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    config = PretrainConfig(
        tokens=str(tokens),
        out=out,
        backbone=replace(NETWORK, layers=2, num_frames=2, grid_height=4, grid_width=4, dropout=0.1),
        objective=VimpacObjectiveConfig(head_hidden=16, head_out=8),
    )
    open_run(config)
    torch.manual_seed(7)
    objective = VimpacObjective(VimpacBackbone(config.backbone), config.objective)
    write_checkpoint(out, objective.state_dict(), {}, Cursor())
    return out


def start(config: FinetuneConfig) -> FinetuneConfig:
    """What the job does before the workers begin, for a run that starts from another."""
    assert config.from_run is not None
    source, checkpoint = find_source(config.from_run)
    config = replace(config, backbone=job._take_network(config.backbone, source.backbone))
    open_run(config)
    job._start_from(config, source, checkpoint, CLASSES)
    return config


def test_it_starts_from_a_run_whose_network_it_takes_over(tokens: Path, pretrained: Path, tmp_path: Path) -> None:
    config = start(make_config(tokens, tmp_path / "run", from_run=pretrained))
    assert config.backbone == replace(NETWORK, layers=2)  # dropout, frames and grid are its own
    first = load_classifier(config, CLASSES, list_checkpoints(config.out)[0])
    source = find_source(pretrained)[1]
    weights = job.load_objective(find_source(pretrained)[0], source).state_dict()
    expected = resize_positions(weights, (2, 2), num_frames=3)
    for name, value in first.backbone.state_dict().items():
        assert torch.equal(value, expected[f"backbone.{name}"])
    assert not first.head.weight.any()
    rows = finetune(config)
    assert losses(rows)[0] == pytest.approx(1.0986, abs=1e-3) and losses(rows)[-1] < losses(rows)[0]
    assert find_source(source)[1] == source  # a checkpoint of a run will do as well


def test_frozen_leaves_the_backbone_as_it_was(tokens: Path, pretrained: Path, tmp_path: Path) -> None:
    config = start(make_config(tokens, tmp_path / "run", from_run=pretrained, frozen=True))
    finetune(config)
    first, last = (load_classifier(config, CLASSES, list_checkpoints(config.out)[place]) for place in (0, -1))
    changed = {name for name, value in last.state_dict().items() if not torch.equal(value, first.state_dict()[name])}
    assert changed == {"head.weight", "head.bias"}


def test_settings_of_the_data_change_what_is_trained_on(tokens: Path, tmp_path: Path) -> None:
    def first_losses(name: str, **changes: Any) -> list[float]:
        config = make_config(tokens, tmp_path / name)
        short = replace(config.loop, steps=3, save_every_steps=3)
        return losses(finetune(replace(config, loop=short, loader=replace(config.loader, **changes))))

    plain = first_losses("plain")
    for name, changes in {
        "fps": {"fps": 16.0},
        "views": {"views": job.PLAIN},
        "seed": {"seed": 1},
        "batch": {"batch_size": 6},
    }.items():
        assert first_losses(name, **changes) != plain, name


def test_without_a_validation_split_nothing_is_validated_or_drawn(tmp_path: Path) -> None:
    tokens = make_labelled_tokens(tmp_path / "tokens", {"train": 4}, views=("",))
    config = make_config(tokens, tmp_path / "run")
    rows = finetune(replace(config, loop=replace(config.loop, steps=2, picture_every_steps=1)))
    assert not accuracies(rows) and not (config.out / "pictures").exists()
    assert job._conclude(config, CLASSES) == {"classes": 3}


def refused(config: FinetuneConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job.run(config)
    assert not config.out.exists()


def test_wrong_settings_are_refused_before_any_work(tokens: Path, tmp_path: Path) -> None:
    config = make_config(tokens, tmp_path / "run")
    refused(replace(config, from_run=tmp_path), "from_run: .* holds no pre-training run with a checkpoint")
    refused(replace(config, backbone=replace(NETWORK, codebook_size=99)), r"codebook of 64; recipe debug expects 99")
    refused(
        replace(config, backbone=replace(NETWORK, grid_height=4)),
        r"holds grids of \[\(2, 2\)\] tokens; the model takes",
    )
    refused(replace(config, loader=replace(config.loader, fps=5.0)), "loader.fps = 5.0")
    refused(replace(config, workers=replace(config.workers, num_workers=5)), "batch_size = 12 does not divide by the 5")
    refused(replace(config, loop=replace(config.loop, parallel="fsdp")), "fsdp cannot measure the validation split")
    with pytest.raises(ConfigError, match=r"epochs = -1.0"):
        replace(config, epochs=-1.0)
    with pytest.raises(ConfigError, match=r"0 with loop.schedule_steps = 30"):
        replace(config, epochs=1.0, loop=replace(config.loop, schedule_steps=30))
    with pytest.raises(ConfigError, match=r"test.num_clips = 0"):
        MultiClipConfig(num_clips=0)


def test_a_label_that_training_never_saw_is_refused(tokens: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "splits.csv"
    manifest.write_text("video,label,split\njump/0.mp4,jump,train\nrun/1.mp4,run,train\nsit/2.mp4,sit,test\n")
    config = make_config(tokens, tmp_path / "run", loader=LabelledConfig(batch_size=2, splits=manifest))
    refused(config, r"sample \S+ \(sit/2.mp4\) of split test has the label 'sit', which no training sample had")


def test_codes_of_another_tokenizer_are_refused(pretrained: Path, tmp_path: Path) -> None:
    tokens = make_labelled_tokens(tmp_path / "tokens", {"train": 4}, tokenizer="u" * 32)
    refused(
        make_config(tokens, tmp_path / "run", from_run=pretrained), r"trained on other codes: tokenizer t+ \(here u+\)"
    )


def test_how_a_run_is_tested_is_no_part_of_its_identity(tokens: Path, tmp_path: Path) -> None:
    config = make_config(tokens, tmp_path / "run")
    before = _open_run(config.out, config, [])
    assert _open_run(config.out, replace(config, test=MultiClipConfig(num_clips=7)), []) == before
    with pytest.raises(ConfigError, match=r"loader.fps = 8.0 \(now 4.0\)"):
        _open_run(config.out, replace(config, loader=replace(config.loader, fps=4.0)), [])
    assert json.loads((config.out / "config.json").read_text())["test"]["num_clips"] == 7
    save_config(config.out, config)

"""A model folder gives the same network to our loader and to MLflow's, and neither unpickles anything of ours."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.config import CONFIG_NAME
from jobs.model_folder import Features, add_mlflow_model, load_model, write_model
from jobs.registry import digest_model
from jobs.run_files import DamagedRun
from models.vimpac import VimpacBackbone, VimpacConfig, VimpacObjective, VimpacObjectiveConfig
from pipeline.errors import ConfigError

CONFIG = VimpacConfig(
    layers=1, hidden=16, heads=2, head_dim=8, mlp=16, num_frames=3, grid_height=2, grid_width=3, codebook_size=16
)


@pytest.fixture(autouse=True)
def refuse_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")


@pytest.fixture(scope="module")
def objective() -> VimpacObjective:
    torch.manual_seed(0)
    return VimpacObjective(VimpacBackbone(CONFIG), VimpacObjectiveConfig(head_hidden=8, head_out=4)).eval()


@pytest.fixture(scope="module")
def folder(objective: VimpacObjective, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    (run / CONFIG_NAME).write_text('{"recipe": "debug"}')
    write_model(run / "model", objective, run)
    add_mlflow_model(run / "model", objective)
    return run / "model"


def test_each_export_of_a_network_is_the_same_model(folder: Path, objective: VimpacObjective, tmp_path: Path) -> None:
    shutil.copy(folder.parent / CONFIG_NAME, tmp_path)
    write_model(tmp_path / "model", objective, tmp_path)
    half = digest_model(tmp_path / "model")
    add_mlflow_model(tmp_path / "model", objective)
    assert (tmp_path / "model" / "MLmodel").read_text() != (folder / "MLmodel").read_text()  # a UUID, a time
    assert digest_model(tmp_path / "model") == digest_model(folder) != half


def draw_tokens(num_clips: int) -> torch.Tensor:
    tokens = torch.randint(CONFIG.codebook_size, (num_clips, *CONFIG.shape), generator=torch.Generator().manual_seed(1))
    tokens[0, 1:] = CONFIG.pad_id
    return tokens


def test_both_loaders_give_the_network_that_was_trained(folder: Path, objective: VimpacObjective) -> None:
    import mlflow.pytorch

    ours, theirs = load_model(folder), mlflow.pytorch.load_model(str(folder))
    assert ours.config == objective.config and ours.backbone.config == CONFIG
    for num_clips in (1, 2, 5):  # the graph was traced with two
        tokens = draw_tokens(num_clips)
        with torch.inference_mode():
            cls, features, _ = objective.backbone(tokens)
            assert torch.equal(ours.backbone(tokens).cls, cls)
            out = theirs(tokens)
        torch.testing.assert_close(out[:, 0], cls)
        torch.testing.assert_close(out[:, 1:], features.flatten(1, 3))
    assert json.loads((folder / "run_config.json").read_text()) == {"recipe": "debug"}


def test_the_signature_says_what_goes_in_and_out(folder: Path, objective: VimpacObjective) -> None:
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(str(folder))
    inputs, outputs = model.metadata.signature.inputs.inputs[0], model.metadata.signature.outputs.inputs[0]
    assert (inputs.type, inputs.shape) == ("int64", (-1, *CONFIG.shape))
    assert (outputs.type, outputs.shape) == ("float32", (-1, 19, CONFIG.hidden))
    out = model.predict(draw_tokens(3).numpy())
    with torch.inference_mode():
        torch.testing.assert_close(torch.as_tensor(out), Features(objective.backbone)(draw_tokens(3)))


def test_a_pickle_in_place_of_the_graph_is_refused(folder: Path, tmp_path: Path) -> None:
    """What then keeps `mlflow.pytorch.load_model` from running code is MLflow's check, so this is to notice if it goes."""
    import mlflow.pytorch
    from mlflow.exceptions import MlflowException

    evil = tmp_path / "model"
    shutil.copytree(folder, evil)
    graph = evil / "data" / "model.pt2"
    with zipfile.ZipFile(graph) as archive:
        name = next(one for one in archive.namelist() if one.endswith("model.json"))
        root = name.partition("/")[0]
    with zipfile.ZipFile(graph, "a") as archive:
        archive.writestr(f"{root}/data/constants/evil", b"cos\nsystem\n(S'touch evil'\ntR.")
    with pytest.raises(MlflowException, match="not a pickle-free payload"):
        mlflow.pytorch.load_model(str(evil))


@pytest.mark.parametrize("damage", ["missing", "no json", "other kind of model"])
def test_a_folder_without_a_model_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    if damage != "missing":
        (tmp_path / "config.json").write_text("{" if damage == "no json" else json.dumps({"kind": "vqvae"}))
    with pytest.raises(ConfigError, match="holds no pre-trained model"):
        load_model(tmp_path)


def test_weights_of_another_network_are_refused(folder: Path, objective: VimpacObjective, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text("{}")
    other = VimpacObjective(VimpacBackbone(replace(CONFIG, hidden=32)), objective.config)
    write_model(tmp_path / "model", other, tmp_path)
    (tmp_path / "model" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(DamagedRun, match=r"model\.safetensors: tensor .* is \('F32'"):
        load_model(tmp_path / "model")

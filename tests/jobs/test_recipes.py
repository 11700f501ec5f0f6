"""Recipes: sizes of their networks, their schedules, and that an ablation changes what it says and nothing else."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.cli import parse_options, run
from jobs.config import from_plain, save_config, to_plain
from jobs.pretrain import PretrainConfig
from jobs.recipes import RECIPES, find_recipe
from models.optim import lr_at
from models.vimpac import VimpacBackbone, VimpacObjective
from pipeline.dataset import config_differences
from pipeline.errors import ConfigError

PARAMETERS = {
    "debug": 352_128,
    "vimpac-small": 29_442_048,
    "vimpac-base": 119_748_096,
    "vimpac-large": 210_106_368,
    "vimpac-large-stage2": 210_139_136,  # 2 x 16 more positions of 1,024
}

GRID_256 = {"backbone.grid_height": 32, "backbone.grid_width": 32}
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "vimpac-small-mp": ("vimpac-small", {"objective.alpha": 0.0}),
    "vimpac-small-cl": ("vimpac-small", {"objective.mlm_weight": 0.0}),
    "vimpac-small-mp-iid": ("vimpac-small-mp", {"objective.mask": "iid"}),
    "vimpac-small-mp-256": ("vimpac-small-mp", {**GRID_256, "objective.num_blocks": 6}),
    "vimpac-small-mp-256-iid": ("vimpac-small-mp-256", {"objective.mask": "iid", "objective.iid_fraction": 0.152}),
    "vimpac-small-txhxw": ("vimpac-small", {"backbone.layout": "TxHxW"}),
    "vimpac-small-t-hxw": ("vimpac-small", {"backbone.layout": "T,HxW"}),
    "vimpac-small-t-h-w": ("vimpac-small", {"backbone.layout": "T,H,W"}),
    "vimpac-small-preln": ("vimpac-small", {"backbone.norm": "pre"}),
    "vimpac-6x768": ("vimpac-small", {"backbone.hidden": 768, "backbone.heads": 12, "backbone.mlp": 3072}),
    "vimpac-12x512": ("vimpac-small", {"backbone.layers": 12}),
    "vimpac-24x1024-half": (
        "vimpac-small",
        {"backbone.layers": 24, "backbone.hidden": 1024, "backbone.heads": 16, "backbone.head_dim": 32},
    ),
    "vimpac-small-10x128": ("vimpac-small", {"backbone.num_frames": 10, "objective.num_blocks": 6}),
    "vimpac-small-5x256": ("vimpac-small", {**GRID_256, "objective.num_blocks": 6}),
    "vimpac-small-10x256": ("vimpac-small", {"backbone.num_frames": 10, **GRID_256, "objective.num_blocks": 7}),
    "vimpac-base": (
        "vimpac-small",
        {"backbone.layers": 12, "backbone.hidden": 768, "backbone.heads": 12, "backbone.mlp": 3072},
    ),
}


def differences(base: str, other: str) -> dict[str, Any]:
    """Dotted name -> value in `other`, of all that differs but the name and what a person must fill in."""
    pairs = config_differences(to_plain(find_recipe(base)), to_plain(find_recipe(other)))
    return {name: value for name, _, value in pairs if name != "recipe"}


def build(name: str) -> VimpacObjective:
    config = find_recipe(name)
    with torch.device("meta"):
        return VimpacObjective(VimpacBackbone(config.backbone), config.objective)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_and_say_what_they_are(name: str) -> None:
    backbone = build(name).backbone
    if name in PARAMETERS:
        assert sum(parameter.numel() for parameter in backbone.parameters()) == PARAMETERS[name]
    doc = (RECIPES[name].__doc__ or "").splitlines()[0]
    assert 10 < len(doc) < 110, "one line for --help"
    config = find_recipe(name)
    assert config.recipe == name
    filled = to_plain(config) | {"tokens": "t", "out": "o", "continue_from": None}
    assert to_plain(from_plain(filled, PretrainConfig, name)) == filled


def test_every_recipe_has_a_stated_difference() -> None:
    assert RECIPES.keys() == ABLATIONS.keys() | PARAMETERS.keys()


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_from_its_base_in_its_stated_fields_alone(name: str) -> None:
    base, stated = ABLATIONS[name]
    assert differences(base, name) == stated
    shape = find_recipe(name).backbone
    assert shape.heads == shape.hidden // 64  # as in all of the paper's networks


def test_the_network_of_large_is_the_one_of_its_ablation() -> None:
    assert find_recipe("vimpac-24x1024-half").backbone == find_recipe("vimpac-large").backbone


def test_large_is_one_schedule_in_two_stages() -> None:
    one, two = find_recipe("vimpac-large"), find_recipe("vimpac-large-stage2")
    assert differences("vimpac-large", "vimpac-large-stage2").keys() == {
        *("backbone.grid_height", "backbone.grid_width", "objective.num_blocks"),
        *("loop.steps", "loop.schedule_steps", "continue_from"),
    }
    assert two.backbone.shape == (5, 32, 32) and two.objective.num_blocks == 6
    assert (one.loop.steps, one.loop.num_schedule_steps) == (108_000, 120_000)
    assert (two.loop.steps, two.loop.num_schedule_steps) == (120_000, 120_000)
    assert one.optim == two.optim and lr_at(5_999, 120_000, one.optim) == one.optim.lr == 3e-4
    assert lr_at(108_000, one.loop.num_schedule_steps, one.optim) == pytest.approx(3e-4 * 12 / 114)


def test_the_contrastive_heads_of_the_paper() -> None:
    small, large = build("vimpac-small").contrastive_head, build("vimpac-large").contrastive_head
    assert small is not None and large is not None
    assert [tuple(p.shape) for p in small.parameters() if p.ndim == 2] == [(2048, 512), (256, 2048)]
    assert [tuple(p.shape) for p in large.parameters() if p.ndim == 2] == [(4096, 1024), (4096, 4096), (256, 4096)]


def test_help_lists_every_recipe_with_its_line() -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        assert run(["pretrain", "--help"]) == 0
    rows = {line.split()[0]: line for line in out.getvalue().splitlines() if line.startswith("  ")}
    for name, make in RECIPES.items():
        assert (make.__doc__ or "").splitlines()[0] in rows[name]


def test_a_saved_config_runs_again_without_its_recipe(tmp_path: Path) -> None:
    config = replace(find_recipe("debug"), tokens=str(tmp_path / "t"), out=tmp_path / "run")
    saved = str(save_config(tmp_path, config))
    for words in (["--config", saved], ["debug", f"--config={saved}"]):
        assert parse_options("pretrain", words) == config
    changed = parse_options("pretrain", ["--config", saved, "--loop.seed", "7"])
    assert changed == replace(config, loop=replace(config.loop, seed=7))
    with pytest.raises(ConfigError, match="is of recipe debug, not vimpac-small"):
        parse_options("pretrain", ["vimpac-small", "--config", saved])


def test_stage_two_needs_a_run_to_continue() -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        assert run(["pretrain", "vimpac-large-stage2", "--tokens", "t", "--out", "o"]) == 2
    assert "continue-from" in out.getvalue()

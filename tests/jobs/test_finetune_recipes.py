"""Recipes of fine-tuning: the paper's numbers by data set and size."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import pytest

from jobs.cli import run
from jobs.config import from_plain, to_plain
from jobs.finetune import FinetuneConfig
from jobs.finetune_recipes import RECIPES, find_recipe
from jobs.recipes import find_recipe as find_pretraining
from models.vimpac import SIZES
from pipeline.errors import ConfigError

PAPER = {"ssv2": (22, 4.0), "diving48": (50, 4.0), "ucf101": (50, 2.0), "hmdb51": (50, 4.0), "k400": (30, 2.0)}


@pytest.mark.parametrize("data", PAPER)
@pytest.mark.parametrize(("size", "lr"), [("small", 1e-4), ("base", 1e-4), ("large", 5e-5)])
def test_the_papers_numbers(data: str, size: str, lr: float) -> None:
    recipe = find_recipe(f"finetune-{data}" + ("" if size == "small" else f"-{size}"))
    epochs, fps = PAPER[data]
    assert (recipe.epochs, recipe.loader.fps, recipe.loader.batch_size) == (epochs, fps, 128)
    optim = recipe.optim
    assert (optim.lr, optim.betas, optim.weight_decay, optim.warmup_share) == (lr, (0.9, 0.999), 0.01, 0.1)
    assert (optim.schedule, optim.final_lr, optim.clip_norm) == ("linear", 0.0, 1.0)
    assert recipe.backbone.shape == (10, 32, 32) and recipe.backbone.hidden == SIZES[size].hidden
    assert recipe.loader.views.resized and len(recipe.loader.views.crops) == 3
    assert recipe.loader.views.flip == (data != "ssv2")
    assert recipe.test.num_clips == 10 and not recipe.test.views.flip and not recipe.test.views.resized
    assert recipe.test.views.crops == (("center",) if data == "ssv2" else ("start", "center", "end"))


def test_debug_has_the_network_of_its_pretraining() -> None:
    assert find_recipe("debug").backbone == find_pretraining("debug").backbone


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_what_they_are_and_survive_their_file(name: str) -> None:
    assert 10 < len((RECIPES[name].__doc__ or "").splitlines()[0]) < 110, "one line for --help"
    config = find_recipe(name)
    assert config.recipe == name
    filled = to_plain(config) | {"tokens": "t", "out": "o"}
    assert to_plain(from_plain(filled, FinetuneConfig, name)) == filled


def test_the_command_line_lists_them_and_names_a_wrong_one() -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        assert run(["finetune", "--help"]) == 0
    assert all(f"  {name} " in out.getvalue() for name in RECIPES) and "RECIPE TOKENS OUT" in out.getvalue()
    with pytest.raises(ConfigError, match=r"no such recipe; allowed: debug, finetune-ssv2"):
        find_recipe("finetune-imagenet")
    with redirect_stdout(out):
        assert run(["finetune", "debug", "nowhere", "run"]) == 2
    assert "nowhere is not a dataset" in out.getvalue()

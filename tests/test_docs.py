"""What the documents show works: the blocks of docs/extending.md run, and every command's options are there."""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs.cli import _JOBS, _take_name, parse_job, parse_options
from jobs.journal import read_journal
from jobs.loop import Context, LoopConfig, train
from jobs.recipes import RECIPES, find_recipe
from models.optim import OptimConfig
from models.tokenizers import base
from models.vimpac import VimpacBackbone, VimpacConfig
from pipeline.loader import LoaderConfig, TokenLoader
from tests.pipeline.datasets import GRID, make_token_dataset

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def extension() -> Iterator[types.ModuleType]:
    """The Python blocks of docs/extending.md as a module."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), re.DOTALL)
    module = types.ModuleType("extension")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "extension", module)  # dataclasses look their module up
        patch.setitem(RECIPES, "vimpac-small-colours", RECIPES["vimpac-small"])  # so that it is taken out again
        exec(compile("\n".join(blocks), "docs/extending.md", "exec"), module.__dict__)  # noqa: S102 (our own document)
        yield module


def test_a_tokenizer_of_ones_own(extension: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._KINDS, "colours", ("extension", "Colours"))
    extension.Colours(extension.ColourConfig(patch=8)).save(tmp_path)
    tokenizer = base.load_tokenizer(tmp_path)
    frames = torch.full((2, 16, 24, 3), 200, dtype=torch.uint8)
    frames[1, 8:, 16:] = torch.tensor([10, 100, 250], dtype=torch.uint8)
    codes = tokenizer.encode(frames)
    assert codes.shape == (2, 2, 3) and codes.dtype == torch.uint16 and len(codes.unique()) == 2
    assert (tokenizer.decode(codes).int() - frames.int()).abs().max() <= 255 / 16 + 1


def test_a_target_of_ones_own_trains_on_tokens(extension: types.ModuleType, tmp_path: Path) -> None:
    tokens = make_token_dataset(tmp_path / "tokens", [[6] * 8])
    torch.manual_seed(0)
    network = VimpacConfig(
        layers=1, hidden=16, heads=2, head_dim=8, mlp=16, num_frames=4, grid_height=2, grid_width=3, codebook_size=64
    )
    window = (4, *GRID)
    loader = TokenLoader(
        tokens, LoaderConfig(batch_size=4), window=window, num_views=2, pad=network.pad_id, rank=0, world_size=1
    )
    objective = extension.Arrow(VimpacBackbone(network))
    loop = LoopConfig(steps=2, save_every_steps=2, picture_every_steps=0)
    train(objective, loader, Context(run=tmp_path / "run"), loop, OptimConfig())
    rows = list(read_journal(tmp_path / "run" / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2] and all(0 <= row["accuracy"] <= 1 for row in rows)
    assert rows[0]["loss"] == pytest.approx(rows[0]["loss_arrow"])


def test_a_recipe_of_ones_own(extension: types.ModuleType) -> None:
    config = find_recipe("vimpac-small-colours")
    assert config.backbone.codebook_size == 512 and config.recipe == "vimpac-small-colours"


def read_commands() -> list[str]:
    """The lines `tokenreel ...` of the shell blocks in README.md and docs/, without comments; "…" stands for what was said."""
    pages = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS.parent / "infra").rglob("*.md"))]
    blocks = "".join("\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)) for page in pages)
    lines = re.findall(r"^(?:\.venv/bin/)?tokenreel (.*)$", blocks.replace("\\\n", " "), re.MULTILINE)
    return sorted({line.split(" #")[0].strip() for line in lines if "…" not in line})


def test_commands_of_the_documents_are_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")  # `submit --env` hands it over
    commands = read_commands()
    assert len(commands) > 40
    for command in commands:
        words = shlex.split(command.replace("$PWD", "."))
        name, rest = _take_name(words)
        assert name in _JOBS, command
        options = parse_options(name, rest)
        if name == "submit":
            parse_job(list(options.words))

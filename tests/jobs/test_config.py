from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli import parse_options
from jobs.config import load_config, save_config
from jobs.paths import absolute_paths
from jobs.recipes import RECIPES, find_recipe
from jobs.shard import ShardConfig
from pipeline.errors import ConfigError
from tests.conftest import small_pretrain_config, small_shard_config


def test_a_saved_config_loads_back_equal(tmp_path: Path) -> None:
    for config in (small_shard_config(Path("a"), Path("b")), small_pretrain_config(Path("a"), Path("b"))):
        assert load_config(save_config(tmp_path, config), type(config)) == absolute_paths(config)


def test_an_unknown_name_in_a_saved_config_is_named(tmp_path: Path) -> None:
    path = save_config(tmp_path, small_shard_config(Path("a"), Path("b")))
    plain = json.loads(path.read_text())
    plain["settings"]["clips"]["windows"] = 3
    path.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match=r"settings\.clips\.windows"):
        load_config(path, ShardConfig)


def test_a_wrong_value_in_a_saved_config_is_named(tmp_path: Path) -> None:
    path = save_config(tmp_path, small_shard_config(Path("a"), Path("b")))
    path.write_text(path.read_text().replace('"window"', '"widow"'))
    with pytest.raises(ConfigError, match=r"settings\.clips\.mode"):
        load_config(path, ShardConfig)


def test_every_recipe_builds_and_an_unknown_one_lists_them() -> None:
    assert all(find_recipe(name).recipe == name for name in RECIPES)
    with pytest.raises(ConfigError, match="debug"):
        find_recipe("nope")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("shard C O", "--clips.stride-s"),
        ("shard C O", "--shard-bytes"),
        ("shard C O --storage transcode", "--transcode.fps"),
        ("tokenize C O --tokenizer T", "--num-encoders"),
        ("embed T R O", "--num-encoders"),
        ("embed T R O", "--stride-frames"),
        ("embed T R O", "--layer"),
    ],
)
def test_what_an_option_leaves_to_us_is_spelled_none(words: str, option: str) -> None:
    """One word for all of them, and the default; 0 is a value like others, and refused before any work."""
    name, *rest = words.split()
    assert parse_options(name, [*rest, option, "None"]) == parse_options(name, rest)
    for value in ("0", "-1", "nan"):
        with pytest.raises(ConfigError, match=option.rpartition(".")[2].strip("-").replace("-", ".")):
            parse_options(name, [*rest, f"{option}={value}"])

from __future__ import annotations

import shlex

from tests.infra.versions import image, load, ray_start_options


def test_rays_own_schema_takes_it() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(load("ray/cluster.yaml")[0]))


def test_what_it_starts() -> None:
    config = load("ray/cluster.yaml")[0]
    assert config["docker"]["image"] == image()
    nodes = config["available_node_types"]
    assert nodes[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert sum(node.get("max_workers", 0) for node in nodes.values()) == config["max_workers"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        for words in map(shlex.split, commands):
            if words[:2] == ["ray", "start"]:
                assert {word.partition("=")[0] for word in words[2:]} <= ray_start_options()

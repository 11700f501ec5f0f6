"""Stage two: positions on a finer grid, and Adam moments that go with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.optim import MOMENTS, OptimConfig, build_optimizer, update_ema
from models.stage2 import resize_moments, resize_positions
from models.vimpac import VimpacObjective
from tests.models.test_vimpac import TINY, make_batch, make_loud_backbone, make_objective

GRID = (TINY.grid_height, TINY.grid_width)


def test_the_same_grid_changes_nothing() -> None:
    backbone = make_loud_backbone()
    state = backbone.state_dict()
    resized = resize_positions(state, GRID)
    assert resized.keys() == state.keys() and all(torch.equal(resized[name], state[name]) for name in state)
    tokens = make_batch()["tokens"][:, 0]
    before = backbone(tokens).cls
    backbone.load_state_dict(resized)
    assert torch.equal(backbone(tokens).cls, before)


def test_only_the_positions_of_height_and_width_change() -> None:
    state = make_objective().state_dict()
    resized = resize_positions(state, (8, 9))
    changed = {name for name in state if state[name] is not resized[name]}
    assert changed == {"backbone.position_h", "backbone.position_w"}
    assert resized["backbone.position_h"].shape == (8, 32) and resized["backbone.position_w"].shape == (9, 32)
    assert state["backbone.position_h"].shape == (4, 32)  # what was passed stays


def test_frames_are_resized_where_that_is_asked_for() -> None:
    state = make_objective().state_dict()
    resized = resize_positions(state, GRID, num_frames=2 * TINY.num_frames)
    changed = {name for name in state if state[name] is not resized[name]}
    assert changed == {"backbone.position_t"}
    t = resized["backbone.position_t"]
    assert t.shape == (2 * TINY.num_frames, 32)
    assert torch.equal(t[[0, -1]], state["backbone.position_t"][[0, -1]])  # the ends are kept
    with pytest.raises(ValueError, match="num_frames is -1"):
        resize_positions(state, GRID, num_frames=-1)


def test_embeddings_stand_at_the_centres_of_their_tokens() -> None:
    positions = torch.tensor([[0.0], [10.0], [20.0], [30.0]])
    doubled = resize_positions({"position_h": positions}, (8, 1))["position_h"]
    # New centres, in steps of the old grid: -1/4, 1/4, 3/4 ...; the ends are kept.
    assert doubled.flatten().tolist() == [0.0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30.0]
    halved = resize_positions({"position_w": positions}, (1, 2))["position_w"]
    assert halved.flatten().tolist() == [5.0, 25.0]


def make_moments(objective: VimpacObjective) -> tuple[dict[str, Tensor], list[str]]:
    """AdamW's state after a step, as a checkpoint holds it, and the names of the parameters by number."""
    optimizer = build_optimizer(objective, OptimConfig())
    torch.stack(list(objective(make_batch())["losses"].values())).sum().backward()
    optimizer.step()
    update_ema(optimizer, 0.9)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        f"{number}.{kind}": value
        for number, parameter in enumerate(parameters)
        for kind, value in optimizer.state[parameter].items()
    }
    return state, [names[id(parameter)] for parameter in parameters]


def test_moments_are_resized_as_the_positions_are() -> None:
    objective = make_objective()
    state, names = make_moments(objective)
    with torch.device("meta"):
        empty = make_objective()
    resized = resize_moments(state, empty, (8, 12))
    assert resized.keys() == state.keys()
    for number, name in enumerate(names):
        for kind in (*MOMENTS, "step"):
            before, after = state[f"{number}.{kind}"], resized[f"{number}.{kind}"]
            if kind != "step" and name.endswith(("position_h", "position_w")):
                assert torch.equal(after, resize_positions({name: before}, (8, 12))[name])
                assert after.shape[0] == 2 * before.shape[0] and after.abs().sum() > 0
                assert torch.equal(after[0], before[0]) and torch.equal(after[-1], before[-1])
                assert kind != "exp_avg_sq" or (after >= 0).all()
            else:
                assert after is before, name


def test_a_bad_grid_is_named() -> None:
    with pytest.raises(ValueError, match=r"grid is \(0, 4\), num_frames is None; allowed"):
        resize_positions({}, (0, 4))

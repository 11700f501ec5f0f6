"""VIMPAC: exact sizes, the guarantees of the backbone, and the objective down to a batch it learns by heart."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.objective import Fraction
from models.optim import OptimConfig, build_optimizer, clip_gradients
from models.vimpac import SIZES, Layout, VimpacBackbone, VimpacConfig, VimpacObjective, VimpacObjectiveConfig

TINY = VimpacConfig(
    layers=2,
    hidden=32,
    heads=4,
    head_dim=8,
    mlp=64,
    num_frames=3,
    grid_height=4,
    grid_width=6,
    codebook_size=50,
    dropout=0.0,
)
HEAD = VimpacObjectiveConfig(head_hidden=32, head_out=16)


def make_batch(config: VimpacConfig = TINY, videos: int = 4, views: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(config.codebook_size, (videos, views, *config.shape), generator=generator),
        "seeds": torch.arange(videos * views).view(videos, views),
        "keys": [str(i) for i in range(videos)],
    }


def make_objective(config: VimpacConfig = TINY, objective: VimpacObjectiveConfig = HEAD) -> VimpacObjective:
    torch.manual_seed(0)
    return VimpacObjective(VimpacBackbone(config), objective)


def values(named: dict[str, Tensor | Fraction]) -> list[Tensor]:
    """The numbers of metrics or losses."""
    return [value.value if isinstance(value, Fraction) else value for value in named.values()]


def make_loud_backbone(config: VimpacConfig = TINY) -> VimpacBackbone:
    """A backbone with weights far from 0, so that attention is not near uniform and mistakes show."""
    torch.manual_seed(0)
    backbone = VimpacBackbone(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return backbone


@pytest.mark.parametrize(("size", "count"), [("small", 29_442_048), ("base", 119_748_096), ("large", 210_106_368)])
def test_parameter_counts_of_the_paper(size: str, count: int) -> None:
    with torch.device("meta"):
        backbone = VimpacBackbone(SIZES[size])
    assert sum(parameter.numel() for parameter in backbone.parameters()) == count


def test_initial_weights() -> None:
    torch.manual_seed(0)
    backbone = VimpacBackbone(VimpacConfig(layers=4, hidden=512, heads=4, head_dim=32, mlp=512))
    stds = {name: p.std().item() for name, p in backbone.named_parameters() if p.ndim > 1}
    for name, std in stds.items():
        expected = 0.02 / math.sqrt(3) if name in ("position_t", "position_h", "position_w") else 0.02
        assert std == pytest.approx(expected, rel=0.15), name
    assert all(p.eq(0).all() for name, p in backbone.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_every_layout_and_norm_trains_all_its_weights(layout: Layout, norm: Any) -> None:
    objective = make_objective(replace(TINY, layout=layout, norm=norm, dropout=0.1))
    out = objective(make_batch())
    sum(out["losses"].values()).backward()  # type: ignore[union-attr]
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert not any(value.requires_grad for value in values(out["metrics"]))


def test_layouts_and_norms_differ() -> None:
    tokens = make_batch()["tokens"][:, 0]
    configs = [replace(TINY, layout=layout, norm=norm) for layout in get_args(Layout) for norm in ("post", "pre")]
    outputs = [make_loud_backbone(config)(tokens).cls for config in configs]
    for i, a in enumerate(outputs):
        assert not any(torch.allclose(a, b, atol=1e-3) for b in outputs[:i])


@pytest.mark.parametrize("layout", get_args(Layout))
def test_padding_does_not_reach_other_outputs(layout: Layout) -> None:
    config = replace(TINY, layout=layout)
    backbone = make_loud_backbone(config)
    tokens = make_batch()["tokens"][:, 0]
    tokens[:, 2:] = config.pad_id
    before = backbone(tokens)
    # What PAD holds.
    with torch.no_grad():
        backbone.token.weight[config.pad_id] += 5
    after = backbone(tokens)
    # How much PAD there is: the same weights on clips that end where the padding would begin.
    short = make_loud_backbone(replace(config, num_frames=2))
    weights = backbone.state_dict()
    short.load_state_dict({**weights, "position_t": weights["position_t"][:2]})
    without = short(tokens[:, :2])
    for features in (after, without):
        torch.testing.assert_close(features.cls, before.cls)
        torch.testing.assert_close(features.tokens[:, :2], before.tokens[:, :2])


@pytest.mark.parametrize("layout", get_args(Layout))
def test_clips_of_padding_alone_stay_finite(layout: Layout) -> None:
    objective = make_objective(replace(TINY, layout=layout))
    batch = make_batch()
    batch["tokens"][1:] = TINY.pad_id
    out = objective(batch)
    sum(out["losses"].values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    batch["tokens"][:] = TINY.pad_id  # nothing to predict at all
    out = objective(batch)
    assert out["losses"]["mlm"] == 0 and out["metrics"]["masked_share"] == (0, 0)
    assert all(value.isfinite() for value in out["losses"].values())
    out["losses"]["mlm"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


def test_intermediates_are_every_layer() -> None:
    backbone = make_loud_backbone()
    tokens = make_batch()["tokens"][:, 0]
    features = backbone(tokens, intermediates=True)
    assert len(features.layers) == 2 and backbone(tokens).layers == ()
    assert features.cls.shape == (4, 32) and features.tokens.shape == (4, 3, 4, 6, 32)
    torch.testing.assert_close(features.layers[-1], (features.cls, features.tokens))


def test_masked_only_logits_equal_full_logits() -> None:
    objective = make_objective(objective=replace(HEAD, alpha=0.0))
    batch = make_batch()
    loss = objective(batch)["losses"]["mlm"]
    tokens = batch["tokens"].flatten(0, 1)
    mask = objective.draw_masks(tokens, batch["seeds"].flatten())
    hidden = objective.backbone(torch.where(mask, TINY.mask_id, tokens)).tokens
    assert objective.mlm_head is not None
    full = objective.mlm_head(hidden, objective.backbone.token.weight)
    assert full.shape == (*tokens.shape, TINY.codebook_size)
    target = torch.where(mask, tokens, -100)
    torch.testing.assert_close(loss, F.cross_entropy(full.flatten(0, -2), target.flatten(), ignore_index=-100))
    predicted = objective.predict(tokens, mask)
    assert torch.equal(predicted[~mask], tokens[~mask])
    assert torch.equal(predicted[mask], full[mask].argmax(-1))


def test_accuracies_of_frames_against_a_count() -> None:
    objective, batch = make_objective(), make_batch()
    tokens = batch["tokens"].flatten(0, 1)
    mask = objective.draw_masks(tokens, batch["seeds"].flatten())
    with torch.no_grad():
        objective.mlm_head.bias[tokens[mask][0]] += 9.0  # type: ignore[union-attr]  # one code everywhere: some are right
    hits = (objective.predict(tokens, mask) == tokens) & mask
    found = objective(batch)["metrics"]
    for name, frames in (("", slice(None)), ("_first_frame", slice(1)), ("_last_frame", slice(2, 3))):
        assert found[f"masked_token_accuracy{name}"] == (hits[:, frames].sum(), mask[:, frames].sum())
    assert 0 < found["masked_token_accuracy"].value < 1


def batches_of_one_part(batch: dict[str, Any], num_parts: int) -> list[dict[str, Any]]:
    tokens, seeds = batch["tokens"].chunk(num_parts), batch["seeds"].chunk(num_parts)
    return [{"tokens": tokens[place], "seeds": seeds[place]} for place in range(num_parts)]


def run_ahead(objective: VimpacObjective, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with torch.no_grad():
        return list(objective.look_ahead(parts, lambda _, part: objective(part)))


@pytest.mark.parametrize("num_parts", [2, 4])
@pytest.mark.parametrize("negatives", ["step", "micro_batch"])
def test_parts_of_a_batch_against_the_whole(num_parts: int, negatives: Any) -> None:
    """Mean loss and gradient of the parts are the batch's; batch norm's statistics move once."""
    batch = make_batch()
    batch["tokens"][0, :, 1:] = TINY.pad_id  # parts of unequal numbers of masked tokens
    results = []
    for count in (1, num_parts):
        objective = make_objective(objective=replace(HEAD, negatives=negatives))
        # Clips that differ much: batch norm would blow up the rounding of an untrained model's.
        objective.backbone.load_state_dict(make_loud_backbone().state_dict())
        parts = run_ahead(objective, objective.split(batch, count))
        outs = [objective(part) for part in parts]
        losses = {name: torch.stack([out["losses"][name] for out in outs]).mean() for name in outs[0]["losses"]}
        sum(losses.values()).backward()  # type: ignore[union-attr]
        grads = {name: parameter.grad for name, parameter in objective.named_parameters()}
        share = sum(out["metrics"]["masked_share"].part for out in outs)
        flops = sum(out["counts"]["flops"] for out in outs)
        results.append((losses, grads, dict(objective.named_buffers()), share, flops))
    whole, split = results
    torch.testing.assert_close(split[0]["mlm"], whole[0]["mlm"])
    assert split[3] == whole[3]
    if negatives == "step":
        torch.testing.assert_close(split[:3], whole[:3], rtol=1e-4, atol=1e-5)
        assert split[4] == whole[4]
    else:
        alone = [objective(one)["losses"]["contrastive"] for one in batches_of_one_part(batch, num_parts)]
        torch.testing.assert_close(split[0]["contrastive"], torch.stack(alone).mean())
        assert split[0]["contrastive"].item() != pytest.approx(whole[0]["contrastive"].item(), rel=1e-3)
        assert split[4] < whole[4]


def test_masks_spare_padding() -> None:
    objective = make_objective()
    batch = make_batch()
    batch["tokens"][:, :, 1:] = TINY.pad_id
    tokens = batch["tokens"].flatten(0, 1)
    mask = objective.draw_masks(tokens, batch["seeds"].flatten())
    assert mask[:, 0].any() and not mask[:, 1:].any()
    share = objective(batch)["metrics"]["masked_share"].value
    assert share == mask[:, 0].float().mean()


def test_objective_settings_change_what_is_trained() -> None:
    batch = make_batch()
    both = make_objective()(batch)
    assert set(both["losses"]) == {"mlm", "contrastive"}
    accuracies = {f"masked_token_accuracy{where}" for where in ("", "_first_frame", "_last_frame")}
    assert set(both["metrics"]) == {"masked_share", "contrastive_accuracy", *accuracies}
    weighted = make_objective(objective=replace(HEAD, mlm_weight=2.0, alpha=0.5))(batch)
    assert weighted["losses"]["mlm"] == 2 * both["losses"]["mlm"]
    assert weighted["losses"]["contrastive"] == 0.5 * both["losses"]["contrastive"]
    only_masked = make_objective(objective=replace(HEAD, alpha=0.0))
    assert set(only_masked(make_batch(views=3))["losses"]) == {"mlm"} and only_masked.contrastive_head is None
    only_contrast = make_objective(objective=replace(HEAD, mlm_weight=0.0))
    assert set(only_contrast(batch)["losses"]) == {"contrastive"} and only_contrast.mlm_head is None
    iid = make_objective(objective=replace(HEAD, mask="iid", iid_fraction=0.6))(batch)
    assert iid["metrics"]["masked_share"].value == pytest.approx(0.6, abs=0.06)


def test_one_batch_is_learned_by_heart() -> None:
    objective = make_objective()
    config = OptimConfig(lr=5e-3, weight_decay=0.0)
    optimizer, batch = build_optimizer(objective, config), make_batch()
    first: Tensor = sum(objective(batch)["losses"].values())  # type: ignore[assignment]
    assert first.item() == pytest.approx(math.log(50) + 0.4 * math.log(7), rel=0.2)
    for _ in range(150):
        out = objective(batch)
        optimizer.zero_grad()
        sum(out["losses"].values()).backward()  # type: ignore[union-attr]
        clip_gradients(objective, config)
        optimizer.step()
    assert out["losses"]["mlm"] < 0.1
    assert out["metrics"]["masked_token_accuracy"].value > 0.95 and out["metrics"]["contrastive_accuracy"] == 1


def test_bfloat16_autocast_stays_close() -> None:
    objective, batch = make_objective(), make_batch()
    exact = objective(batch)["losses"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = objective(batch)["losses"]
    for name, loss in exact.items():
        assert rounded[name].dtype == torch.float32
        assert rounded[name].item() == pytest.approx(loss.item(), rel=0.05)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"heads": 3}, "heads is 3 with layout 'T,H|W'"),
        ({"layers": 0}, "layers is 0; allowed: >= 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"layout": "H"}, "layout is 'H'; allowed: TxHxW"),
        ({"norm": "none"}, "norm is 'none'; allowed: post, pre"),
        ({"codebook_size": 65536}, "codebook_size is 65536"),
    ],
)
def test_bad_backbone_settings_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        replace(TINY, **setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mask": "tube"}, "mask is 'tube'"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"iid_fraction": 0.0}, "iid_fraction is 0.0"),
        ({"mlm_weight": 0.0, "alpha": 0.0}, "mlm_weight is 0.0, alpha is 0.0"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"negatives": "video"}, "negatives is 'video'; allowed: step, micro_batch"),
    ],
)
def test_bad_objective_settings_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(HEAD, **setting)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"tokens are \(1, 2, 4, 6\); allowed: \(n, 3, 4, 6\)"):
        make_loud_backbone()(torch.zeros(1, 2, 4, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="1 clips a video"):
        make_objective()(make_batch(views=1))
    with pytest.raises(ValueError, match="no prediction head"):
        make_objective(objective=replace(HEAD, mlm_weight=0.0)).predict(torch.zeros(1), torch.zeros(1))

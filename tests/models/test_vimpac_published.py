"""Published weights: under their names, an independent naive forward computes what our model does with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.vimpac import VimpacBackbone, VimpacConfig, VimpacObjective, VimpacObjectiveConfig
from models.vimpac_published import from_published

HALF = VimpacConfig(  # inner width of attention 16, half of 32
    layers=2, hidden=32, heads=4, head_dim=4, mlp=64, num_frames=3, grid_height=2, grid_width=4, codebook_size=20
)
HEAD = VimpacObjectiveConfig(head_layers=3, head_hidden=24, head_out=8)
POSITIONS = "backbone.positional_embedding"


def make_published(config: VimpacConfig = HALF, head: VimpacObjectiveConfig = HEAD) -> dict[str, Tensor]:
    """Random weights with the names and shapes of the published files, in small."""
    generator = torch.Generator().manual_seed(0)
    d, rows, weights = config.hidden, config.codebook_size + 5, {}

    def add(name: str, *shape: int) -> None:
        weights[name] = torch.randn(shape, generator=generator) / math.sqrt(shape[-1] if len(shape) > 1 else 4)

    def add_linear(name: str, inside: int, outside: int) -> None:
        add(f"{name}.weight", outside, inside)
        add(f"{name}.bias", outside)

    def add_norm(name: str, width: int) -> None:
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    add("backbone.embedding.weight", rows, d)
    add("backbone.cls_param", d)
    add(f"{POSITIONS}.cls_pos_embedding", 1, d)
    add(f"{POSITIONS}.temporal_pos_embedding", config.num_frames, d)
    add(f"{POSITIONS}.height_pos_embedding", config.grid_height, d)
    add(f"{POSITIONS}.width_pos_embedding", config.grid_width, d)
    add_norm("backbone.ln_pre", d)
    inner = config.heads * config.head_dim
    for i in range(config.layers):
        block = f"backbone.transformer.resblocks.{i}"
        for j, patterns in enumerate(config.layout.split(",")):
            count = len(patterns.split("|"))
            for k, role in product(range(count), ("query", "key", "value")):
                add_linear(f"{block}.attention_blocks.{j}.attentions.{k}.attention.{role}", d, inner // count)
            add_linear(f"{block}.attention_blocks.{j}.output.dense", inner, d)
            add_norm(f"{block}.attention_blocks.{j}.output.LayerNorm", d)
        add_linear(f"{block}.mlp.c_fc", d, config.mlp)
        add_linear(f"{block}.mlp.c_proj", config.mlp, d)
        add_norm(f"{block}.ln", d)
    add_linear("mlm_head.transform.0", d, d)
    add_norm("mlm_head.transform.2", d)
    add("mlm_head.bias", rows)
    weights["mlm_head.decoder.weight"] = weights["backbone.embedding.weight"]
    weights["mlm_head.decoder.bias"] = weights["mlm_head.bias"]
    width = d
    for n in range(head.head_layers - 1):
        add_linear(f"cls_head.mlp.linear_{n}", width, head.head_hidden)
        add_norm(f"cls_head.mlp.bn_{n}", head.head_hidden)
        add(f"cls_head.mlp.bn_{n}.running_mean", head.head_hidden)
        weights[f"cls_head.mlp.bn_{n}.running_var"] = torch.rand(head.head_hidden, generator=generator) + 0.5
        weights[f"cls_head.mlp.bn_{n}.num_batches_tracked"] = torch.tensor(7)
        width = head.head_hidden
    add(f"cls_head.mlp.linear_{head.head_layers - 1}.weight", head.head_out, width)
    return weights


class Naive:
    """The forward of one clip (t h w) as the method is described: one line, one head at a time."""

    def __init__(self, weights: dict[str, Tensor], config: VimpacConfig, head: VimpacObjectiveConfig) -> None:
        self.weights, self.config, self.head = weights, config, head

    def __call__(self, clip: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """CLS (d), tokens (t h w d), scores of all rows (t h w rows), projection (o)."""
        t, h, w = clip.shape
        places = list(product(range(t), range(h), range(w)))
        part = {name: self.weights[f"{POSITIONS}.{name}_pos_embedding"] for name in ("temporal", "height", "width")}
        cls = self.weights["backbone.cls_param"] + self.weights[f"{POSITIONS}.cls_pos_embedding"][0]
        cls = self.norm("backbone.ln_pre", cls)
        x = {}
        for place in places:
            token = self.weights["backbone.embedding.weight"][clip[place]]
            where = part["temporal"][place[0]] + part["height"][place[1]] + part["width"][place[2]]
            x[place] = self.norm("backbone.ln_pre", token + where)
        for i in range(self.config.layers):
            block = f"backbone.transformer.resblocks.{i}"
            for j, patterns in enumerate(self.config.layout.split(",")):
                name = f"{block}.attention_blocks.{j}"
                mixed = [
                    self.attend(f"{name}.attentions.{k}.attention", pattern, cls, x, clip)
                    for k, pattern in enumerate(patterns.split("|"))
                ]
                cls = self.add(f"{name}.output", cls, torch.cat([one for one, _ in mixed]))
                x = {
                    place: self.add(f"{name}.output", x[place], torch.cat([y[place] for _, y in mixed])) for place in x
                }
            cls = self.norm(f"{block}.ln", cls + self.mlp(block, cls))
            x = {place: self.norm(f"{block}.ln", value + self.mlp(block, value)) for place, value in x.items()}
        tokens = torch.stack([x[place] for place in places]).view(t, h, w, -1)
        scores = self.norm("mlm_head.transform.2", F.gelu(self.linear("mlm_head.transform.0", tokens)))
        scores = scores @ self.weights["mlm_head.decoder.weight"].T + self.weights["mlm_head.decoder.bias"]
        return cls, tokens, scores, self.project(cls)

    def attend(
        self, name: str, pattern: str, cls: Tensor, x: dict[tuple[int, ...], Tensor], clip: Tensor
    ) -> tuple[Tensor, dict[tuple[int, ...], Tensor]]:
        outputs, of_cls = {}, []
        for line in lines(tuple(clip.shape), "THW".index(pattern)):
            row = torch.stack([cls, *(x[place] for place in line)])
            seen = torch.tensor([True, *(int(clip[place]) != self.config.pad_id for place in line)])
            q, k, v = (self.linear(f"{name}.{role}", row) for role in ("query", "key", "value"))
            heads = []
            for first in range(0, q.shape[1], self.config.head_dim):
                own = slice(first, first + self.config.head_dim)
                scores = q[:, own] @ k[:, own].T / math.sqrt(self.config.head_dim)
                heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, own])
            out = torch.cat(heads, dim=1)
            of_cls.append(out[0])
            outputs.update(zip(line, out[1:], strict=True))
        return torch.stack(of_cls).mean(0), outputs

    def project(self, x: Tensor) -> Tensor:
        last = self.head.head_layers - 1
        for n in range(last):
            x = self.linear(f"cls_head.mlp.linear_{n}", x)
            bn = {kind: self.weights[f"cls_head.mlp.bn_{n}.{kind}"] for kind in ("weight", "bias")}
            mean, var = (self.weights[f"cls_head.mlp.bn_{n}.running_{kind}"] for kind in ("mean", "var"))
            x = torch.relu((x - mean) / torch.sqrt(var + 1e-5) * bn["weight"] + bn["bias"])
        return self.weights[f"cls_head.mlp.linear_{last}.weight"] @ x

    def add(self, name: str, x: Tensor, update: Tensor) -> Tensor:
        return self.norm(f"{name}.LayerNorm", x + self.linear(f"{name}.dense", update))

    def mlp(self, block: str, x: Tensor) -> Tensor:
        return self.linear(f"{block}.mlp.c_proj", F.gelu(self.linear(f"{block}.mlp.c_fc", x)))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-12)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def lines(shape: tuple[int, ...], axis: int) -> Iterator[list[tuple[int, ...]]]:
    others = [range(size) if a != axis else range(1) for a, size in enumerate(shape)]
    for first in product(*others):
        yield [(*first[:axis], i, *first[axis + 1 :]) for i in range(shape[axis])]


@pytest.mark.parametrize(
    "config", [HALF, replace(HALF, head_dim=8), replace(HALF, layout="T,H,W")], ids=["half", "full", "T,H,W"]
)
def test_equal_weights_give_equal_outputs(config: VimpacConfig) -> None:
    published = make_published(config)
    objective = VimpacObjective(VimpacBackbone(config), HEAD)
    objective.load_state_dict(from_published(published, config, HEAD))
    objective.eval()
    clips = torch.randint(config.codebook_size, (2, *config.shape), generator=torch.Generator().manual_seed(1))
    clips[1, 0, 1, 2] = config.mask_id
    clips[1, 2, 0, 1] = config.pad_id  # no whole line of PAD
    with torch.no_grad():
        features = objective.backbone(clips)
        assert objective.mlm_head is not None and objective.contrastive_head is not None
        scores = objective.mlm_head(features.tokens, objective.backbone.token.weight)
        projected = objective.contrastive_head(features.cls)
    naive = Naive(published, config, HEAD)
    for n, clip in enumerate(clips):
        cls, tokens, all_scores, projection = naive(clip)
        close = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(features.cls[n], cls, **close)
        torch.testing.assert_close(features.tokens[n], tokens, **close)
        torch.testing.assert_close(scores[n], all_scores[..., : config.codebook_size], **close)
        torch.testing.assert_close(projected[n], projection, **close)


def test_every_published_tensor_is_used_and_every_one_of_ours_filled() -> None:
    published = make_published()
    state = from_published(published, HALF, HEAD)
    used = sum(value.numel() for name, value in published.items() if not name.startswith("mlm_head.decoder."))
    assert sum(value.numel() for value in state.values()) == used - 5  # biases of the special rows
    objective = VimpacObjective(VimpacBackbone(HALF), replace(HEAD, alpha=0.0))
    without = {name: value for name, value in published.items() if not name.startswith("cls_head")}
    objective.load_state_dict(from_published(without, HALF, replace(HEAD, alpha=0.0)))


def test_missing_and_unknown_names_are_listed() -> None:
    published = make_published()
    less = {n: v for n, v in published.items() if n not in ("backbone.cls_param", "backbone.ln_pre.bias")}
    with pytest.raises(ValueError, match=r"lack backbone\.cls_param, backbone\.ln_pre\.bias$"):
        from_published(less, HALF, HEAD)
    more = {**published, "cls_fc.weight": torch.zeros(1), "cls_fc.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unknown names cls_fc\.bias, cls_fc\.weight$"):
        from_published(more, HALF, HEAD)
    with pytest.raises(ValueError, match=r"unknown names .*mlm_head\.bias"):
        from_published(published, HALF, replace(HEAD, mlm_weight=0.0))


def test_other_shapes_and_broken_ties_are_named() -> None:
    published = make_published()
    with pytest.raises(ValueError, match=r"height_pos_embedding \(2, 32\) do not make backbone\.position_h \(4, 32\)"):
        from_published(published, replace(HALF, grid_height=4), HEAD)
    query = "backbone.transformer.resblocks.0.attention_blocks.1.attentions.0.attention.query.weight"
    with pytest.raises(ValueError, match=r"query\.weight \(8, 31\).* do not make backbone\.layers\.0\.attentions\.1"):
        from_published({**published, query: torch.zeros(8, 31)}, HALF, HEAD)
    untied = {**published, "mlm_head.decoder.weight": torch.zeros(25, 32)}
    with pytest.raises(ValueError, match=r"mlm_head\.decoder\.weight differs from backbone\.embedding\.weight"):
        from_published(untied, HALF, HEAD)


@pytest.mark.parametrize("config", [replace(HALF, norm="pre"), replace(HALF, layout="T,HxW")])
def test_networks_that_their_weights_do_not_fit_are_refused(config: VimpacConfig) -> None:
    with pytest.raises(ValueError, match="allowed: post, with"):
        from_published({}, config, HEAD)

"""The weights that VIMPAC's authors published, as weights of our `VimpacObjective`: equal inputs give equal outputs.

Names of a pre-training file (`classifier.pt`, a state_dict), with layer i; j numbers the attentions that follow one
another in a layout (T is 0, H|W is 1), k those side by side (H is 0, W is 1):

    backbone.embedding.weight                                            backbone.token.weight
    backbone.cls_param  (d), ours (1 d)                                  backbone.cls
    backbone.positional_embedding.{cls,temporal,height,width}_pos_embedding
                                                                         backbone.position_{cls,t,h,w}
    backbone.ln_pre.*                                                    backbone.norm.*
    backbone.transformer.resblocks.i.
      attention_blocks.j.attentions.k.attention.{query,key,value}.*      backbone.layers.i.attentions.j.branch.qkv.*
      attention_blocks.j.output.dense.*                                  backbone.layers.i.attentions.j.branch.out.*
      attention_blocks.j.output.LayerNorm.*                              backbone.layers.i.attentions.j.norm.*
      mlp.c_fc.*, mlp.c_proj.*                                           backbone.layers.i.mlp.branch.{0,2}.*
      ln.*                                                               backbone.layers.i.mlp.norm.*
    mlm_head.transform.{0,2}.*                                           mlm_head.transform.{0,2}.*
    mlm_head.bias, and the same as mlm_head.decoder.bias                 mlm_head.bias
    mlm_head.decoder.weight, the same as backbone.embedding.weight       none, ours is tied
    cls_head.mlp.linear_n.*, cls_head.mlp.bn_n.*                         contrastive_head.{3n,3n+1}.*

Ours stacks queries, keys and values of all k, in this order, into one matrix. Their scores cover the five special rows
of the token table too; ours are the codes alone, and equal to theirs at the codes. Where whole lines of a clip are PAD,
outputs differ: they average CLS over these lines too, and ours leaves them out.

Their pre-LN network is another function than ours (it adds to the normed input), so only post-LN weights fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.vimpac import VimpacBackbone, VimpacConfig, VimpacObjective, VimpacObjectiveConfig


@dataclass(frozen=True)
class _Source:
    """Where one tensor of ours comes from: `join` of the tensors `names`."""

    names: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor] = lambda tensors: tensors[0]


def from_published(
    published: Mapping[str, Tensor], backbone: VimpacConfig, objective: VimpacObjectiveConfig
) -> dict[str, Tensor]:
    """The state of `VimpacObjective(VimpacBackbone(backbone), objective)`, for its `load_state_dict`.

    Args:
        published: what `torch.load(path, weights_only=True, map_location="cpu")` or safetensors returns for their file.
        backbone, objective: ours for these weights, such as those of the recipes vimpac-small and vimpac-large.

    Raises:
        ValueError: the weights have other names or shapes than the configs ask for, or ties that do not hold; lists
            them.
    """
    if backbone.norm != "post" or backbone.layout not in ("T,H|W", "T,H,W"):
        raise ValueError(
            f"from_published: norm is {backbone.norm!r}, layout is {backbone.layout!r}; allowed: post, with T,H|W or T,H,W"
        )
    with torch.device("meta"):
        ours = VimpacObjective(VimpacBackbone(backbone), objective).state_dict()
    sources = _sources(backbone, objective)
    assert sources.keys() == ours.keys()
    ties = {
        "mlm_head.decoder.weight": "backbone.embedding.weight",
        "mlm_head.decoder.bias": "mlm_head.bias",
    }
    needed = {name for source in sources.values() for name in source.names}
    known = needed | ({*ties} if objective.mlm_weight else set())
    if missing := sorted(needed - published.keys()):
        raise ValueError(f"from_published: the weights lack {', '.join(missing)}")
    if unknown := sorted(published.keys() - known):
        raise ValueError(f"from_published: the weights have unknown names {', '.join(unknown)}")
    for copy, original in ties.items():
        if copy in published and not torch.equal(published[copy], published[original]):
            raise ValueError(f"from_published: {copy} differs from {original}; in these weights both are one tensor")
    state, wrong = {}, []
    for name, source in sources.items():
        try:
            state[name] = source.join([published[one] for one in source.names]).clone()
        except RuntimeError:  # parts that do not join
            state[name] = torch.empty(0)
        if state[name].shape != ours[name].shape:
            given = ", ".join(f"{one} {tuple(published[one].shape)}" for one in source.names)
            wrong.append(f"{given} do not make {name} {tuple(ours[name].shape)}")
    if wrong:
        raise ValueError(f"from_published: {'; '.join(wrong)}")
    return state


def _sources(backbone: VimpacConfig, objective: VimpacObjectiveConfig) -> dict[str, _Source]:
    """Each name of our state with where it comes from."""
    positions = "backbone.positional_embedding"
    sources = {
        "backbone.token.weight": _Source(("backbone.embedding.weight",)),
        "backbone.cls": _Source(("backbone.cls_param",), lambda tensors: tensors[0][None]),
        "backbone.position_cls": _Source((f"{positions}.cls_pos_embedding",)),
        "backbone.position_t": _Source((f"{positions}.temporal_pos_embedding",)),
        "backbone.position_h": _Source((f"{positions}.height_pos_embedding",)),
        "backbone.position_w": _Source((f"{positions}.width_pos_embedding",)),
        **_affine("backbone.norm", "backbone.ln_pre"),
    }
    for i in range(backbone.layers):
        layer, block = f"backbone.layers.{i}", f"backbone.transformer.resblocks.{i}"
        for j, side_by_side in enumerate(backbone.layout.split(",")):
            ours, theirs = f"{layer}.attentions.{j}", f"{block}.attention_blocks.{j}"
            for kind in ("weight", "bias"):
                parts = tuple(
                    f"{theirs}.attentions.{k}.attention.{role}.{kind}"
                    for role in ("query", "key", "value")
                    for k in range(len(side_by_side.split("|")))
                )
                sources[f"{ours}.branch.qkv.{kind}"] = _Source(parts, torch.cat)
            sources |= _affine(f"{ours}.branch.out", f"{theirs}.output.dense")
            sources |= _affine(f"{ours}.norm", f"{theirs}.output.LayerNorm")
        sources |= _affine(f"{layer}.mlp.branch.0", f"{block}.mlp.c_fc")
        sources |= _affine(f"{layer}.mlp.branch.2", f"{block}.mlp.c_proj")
        sources |= _affine(f"{layer}.mlp.norm", f"{block}.ln")
    if objective.mlm_weight:
        sources |= _affine("mlm_head.transform.0", "mlm_head.transform.0")
        sources |= _affine("mlm_head.transform.2", "mlm_head.transform.2")
        codes = backbone.codebook_size
        sources["mlm_head.bias"] = _Source(("mlm_head.bias",), lambda tensors: tensors[0][:codes])
    if objective.alpha:
        last = objective.head_layers - 1
        for n in range(last):
            sources |= _affine(f"contrastive_head.{3 * n}", f"cls_head.mlp.linear_{n}")
            for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                sources[f"contrastive_head.{3 * n + 1}.{kind}"] = _Source((f"cls_head.mlp.bn_{n}.{kind}",))
        sources[f"contrastive_head.{3 * last}.weight"] = _Source((f"cls_head.mlp.linear_{last}.weight",))
    return sources


def _affine(ours: str, theirs: str) -> dict[str, _Source]:
    return {f"{ours}.{kind}": _Source((f"{theirs}.{kind}",)) for kind in ("weight", "bias")}

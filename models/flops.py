"""Floating-point operations of VIMPAC's training, for the model FLOPs utilisation: MFU = FLOPs / seconds / peak.

Counted are the matrix products that the method needs, 2 FLOPs a multiply-add: projections, attention inside each line
(scores and mixing), MLPs, the prediction head at masked positions alone, the contrastive head and its similarities. Left
out are element-wise work, the mean of CLS over lines, and whatever an implementation computes twice (recomputed
activations, the first pass of accumulated contrast). A backward pass has two products for each forward one, so training
costs three times the forward pass.
"""

from __future__ import annotations

import itertools
import math
import re

import torch

from models.layers import line_shape
from models.vimpac_config import ATTENTIONS, VimpacConfig, VimpacObjectiveConfig

_TRAINING_OVER_FORWARD = 3
_PEAK_TFLOPS = {  # words of a device's name -> dense bf16, fp32 without TF32, from data sheets; the first match counts
    "GH200": (989, 67),
    "H200 NVL": (835, 60),
    "H200": (989, 67),
    "H100 NVL": (835, 60),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "A10G": (70, 35),
}


def training_flops(
    backbone: VimpacConfig, objective: VimpacObjectiveConfig, num_clips: int, num_masked: int, num_compared: int
) -> float:
    """FLOPs of forward and backward pass of `num_clips` clips; within 1 % of what torch counts.

    Args:
        num_masked: masked positions of all clips.
        num_compared: clips that each clip is compared with in the contrastive loss: those of all workers.
    """
    d, inner = backbone.hidden, backbone.heads * backbone.head_dim
    positions = 1 + math.prod(backbone.shape)
    layer = 2 * positions * 2 * d * backbone.mlp
    for kinds in ATTENTIONS[backbone.layout]:
        layer += 2 * positions * d * 4 * inner  # queries, keys, values and the projection
        for lines in kinds:
            num_lines, length = line_shape(lines, backbone.shape)
            layer += 2 * 2 * num_lines * (1 + length) ** 2 * inner // len(kinds)  # each kind has its share of the heads
    per_clip = backbone.layers * layer
    if objective.alpha:
        widths = [d, *[objective.head_hidden] * (objective.head_layers - 1), objective.head_out]
        per_clip += sum(2 * a * b for a, b in itertools.pairwise(widths))
        per_clip += 2 * num_compared * objective.head_out
    per_masked = 2 * d * (d + backbone.codebook_size) if objective.mlm_weight else 0
    return float(_TRAINING_OVER_FORWARD * (num_clips * per_clip + num_masked * per_masked))


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of matrix products that the data sheet states; None for a CPU and for a GPU that is not in the table.

    Args:
        precision: "fp32", or "bf16" and "fp16", which have the same peak.
    """
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(device_name: str, precision: str) -> float | None:
    """`peak_flops` by the name that the driver gives a GPU."""
    # Whole words: an L4 is no L40.
    found = next((peaks for words, peaks in _PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", device_name)), None)
    return None if found is None else found[precision == "fp32"] * 1e12

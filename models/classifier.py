"""Action classification on a VIMPAC backbone: one zero-initialised linear layer on CLS.

Shapes: n clips; t h w token grid; d width; c classes.

Source: VIMPAC (arXiv 2106.11250), section 4: fine-tuning for action classification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.flops import training_flops
from models.objective import Fraction, Output
from models.stage2 import resize_positions
from models.vimpac import VimpacBackbone
from models.vimpac_config import VimpacObjectiveConfig

_NO_HEADS = VimpacObjectiveConfig(alpha=0.0)
_BACKBONE = "backbone."


class VimpacClassifier(nn.Module):
    """Cross-entropy over the classes of clips. At the start every class is equally likely, whatever the backbone.

    Args:
        classes: the labels, by class number.
        frozen: train the linear layer alone; the backbone stays in eval mode, without dropout.
    """

    def __init__(self, backbone: VimpacBackbone, classes: Sequence[str], *, frozen: bool = False) -> None:
        super().__init__()
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise ValueError(f"VimpacClassifier: {len(classes)} classes; allowed: two or more, each once")
        self.backbone, self.classes, self.frozen = backbone, tuple(classes), frozen
        self.head = nn.Linear(backbone.config.hidden, len(classes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if frozen:
            backbone.requires_grad_(False)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's layers."""
        return list(self.backbone.layers)

    def train(self, mode: bool = True) -> VimpacClassifier:
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def logits(self, tokens: Tensor, *, padded: bool | None = None) -> Tensor:
        """(n c) float32 of clips (n t h w); arguments are those of the backbone."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            cls = self.backbone(tokens, padded=padded).cls
        return self.head(cls).float()

    def split(self, batch: Mapping[str, Any], num_parts: int) -> list[dict[str, Any]]:
        """A batch as micro-batches of equal size.

        Args:
            batch: "tokens" (n t h w) int64 with PAD where a video is too short; "labels" (n) int64 class numbers. On the
                host, or looking for PAD waits for the device.
        """
        pad = self.backbone.config.pad_id
        return [
            {"tokens": tokens, "labels": labels, "padded": bool((tokens == pad).any())}
            for tokens, labels in zip(batch["tokens"].chunk(num_parts), batch["labels"].chunk(num_parts), strict=True)
        ]

    def look_ahead(
        self, parts: Sequence[dict[str, Any]], run: Callable[[int, dict[str, Any]], Any]
    ) -> Sequence[dict[str, Any]]:
        """The same parts: the loss is a plain mean over clips."""
        return parts

    def forward(self, part: Mapping[str, Any]) -> Output:
        """Loss "classification" and metric `accuracy` of one micro-batch of `split`."""
        logits, labels = self.logits(part["tokens"], padded=part["padded"]), part["labels"]
        hits = (logits.detach().argmax(dim=-1) == labels).sum()
        flops = training_flops(self.backbone.config, _NO_HEADS, len(labels), 0, 0)
        if self.frozen:
            flops /= 3  # there is no backward pass, which costs two thirds
        counts = {"clips": len(labels), "flops": flops}
        return Output(
            losses={"classification": F.cross_entropy(logits, labels)},
            metrics={"accuracy": Fraction(hits, torch.full_like(hits, len(labels)))},
            counts={name: torch.tensor(float(value), device=logits.device) for name, value in counts.items()},
        )


def load_pretrained(backbone: VimpacBackbone, weights: Mapping[str, Tensor]) -> None:
    """Load the backbone of a pre-training objective; positions of another grid or number of frames are interpolated.

    Args:
        weights: state of the objective by name, heads and all.

    Raises:
        RuntimeError: another network; torch names what does not fit.
    """
    config = backbone.config
    own = {name.removeprefix(_BACKBONE): value for name, value in weights.items() if name.startswith(_BACKBONE)}
    grid = config.grid_height, config.grid_width
    backbone.load_state_dict(resize_positions(own, grid, num_frames=config.num_frames))

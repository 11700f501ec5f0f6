"""The classifier: where it starts, that it learns, what stays frozen, and that it starts from a pre-trained backbone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.classifier import VimpacClassifier, load_pretrained
from models.flops import training_flops
from models.objective import Fraction, HasBlocks, Splits
from models.optim import OptimConfig, build_optimizer
from models.vimpac import VimpacBackbone, VimpacConfig, VimpacObjective, VimpacObjectiveConfig

CONFIG = VimpacConfig(
    layers=2, hidden=32, heads=4, head_dim=8, mlp=64, num_frames=3, grid_height=4, grid_width=4, codebook_size=20
)
CLASSES = ("jump", "run", "sit")


def make_classifier(frozen: bool = False, **changes: Any) -> VimpacClassifier:
    torch.manual_seed(0)
    return VimpacClassifier(VimpacBackbone(replace(CONFIG, **changes)), CLASSES, frozen=frozen)


def make_batch(size: int = 12) -> dict[str, Any]:
    tokens = torch.randint(20, (size, *CONFIG.shape), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens, "labels": torch.arange(size) % 3, "keys": [str(n) for n in range(size)]}


def test_at_the_start_every_class_is_equally_likely() -> None:
    classifier, batch = make_classifier(), make_batch()
    assert isinstance(classifier, Splits) and isinstance(classifier, HasBlocks)
    assert torch.equal(classifier.logits(batch["tokens"]), torch.zeros(12, 3))
    [part] = classifier.split(batch, 1)
    output = classifier(part)
    torch.testing.assert_close(output["losses"]["classification"], torch.tensor(3.0).log())
    accuracy = output["metrics"]["accuracy"]
    assert isinstance(accuracy, Fraction) and (int(accuracy.part), int(accuracy.whole)) == (4, 12)


def learn(classifier: VimpacClassifier, steps: int, lr: float) -> tuple[float, float]:
    """Loss and accuracy after `steps` on one batch."""
    [part] = classifier.split(make_batch(), 1)
    optimizer = build_optimizer(classifier, OptimConfig(lr=lr))
    for _ in range(steps):
        optimizer.zero_grad()
        classifier.train()(part)["losses"]["classification"].backward()
        optimizer.step()
    output = classifier.eval()(part)
    return output["losses"]["classification"].item(), output["metrics"]["accuracy"].value.item()


def test_it_overfits_one_batch() -> None:
    loss, accuracy = learn(make_classifier(dropout=0.0), 60, 1e-2)
    assert accuracy == 1.0 and loss < 0.05


def test_frozen_trains_the_linear_layer_alone_and_without_dropout() -> None:
    classifier = make_classifier(frozen=True, dropout=0.5)
    with torch.no_grad():  # as at the start of training, CLS would be nearly the same for all clips
        for parameter in classifier.backbone.layers.parameters():
            parameter.mul_(10)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    loss, _ = learn(classifier, 40, 0.05)
    changed = {name for name, value in classifier.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"} and loss < 1.0
    tokens = make_batch()["tokens"]
    classifier.train()
    assert torch.equal(classifier.logits(tokens), classifier.logits(tokens))
    thawed = make_classifier(dropout=0.5).train().backbone
    assert not torch.equal(thawed(tokens).cls, thawed(tokens).cls)


def test_micro_batches_say_whether_they_hold_padding() -> None:
    classifier, batch = make_classifier().eval(), make_batch()
    batch["tokens"][8:, 1:] = CONFIG.pad_id
    parts = classifier.split(batch, 3)
    assert [part["padded"] for part in parts] == [False, False, True]
    assert classifier.look_ahead(parts, lambda *_: None) is parts
    torch.nn.init.normal_(classifier.head.weight)
    whole = classifier(classifier.split(batch, 1)[0])["losses"]["classification"]
    mean = torch.stack([classifier(part)["losses"]["classification"] for part in parts]).mean()
    torch.testing.assert_close(whole, mean)


def test_operations_are_those_of_the_backbone_once_or_three_times() -> None:
    batch = make_batch()
    counted = []
    for frozen in (False, True):
        classifier = make_classifier(frozen=frozen)
        counted.append(classifier(classifier.split(batch, 1)[0])["counts"]["flops"].item())
    assert counted[0] == training_flops(CONFIG, VimpacObjectiveConfig(alpha=0.0), 12, 0, 0) == 3 * counted[1]


def test_a_pretrained_backbone_on_its_own_grid_gives_its_own_features() -> None:
    torch.manual_seed(5)
    objective = VimpacObjective(VimpacBackbone(CONFIG), VimpacObjectiveConfig(head_hidden=16, head_out=8)).eval()
    classifier, tokens = make_classifier().eval(), make_batch()["tokens"]
    load_pretrained(classifier.backbone, objective.state_dict())
    assert torch.equal(classifier.backbone(tokens).cls, objective.backbone(tokens).cls)


def test_more_frames_and_a_finer_grid_interpolate_positions() -> None:
    objective = VimpacObjective(VimpacBackbone(CONFIG), VimpacObjectiveConfig(head_hidden=16, head_out=8))
    finer = make_classifier(num_frames=6, grid_height=8, grid_width=8).backbone
    load_pretrained(finer, objective.state_dict())
    assert torch.equal(finer.position_t[0], objective.backbone.position_t[0])
    assert torch.equal(finer.token.weight, objective.backbone.token.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_pretrained(make_classifier(hidden=16).backbone, objective.state_dict())


@pytest.mark.parametrize("classes", [(), ("one",), ("a", "b", "a")])
def test_fewer_than_two_classes_or_one_twice_are_refused(classes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="two or more, each once"):
        VimpacClassifier(VimpacBackbone(CONFIG), classes)

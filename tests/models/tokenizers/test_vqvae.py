"""VQ-VAE: the codebook against arithmetic by hand, one worker against two, saving and loading."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.optim import OptimConfig, build_optimizer
from models.tokenizers.base import Precision, load_tokenizer
from models.tokenizers.dvae import Dvae, DvaeConfig
from models.tokenizers.vqvae import (
    Codebook,
    Vqvae,
    VqvaeConfig,
    VqvaeObjective,
    VqvaeObjectiveConfig,
    feature_distance,
)
from tests.models.distributed import run_two_workers

TINY = VqvaeConfig(channels=8, codebook_size=16, code_dim=4, restart_below=0.0)


def make_frames(num_frames: int = 4, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (num_frames, side // 8, side // 8, 3), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)


def make_tokenizer(config: VqvaeConfig = TINY) -> Vqvae:
    """A tokenizer whose codebook has started, in eval mode."""
    torch.manual_seed(0)
    tokenizer = Vqvae(config)
    tokenizer.codebook(tokenizer.encoder(tokenizer.normalize(make_frames())))
    return tokenizer.eval()


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_shapes_dtypes_and_ranges(patch: int) -> None:
    tokenizer = make_tokenizer(replace(TINY, patch=patch))
    frames = make_frames(3)[:, :, :16]
    codes = tokenizer.encode(frames)
    assert codes.dtype == torch.uint16 and codes.shape == (3, 32 // patch, 16 // patch)
    assert int(codes.long().max()) < tokenizer.codebook_size == 16 and tokenizer.patch == patch
    pictures = tokenizer.decode(codes)
    assert pictures.dtype == torch.uint8 and pictures.shape == frames.shape
    assert torch.equal(pictures, tokenizer.decode(codes.long()))


def test_codes_are_nearest_by_euclidean_distance() -> None:
    tokenizer = make_tokenizer()
    z = tokenizer.encoder(tokenizer.normalize(make_frames()))
    rows = z.permute(0, 2, 3, 1).reshape(-1, 4)
    expected = torch.cdist(rows, tokenizer.codebook.codes).argmin(1).view(4, 4, 4)
    assert torch.equal(tokenizer.encode(make_frames()).long(), expected)


def test_encoding_never_moves_the_codebook() -> None:
    tokenizer = make_tokenizer().train()
    before = tokenizer.fingerprint()
    tokenizer.encode(make_frames())
    tokenizer.eval()
    VqvaeObjective(tokenizer, VqvaeObjectiveConfig())({"frames": make_frames()})
    assert tokenizer.fingerprint() == before


def test_first_batch_lays_the_codebook() -> None:
    torch.manual_seed(0)
    codebook, z = Codebook(TINY), torch.randn(2, 4, 3, 5)
    codebook._start(rows := z.permute(0, 2, 3, 1).reshape(-1, 4))
    assert all((code == rows).all(1).any() for code in codebook.codes)
    assert codebook.uses.tolist() == pytest.approx([30 / 16] * 16)


def test_moving_averages_by_hand() -> None:
    torch.manual_seed(0)
    codebook, z = Codebook(TINY), torch.randn(2, 4, 3, 5)
    codebook(z)
    codes, uses, sums = (value.clone() for value in (codebook.codes, codebook.uses, codebook.sums))
    rows = torch.randn(30, 4)
    nearest = torch.cdist(rows, codes).argmin(1)
    quantized = codebook(rows.view(2, 3, 5, 4).permute(0, 3, 1, 2))
    torch.testing.assert_close(quantized.vectors.permute(0, 2, 3, 1).reshape(30, 4), codes[nearest])
    for k in range(16):
        mine = rows[nearest == k]
        assert quantized.counts[k] == len(mine)
        uses[k] = 0.9 * uses[k] + 0.1 * len(mine)
        sums[k] = 0.9 * sums[k] + 0.1 * mine.sum(0)
        torch.testing.assert_close(codebook.codes[k], sums[k] / uses[k])
    torch.testing.assert_close((codebook.uses, codebook.sums), (uses, sums))


def test_dead_codes_restart_on_encoder_outputs() -> None:
    torch.manual_seed(0)
    codebook = Codebook(replace(TINY, restart_below=0.5, restart_every=3))
    for step in range(3):
        z = torch.randn(8, 4, 4, 4) + 100  # far from where the codes below lie
        if step == 0:
            codebook(z)
            codebook.codes[:4] = codebook.sums[:4] = -100
            codebook.uses[:4] = 1e-3
        elif step == 1:
            codebook(z)
            assert (codebook.codes[:4] < 0).all()  # not yet: restart_every is 3
        else:
            codebook(z)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 4)
    assert all((code == rows).all(1).any() for code in codebook.codes[:4])
    assert (codebook.uses[:4] > 1).all()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_an_unused_code_keeps_its_place_for_ever(distance: Any) -> None:
    torch.manual_seed(0)
    codebook = Codebook(replace(TINY, distance=distance, ema_decay=0.5))
    codebook(torch.randn(8, 4, 4, 4))
    codebook.codes[:4] = codebook.scale(torch.full((4, 4), -100.0))
    codebook.sums[:4] = codebook.codes[:4] * codebook.uses[:4, None]
    place = codebook.codes[:4].clone()
    for _ in range(200):  # until float32 has no smaller number
        codebook(torch.rand(8, 4, 4, 4) + 10)
    assert (codebook.uses[:4] == 0).all()
    torch.testing.assert_close(codebook.codes[:4], place)


def train(steps: int, frames: Tensor, objective: VqvaeObjective) -> dict[str, dict[str, Tensor]]:
    optimizer = build_optimizer(objective, OptimConfig(weight_decay=0.0))
    for _ in range(steps):
        out = objective({"frames": frames})
        optimizer.zero_grad()
        sum(out["losses"].values()).backward()  # type: ignore[union-attr]
        for group in optimizer.param_groups:
            group["lr"] = 3e-3
        optimizer.step()
    return out


def test_one_batch_is_learned_by_heart() -> None:
    torch.manual_seed(0)
    config = VqvaeConfig(channels=32, codebook_size=64, code_dim=8)
    objective = VqvaeObjective(Vqvae(config), VqvaeObjectiveConfig())
    out = train(150, make_frames(), objective)
    assert set(out["losses"]) == {"reconstruction", "commitment"}
    assert out["metrics"]["psnr"] > 18 and out["metrics"]["codes_used"] > 0.5
    assert 1 <= out["metrics"]["perplexity"] <= 64
    frames = make_frames()
    objective.eval()
    error = (objective.tokenizer.decode(objective.tokenizer.encode(frames)).float() - frames.float()).square().mean()
    psnr = objective({"frames": frames})["metrics"]["psnr"].item()
    assert psnr == pytest.approx((10 * torch.log10(255**2 / error)).item(), abs=0.05)  # rounding to uint8


def test_gradients_pass_straight_through() -> None:
    torch.manual_seed(0)
    tokenizer = Vqvae(TINY)
    for beta, expected in ((0.0, True), (0.25, False)):
        tokenizer.zero_grad()
        out = VqvaeObjective(tokenizer, VqvaeObjectiveConfig(beta=beta))({"frames": make_frames()})
        sum(out["losses"].values()).backward()  # type: ignore[union-attr]
        assert (out["losses"]["commitment"] == 0) == expected
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tokenizer.parameters())


KINDS = [(codebook, distance) for codebook in ("ema", "gradient") for distance in ("euclidean", "cosine")]


def length_one(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize(("codebook", "distance"), KINDS)
def test_gradients_by_hand(codebook: str, distance: str) -> None:
    """What reaches encoder, decoder and codes: eq. 3 term by term, and the decoder's gradient passed straight through."""
    torch.manual_seed(0)
    scaled = length_one if distance == "cosine" else lambda rows: rows
    objective = VqvaeObjective(
        Vqvae(replace(TINY, codebook=codebook, distance=distance)), VqvaeObjectiveConfig(beta=0.4, l1_weight=0.0)
    )
    tokenizer, frames = objective.tokenizer, make_frames()
    objective({"frames": frames})  # lays the codebook
    with torch.no_grad():
        tokenizer.codebook.codes += 0.05 * torch.randn(16, 4)
        tokenizer.codebook.codes *= 1.5  # a cosine codebook must not care
    pixels = tokenizer.normalize(frames)

    z = tokenizer.encoder(pixels)
    rows = scaled(z.permute(0, 2, 3, 1).reshape(-1, 4))
    raw_codes = tokenizer.codebook.codes.detach().clone().requires_grad_()
    codes = scaled(raw_codes)
    nearest = torch.cdist(rows, codes).argmin(1)
    chosen = codes[nearest].detach().requires_grad_()
    x = tokenizer.decoder(chosen.view(4, 4, 4, 4).permute(0, 3, 1, 2))
    reconstruction = (x - pixels).square().mean()
    reconstruction.backward()
    assert chosen.grad is not None
    decoder_grads = [p.grad.clone() for p in tokenizer.decoder.parameters()]
    error = rows.detach() - codes[nearest].detach()
    rows.backward(chosen.grad + 0.4 * 2 * error / error.numel())
    encoder_grads = [p.grad.clone() for p in tokenizer.encoder.parameters()]
    per_code = torch.zeros(16, 4).index_add_(0, nearest, -2 * error / error.numel())
    codes.backward(per_code)

    tokenizer.zero_grad()
    out = objective({"frames": frames})["losses"]
    sum(out.values()).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(out["reconstruction"], reconstruction)
    torch.testing.assert_close(out["commitment"], 0.4 * error.square().mean())
    torch.testing.assert_close([p.grad for p in tokenizer.decoder.parameters()], decoder_grads)
    torch.testing.assert_close([p.grad for p in tokenizer.encoder.parameters()], encoder_grads)
    if codebook == "gradient":
        torch.testing.assert_close(out["codebook"], error.square().mean())
        torch.testing.assert_close(tokenizer.codebook.codes.grad, raw_codes.grad)
    else:
        assert "codebook" not in out and not tokenizer.codebook.codes.requires_grad


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_cosine_distance_reads_directions_alone(codebook: str) -> None:
    tokenizer = make_tokenizer(replace(TINY, codebook=codebook, distance="cosine"))
    assert not torch.equal(tokenizer.encode(make_frames()), make_tokenizer().encode(make_frames()))
    rows = length_one(tokenizer.encoder(tokenizer.normalize(make_frames())).permute(0, 2, 3, 1).reshape(-1, 4))
    expected = (rows @ length_one(tokenizer.codebook.codes).T).argmax(1)
    codes = tokenizer.encode(make_frames())
    assert torch.equal(codes.long().flatten(), expected)
    pictures = tokenizer.decode(codes)
    with torch.no_grad():
        tokenizer.encoder[-1].weight *= 7
        tokenizer.encoder[-1].bias *= 7
        if codebook == "gradient":
            tokenizer.codebook.codes *= 3
    assert torch.equal(tokenizer.encode(make_frames()), codes) and torch.equal(tokenizer.decode(codes), pictures)
    vectors = tokenizer.codebook.vectors_of(codes.long())
    torch.testing.assert_close(vectors.square().sum(1), torch.ones_like(vectors[:, 0]))


@pytest.mark.parametrize(("codebook", "distance"), KINDS)
def test_every_kind_learns_and_revives_dead_codes(codebook: str, distance: str) -> None:
    torch.manual_seed(0)
    config = VqvaeConfig(channels=16, codebook_size=32, code_dim=8, codebook=codebook, distance=distance)
    objective = VqvaeObjective(Vqvae(config), VqvaeObjectiveConfig())
    frames = make_frames(2)
    first = objective({"frames": frames})["metrics"]["psnr"]
    with torch.no_grad():
        objective.tokenizer.codebook.codes[:30] = -objective.tokenizer.codebook.codes[30]
        if codebook == "ema":
            objective.tokenizer.codebook.sums[:30] = -objective.tokenizer.codebook.sums[30]
    out = train(60, frames, objective)
    assert out["metrics"]["psnr"] > first + 3 and out["metrics"]["codes_used"] > 0.4
    none = replace(config, restart_below=0.0)
    torch.manual_seed(0)
    lazy = VqvaeObjective(Vqvae(none), VqvaeObjectiveConfig())
    lazy({"frames": frames})
    with torch.no_grad():
        lazy.tokenizer.codebook.codes[:30] = -lazy.tokenizer.codebook.codes[30]
        if codebook == "ema":
            lazy.tokenizer.codebook.sums[:30] = -lazy.tokenizer.codebook.sums[30]
    assert train(60, frames, lazy)["metrics"]["codes_used"] < out["metrics"]["codes_used"]


@pytest.mark.parametrize(("codebook", "distance"), KINDS)
def test_every_kind_is_saved_whole(codebook: str, distance: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(replace(TINY, codebook=codebook, distance=distance))
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert torch.equal(loaded.encode(make_frames()), tokenizer.encode(make_frames()))
    others = {make_tokenizer(replace(TINY, codebook=c, distance=d)).fingerprint() for c, d in KINDS}
    assert len(others) == 4 and tokenizer.fingerprint() in others
    saved = json.loads((tmp_path / "config.json").read_text())["config"]
    # Left out at their defaults, so that tokenizers from before these settings keep their fingerprint.
    assert ("codebook" in saved, "distance" in saved) == (codebook == "gradient", distance == "cosine")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_of_the_encoder_alone(precision: Precision, tmp_path: Path) -> None:
    tokenizer, frames = make_tokenizer(replace(TINY, codebook_size=64)), make_frames(4, side=64)
    tokenizer.save(tmp_path)
    half = load_tokenizer(tmp_path, precision=precision)
    assert half.precision == precision and half.fingerprint() == tokenizer.fingerprint()
    assert {p.dtype for p in half.encoder[:-1].parameters()} == {
        torch.bfloat16 if precision == "bf16" else torch.float16
    }
    exact, found = tokenizer.encode(frames), half.encode(frames)
    assert found.dtype == torch.uint16 and found.shape == exact.shape
    # Rounding shows in the outputs, and seldom in the codes.
    body = half.encoder[:-1](half.normalize(frames).to(next(half.encoder.parameters()).dtype)).float()
    error = (body - tokenizer.encoder[:-1](tokenizer.normalize(frames))).abs().max().item()
    assert 0 < error < (0.1 if precision == "bf16" else 0.01)
    assert (found.long() != exact.long()).float().mean() < 0.1
    assert torch.equal(half.decode(exact), tokenizer.decode(exact))
    with pytest.raises(ValueError, match=f"save: the weights are cast to {precision}; allowed: fp32"):
        half.save(tmp_path / "other")
    with pytest.raises(ValueError, match=f"cast to {precision} already, fp32 was asked for"):
        half.set_precision("fp32")
    with pytest.raises(ValueError, match="precision is 'fp8'; allowed: fp32, bf16, fp16"):
        load_tokenizer(tmp_path, precision="fp8")  # type: ignore[arg-type]


def test_float32_is_not_rounded_to_tf32() -> None:
    tokenizer, seen = make_tokenizer(), []
    tokenizer.encoder[-1].register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    assert before
    tokenizer.encode(make_frames())
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32 == before


def gradient_codebook(rank: int | None) -> dict[str, Tensor]:
    """Uses and gradient of codes that learn by a loss, on this worker's half of the rows or on all."""
    generator = torch.Generator().manual_seed(0)
    codebook = Codebook(replace(TINY, codebook="gradient", distance="cosine"))
    with torch.no_grad():
        codebook.codes.copy_(torch.randn(16, 4, generator=generator))
    codebook.uses.fill_(1.0)
    codebook.updates.fill_(1)
    z = torch.randn(4, 4, 2, 3, generator=generator)
    z = z if rank is None else z[2 * rank : 2 * rank + 2]
    quantized = codebook(z)
    F.mse_loss(quantized.vectors, F.normalize(z, dim=1)).backward()
    assert codebook.codes.grad is not None
    grad = codebook.codes.grad
    if rank is not None:  # as DDP does
        torch.distributed.all_reduce(grad)
        grad = grad / 2
    return {"uses": codebook.uses, "counts": quantized.counts, "grad": grad}


def codebook_steps(rank: int) -> dict[str, Tensor]:
    """Seven updates of a codebook, with restarts, on this worker's half of the rows."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for kind, distance in KINDS:
        codebook = Codebook(replace(TINY, codebook=kind, distance=distance, restart_below=0.9, restart_every=2))
        for _ in range(7):
            z = torch.randn(4, 4, 2, 3, generator=generator)
            counts = codebook(z[2 * rank : 2 * rank + 2]).counts
        found |= {f"{kind}.{distance}.{name}": value for name, value in codebook.state_dict().items()}
        found[f"{kind}.{distance}.counts"] = counts
    return found


def follow_whole_batch(rank: int | None) -> dict[str, Tensor]:
    """One moving-average step from given codes."""
    generator = torch.Generator().manual_seed(0)
    codebook = Codebook(TINY)
    codebook.codes.copy_(torch.randn(16, 4, generator=generator))
    codebook.sums.copy_(codebook.codes)
    codebook.uses.fill_(1.0)
    codebook.updates.fill_(1)
    z = torch.randn(4, 4, 2, 3, generator=generator)
    counts = codebook(z if rank is None else z[2 * rank : 2 * rank + 2]).counts
    return {**codebook.state_dict(), "counts": counts}


def two_checks(rank: int) -> list[dict[str, Tensor]]:
    return [codebook_steps(rank), follow_whole_batch(rank), gradient_codebook(rank)]


def test_two_workers_keep_one_codebook(tmp_path: Path) -> None:
    first, second = run_two_workers(two_checks, tmp_path)
    for a, b in zip(first, second, strict=True):
        for name, value in a.items():
            assert torch.equal(value, b[name]), name
    torch.testing.assert_close(first[1], follow_whole_batch(None))
    torch.testing.assert_close(first[2], gradient_codebook(None))


@pytest.mark.parametrize(("codebook", "distance"), KINDS)
def test_checkpoint_in_the_middle_is_exact(codebook: str, distance: str) -> None:
    config = replace(TINY, codebook=codebook, distance=distance, restart_below=0.5, restart_every=2)
    torch.manual_seed(0)
    straight = VqvaeObjective(Vqvae(config), VqvaeObjectiveConfig())
    train(3, make_frames(), straight)
    torch.manual_seed(1)
    resumed = VqvaeObjective(Vqvae(config), VqvaeObjectiveConfig())
    resumed.load_state_dict(straight.state_dict())
    for objective in (straight, resumed):
        train(3, make_frames(), objective)
    assert straight.tokenizer.fingerprint() == resumed.tokenizer.fingerprint()


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded.fingerprint() == tokenizer.fingerprint() and not loaded.training
    assert torch.equal(loaded.encode(make_frames()), tokenizer.encode(make_frames()))
    assert make_tokenizer(replace(TINY, ema_decay=0.5)).fingerprint() != tokenizer.fingerprint()
    with torch.no_grad():
        tokenizer.encoder[0].weight[0] += 1e-3
    assert tokenizer.fingerprint() != loaded.fingerprint()


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing.*train one"):
        load_tokenizer(tmp_path)
    good = tmp_path / "good"
    make_tokenizer().save(good)
    make_tokenizer(replace(TINY, channels=4)).save(tmp_path / "other")

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    (damaged("no-weights") / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_tokenizer(tmp_path / "no-weights")
    (damaged("no-json") / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer config"):
        load_tokenizer(tmp_path / "no-json")
    (damaged("short") / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match="do not make a vqvae tokenizer"):
        load_tokenizer(tmp_path / "short")
    shutil.copy(tmp_path / "other" / "model.safetensors", damaged("mixed"))
    with pytest.raises(ValueError, match="do not make a vqvae tokenizer"):
        load_tokenizer(tmp_path / "mixed")
    config = json.loads((good / "config.json").read_text())
    for name, change, message in (
        ("kind", {"kind": "jpeg"}, "kind 'jpeg'; allowed: vqvae"),
        ("pixels", {"preprocessing": "x / 255"}, "preprocesses otherwise"),
        ("edited", {"config": {**config["config"], "ema_decay": 0.5}}, "the files were changed"),
        ("field", {"config": {**config["config"], "depth": 3}}, "unexpected keyword argument 'depth'"),
    ):
        (damaged(name) / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)


def test_wrong_frames_are_named() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"float32 of shape \(1, 8, 8, 3\); allowed: uint8"):
        tokenizer.encode(torch.zeros(1, 8, 8, 3))
    with pytest.raises(ValueError, match="12x8 px; allowed: multiples of 8 px"):
        tokenizer.encode(torch.zeros(1, 12, 8, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"channels": 7}, "channels is 7"),
        ({"res_blocks": 0}, "res_blocks is 0"),
        ({"codebook_size": 65536}, "codebook_size is 65536"),
        ({"patch": 5}, "patch is 5; allowed: 4, 8, 16"),
        ({"codebook": "none"}, "codebook is 'none'; allowed: ema, gradient"),
        ({"distance": "l1"}, "distance is 'l1'; allowed: euclidean, cosine"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"restart_below": 1.0}, "restart_below is 1.0"),
    ],
)
def test_bad_settings_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **setting)
    with pytest.raises(ValueError, match=r"beta is -1\.0"):
        VqvaeObjectiveConfig(beta=-1.0)


@pytest.mark.parametrize("kind", ["vqvae", "dvae"])
def test_perceptual_loss(kind: str) -> None:
    """It compares features of a frozen tokenizer, its gradient reaches the one that learns, and it learns to lower it."""
    torch.manual_seed(1)
    network = Vqvae(replace(TINY, channels=16)) if kind == "vqvae" else Dvae(DvaeConfig(hidden=8, codebook_size=24))
    frames, before = make_frames(), network.fingerprint()
    pixels = (frames.permute(0, 3, 1, 2) / 127.5) - 1
    assert feature_distance(network, pixels, pixels) == 0
    ours, theirs = (network.features((x + 1) / 2) for x in (pixels.flip(3), pixels))
    expected = 2 - 2 * F.cosine_similarity(ours, theirs, dim=1).mean()
    torch.testing.assert_close(feature_distance(network, pixels.flip(3), pixels), expected, atol=1e-5, rtol=1e-4)
    logits = network.encoder[-1](theirs) if isinstance(network, Vqvae) else network.encoder.head(theirs)
    torch.testing.assert_close(logits, network.encoder(network.normalize(frames)), atol=1e-5, rtol=1e-4)

    def perceptual(weight: float, steps: int) -> tuple[VqvaeObjective, float]:
        torch.manual_seed(0)
        config = VqvaeObjectiveConfig(perceptual_weight=weight)
        objective = VqvaeObjective(Vqvae(replace(TINY, channels=16)), config, network)
        return objective, train(steps, frames, objective)["losses"]["perceptual"].item() / weight

    objective, start = perceptual(1e-3, 1)
    assert "perceptual" not in VqvaeObjective(objective.tokenizer, VqvaeObjectiveConfig())({"frames": frames})["losses"]
    assert perceptual(100.0, 40)[1] < min(start, perceptual(1e-3, 40)[1])
    assert network.fingerprint() == before and all(p.grad is None for p in network.parameters())
    assert {name.split(".")[0] for name in objective.state_dict()} == {"tokenizer"}
    with pytest.raises(ValueError, match=r"perceptual_weight is 0\.5 with no tokenizer"):
        VqvaeObjective(objective.tokenizer, VqvaeObjectiveConfig(perceptual_weight=0.5))
    with pytest.raises(ValueError, match=r"perceptual_weight is 0\.0 with a tokenizer"):
        VqvaeObjective(objective.tokenizer, VqvaeObjectiveConfig(), network)
    with pytest.raises(ValueError, match=r"perceptual_weight is -1\.0"):
        VqvaeObjectiveConfig(perceptual_weight=-1.0)

"""`tokenreel bench train`: the training step of VIMPAC against a straightforward one, and ways to attend inside short lines.

`measure` needs torch, einops, numpy and safetensors alone, so a bare GPU machine runs it:
`python -c "from jobs.bench.train import *; print(measure(BenchTrainConfig(size='base')))"`.
"""

from __future__ import annotations

import functools
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.bench.plain_vimpac import PlainVimpac
from jobs.loop import Context, LoopConfig
from jobs.step import Measured, Step, split
from models.flops import peak_flops
from models.layers import line_shape
from models.optim import OptimConfig, param_groups
from models.vimpac import SIZES, VimpacBackbone, VimpacConfig, VimpacObjective, VimpacObjectiveConfig
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from jobs.result import JobResult

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchTrainConfig:
    """Time training steps on the GPU where there is one, else on the CPU, on random tokens that lie in memory.

    Each figure is the median of several rounds, in which the ways take turns. A step is everything but the loader's
    thread, which makes our masks: copy to the device, forward, backward, clipping and AdamW.
    """

    size: Literal["small", "base", "large"] = "small"
    """VIMPAC's network, at 5 frames of 128 px."""
    layers: int | None = None
    """Layers, where not all of the network's: a CPU takes long."""
    videos: int = 64
    """Videos of a step, two clips each; lower it for a CPU, to 2 or 4."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of our step. The straightforward one takes fp16 for bf16 on a GPU, as the authors do."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Also time our step compiled; auto on GPUs only."""
    repeats: int = 5
    """Rounds, after one that only warms up."""
    steps_per_round: int = 1
    """Steps that each way takes in a round, with one wait for the device at its end."""
    peak_tflops: float | None = None
    """Peak speed of the device, of which the MFU is a share; by default from its data sheet, and for a CPU none."""

    def __post_init__(self) -> None:
        for name in ("videos", "repeats", "steps_per_round", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: must be 1 or more")


def run(config: BenchTrainConfig) -> JobResult:
    """Two tables; see `measure`."""
    from jobs.result import JobResult

    started_s = time.monotonic()
    figures = measure(config)
    num_rows = len(figures["steps"]) + len(figures["lines"])
    elapsed_s = time.monotonic() - started_s
    return JobResult(
        job="bench train", out="", planned=num_rows, committed=num_rows, elapsed_s=elapsed_s, figures=figures
    )


def measure(config: BenchTrainConfig) -> dict[str, Any]:
    """Device, and two tables.

    steps: way (ours, compiled, plain), step_s, clips_per_s, tokens_per_s, tflops_per_s and mfu (of the FLOPs that the method
    needs, `models/flops.py`), times_plain, peak_memory_bytes on a GPU.
    lines: axes, positions of a line with CLS, way, forward and backward in ms, for one layer's attention of all clips.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = SIZES[config.size]
    backbone = replace(backbone, layers=config.layers or backbone.layers)
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": config.size,
        "layers": backbone.layers,
        "videos": config.videos,
        "precision": config.precision,
        "steps": _measure_steps(config, backbone, device),
        "lines": _measure_lines(config, backbone, device),
    }


def _measure_steps(config: BenchTrainConfig, backbone: VimpacConfig, device: torch.device) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    shape = (config.videos, 2, *backbone.shape)
    batch: dict[str, Any] = {
        "tokens": torch.randint(backbone.codebook_size, shape, generator=generator),
        "seeds": torch.arange(config.videos * 2).view(config.videos, 2),
        "keys": [str(number) for number in range(config.videos)],
    }
    ways: dict[str, Callable[[int], Measured | None]] = {"ours": _our_step(config, backbone, device, batch, "off")}
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        ways["compiled"] = _our_step(config, backbone, device, batch, "on")
    ways["plain"] = _plain_step(config, backbone, device, batch)
    peak_bytes: dict[str, int] = {}
    flops = 0.0

    def take(name: str) -> None:
        nonlocal flops
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for step in range(config.steps_per_round):
            measured = ways[name](step)
            if measured is not None and step == config.steps_per_round - 1:
                flops = measured.read()[1]["flops"]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            peak_bytes[name] = torch.cuda.max_memory_allocated(device)

    taken_s = _alternate({name: functools.partial(take, name) for name in ways}, config.repeats)
    peak = config.peak_tflops * 1e12 if config.peak_tflops else peak_flops(device, config.precision)
    rows = []
    for name, round_s in taken_s.items():
        step_s = round_s / config.steps_per_round
        row = {
            "way": name,
            "step_s": _round(step_s),
            "clips_per_s": _round(config.videos * 2 / step_s),
            "tokens_per_s": _round(batch["tokens"].numel() / step_s),
            "tflops_per_s": _round(flops / step_s / 1e12),
            "times_plain": round(taken_s["plain"] / round_s, 2),
        }
        if peak is not None:
            row["mfu"] = _round(flops / step_s / peak)
        if name in peak_bytes:
            row["peak_memory_bytes"] = peak_bytes[name]
        log.info("bench train: %s", row)
        rows.append(row)
    return rows


def make_objective(backbone: VimpacConfig, size: str) -> VimpacObjective:
    """The objective of a recipe's size, with the same random weights each time."""
    task = VimpacObjectiveConfig()
    if size == "large":
        task = replace(task, head_layers=3, head_hidden=4096)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VimpacObjective(VimpacBackbone(backbone), task)


def _our_step(
    config: BenchTrainConfig, backbone: VimpacConfig, device: torch.device, batch: dict[str, Any], compiled: Any
) -> Callable[[int], Measured]:
    objective = make_objective(backbone, config.size).to(device).train()
    loop = LoopConfig(precision=config.precision, compile=compiled)
    step = Step(objective, Context(run=Path(), device=device), loop, OptimConfig())
    # The loader's thread makes these while the step before runs, so they are made once here.
    parts = [
        {
            name: value.pin_memory() if device.type == "cuda" and isinstance(value, Tensor) else value
            for name, value in part.items()
        }
        for part in split(objective, batch, None)
    ]
    return lambda number: step(parts, number)


def _plain_step(
    config: BenchTrainConfig, backbone: VimpacConfig, device: torch.device, batch: dict[str, Any]
) -> Callable[[int], None]:
    model = PlainVimpac(make_objective(backbone, config.size)).to(device).train()
    optim = OptimConfig()
    optimizer = torch.optim.AdamW(param_groups(model, optim.weight_decay), lr=optim.lr, betas=optim.betas)
    is_half = config.precision == "bf16" and device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=is_half)
    dtype = torch.float16 if is_half else torch.bfloat16

    def step(number: int) -> None:
        tokens = batch["tokens"].to(device)
        with torch.autocast(device.type, dtype, enabled=config.precision == "bf16"):
            loss = model({**batch, "tokens": tokens})
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        loss.item()

    return step


def attend_written_out(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention as two batched products and a softmax: (n m l e) each -> (n m l e)."""
    return F.dropout((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1), dropout) @ v


def _line_ways(config: BenchTrainConfig, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    def attend_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        allowed = torch.ones(len(q), 1, 1, q.shape[2], dtype=torch.bool, device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    ways: dict[str, Callable[..., Tensor]] = {
        "sdpa": F.scaled_dot_product_attention,
        "sdpa with a mask": attend_masked,
        "sdpa with dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1),
        "written out": attend_written_out,
        "written out with dropout": functools.partial(attend_written_out, dropout=0.1),
    }
    backends = {"sdpa math": SDPBackend.MATH}
    if device.type == "cuda":
        backends |= {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION}
        backends |= {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION}

    def attend_by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    ways |= {name: functools.partial(attend_by, backend) for name, backend in backends.items()}
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        compiled = torch.compile(attend_written_out, dynamic=False)
        ways |= {"compiled": compiled, "compiled with dropout": functools.partial(compiled, dropout=0.1)}
    return ways


def _measure_lines(config: BenchTrainConfig, backbone: VimpacConfig, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    for axes, heads in (("t", backbone.heads), ("h", backbone.heads // 2)):
        num_lines, length = line_shape(axes, backbone.shape)  # type: ignore[arg-type]  # two of the Lines
        shape = (3, config.videos * 2 * num_lines, heads, 1 + length, backbone.head_dim)
        qkv = torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
        qkv.requires_grad_()

        def attend(way: Callable[..., Tensor], qkv: Tensor = qkv) -> None:
            out = way(*qkv.unbind())
            torch.autograd.grad(out, qkv, torch.ones_like(out))
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        ways: dict[str, Callable[[], None]] = {}
        for name, way in _line_ways(config, device).items():
            try:
                attend(way)
            except RuntimeError as error:  # a backend that does not take these shapes
                log.info(
                    "bench train: %s does not run on lines of %d: %s", name, 1 + length, str(error).splitlines()[0]
                )
                continue
            ways[name] = functools.partial(attend, way)
        taken_s = _alternate(ways, config.repeats)
        rows += [
            {"axes": axes, "positions": 1 + length, "way": name, "ms": _round(seconds * 1e3)}
            for name, seconds in taken_s.items()
        ]
    return rows


def _alternate(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turn, after a round that does not count."""
    taken_s: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started_s = time.perf_counter()
            way()
            if turn:
                taken_s[name].append(time.perf_counter() - started_s)
    return {name: statistics.median(seconds) for name, seconds in taken_s.items()}


def _round(value: float) -> float:
    """Three digits that count."""
    return float(f"{value:.3g}")

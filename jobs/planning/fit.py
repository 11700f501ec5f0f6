"""Settings that do not fit the cluster or each other, each with what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jobs.data_job import RejectPolicy
from jobs.planning.prediction import StagePrediction
from jobs.planning.spec import ClusterSpec

_PADDED_SHARE = 0.1
_UNSURE = 0.25


def find_misfits(
    stages: Mapping[str, StagePrediction],
    spec: ClusterSpec,
    recipe: str | None,
    *,
    batch_frames: int,
    val_fraction: float,
) -> list[str]:
    """Warnings for a person.

    Args:
        recipe: of pre-training, if any.
        batch_frames: frames of a batch, over the views of a clip that share it.
    """
    clips, tokens = stages["shard"], stages.get("tokenize")
    found = [*_shards(clips, tokens, spec), *_disks(clips, spec), *_sample(stages)]
    if tokens:
        found += [*_encoders(tokens, spec), *_padding(tokens, batch_frames)]
    if tokens and recipe:
        found += _recipe(tokens, spec, recipe, val_fraction)
    return found


def _shards(clips: StagePrediction, tokens: StagePrediction | None, spec: ClusterSpec) -> Iterator[str]:
    if clips.num_shards < spec.num_cpus:
        yield (
            f"{clips.num_shards} shards for {spec.num_cpus} CPUs: while shard runs, {spec.num_cpus - clips.num_shards} of them "
            "have nothing to do; lower --videos-per-shard or --shard-bytes"
        )
    elif clips.bound_by == "last shard":
        yield "shard: most CPUs wait for the last shards; lower --videos-per-shard, or plan fewer CPUs"
    if tokens and tokens.num_shards < 2 * spec.num_gpus:
        yield (
            f"{tokens.num_shards} shards for {spec.num_gpus} GPUs, which work on two each; lower --videos-per-shard or "
            "--shard-bytes"
        )


def _disks(clips: StagePrediction, spec: ClusterSpec) -> Iterator[str]:
    """With datasets in an object store, each CPU of a node has a shard on its disk until that is uploaded."""
    for one in spec.nodes:
        needed_gb = one.cpus * clips.largest_shard_bytes / 1e9
        if one.disk_gb and needed_gb > one.disk_gb:
            yield (
                f"nodes {one.name}: {one.cpus} shards of up to {clips.largest_shard_bytes / 1e9:.3g} GB at a time need "
                f"{needed_gb:.3g} GB of scratch with an object store, disk_gb = {one.disk_gb:g}; lower --videos-per-shard"
            )


def _sample(stages: Mapping[str, StagePrediction]) -> Iterator[str]:
    most = RejectPolicy().max_reject_fraction
    for name, stage in stages.items():
        rejected = sum(stage.rejected.values())
        if rejected > most * stage.planned:
            yield (
                f"{name}: {rejected} of {stage.planned} samples would be rejected, and {most:.0%} ends the job; clean the "
                "corpus, or raise --max-reject-fraction"
            )
        for figure, error in stage.relative_error.items():
            if error > _UNSURE:
                yield f"{name}: {figure} is known to ± {error:.0%} only (standard error); raise --share or --min-videos"


def _encoders(tokens: StagePrediction, spec: ClusterSpec) -> Iterator[str]:
    if spec.num_gpus and tokens.bound_by == "cpus":
        busy = tokens.gpu_hours / spec.num_gpus / (tokens.cpu_hours / spec.num_cpus)
        yield (
            f"tokenize: GPUs wait {1 - busy:.0%} of the time for {spec.num_cpus} CPUs to decode; plan {spec.num_cpus / busy:.0f} "
            "CPUs, fewer GPUs, or --storage transcode with a smaller --transcode.short-side-px"
            if busy > 0
            else "tokenize: GPUs have next to nothing to do"
        )


def _padding(tokens: StagePrediction, batch_frames: int) -> Iterator[str]:
    frames = tokens.frames / max(1, tokens.num_shards)
    padded = batch_frames / 2 / (frames + batch_frames / 2)
    if padded > _PADDED_SHARE:
        yield (
            f"tokenize: a shard has {frames:.0f} frames, so the padding of its last batch of {batch_frames} is about {padded:.0%} of "
            "what is encoded; lower --batch-frames, or raise --videos-per-shard"
        )


def _recipe(tokens: StagePrediction, spec: ClusterSpec, recipe: str, val_fraction: float) -> Iterator[str]:
    from jobs.recipes import find_recipe

    loader = find_recipe(recipe).loader
    train = tokens.committed * (1 - val_fraction)
    if train < loader.batch_size:
        yield (
            f"{recipe}: a batch is {loader.batch_size} videos, and about {train:.0f} samples are there to train on; lower "
            "--loader.batch-size, or take a larger corpus"
        )
    block = min(loader.shards_per_block, tokens.num_shards) * tokens.largest_shard_bytes
    rooms = {f"disk_gb of nodes {one.name}": one.disk_gb * 1e9 for one in spec.nodes if one.disk_gb}
    for name, room in {"--loader.cache.max-bytes": loader.cache.max_bytes, **rooms}.items():
        if block > room:
            yield (
                f"{recipe}: {loader.shards_per_block} shards of tokens are shuffled together, up to {block / 1e9:.3g} GB, and "
                f"{name} is {room / 1e9:.3g} GB; lower --loader.shards-per-block or --videos-per-shard"
            )

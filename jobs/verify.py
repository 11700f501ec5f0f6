"""`tokenreel verify`: every byte of a dataset against its index, and its books against its files."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from jobs.config import CONFIG_NAME, from_plain
from jobs.paths import PathOrUrl
from jobs.progress import Progress
from jobs.result import JobResult
from jobs.token_origin import TOKENIZER_FOLDER, load_kept_tokenizer, settings_of
from pipeline import ffmpeg
from pipeline.audit import audit, draw_samples
from pipeline.dataset import DatasetMeta, find_parent, listed_shards, read_meta, require_writable
from pipeline.encoding import Encode
from pipeline.errors import ConfigError, DatasetError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings
from pipeline.untrusted import MAX_JSON_BYTES, parse_object, read_member
from pipeline.verify import Problem, shards_at_fault
from pipeline.verify import verify as verify_dataset

log = logging.getLogger(__name__)


def parse_share(text: str) -> float:
    """A share as people write it, 0.001 or 0.1%; ValueError where it is not one between 0 and 1."""
    share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 <= share <= 1:
        raise ValueError(f"{text}: a share must be in [0, 1], or in [0%, 100%]")
    return share


_SHARE = PrimitiveConstructorSpec[float](
    nargs=1,
    metavar="SHARE",
    instance_from_str=lambda words: parse_share(words[0]),
    is_instance=lambda value: isinstance(value, float | int),
    str_from_instance=lambda share: [str(share)],
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Check a clip, token or embedding dataset: hashes, offsets, tar members, books, splits, duplicates, stale or foreign shards; with
    --re-encode also whether tokens are those of their clips."""

    dataset: Annotated[PathOrUrl, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """The dataset: a path, or s3://, gs://, abfs://."""
    repair: bool = False
    """Make the shards that fail again, from the same inputs by the command that the dataset keeps (config.json), and check
    once more. A shard stays as it is until the new one is whole."""
    parent: str = ""
    """The clips that tokens, or the tokens that embeddings were made from, where they are not at the place that DATASET names
    within its own storage; a path, or s3://, gs://, abfs://."""
    deep: bool = False
    """Decode every clip, and compare how many frames it shows with what the index says."""
    re_encode: Annotated[float, _SHARE] = 0.0
    """Share of the samples of a token dataset, as 0.001 or 0.1%, whose clips are decoded and encoded again, on the GPU where
    there is one; the codes must be the same. At least one sample, drawn at random."""
    re_encode_seed: int = 0
    """Another seed draws other samples."""
    re_encode_tolerance: Annotated[float, _SHARE] = 0.0
    """Share of a sample's codes that may differ. On the kind of device that made the tokens none does; another one may
    round a near tie the other way."""

    def __post_init__(self) -> None:
        for name in ("re_encode", "re_encode_tolerance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be in [0, 1]")
        if self.re_encode_seed < 0:
            raise ConfigError(f"re_encode_seed = {self.re_encode_seed}: must be 0 or more")


def run(config: VerifyConfig) -> JobResult:
    started_s = time.monotonic()
    store = Store.at(config.dataset)
    check = _Check(config, store)
    problems = check.run()
    repaired: list[int] = []
    if problems and config.repair:
        require_writable(store, read_meta(store))
        repaired = shards_at_fault(store, problems)
        log.info("verify: making %d shards again: %s", len(repaired), ", ".join(f"{s:06d}" for s in repaired[:20]))
        _rebuild(store, repaired)
        problems = check.run()
    meta = read_meta(store)
    num_samples = (meta.totals or {}).get("committed", 0)
    log.info("verify: %d samples, %d problems", num_samples, len(problems))
    return JobResult(
        job="verify",
        out=store.url,
        status="failed" if problems else "done",
        planned=num_samples,
        committed=num_samples,
        fingerprint=meta.fingerprint,
        elapsed_s=time.monotonic() - started_s,
        figures={
            "num_problems": len(problems),
            "problems": [problem.text for problem in problems[:20]],
            "repaired_shards": repaired,
            **check.figures,
        },
    )


class _Check:
    """One look at a dataset, which can be repeated; `figures` are the last one's."""

    def __init__(self, config: VerifyConfig, store: Store) -> None:
        self._config, self._store = config, store
        self.figures: dict[str, int] = {}
        meta = read_meta(store)
        self._parent = find_parent(store, meta, config.parent or None)
        self._limits = _limits_of(store) if meta.kind == "clips" else FfmpegLimits()
        if config.re_encode:
            self._require_clips(meta)  # hashing a large dataset takes hours, so this is said before
        elif meta.kind != "clips" and self._parent is None:
            log.warning(
                f"{store}: whether its shards are stale was left out: the dataset that it was made from, {meta.parent_fingerprint}, "
                "is not at hand; give its place by --parent"
            )

    def run(self) -> list[Problem]:
        problems = []
        for problem in self._find():
            log.error(problem.text)
            problems.append(problem)
        return problems

    def _find(self) -> Iterator[Problem]:
        found = []
        if read_meta(self._store).kind != "clips":
            self.figures["parent_checked"] = int(self._parent is not None)
        for problem in verify_dataset(self._store, self._parent, deep=self._config.deep, limits=self._limits):
            found.append(problem.shard)
            yield problem
        if self._config.re_encode:
            yield from self._re_encode([shard for shard in listed_shards(self._store) if shard not in found])

    def _re_encode(self, shards: list[int]) -> Iterator[Problem]:
        """What decoding and encoding says of samples in `shards`; a shard whose bytes are wrong is known to be bad."""
        config, store = self._config, self._store
        meta = read_meta(store)
        clips = self._require_clips(meta)
        drawn = draw_samples(store, shards, config.re_encode, config.re_encode_seed)
        number = sum(map(len, drawn.values()))
        self.figures |= {"samples_re_encoded": number, "codes_compared": 0, "codes_different": 0}
        if meta.decoder and meta.decoder != ffmpeg.identity():
            log.warning(
                f"{store}: its clips were decoded by {meta.decoder}; this machine has {ffmpeg.identity()}, so codes may differ without a fault"
            )
        settings = _settings_of(store, meta)
        encode = _encode_of(store, meta, settings)
        with Progress("re-encode", "samples", number) as bar:
            for one in audit(store, clips, drawn, settings, encode, config.re_encode_tolerance):
                self.figures["codes_compared"] += one.codes_compared
                self.figures["codes_different"] += one.codes_different
                bar.advance(1)
                if one.problem is not None:
                    yield one.problem

    def _require_clips(self, meta: DatasetMeta) -> Store:
        """The clip dataset that tokens were made from."""
        if meta.kind != "tokens":
            raise ConfigError(f"{self._store} holds {meta.kind}; only tokens can be encoded again (--re-encode)")
        if self._parent is None:
            raise ConfigError(
                f"{self._store}: --re-encode needs the clips that its tokens were made from, dataset {meta.parent_fingerprint}, "
                "which are not at hand; give their place by --parent, or verify without --re-encode"
            )
        return self._parent


def _settings_of(store: Store, meta: DatasetMeta) -> TokenizeSettings:
    """The settings that made a token dataset, with the limits of its last command."""
    return replace(settings_of(meta), limits=_limits_of(store))


def _limits_of(store: Store) -> FfmpegLimits:
    """The limits of the last command that wrote a dataset, or the usual ones where it cannot be read."""
    with contextlib.suppress(ConfigError, KeyError, TypeError):
        return from_plain(_read_config(store)["settings"]["limits"], FfmpegLimits, store.where(CONFIG_NAME))
    return FfmpegLimits()


def _encode_of(store: Store, meta: DatasetMeta, settings: TokenizeSettings) -> Encode:
    """How the tokenizer that a token dataset keeps encodes.

    Raises:
        DatasetError: it is not there, is damaged, or is not the one that made the tokens.
    """
    import torch

    from jobs.frame_encoder import FrameEncoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = load_kept_tokenizer(store, device, settings.precision)
    except (FileNotFoundError, ValueError) as error:
        raise DatasetError(f"{store.where(TOKENIZER_FOLDER)}: the tokenizer cannot be loaded: {error}") from error
    if tokenizer.fingerprint() != meta.config["tokenizer"]:
        raise DatasetError(
            f"{store.where(TOKENIZER_FOLDER)} has fingerprint {tokenizer.fingerprint()}; the tokens were made by "
            f"{meta.config['tokenizer']}. Put that tokenizer there"
        )
    return FrameEncoder(tokenizer, device, settings.precision)


def _rebuild(store: Store, shards: list[int]) -> None:
    """Run the job that wrote the dataset again, by its own config, for these shards."""
    from jobs import embed, shard, tokenize

    jobs: dict[str, tuple[type[Any], Callable[[Any, list[int]], JobResult]]] = {
        "clips": (shard.ShardConfig, shard.run),
        "tokens": (tokenize.TokenizeConfig, tokenize.run),
        "embeddings": (embed.EmbedConfig, embed.run),
    }
    kind, run_job = jobs[read_meta(store).kind]
    plain = {name: value for name, value in _read_config(store).items() if name != "plan"}  # its file may be gone
    config = from_plain(plain, kind, store.where(CONFIG_NAME))
    # What a damaged shard says of its rejects is not believed.
    run_job(replace(config, out=store.url, rejects=replace(config.rejects, retry_rejects=())), shards)


def _read_config(store: Store) -> dict[str, Any]:
    try:
        return parse_object(read_member(store, CONFIG_NAME, MAX_JSON_BYTES), store.where(CONFIG_NAME))
    except (FileNotFoundError, DatasetError) as error:
        raise ConfigError(
            f"{store.where(CONFIG_NAME)} cannot be read, so the command that wrote the dataset is unknown: {error}"
        ) from error

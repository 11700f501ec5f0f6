"""The shard stage without Ray: a deterministic plan, and the work on one item of it."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa

from pipeline.clips import ClipConfig, plan_clips
from pipeline.corpus import list_corpus, split_duplicates
from pipeline.dataset import DatasetMeta, ShardWriter
from pipeline.decode import TranscodeConfig, require_decodable, transcode
from pipeline.errors import BadVideo, ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.ledger import Ledger
from pipeline.probe import VideoInfo, probe
from pipeline.schema import INPUT_SCHEMA, ClipSpan, Reject, VideoRef, draw_split, fingerprint

_UNREADABLE = (errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ESTALE)
_EXTENSIONS = {"mov": "mp4", "matroska": "mkv", "mpegts": "ts", "mpeg": "mpg", "mpegvideo": "mpg"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSettings:
    """What decides the content of a clip dataset, beside its corpus."""

    clips: ClipConfig = field(default_factory=ClipConfig)
    storage: Literal["copy", "transcode"] = "copy"
    """copy: a video's bytes as they are. transcode: H.264 of a small size that decodes fast."""
    transcode: TranscodeConfig = field(default_factory=TranscodeConfig)
    include: str = "*"
    """Glob that the relative paths of a corpus folder must match; everything else in it is ignored."""
    videos_per_shard: int = 32
    """Videos that share one output shard, the unit of work and of resume."""
    val_fraction: float = 0.05
    """Share of videos whose clips go to the validation split, drawn by a hash of their content."""
    limits: FfmpegLimits = field(default_factory=FfmpegLimits)

    def __post_init__(self) -> None:
        if self.storage not in ("copy", "transcode"):
            raise ConfigError(f"storage = {self.storage!r}: allowed are copy, transcode")
        if self.storage == "copy" and self.clips.mode != "whole":
            raise ConfigError(
                f"storage = copy keeps whole videos; clips.mode = {self.clips.mode} needs storage = transcode"
            )
        if self.videos_per_shard < 1:
            raise ConfigError(f"videos_per_shard = {self.videos_per_shard}: must be 1 or more")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"val_fraction = {self.val_fraction}: must be in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """All work of a shard job, known before any of it starts: item i becomes shard i."""

    root: Path
    items: list[list[VideoRef]]
    rejects: list[Reject]

    @property
    def num_videos(self) -> int:
        return sum(map(len, self.items)) + len(self.rejects)


def plan_shards(corpus: Path, settings: ShardSettings) -> ShardPlan:
    """List the corpus and deal its videos out to shards, in an order that does not depend on the file system.

    Neighbours in a folder are spread over shards by a hash of their paths, so that a shard is a fair sample.
    """
    root, refs, rejects = list_corpus(corpus, settings.include)
    refs, duplicates = split_duplicates(root, refs)
    refs.sort(key=lambda ref: (hashlib.sha256(ref.path.encode()).digest(), ref.path))
    size = settings.videos_per_shard
    items = [refs[start : start + size] for start in range(0, len(refs), size)]
    return ShardPlan(root=root, items=items, rejects=[*rejects, *duplicates])


def describe_clips(plan: ShardPlan, config: dict[str, Any]) -> DatasetMeta:
    """The identity of the clip dataset that `plan` and `config` (the settings as plain JSON) make.

    Inputs count by path, size and modification time: a changed file is found without reading the corpus again.
    """
    inputs_digest = fingerprint(
        inputs=[astuple(ref) for item in plan.items for ref in item],
        rejects=[[r.path, r.reject_class] for r in plan.rejects],
    )
    return DatasetMeta(
        kind="clips",
        fingerprint=fingerprint(kind="clips", inputs=inputs_digest, config=config),
        config=config,
        parent_fingerprint="",
        inputs_digest=inputs_digest,
        num_shards=len(plan.items),
        extra={"corpus": plan.root.name},
    )


def list_inputs(plan: ShardPlan) -> pa.Table:
    """The inputs as a table, kept beside the dataset so that a resume can name the file that changed."""
    return pa.Table.from_pylist([asdict(ref) for item in plan.items for ref in item], schema=INPUT_SCHEMA)


def write_clip_shard(
    out: Path, meta: DatasetMeta, shard: int, root: Path, refs: list[VideoRef], settings: ShardSettings
) -> Ledger:
    """Turn the videos of one work item into one committed shard, and return its books. Bad videos become rejects."""
    writer = ShardWriter(out, meta, shard)
    rejects: list[Reject] = []
    planned = 0
    try:
        for ref in refs:
            for outcome in _Video(root, ref, settings).read():
                planned += 1
                if isinstance(outcome, Reject):
                    rejects.append(outcome)
                else:
                    writer.add(*outcome)
        return writer.commit(planned, rejects)
    finally:
        writer.abort()


Sample = tuple[dict[str, Any], str, bytes]


class _Video:
    """One input on its way to samples."""

    def __init__(self, root: Path, ref: VideoRef, settings: ShardSettings) -> None:
        self._root, self._ref, self._settings = root, ref, settings

    def read(self) -> Iterator[Sample | Reject]:
        """A sample or a reject for each planned clip; one reject where the video fails as a whole."""
        try:
            with (self._root / self._ref.path).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                info = probe(file, self._settings.limits)
                require_decodable(file, info, self._settings.limits)
                for span in plan_clips(info.duration_s, self._settings.clips):
                    yield self._read_span(file, digest, info, span)
        except BadVideo as bad:
            yield self._reject(bad)
        except OSError as error:
            if error.errno not in _UNREADABLE:  # a full disk is not the video's fault
                raise
            yield self._reject(BadVideo("unreadable", f"cannot be read: {error.strerror}"))

    def _read_span(self, file: IO[bytes], digest: str, info: VideoInfo, span: ClipSpan) -> Sample | Reject:
        settings = self._settings
        video_id = digest[:16]
        key = f"{video_id}-{round(span.start_s * 1000):09d}"
        if span.duration_s < settings.clips.min_s:
            reason = f"{span.duration_s:.3f} s; clips.min_s is {settings.clips.min_s:g}"
            return Reject(
                path=self._ref.path, key=key, stage="shard", reject_class="too-short", reason=reason, outcome="filtered"
            )
        try:
            if settings.storage == "copy":
                file.seek(0)
                data, ext, stored = file.read(), _extension(info), info
            else:
                data, stored = transcode(file, span, settings.transcode, settings.limits)
                ext = "mp4"
        except BadVideo as bad:
            return self._reject(bad, key)
        row = {
            "key": key,
            "video_id": video_id,
            "source": self._ref.path,
            "start_s": span.start_s,
            "end_s": span.end_s,
            "num_frames": round(stored.duration_s * stored.fps),
            "height": stored.height,
            "width": stored.width,
            "fps": stored.fps,
            "codec": stored.codec,
            "ext": ext,
            "caption": self._ref.caption,
            "label": self._ref.label,
            "split": self._ref.split or draw_split(video_id, settings.val_fraction),
        }
        return row, ext, data

    def _reject(self, bad: BadVideo, key: str = "") -> Reject:
        return Reject(path=self._ref.path, key=key, stage="shard", reject_class=bad.reject_class, reason=bad.reason)


def _extension(info: VideoInfo) -> str:
    first = info.container.split(",")[0]
    return _EXTENSIONS.get(first, first)

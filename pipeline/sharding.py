"""The shard stage without Ray: the work on one item of the plan."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import IO, Any, Literal

from pipeline import ffmpeg
from pipeline.clips import ClipConfig
from pipeline.cut import Cut
from pipeline.cutting import check_storage, cut_video, needs_check
from pipeline.dataset import DatasetMeta, read_rejects_file
from pipeline.decode import require_decodable
from pipeline.display import DisplayConfig, describe_changes
from pipeline.errors import BadVideo, ConfigError, DatasetError, TransientIO
from pipeline.ffmpeg import FfmpegLimits
from pipeline.internal import as_bad_video
from pipeline.planning import ShardPlan
from pipeline.probe import VideoInfo, probe
from pipeline.quality import QualityConfig
from pipeline.schema import SCORES, ClipSpan, Reject, VideoRef, draw_split, identify_dataset
from pipeline.shards import ADDED, PLACE, ShardWriter, Written, read_shard_info, read_shard_rows, rejects_name
from pipeline.storage import LOCAL_TROUBLE, Store
from pipeline.transcode import TranscodeConfig
from pipeline.untrusted import open_member

_MAX_FAILED_IN_A_ROW = 32
"""Clips of one video, after which the rest of it is not tried: one wrong timestamp can promise a day of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSettings:
    """What decides the content of a clip dataset, beside its corpus."""

    clips: ClipConfig = field(default_factory=ClipConfig)
    storage: Literal["copy", "remux", "transcode"] = "copy"
    """copy: a video's bytes as they are. remux: its coded pictures as they are, cut at keyframes, in MP4. transcode:
    coded anew, small, and fast to decode."""
    transcode: TranscodeConfig = field(default_factory=TranscodeConfig)
    audio: bool = False
    """Keep the sound (remux, transcode; copy keeps it anyway)."""
    display: DisplayConfig = field(default_factory=DisplayConfig)
    """Of pictures that are coded anew (transcode) or looked at (shots, quality); copy and remux leave it to tokenize."""
    quality: QualityConfig = field(default_factory=QualityConfig)
    include: str = "*"
    """Glob that the relative paths of a corpus folder must match; everything else in it is ignored."""
    videos_per_shard: int = 32
    """Videos that share one output shard, the unit of work and of resume."""
    shard_bytes: int | None = None
    """Input bytes that share one output shard, in place of a number of videos."""
    shards_multiple_of: int = 1
    """Makes the number of shards a multiple of this: of the nodes or workers that will read them in equal parts."""
    duplicates: Literal["drop", "keep"] = "drop"
    """drop: of files with equal bytes only the first stays. keep: nothing is read to find them; within a shard, the second
    is still rejected, because equal clips have equal keys."""
    val_fraction: float = 0.05
    """Share of videos whose clips go to the validation split, drawn by a hash of their content."""
    limits: FfmpegLimits = field(default_factory=FfmpegLimits)

    def __post_init__(self) -> None:
        check_storage(self)
        if self.storage == "copy" and self.audio:
            raise ConfigError("audio is for storage = remux or transcode; copy keeps a video's sound anyway")
        if self.duplicates not in ("drop", "keep"):
            raise ConfigError(f"duplicates = {self.duplicates!r}: allowed are drop, keep")
        for name in ("videos_per_shard", "shard_bytes", "shards_multiple_of"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} = {value}: must be 1 or more")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"val_fraction = {self.val_fraction}: must be in [0, 1)")


def describe_clips(plan: ShardPlan, config: dict[str, Any]) -> DatasetMeta:
    """The identity of the clip dataset that `plan` and `config` (the settings as plain JSON) make.

    Inputs count by path, size and modification time: a changed file is found without reading the corpus again. The
    limits are no part of it: they decide only what is refused, so rejects can be retried under others. This machine's ffmpeg
    is: where it differs, so may every cut, score and coded frame.
    """
    config = {name: value for name, value in config.items() if name != "limits"}
    decoder = ffmpeg.identity()
    return DatasetMeta(
        kind="clips",
        fingerprint=identify_dataset(kind="clips", inputs=plan.inputs_digest, config=config, decoder=decoder),
        config=config,
        parent_fingerprint="",
        inputs_digest=plan.inputs_digest,
        num_shards=plan.num_shards,
        extra={"corpus": Store.at(plan.root).name},
        decoder=decoder,
    )


def write_clip_shard(
    out: Store,
    dataset_fingerprint: str,
    shard: int,
    corpus: Store,
    refs: Sequence[VideoRef],
    settings: ShardSettings,
    retry: Collection[str] = (),
) -> Written:
    """Turn the videos of one work item into one committed shard. A video for which anything goes wrong becomes a reject, of class
    `internal` where nobody foresaw it.

    Args:
        refs: rows of the plan; those of one video stand together.
        retry: reject classes that are tried again where the shard is committed already. All else is taken over from it,
            and the result is what an unbroken run without those failures would have written.
    """
    with ExitStack() as stack:
        writer = ShardWriter(out, "clips", dataset_fingerprint, shard)
        stack.callback(writer.abort)
        previous = stack.enter_context(_Previous(out, shard)) if retry and read_shard_info(out, shard) else None
        item = _Item(corpus, settings, writer)
        for path, group in itertools.groupby(refs, key=lambda ref: ref.path):
            if previous is not None and not previous.failed(path, retry):
                item.planned += previous.take_over(path, writer, item.keys, item.rejects)
            else:
                item.add_video(list(group), previous.attempts(path) if previous is not None else 0)
        return Written(writer.commit(item.planned, item.rejects), item.read_bytes)


class _Item:
    """A shard in the making: its books, and one video after the other."""

    def __init__(self, corpus: Store, settings: ShardSettings, writer: ShardWriter) -> None:
        self._corpus, self._settings, self._writer = corpus, settings, writer
        self.keys: set[str] = set()
        """Of the samples in it, whether made or taken over."""
        self.planned = 0
        self.rejects: list[Reject] = []
        self.read_bytes = 0

    def add_video(self, refs: list[VideoRef], attempts: int) -> None:
        """Add the clips of one video; `attempts` counts those made before this one."""
        has_spans = refs[0].start_s is not None
        first_reject = len(self.rejects)
        left: dict[ClipSpan, VideoRef] | None = None
        try:
            with self._open(refs[0].path) as file, ThreadPoolExecutor(1) as hashing:
                self.read_bytes += os.fstat(file.fileno()).st_size
                info = probe(file, self._settings.limits)
                spans = [_span(ref) for ref in refs] if has_spans else None
                if needs_check(spans, self._settings):
                    require_decodable(file, info, self._settings.limits)
                # A copied video is hashed on its way into the shard; others while ffmpeg works on their first clip.
                copies = self._settings.storage == "copy"
                digest = None if copies else hashing.submit(_hash, file).result
                left = {_span(ref): ref for ref in refs} if has_spans else {}
                failed_in_a_row = 0
                for cut in cut_video(file, info, spans, self._settings):
                    self.planned += 1
                    self._add_cut(cut, left.pop(cut.planned, refs[0]), file, info, digest, has_spans)
                    failed_in_a_row = failed_in_a_row + 1 if cut.error is not None else 0
                    if (
                        failed_in_a_row == _MAX_FAILED_IN_A_ROW
                        and not has_spans
                        and cut.planned.end_s < info.duration_s
                    ):
                        raise BadVideo(
                            "corrupt",
                            f"{failed_in_a_row} clips in a row failed; what is left, [{cut.planned.end_s:g}, "
                            f"{info.duration_s:g}) s, counts as one that fails too",
                        )
        except Exception as error:  # of the video as a whole, or of its rest: each clip that it was planned as
            bad = as_bad_video(error)
            rest = refs[:1] if not has_spans else refs if left is None else list(left.values())
            self.planned += len(rest)
            self.rejects += [_reject(ref.path, bad, "") for ref in rest]
        self.rejects[first_reject:] = [
            replace(one, attempts=attempts + one.attempts) for one in self.rejects[first_reject:]
        ]

    def _open(self, path: str) -> IO[bytes]:
        try:
            file = self._corpus.open(path, max_bytes=self._settings.limits.max_file_bytes)
        except OSError as error:
            if error.errno in LOCAL_TROUBLE:  # a full disk is not the video's fault
                raise
            raise BadVideo("unreadable", f"cannot be opened: {error.strerror or error}") from error
        if self._corpus.is_local and not _is_inside(self._corpus, path):
            file.close()
            raise BadVideo("outside-corpus", f"leads to a place outside of {self._corpus.name}/")
        return file

    def _add_cut(
        self,
        cut: Cut,
        ref: VideoRef,
        file: IO[bytes],
        info: VideoInfo,
        digest: Callable[[], str] | None,
        has_spans: bool,
    ) -> None:
        def key_of(video_id: str) -> str:
            key = f"{video_id}-{round(cut.planned.start_s * 1000):09d}"
            # Spans of a manifest may begin together.
            return f"{key}-{round(cut.planned.end_s * 1000):09d}" if has_spans else key

        def describe(payload_digest: str) -> dict[str, Any]:
            video_id = (digest() if digest else payload_digest)[:16]
            key = key_of(video_id)
            if key in self.keys:
                raise _duplicate(key)
            return _row(key, video_id, ref, cut, info, self._settings)

        key = ""
        try:
            if cut.filtered is not None or cut.error is not None:
                key = key_of((digest() if digest else _hash(file))[:16])
            if cut.error is not None:
                raise cut.error
            if cut.filtered is not None:
                self.rejects.append(
                    Reject(
                        path=ref.path, key=key, stage="shard", outcome="filtered", reject_class=cut.filtered[0],
                        reason=cut.filtered[1],
                    )
                )  # fmt: skip
            else:
                split = ref.split or "train"
                payload_digest = self._writer.add_file(cut.clip or file, cut.ext, describe, split=split)
                self.keys.add(key_of((digest() if digest else payload_digest)[:16]))
        except Exception as error:
            self.rejects.append(_reject(ref.path, as_bad_video(error), key))


class _Previous:
    """A committed shard whose good samples, and rejects that are not retried, go into the one that replaces it."""

    def __init__(self, store: Store, shard: int) -> None:
        self._rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in read_shard_rows(store, shard):
            self._rows[row["source"]].append(row)
        self._rejects: dict[str, list[Reject]] = defaultdict(list)
        if store.exists(rejects_name(shard)):
            for reject in read_rejects_file(store, rejects_name(shard)):
                self._rejects[reject.path].append(reject)
        with ExitStack() as stack:
            tars = {row["tar"] for rows in self._rows.values() for row in rows}
            self._tars = {name: stack.enter_context(open_member(store, name)) for name in tars}
            self._close = stack.pop_all().close

    def __enter__(self) -> _Previous:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def failed(self, path: str, classes: Collection[str]) -> bool:
        """Whether a clip of the video is a reject of one of `classes`."""
        return any(one.outcome == "rejected" and one.reject_class in classes for one in self._rejects[path])

    def attempts(self, path: str) -> int:
        return max((one.attempts for one in self._rejects[path]), default=0)

    def take_over(self, path: str, writer: ShardWriter, keys: set[str], rejects: list[Reject]) -> int:
        """Copy what the shard holds of a video, and return the number of clips that it was planned as.

        Where an equal video before it has become a sample only now, its clips are the duplicates; `keys` are those that
        the new shard has.
        """
        rows = sorted(self._rows[path], key=lambda row: (row["split"], int(row["offset"])))
        for row in rows:
            if row["key"] in keys:
                rejects.append(_reject(path, _duplicate(row["key"]), ""))
                continue
            keys.add(row["key"])
            tar, same = self._tars[row["tar"]], functools.partial(_same, row)
            writer.add_file(tar, row["ext"], same, row["offset"], row["size"], split=row["split"])
        rejects += self._rejects[path]
        return len(rows) + len(self._rejects[path])


def _same(row: dict[str, Any], digest: str) -> dict[str, Any]:
    if digest != row["sha256"]:
        raise DatasetError(f"sample {row['key']} is damaged; run `tokenreel verify --repair` first")
    return {name: value for name, value in row.items() if name not in ADDED | PLACE}


def _row(key: str, video_id: str, ref: VideoRef, cut: Cut, info: VideoInfo, settings: ShardSettings) -> dict[str, Any]:
    stored = cut.info
    assert stored is not None
    return {
        "key": key,
        "video_id": video_id,
        "source": ref.path,
        "start_s": cut.span.start_s,
        "end_s": cut.span.end_s,
        "num_frames": stored.num_frames,
        "num_packets": stored.num_packets,
        "height": stored.height,
        "width": stored.width,
        "fps": stored.fps,
        "codec": stored.codec,
        "scan": stored.picture.scan,
        "color": stored.picture.color,
        "picture": describe_changes(info.picture, settings.display) if settings.storage == "transcode" else "",
        "ext": cut.ext,
        "source_codec": info.codec,
        "source_container": info.container,
        "caption": ref.caption,
        "label": ref.label,
        "split": ref.split or draw_split(video_id, settings.val_fraction),
        "extra": ref.extra,
        **{f"score_{name}": cut.scores[name] if cut.scores else None for name in SCORES},
    }


def _span(ref: VideoRef) -> ClipSpan:
    assert ref.start_s is not None and ref.end_s is not None
    return ClipSpan(start_s=ref.start_s, end_s=ref.end_s)


def _reject(path: str, bad: BadVideo, key: str) -> Reject:
    return Reject(
        path=path, key=key, stage="shard", reject_class=bad.reject_class, reason=bad.reason, stderr=bad.stderr
    )


def _duplicate(key: str) -> BadVideo:
    return BadVideo("duplicate", f"the same video as another of this shard: key {key} stands in it already")


def _is_inside(corpus: Store, path: str) -> bool:
    root = os.path.realpath(corpus.path()).rstrip(os.sep) + os.sep  # of / too
    return os.path.realpath(corpus.path(path)).startswith(root)


def _hash(file: IO[bytes]) -> str:
    """SHA-256 of an open file, in hex; leaves its position alone, so that ffmpeg can read it at the same time.

    Raises:
        TransientIO: the file cannot be read.
    """
    hasher, offset = hashlib.sha256(), 0
    buffer = memoryview(bytearray(2**20))
    try:
        while count := os.preadv(file.fileno(), [buffer], offset):
            hasher.update(buffer[:count])
            offset += count
    except OSError as error:
        raise TransientIO(f"cannot be read from byte {offset} on: {error.strerror}") from error
    return hasher.hexdigest()

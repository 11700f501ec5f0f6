"""The words that stages share: records, Arrow schemas, the batch contract, and the version of all of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 4
"""Of the datasets that are written, and part of their fingerprints: raise it when the same input and config would give other
bytes."""
READABLE_VERSIONS = (3, SCHEMA_VERSION)
_IDENTITY_VERSION = 3

Split = Literal["train", "val", "test"]
"""test comes from manifests alone: nothing draws it, trains on it or chooses a model by it."""
SPLITS: tuple[Split, ...] = get_args(Split)

REJECT_CLASSES = (
    "bad-row",  # a manifest row that cannot be an input
    "empty",  # no bytes
    "unreadable",  # missing, or the storage refused
    "storage",  # the storage failed in a way that may pass, on every attempt
    "outside-corpus",  # a name or a link that leads out of the corpus
    "not-video",  # no known container in it
    "no-video-stream",  # audio or subtitles only
    "corrupt",  # a container that cannot be decoded
    "unsupported",  # sound, but not to be stored in the way that was asked for
    "too-large",  # resolution, duration or frame budget exceeded
    "duplicate",  # the same bytes as an earlier file
    "timeout",  # ffmpeg ran out of wall-clock or CPU time
    "resources",  # ffmpeg ran out of memory or was killed
    "internal",  # it raised an error that nobody foresaw: a defect of ours
)
SCORES = ("black", "frozen", "letterbox", "brightness", "sharpness", "motion", "cuts_per_min")
"""What one pass over a clip measures (`pipeline.quality`); a column `score_NAME` each in the index."""
Outcome = Literal["rejected", "filtered"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRef:
    """One input of a corpus, before anything opened it: a file, or with `start_s`/`end_s` a span of one.

    path: relative to the corpus root, with `/`.
    size_bytes, mtime_ns: as the storage lists them; None where it was not asked (a manifest of an object store).
    extra: a JSON object of the manifest's other columns, None without any.
    """

    path: str
    size_bytes: int | None = None
    mtime_ns: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    caption: str | None = None
    label: str | None = None
    split: Split | None = None
    extra: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSpan:
    """The part `[start_s, end_s)` of a video that becomes one sample."""

    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """Why an input is in no shard: it failed (`rejected`) or a threshold left it out on purpose (`filtered`).

    `key` is empty where the whole video failed before it had one. `stderr` is the tail of what ffmpeg said,
    or of the traceback in class `internal`.
    """

    path: str
    stage: Literal["plan", "shard", "tokenize", "embed"]
    reject_class: str
    reason: str
    outcome: Outcome = "rejected"
    key: str = ""
    attempts: int = 1
    stderr: str = ""


PLAN_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("path", pa.string()),
        ("size_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("caption", pa.string()),
        ("label", pa.string()),
        ("split", pa.string()),
        ("extra", pa.string()),
    ]
)
"""`plan.parquet`: one row a `VideoRef`, in the order of shards; the rows of one video stand together."""
REJECT_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("key", pa.string()),
        ("stage", pa.string()),
        ("outcome", pa.string()),
        ("reject_class", pa.string()),
        ("reason", pa.string()),
        ("attempts", pa.int32()),
        ("stderr", pa.string()),
    ]
)

# Columns that clip and token datasets share. `offset`/`size` locate the payload (the video file, or the raw uint16
# values after the .npy header) in the shard, so a reader needs no tar parser; `sha256` is over that payload.
_COMMON = [
    ("key", pa.string()),
    ("video_id", pa.string()),
    ("source", pa.string()),
    ("start_s", pa.float64()),
    ("end_s", pa.float64()),
    ("offset", pa.int64()),
    ("size", pa.int64()),
    ("sha256", pa.string()),
    ("json_offset", pa.int64()),
    ("json_size", pa.int64()),
    ("num_frames", pa.int32()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("caption", pa.string()),
    ("label", pa.string()),
    ("split", pa.string()),
    ("extra", pa.string()),
    ("fps", pa.float64()),
    *((f"score_{name}", pa.float64()) for name in SCORES),
]
CLIP_SCHEMA = pa.schema(
    [
        *_COMMON,
        ("num_packets", pa.int32()),
        ("ext", pa.string()),
        ("codec", pa.string()),
        ("scan", pa.string()),
        ("color", pa.string()),
        ("picture", pa.string()),
        ("source_codec", pa.string()),
        ("source_container", pa.string()),
    ]
)
# Of the clip that a token sample shows, and in which view; `view` is "" where its dataset has one view a clip.
TOKEN_SCHEMA = pa.schema([*_COMMON, ("clip_key", pa.string()), ("view", pa.string()), ("clip_sha256", pa.string())])

# Of the token sample, or the window of one, that a row is about. Behind these stands `embedding`, a fixed-size list of as many
# float32 as the model is wide; `sha256` is over its little-endian bytes.
EMBEDDING_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("sample_key", pa.string()),
        ("clip_key", pa.string()),
        ("view", pa.string()),
        ("video_id", pa.string()),
        ("source", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("first_frame", pa.int32()),
        ("num_frames", pa.int32()),
        ("num_windows", pa.int32()),
        ("fps", pa.float64()),
        ("caption", pa.string()),
        ("label", pa.string()),
        ("split", pa.string()),
        ("extra", pa.string()),
        *((f"score_{name}", pa.float64()) for name in SCORES),
        ("sha256", pa.string()),
    ]
)


class TokenBatch(TypedDict):
    """What the loader hands to an objective: the contract between `pipeline` and `models`.

    tokens: (b, v, t, h, w) int64 tensor; v clips a video; PAD where a video is too short.
    seeds:  (b, v) int64 tensor; one per clip, from (seed, epoch, key, view) alone; masks are drawn from it.
    keys:   list of b sample keys.
    """

    tokens: Any
    seeds: Any
    keys: list[str]


def fingerprint(**parts: Any) -> str:
    """Hex digest (32 characters) of `parts`, stable over runs and machines. Values must be plain JSON.

    It identifies runs, models and caches, which a new format of datasets leaves as they are.
    """
    text = json.dumps({"schema_version": _IDENTITY_VERSION, **parts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def identify_dataset(**parts: Any) -> str:
    """The `fingerprint` of a dataset, which the version of its format is part of."""
    return fingerprint(schema_version=SCHEMA_VERSION, **parts)


def draw_split(video_id: str, val_fraction: float) -> Literal["train", "val"]:
    """The split of a video: a hash of its id against `val_fraction`, so all its clips stand on one side."""
    return (
        "val"
        if int(hashlib.sha256(f"split:{video_id}".encode()).hexdigest()[:8], 16) < val_fraction * 2**32
        else "train"
    )


def mix64(values: np.ndarray) -> np.ndarray:
    """Avalanche each uint64 of `values` (the splitmix64 finaliser); wraps modulo 2**64."""
    values = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

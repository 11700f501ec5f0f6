"""The stages' own work on drawn videos, one at a time a CPU, timed: what each becomes and what it costs."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from jobs.cost import cpu_name
from jobs.progress import Progress
from pipeline.encoding import Encode
from pipeline.ledger import Ledger
from pipeline.schema import VideoRef
from pipeline.sharding import ShardSettings, write_clip_shard
from pipeline.shards import ShardInfo, read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clips, write_token_shard

_ENCODE_S = 20.0
"""Encoding that one CPU times; the codes of later frames are zeros, which take as many bytes."""
_FINGERPRINT = "probe"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSettings:
    """What to do with a video. tokenize: None shards only. encoder: a folder to encode with on CPUs; None does not encode."""

    shard: ShardSettings
    tokenize: TokenizeSettings | None = None
    encoder: Path | None = None
    patch: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What one stage made of one video in `seconds` of one CPU, encoding aside. member_bytes: of its tar, less the tar's end."""

    seconds: float
    books: Ledger
    member_bytes: int
    frames: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """One video. encoded: by side of the frames in px, how many batches were encoded, and in how many seconds."""

    clips: Made
    tokens: Made | None = None
    num_tokens: int = 0
    encoded: dict[int, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """All that a probe found: `probed` by the number of its video.

    connect_s: Ray's start. worker_s, encoder_s: until a worker of it was ready, and until it had loaded its tokenizer.
    """

    probed: dict[int, Probed]
    batch_s: dict[int, float]
    cpus: dict[str, int]
    connect_s: float
    worker_s: float
    encoder_s: float


class VideoProbe:
    """Puts videos through shard and tokenize, in a temporary folder of their own each."""

    def __init__(self, corpus: Store, settings: ProbeSettings) -> None:
        begun_s = time.perf_counter()
        self._corpus, self._settings = corpus, settings
        encode: Encode | None = None
        if settings.tokenize and settings.encoder:
            from jobs.frame_encoder import FrameEncoder  # torch: the shard stage's workers do without

            encode = FrameEncoder(settings.encoder, "cpu", settings.tokenize.precision)
        self._encode = _TimedEncode(encode, settings.patch)
        self.load_s = time.perf_counter() - begun_s

    def ready(self) -> tuple[str, float]:
        """The name of the CPU it runs on, and the seconds that its tokenizer took to load."""
        return cpu_name(), self.load_s

    def probe(self, refs: Sequence[VideoRef]) -> Probed:
        """Refs are the rows of one video, as for `write_clip_shard`."""
        with tempfile.TemporaryDirectory(prefix="tokenreel-plan-") as folder:
            clips, tokens = Store.at(Path(folder, "clips")), Store.at(Path(folder, "tokens"))
            for store in (clips, tokens):
                for part in ("shards", "index", "rejects"):
                    store.path(part).mkdir(parents=True)
            begun_s = time.perf_counter()
            written = write_clip_shard(clips, _FINGERPRINT, 0, self._corpus, refs, self._settings.shard)
            made = _made(clips, written.info, time.perf_counter() - begun_s)
            if self._settings.tokenize is None or not made.books.committed:
                return Probed(clips=made)
            return self._tokenize(clips, tokens, self._settings.tokenize, made)

    def _tokenize(self, clips: Store, tokens: Store, settings: TokenizeSettings, made: Made) -> Probed:
        self._encode.reset()
        begun_s = time.perf_counter()
        rows = read_shard_rows(clips, 0)
        pieces = chain.from_iterable(decode_clips(clips, rows, settings))
        written = write_token_shard(clips, tokens, _FINGERPRINT, 0, rows, pieces, self._encode, settings)
        seconds = time.perf_counter() - begun_s - self._encode.inside_s
        return Probed(
            clips=made,
            tokens=_made(tokens, written.info, seconds),
            num_tokens=written.info.totals["payload_bytes"] // 2,
            encoded=dict(self._encode.by_size),
        )


def _made(store: Store, info: ShardInfo, seconds: float) -> Made:
    rows = read_shard_rows(store, 0)
    ends = [row["json_offset"] + row["json_size"] + -row["json_size"] % 512 for row in rows]
    frames = info.totals["frames"]
    return Made(seconds=seconds, books=info.ledger, member_bytes=max(ends, default=0), frames=frames)


class _TimedEncode:
    """Encodes like the stage's encoder until it has timed enough; None gives zeros from the start.

    The first batch of a size counts as start-up: it is encoded twice.
    """

    def __init__(self, encode: Encode | None, patch: int) -> None:
        self._encode, self._patch = encode, patch
        self._timed_s = defaultdict[int, float](float)
        self.reset()

    def reset(self) -> None:
        self.by_size: dict[int, tuple[int, float]] = {}
        self.inside_s = 0.0

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        side = frames.shape[1]
        if self._encode is None or self._timed_s[side] >= _ENCODE_S:
            return np.zeros((len(frames), side // self._patch, side // self._patch), np.uint16)
        entered_s = time.perf_counter()
        if side not in self._timed_s:
            self._encode(frames)
        begun_s = time.perf_counter()
        codes = self._encode(frames)
        taken_s = time.perf_counter() - begun_s
        self._timed_s[side] += taken_s
        num, seconds = self.by_size.get(side, (0, 0.0))
        self.by_size[side] = (num + 1, seconds + taken_s)
        self.inside_s += time.perf_counter() - entered_s
        return codes


def probe_videos(
    corpus: Store,
    videos: dict[int, list[VideoRef]],
    settings: ProbeSettings,
    *,
    order: Sequence[int],
    budget_s: float,
    connect_s: float,
    check_cpus: Callable[[dict[str, int]], object],
) -> Sample:
    """Probe `videos` in `order` on every CPU of the connected cluster at once, as the stages would have them.

    No video is begun after `budget_s` seconds, but the first one of each CPU.

    Args:
        check_cpus: told how many CPUs there are of each name, before any video is begun; may raise.
    """
    import ray

    begun_s = time.perf_counter()
    cpus = min(len(order), max(1, int(ray.cluster_resources().get("CPU", 1))))
    kind: Any = ray.remote(VideoProbe).options(num_cpus=1, scheduling_strategy="SPREAD")
    actors = [kind.remote(corpus, settings) for _ in range(cpus)]
    try:
        names, loads_s = zip(*ray.get([actor.ready.remote() for actor in actors]), strict=True)
        ready_s = time.perf_counter() - begun_s
        check_cpus(dict(Counter(names)))
        with Progress("plan", "videos", len(order)) as bar:
            probed = {}
            for video, one in _run(actors, videos, order, begun_s + ready_s + budget_s):
                probed[video] = one
                bar.advance(1)
    finally:
        for actor in actors:
            ray.kill(actor)
    worker_s = max(0.0, ready_s - max(loads_s))
    return Sample(
        probed=probed,
        batch_s=_batch_s(probed.values()),
        cpus=dict(Counter(names)),
        connect_s=connect_s,
        worker_s=worker_s,
        encoder_s=max(loads_s),
    )


def _run(
    actors: list[Any], videos: dict[int, list[VideoRef]], order: Sequence[int], until_s: float
) -> Iterator[tuple[int, Probed]]:
    import ray

    waiting = iter(order)
    running = {actor.probe.remote(videos[video]): (actor, video) for actor, video in zip(actors, waiting, strict=False)}
    while running:
        done = ray.wait(list(running))[0][0]
        actor, video = running.pop(done)
        yield video, ray.get(done)
        video = next(waiting, -1) if time.perf_counter() < until_s else -1
        if video >= 0:
            running[actor.probe.remote(videos[video])] = (actor, video)


def _batch_s(probed: Iterable[Probed]) -> dict[int, float]:
    """Seconds that a CPU takes for a batch, by side of its frames."""
    numbers, seconds = Counter[int](), defaultdict[int, float](float)
    for one in probed:
        for side, (num, taken_s) in one.encoded.items():
            numbers[side] += num
            seconds[side] += taken_s
    return {side: seconds[side] / numbers[side] for side in numbers}

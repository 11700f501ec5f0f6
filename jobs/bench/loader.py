"""`tokenreel bench loader`: clip pairs a second in ready batches against other loaders, and opening an index of any length."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs.bench.loader_peers import INSTALL, PEERS, Batches, Content, Peer
from jobs.result import JobResult
from pipeline.dataset import DatasetMeta, create_or_resume, digest_contents, finish, write_meta
from pipeline.errors import ConfigError, TokenreelError
from pipeline.ledger import Ledger
from pipeline.loader import CacheConfig, LoaderConfig, TokenLoader
from pipeline.schema import SCORES, TOKEN_SCHEMA
from pipeline.shards import ShardInfo, ShardWriter, index_name, index_schema, tar_name
from pipeline.storage import Store

log = logging.getLogger(__name__)

_SAMPLES_PER_SHARD = 64
_INDEX_ROWS_PER_SHARD = 4096
_CODES = 8192
_PAD = 8193


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchLoaderConfig:
    """Make a token dataset, the same content in the formats of other loaders, and let them take turns on it.

    Everybody makes the same batches, int64 tensors (b, 2, t, h, w) of two random windows of random samples, in one process with one
    thread of torch, from a warm page cache. Each figure is the median over the rounds.
    """

    peers: tuple[Peer, ...] = get_args(Peer)
    """Loaders beside ours. Those of other packages must be installed; see the error of a row that is not."""
    num_samples: int = 2048
    """Samples of the dataset."""
    num_frames: int = 200
    """Frames of a sample."""
    grid: tuple[int, int] = (16, 16)
    """Height and width of a frame, in tokens."""
    window_frames: int = 5
    """Frames of a clip."""
    batch_size: int = 256
    """Pairs of clips in a batch."""
    round_s: float = 2.0
    """Seconds that each loader is timed for in a round; it ends its batch."""
    rounds: int = 3
    """Rounds, after a batch each that only warms up."""
    index_rows: int = 0
    """Instead of all that: rows of a made-up dataset (its shards are holes) that is opened cold, warm, and by
    `index_workers` at once, and resumed far in."""
    index_workers: int = 4
    """Processes that open it at once."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_frames", "window_frames", "batch_size", "rounds", "index_workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be 1 or more")
        if self.batch_size > self.num_samples:
            raise ConfigError(f"batch_size = {self.batch_size} exceeds num_samples = {self.num_samples}")
        if self.index_rows < 0 or self.round_s <= 0 or min(self.grid) < 1:
            raise ConfigError(
                f"index_rows = {self.index_rows} must be 0 or more, round_s = {self.round_s} positive, grid = {self.grid} 1 or more"
            )
        if wrong := set(self.peers) - set(get_args(Peer)):
            raise ConfigError(f"peers = {sorted(wrong)}: allowed are {', '.join(get_args(Peer))}")


def run(config: BenchLoaderConfig) -> JobResult:
    """Figures: `pairs_per_s` of each loader, `times` as fast as each we are, and `missing` peers with the reason; or `index`."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tokenreel-bench-") as folder:
        if config.index_rows:
            figures = measure_index(Path(folder), config)
            planned = committed = config.index_rows
        else:
            figures = measure_peers(Path(folder), config)
            planned, committed = 1 + len(config.peers), len(figures["pairs_per_s"])
    return JobResult(
        job="bench loader",
        out="",
        planned=planned,
        committed=committed,
        elapsed_s=time.monotonic() - started_s,
        figures=figures,
    )


def measure_peers(folder: Path, config: BenchLoaderConfig) -> dict[str, Any]:
    torch.set_num_threads(1)
    content = make_content(folder / "ours", config)
    loaders: dict[str, Batches] = {"tokenreel": _ours(content, folder / "cache")}
    missing = {}
    for peer in config.peers:
        (folder / peer).mkdir()
        try:
            loaders[peer] = PEERS[peer](content, folder / peer)
            next(loaders[peer])
        except ImportError as error:
            loaders.pop(peer, None)
            missing[peer] = f"{INSTALL[peer]} ({error})"
            log.warning("bench loader: %s left out: %s", peer, missing[peer])
    next(loaders["tokenreel"])
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(config.rounds):
        for name, batches in loaders.items():
            rates[name].append(_time(batches, config))
            log.info("bench loader: %s: %.0f pairs/s", name, rates[name][-1])
    middle = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "pairs_per_s": {name: round(value) for name, value in middle.items()},
        "range": {name: [round(min(values)), round(max(values))] for name, values in rates.items()},
        "times": {name: round(middle["tokenreel"] / value, 2) for name, value in middle.items() if name != "tokenreel"},
        "missing": missing,
        "sample_bytes": content.samples[0].nbytes,
        "num_cpus": len(os.sched_getaffinity(0)),
    }


def _time(batches: Batches, config: BenchLoaderConfig) -> float:
    started_s, pairs = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - started_s) < config.round_s:
        tokens, keys = next(batches)
        shape = (config.batch_size, 2, config.window_frames, *config.grid)
        assert tokens.shape == shape and tokens.dtype == torch.int64 and len(keys) == config.batch_size
        pairs += config.batch_size
    return pairs / elapsed_s


def _ours(content: Content, cache: Path) -> Batches:
    config = LoaderConfig(batch_size=content.batch_size, cache=CacheConfig(folder=cache))
    window = (content.window_frames, *content.samples.shape[2:])
    loader = TokenLoader(content.folder, config, window=window, num_views=2, pad=_PAD, rank=0, world_size=1)
    step = 0
    while True:
        batch = loader.batch(step)
        yield batch["tokens"], batch["keys"]
        step += 1


def make_content(folder: Path, config: BenchLoaderConfig) -> Content:
    """Random codes, as a token dataset in `folder` and in memory for whoever writes them in another format."""
    draw = np.random.default_rng(0)
    samples = draw.integers(0, _CODES, (config.num_samples, config.num_frames, *config.grid), np.uint16)
    num_shards = -(-config.num_samples // _SAMPLES_PER_SHARD)
    meta = create_or_resume(folder, _describe(num_shards))
    for shard in range(num_shards):
        writer = ShardWriter(Store.at(folder), "tokens", meta.fingerprint, shard)
        numbers = range(shard * _SAMPLES_PER_SHARD, min((shard + 1) * _SAMPLES_PER_SHARD, config.num_samples))
        for number in numbers:
            member = io.BytesIO()
            np.save(member, samples[number], allow_pickle=False)
            writer.add(_row(number, config), "tokens.npy", member.getvalue(), member.tell() - samples[number].nbytes)
        writer.commit(len(numbers), [])
    finish(folder, meta, Ledger())
    return Content(
        folder=folder,
        samples=samples,
        keys=[_key(number) for number in range(config.num_samples)],
        window_frames=config.window_frames,
        batch_size=config.batch_size,
    )


def _key(number: int) -> str:
    return f"{number:016x}-{0:09d}"


def _row(number: int, config: BenchLoaderConfig) -> dict[str, Any]:
    return {
        **dict.fromkeys(TOKEN_SCHEMA.names),
        "key": _key(number),
        "video_id": f"{number:016x}",
        "source": f"{number:09d}.mp4",
        "start_s": 0.0,
        "end_s": config.num_frames / 2,
        "num_frames": config.num_frames,
        "height": config.grid[0],
        "width": config.grid[1],
        "fps": 2.0,
        "split": "train",
        "clip_sha256": "c" * 64,
    }


def _describe(num_shards: int) -> DatasetMeta:
    return DatasetMeta(
        kind="tokens",
        fingerprint="b" * 32,
        config={},
        parent_fingerprint="",
        inputs_digest="",
        num_shards=num_shards,
        extra={"tokenizer": {"fingerprint": "b" * 32, "codebook_size": 2**16, "patch": 16}},
    )


def measure_index(folder: Path, config: BenchLoaderConfig) -> dict[str, Any]:
    """Seconds to open the index and to make a batch far in, and bytes of memory, of processes that do nothing else."""
    dataset = folder / "dataset"
    _make_index(dataset, config)
    cold = _open_in_processes(dataset, folder / "cache", config, 1)[0]
    warm = _open_in_processes(dataset, folder / "cache", config, 1)[0]
    many = _open_in_processes(dataset, folder / "cache", config, config.index_workers)
    index_bytes = max(path.stat().st_size for path in (folder / "cache").glob("index/*"))
    return {
        "rows": config.index_rows,
        "index_bytes": index_bytes,
        "cold": cold,
        "warm": warm,
        "together": {
            name: [one[name] for one in many] for name in ("open_s", "resume_s", "grown_rss_bytes", "grown_pss_bytes")
        },
    }


def _make_index(folder: Path, config: BenchLoaderConfig) -> None:
    """Index files of `config.index_rows` rows, beside tars that are holes of the right length: a read gives zeros."""
    num_shards = -(-config.index_rows // _INDEX_ROWS_PER_SHARD)
    meta = create_or_resume(folder, _describe(num_shards))
    payload_bytes = config.num_frames * config.grid[0] * config.grid[1] * 2
    contents = []
    for shard in range(num_shards):
        first = shard * _INDEX_ROWS_PER_SHARD
        numbers = range(first, min(first + _INDEX_ROWS_PER_SHARD, config.index_rows))
        count = len(numbers)
        keys = [_key(number) for number in numbers]
        same = {
            **_row(0, config),
            **{f"score_{name}": 0.5 for name in SCORES},
            "sha256": "d" * 64,
            "size": payload_bytes,
        }
        columns = {
            name: pa.repeat(pa.scalar(same[name], TOKEN_SCHEMA.field(name).type), count) for name in TOKEN_SCHEMA.names
        }
        columns["key"] = pa.array(keys)
        columns["video_id"] = pa.array([key[:16] for key in keys])
        columns["source"] = pa.array([f"{key}.mp4" for key in keys])
        columns["offset"] = pa.array(640 + np.arange(count) * (payload_bytes + 4096))
        info = ShardInfo(
            fingerprint=meta.fingerprint,
            shard=shard,
            tars={"train": 640 + count * (payload_bytes + 4096)},
            content=f"{shard:032x}",
            ledger=Ledger(planned=count, committed=count),
        )
        contents.append(info.content)
        pq.write_table(pa.table(columns, schema=index_schema("tokens", info)), folder / index_name(shard))
        with (folder / tar_name(shard, "train")).open("wb") as file:
            file.truncate(info.tar_bytes)
    counts = dict.fromkeys(("videos", "frames", "payload_bytes", "tar_bytes", "hours"), 0)
    books = Ledger(planned=config.index_rows, committed=config.index_rows).to_json()
    totals = {**counts, **books, "content": digest_contents(contents)}
    write_meta(folder, dataclasses.replace(meta, totals=totals))


def _open_in_processes(dataset: Path, cache: Path, config: BenchLoaderConfig, count: int) -> list[dict[str, Any]]:
    """What `_open_index` says in each of `count` processes, whose memory is measured while all of them hold the index."""
    arguments = [str(dataset), str(cache), *(str(n) for n in (config.window_frames, *config.grid, config.batch_size))]
    command = [sys.executable, "-m", "jobs.bench.loader", *arguments]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        answers = []
        for child in children:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("measure\n")
            child.stdin.flush()
            answers.append(child.stdout.readline())
        if not all(answers):
            raise TokenreelError("bench loader: a process that opens the index ended early; its log is above")
        return [json.loads(answer) for answer in answers]
    finally:
        for child in children:
            child.communicate()


def _open_index(dataset: Path, cache: Path, window: tuple[int, int, int], batch_size: int) -> None:
    """Open, make a batch far in and a later one; then, when told, say how long it took and how the memory grew."""
    before = _memory()
    started_s = time.perf_counter()
    config = LoaderConfig(batch_size=batch_size, cache=CacheConfig(folder=cache))
    loader = TokenLoader(dataset, config, window=window, num_views=2, pad=_PAD, rank=0, world_size=1)
    opened_s = time.perf_counter()
    step = 1000 * len(loader) // batch_size + len(loader) // 3 // batch_size  # in epoch 1000
    loader.batch(step)
    resumed_s = time.perf_counter()
    for later in range(step + 1, step + 21):
        loader.batch(later)
    times = {
        "open_s": round(opened_s - started_s, 3),
        "resume_s": round(resumed_s - opened_s, 3),
        "later_batch_s": round((time.perf_counter() - resumed_s) / 20, 5),
    }
    print("ready", flush=True)
    sys.stdin.readline()
    after = _memory()
    print(json.dumps({**times, **{f"grown_{name}_bytes": after[name] - before[name] for name in after}}), flush=True)


def _memory() -> dict[str, int]:
    """Bytes of this process: all of its pages, and its share of those that it shares."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return {
        name: int(found[1]) * 1024 for name in ("rss", "pss") if (found := re.search(rf"{name.title()}:\s+(\d+)", text))
    }


if __name__ == "__main__":
    place, node_cache, *numbers = sys.argv[1:]
    frames, height, width, pairs = map(int, numbers)
    _open_index(Path(place), Path(node_cache), (frames, height, width), pairs)

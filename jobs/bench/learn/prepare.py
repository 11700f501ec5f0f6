"""`tokenreel bench learn prepare`: the labelled benchmark as one token dataset, with a manifest of labels and splits a task.

What it makes, each part once:

    corpus/ clips/            the demo's videos, and the clip dataset of them       (fetch, `tokenreel shard`)
    pixels/ pixel_clips/      the training split's clips as lossless videos         (`tokenreel shard`)
    tokenizers/NAME/          VQ-VAEs trained on these pixels                        (`tokenreel train-tokenizer`)
    tokens/NAME/              all clips of all tasks, split and label in the index
    tasks/TASK.csv            video, label, split: what `tokenreel finetune --loader.splits` reads
    pictures/TASK.png         clips and what is left of them after the codes
    benchmark.json            tasks, sizes, baselines

Rendered frames go to the encoder as they are: a video codec would add noise and nothing else, and 16 frames of 32 px take ffmpeg
some 70 ms of CPU to open, at each of four stages. The tokenizer's training set is a clip dataset as any other.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import logging
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jobs import demo_corpus, shard, train_tokenizer
from jobs.bench.learn import digits, footage, pen
from jobs.bench.learn.baselines import measure_baselines
from jobs.bench.learn.tasks import NUM_FRAMES, SPLITS, Counts, Task
from jobs.cluster import connect
from jobs.config import to_plain
from jobs.data_job import RejectPolicy
from jobs.folder import lock_folder
from jobs.frame_encoder import FrameEncoder
from jobs.loop import LoopConfig
from jobs.pictures import save_png_grid
from jobs.result import JobResult
from jobs.token_origin import TOKENIZER_FOLDER
from jobs.workers import WorkersConfig
from models.optim import OptimConfig
from models.tokenizers.base import load_tokenizer
from models.tokenizers.vqvae import VqvaeConfig
from pipeline.dataset import DatasetMeta, create_or_resume, finish, listed_shards, read_index, read_meta
from pipeline.decode import FrameConfig
from pipeline.errors import ConfigError
from pipeline.frames import FrameLoaderConfig
from pipeline.ledger import Ledger
from pipeline.schema import SCORES, Reject, identify_dataset
from pipeline.sharding import ShardSettings
from pipeline.shards import ShardWriter
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clip

log = logging.getLogger(__name__)

FPS = 8.0
"""What a benchmark clip counts as; nothing depends on it but the times in the index."""
_CLIPS_PER_SHARD = 512
_CLIPS_PER_VIDEO = 100
_PICTURE_CLIPS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnPrepareConfig:
    """Make the labelled benchmark: pen digits, real footage with labels by construction, moving handwritten digits.

    Run the same command again after a crash: what is finished stays.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for everything."""
    size_px: int = 32
    """Side of the frames in pixels."""
    patch: int = 4
    """Pixels along each side of a token's square."""
    codebook_size: int = 512
    """Codes of the tokenizers."""
    pen: Counts = field(default_factory=lambda: Counts(train=2000, val=300, test=600))
    """Clips of the pen digits; there are 10,992."""
    others: Counts = field(default_factory=lambda: Counts(train=600, val=150, test=300))
    """Clips of each other task."""
    tokenizer_steps: tuple[int, ...] = (600, 60)
    """Optimiser steps of each tokenizer. The first one is the benchmark's, `s600`; the others are for the ablation."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self) -> None:
        if self.size_px < 16 or self.size_px % self.patch:
            raise ConfigError(f"size_px = {self.size_px}: must be 16 or more, and a multiple of patch = {self.patch}")
        counts = [*asdict(self.pen).values(), *asdict(self.others).values()]
        if min(counts) < 20 or not self.tokenizer_steps or min(self.tokenizer_steps) < 1:
            raise ConfigError(
                f"pen = {self.pen}, others = {self.others} must be 20 or more each, and tokenizer_steps = "
                f"{self.tokenizer_steps} one or more numbers of 1 or more"
            )


def run(config: LearnPrepareConfig) -> JobResult:
    started_s = time.monotonic()
    with lock_folder(config.out), connect():
        _check_same(config)
        seconds: dict[str, float] = {}

        def timed(name: str, make: Callable[[], Any]) -> Any:
            begun_s = time.monotonic()
            log.info(f"bench learn: {name}")
            made = make()
            seconds[name] = round(time.monotonic() - begun_s, 1)
            return made

        pen_file = timed("fetch", functools.partial(_fetch, config))
        frames = timed("footage", functools.partial(_read_footage, config.out))
        tasks: list[Task] = timed("clips", functools.partial(make_tasks, config, pen_file, frames))
        for task in tasks:
            write_manifest(config.out / "tasks" / f"{task.name}.csv", task)
        timed("pixels", functools.partial(_write_pixels, config, tasks))
        for steps in config.tokenizer_steps:
            timed(f"tokenizer s{steps}", functools.partial(_train_tokenizer, config, steps))
            timed(f"tokens s{steps}", functools.partial(write_tokens, config, tasks, steps))
        timed("pictures", functools.partial(_draw, config, tasks))
        if not (config.out / "benchmark.json").exists():
            points, classes = pen.read_trajectories(pen_file)
            page = {
                "tasks": {task.name: describe(task) for task in tasks},
                "baselines": timed("baselines", lambda: {task.name: measure_baselines(task) for task in tasks}),
                "pen_coordinates": timed("coordinates", lambda: pen.coordinate_accuracies(points, classes)),
            }
            (config.out / "benchmark.json").write_text(json.dumps(page, indent=2) + "\n")
    num_clips = sum(len(task.labels) for task in tasks)
    return JobResult(
        job="bench learn prepare",
        out=str(config.out),
        planned=num_clips,
        committed=num_clips,
        elapsed_s=time.monotonic() - started_s,
        figures={"tasks": [task.name for task in tasks], "seconds": seconds},
    )


def tokens_folder(out: Path, steps: int) -> Path:
    """Where the tokens of the tokenizer of that many steps lie."""
    return out / "tokens" / f"s{steps}"


def make_tasks(config: LearnPrepareConfig, pen_file: Path, frames: Mapping[str, np.ndarray]) -> list[Task]:
    """All tasks with their clips: a function of the config and the files alone."""
    return [
        pen.make_task(pen_file, config.pen, config.size_px, config.seed),
        *footage.make_tasks(frames, config.others, config.size_px, config.seed),
        *digits.make_tasks(config.others, config.size_px, config.seed),
    ]


def _check_same(config: LearnPrepareConfig) -> None:
    """A folder holds one benchmark."""
    path, text = config.out / "prepare.json", json.dumps({**to_plain(config), "out": ""}, indent=2) + "\n"
    if path.exists() and path.read_text() != text:
        raise ConfigError(f"{path} was made with other settings; choose another folder, or delete this one")
    path.write_text(text)


def _fetch(config: LearnPrepareConfig) -> Path:
    for folder, packages in (("corpus", demo_corpus.read_manifest()), ("pen", (pen.PACKAGE,))):
        report = demo_corpus.fetch(config.out / "fetched" / folder / "files", packages=packages)
        if report.failures:
            raise ConfigError(f"{report.failures[0].package} could not be fetched: {report.failures[0].reason}")
    return config.out / "fetched" / "pen" / "files" / pen.FILE_NAME


def _read_footage(out: Path) -> dict[str, np.ndarray]:
    """Frames of each of the demo's clips, through a clip dataset."""
    corpus, clips = out / "fetched" / "corpus" / "files", out / "clips"
    shard.run(shard.ShardConfig(corpus=str(corpus), out=str(clips)))
    settings = TokenizeSettings(frames=FrameConfig(fps=footage.FPS, size_px=footage.SIDE_PX))
    frames = {}
    for row in read_index(clips).to_pylist():
        decoded = decode_clip(Store.at(clips), row, settings)
        if isinstance(decoded, Reject):
            raise ConfigError(f"{row['source']} cannot be decoded: {decoded.reason}")
        frames[row["source"]] = decoded
    return frames


def write_manifest(path: Path, task: Task) -> None:
    """Video, label and split of every clip, as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("video", "label", "split"))
        writer.writerows(
            (_source(task, n), task.classes[task.labels[n]], task.splits[n]) for n in range(len(task.labels))
        )


def _source(task: Task, number: int) -> str:
    return f"{task.name}/{number:06d}"


def _write_pixels(config: LearnPrepareConfig, tasks: list[Task]) -> None:
    """A clip dataset of the frames that tokenizers train on: those of the training split, and a few of val to measure on."""
    out = config.out / "pixel_clips"
    if out.exists() and read_meta(out).totals is not None:
        return
    videos = config.out / "pixels"
    videos.mkdir(exist_ok=True)
    rows = [("video", "split")]
    for task in tasks:
        for split in ("train", "val"):
            members = task.of(split)
            for part in range(0, len(members), _CLIPS_PER_VIDEO):
                name = f"{task.name}-{split}-{part:06d}.mkv"
                _encode(videos / name, task.rgb[members[part : part + _CLIPS_PER_VIDEO]])
                rows.append((name, split))
    with (videos / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    shard.run(
        shard.ShardConfig(
            corpus=str(videos / "manifest.csv"),
            out=str(out),
            settings=ShardSettings(videos_per_shard=16),
            rejects=RejectPolicy(max_reject_fraction=0.0),
        )
    )


def _encode(path: Path, clips: np.ndarray) -> None:
    """Clips (n t H W 3), one after the other, as one lossless video."""
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-y",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{clips.shape[3]}x{clips.shape[2]}",
    ]
    command += ["-r", f"{FPS:g}", "-i", "-", "-c:v", "ffv1", "-pix_fmt", "bgr0", "-fflags", "+bitexact", str(path)]
    done = subprocess.run(command, input=np.ascontiguousarray(clips).tobytes(), capture_output=True)
    if done.returncode:
        raise ConfigError(f"ffmpeg could not write {path.name}: {done.stderr.decode(errors='replace')[-300:]}")


def _train_tokenizer(config: LearnPrepareConfig, steps: int) -> None:
    train_tokenizer.run(
        train_tokenizer.TrainTokenizerConfig(
            clips=config.out / "pixel_clips",
            out=config.out / "tokenizers" / f"s{steps}",
            tokenizer=VqvaeConfig(channels=64, codebook_size=config.codebook_size, patch=config.patch),
            optim=OptimConfig(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
            loader=FrameLoaderConfig(
                frames=FrameConfig(fps=FPS, size_px=config.size_px), batch_size=128, frames_per_clip=8
            ),
            loop=LoopConfig(
                steps=steps, save_every_steps=min(500, steps), picture_every_steps=min(500, steps), seed=config.seed
            ),
            workers=WorkersConfig(num_workers=2),
            eval_frames=1024,
        )
    )


def write_tokens(config: LearnPrepareConfig, tasks: list[Task], steps: int) -> None:
    """The token dataset that `tokenreel tokenize` would make of the clips as videos, written by the same code."""
    folder = tokens_folder(config.out, steps)
    model = config.out / "tokenizers" / f"s{steps}" / "model"
    tokenizer = load_tokenizer(model)
    content = hashlib.sha256()
    for task in tasks:
        content.update(task.frames.tobytes() + task.labels.tobytes())
    settings = TokenizeSettings(frames=FrameConfig(fps=FPS, size_px=config.size_px))
    identity = {"fingerprint": tokenizer.fingerprint(), "codebook_size": config.codebook_size, "patch": config.patch}
    plain = {name: value for name, value in to_plain(settings).items() if name != "limits"}
    plain["tokenizer"] = identity["fingerprint"]
    samples = [(task, number) for task in tasks for number in range(len(task.labels))]
    order = np.random.default_rng([config.seed, 4]).permutation(len(samples))  # a shard is a fair sample
    meta = create_or_resume(
        folder,
        DatasetMeta(
            kind="tokens",
            fingerprint=identify_dataset(kind="tokens", inputs=content.hexdigest(), config=plain),
            config=plain,
            parent_fingerprint="",
            inputs_digest=content.hexdigest()[:32],
            num_shards=-(-len(samples) // _CLIPS_PER_SHARD),
            extra={"tokenizer": identity},
        ),
    )
    store = Store.at(folder)
    for path in model.iterdir():
        store.write(f"{TOKENIZER_FOLDER}/{path.name}", path.read_bytes())
    encode = FrameEncoder(tokenizer, "cpu", "fp32")
    for number in sorted(set(range(meta.num_shards)) - set(listed_shards(store))):
        chosen = [samples[place] for place in order[number * _CLIPS_PER_SHARD : (number + 1) * _CLIPS_PER_SHARD]]
        writer = ShardWriter(store, "tokens", meta.fingerprint, number)
        for row, codes in _encode_clips(chosen, encode):
            buffer = io.BytesIO()
            np.save(buffer, codes, allow_pickle=False)
            writer.add(row, "tokens.npy", buffer.getvalue(), buffer.tell() - codes.nbytes)
        writer.commit(len(chosen), [])
    finish(folder, meta, Ledger())


def _encode_clips(
    samples: list[tuple[Task, int]], encode: FrameEncoder, clips_at_once: int = 16
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    for first in range(0, len(samples), clips_at_once):
        part = samples[first : first + clips_at_once]
        frames = np.concatenate([task.rgb[number] for task, number in part])
        for (task, number), codes in zip(part, np.split(encode(frames), len(part)), strict=True):
            source = _source(task, number)
            # Each clip counts as a video of its own; what it shows stands in `extra`.
            video_id = hashlib.sha256(source.encode()).hexdigest()[:16]
            key = f"{video_id}-{0:09d}"
            row = {
                "key": key,
                "clip_key": key,
                "view": "",
                "video_id": video_id,
                "source": source,
                "start_s": 0.0,
                "end_s": NUM_FRAMES / FPS,
                "caption": None,
                "label": task.classes[task.labels[number]],
                "split": str(task.splits[number]),
                "extra": json.dumps({"task": task.name, "shows": str(task.groups[number])}),
                **{f"score_{name}": None for name in SCORES},
                "num_frames": codes.shape[0],
                "height": codes.shape[1],
                "width": codes.shape[2],
                "fps": FPS,
                "clip_sha256": hashlib.sha256(task.frames[number].tobytes()).hexdigest(),
            }
            yield row, codes


def _draw(config: LearnPrepareConfig, tasks: list[Task]) -> None:
    """A picture a task: some clips of the validation split, and what the first tokenizer leaves of them."""
    tokenizer = load_tokenizer(config.out / "tokenizers" / f"s{config.tokenizer_steps[0]}" / "model")
    encode = FrameEncoder(tokenizer, "cpu", "fp32")
    import torch

    for task in tasks:
        rows = []
        for number in task.of("val")[:_PICTURE_CLIPS]:
            frames = np.ascontiguousarray(task.rgb[number])
            rows.append([frames, tokenizer.decode(torch.from_numpy(encode(frames).astype(np.int64))).numpy()])
        path = config.out / "pictures" / f"{task.name}.png"
        save_png_grid(path, rows, ["original", "reconstruction"])


def describe(task: Task) -> dict[str, Any]:
    """A task's entry in `benchmark.json`: what is asked, what is real, how many clips and sources."""
    return {
        "question": task.question,
        "pixels": task.pixels,
        "labels": task.labels_from,
        "classes": list(task.classes),
        **{split: len(task.of(split)) for split in SPLITS},
        "test_sources": len(np.unique(task.groups[task.of("test")])),
    }

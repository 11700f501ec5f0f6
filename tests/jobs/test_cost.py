"""The cost model: its rules by hand, its file, and a prediction against real tokenizing."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import cost
from jobs.bench import decode, tokenize
from jobs.cost import Cluster, Corpus, DecodeSpeed, EncodeSpeed, Measured, predict
from models.tokenizers.base import load_tokenizer
from pipeline.dataset import create_or_resume, read_index, read_meta
from pipeline.decode import FrameConfig
from pipeline.errors import ConfigError
from pipeline.shards import read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clips, describe_tokens, write_token_shard
from tests.conftest import Stages

MEASURED = Measured(
    decode={
        "cpu": [DecodeSpeed(short_side_px=100, frames_per_s=1000), DecodeSpeed(short_side_px=200, frames_per_s=100)]
    },
    encode={
        "gpu": [EncodeSpeed(tokenizer="t", size_px=64, precision="bf16", frames_per_s=500, num_threads=1)],
        "cpu": [EncodeSpeed(tokenizer="t", size_px=64, precision="fp32", frames_per_s=8, num_threads=4)],
    },
    start_s={"cpu": 0.5},
)
CORPUS = Corpus(clips=100, seconds=3600, source_frames={100: 36_000})
GPUS = Cluster(cpu="cpu", num_cpus=10, gpu="gpu", num_gpus=2)


def plan(corpus: Corpus = CORPUS, cluster: Cluster = GPUS, **changes):
    settings = {"fps": 2.0, "sizes_px": (64,), "patch": 8, "tokenizer": "t", "precision": "bf16"}
    return predict(corpus, MEASURED, cluster, **{**settings, **changes})


def test_gpus_wait_for_decoding_or_decoding_for_them() -> None:
    found = plan()
    assert (found.frames, found.tokens) == (7200, 7200 * 64)
    assert found.bytes == 2 * 7200 * 64 + 100 * cost.SAMPLE_BYTES
    assert found.decode_cpu_hours * 3600 == pytest.approx(100 * 0.5 + 36)
    assert found.encode_device_hours * 3600 == pytest.approx(7200 / 500)
    assert found.tokenize_hours * 3600 == pytest.approx(86 / 10)
    assert plan(cluster=replace(GPUS, num_cpus=1000)).tokenize_hours * 3600 == pytest.approx(7200 / 500 / 2)


def test_views_share_a_decode() -> None:
    one, three = plan(), plan(sizes_px=(64, 64, 128))
    assert three.decode_cpu_hours == one.decode_cpu_hours
    assert three.frames == 3 * one.frames and three.tokens == 6 * one.tokens
    assert three.encode_device_hours == pytest.approx(6 * one.encode_device_hours)
    assert three.bytes == 2 * three.tokens + 300 * cost.SAMPLE_BYTES


def test_without_gpus_the_cpus_share_their_time() -> None:
    found = plan(cluster=Cluster(cpu="cpu", num_cpus=10), precision="fp32")
    assert found.encode_device_hours * 3600 == pytest.approx(7200 / 2)  # 8 frames/s of four threads
    assert found.tokenize_hours * 3600 == pytest.approx((86 + 3600) / 10)


@pytest.mark.parametrize(
    ("side", "milliseconds"),
    [(100, 1), (200, 10), (50, 0.25), (400, 40), (150, 1 + 9 * (150**2 - 100**2) / (200**2 - 100**2))],
)
def test_seconds_a_frame_grow_with_its_pixels(side: int, milliseconds: float) -> None:
    found = plan(replace(CORPUS, clips=0, source_frames={side: 1000}))
    assert found.decode_cpu_hours * 3600 == pytest.approx(milliseconds)


def test_what_was_not_measured_is_named_with_the_command() -> None:
    with pytest.raises(
        ConfigError, match=r"no decoding speed of 'other', only of \['cpu'\]; run `tokenreel bench decode"
    ):
        plan(cluster=replace(GPUS, cpu="other"))
    with pytest.raises(ConfigError, match=r"no encoding speed of t in fp16 on 'gpu'; run `tokenreel bench tokenize"):
        plan(precision="fp16")


def test_the_file_takes_in_new_figures_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "speeds.json"
    cost.save(path, MEASURED)
    assert Measured.load(path) == MEASURED
    newer = Measured(
        decode={
            "cpu": [DecodeSpeed(short_side_px=200, frames_per_s=50)],
            "b": [DecodeSpeed(short_side_px=1, frames_per_s=1)],
        }
    )
    cost.save(path, newer)
    merged = Measured.load(path)
    assert merged.decode == {"b": newer.decode["b"], "cpu": [MEASURED.decode["cpu"][0], newer.decode["cpu"][0]]}
    assert merged.encode == MEASURED.encode and merged.start_s == MEASURED.start_s
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_text('{"some": "thing"}')
    with pytest.raises(ConfigError, match="holds no measured speeds"):
        cost.save(path, MEASURED)


def test_a_prediction_holds_within_a_factor_of_two_and_a_half(stages: Stages, tmp_path: Path) -> None:
    """Real decoding and encoding of the stages' clips, one after the other in this process, on a machine that other work
    may share. 4 fps of 64 px, as the shared run."""
    path, threads = tmp_path / "speeds.json", torch.get_num_threads()
    videos = tmp_path / "videos"
    videos.mkdir()
    rows = read_index(stages.clips).to_pylist()
    for row in rows[::4]:
        data = Store.at(stages.clips).read_range(f"shards/{row['shard']:06d}.tar", row["offset"], row["size"])
        (videos / f"{row['key']}.{row['ext']}").write_bytes(data)
    decode.run(decode.BenchDecodeConfig(videos=videos, fps=4, size_px=64, repeats=1, save=path))
    tokenize.run(
        tokenize.BenchTokenizeConfig(
            tokenizer=stages.tokenizer, sizes_px=(64,), precisions=(), num_frames=32, batch_frames=32, save=path
        )
    )
    source, out, settings = (
        Store.at(stages.clips),
        Store.at(tmp_path / "tokens"),
        TokenizeSettings(frames=FrameConfig(fps=4, size_px=64)),
    )
    tokenizer = load_tokenizer(stages.tokenizer / "model")
    identity = {"fingerprint": tokenizer.fingerprint(), "codebook_size": 64, "patch": 8}
    meta = create_or_resume(out, describe_tokens(read_meta(source), {}, identity))

    def encode(frames: np.ndarray) -> np.ndarray:
        return tokenizer.encode(torch.from_numpy(frames)).numpy()

    begun_s = time.perf_counter()
    for shard in range(meta.num_shards):
        rows_of_shard = read_shard_rows(source, shard)
        pieces = itertools.chain.from_iterable(decode_clips(source, rows_of_shard, settings))
        write_token_shard(source, out, meta.fingerprint, shard, rows_of_shard, pieces, encode, settings)
    taken_s = time.perf_counter() - begun_s

    frames: Counter[int] = Counter()
    for row in rows:
        frames[min(row["height"], row["width"])] += row["num_frames"]
    seconds = sum(row["end_s"] - row["start_s"] for row in rows)
    found = predict(
        Corpus(clips=len(rows), seconds=seconds, source_frames=frames),
        Measured.load(path),
        Cluster(cpu=cost.cpu_name(), num_cpus=1),
        fps=4.0,
        sizes_px=(64,),
        patch=8,
        tokenizer=repr(tokenizer.config),
    )
    committed = read_index(out)
    assert found.frames == pytest.approx(sum(committed["num_frames"].to_pylist()), rel=0.1)
    # The encoder had `threads` CPUs here, decoding one at a time.
    predicted_s = 3600 * (found.decode_cpu_hours + found.encode_device_hours / threads)
    assert taken_s / 2.5 < predicted_s < taken_s * 2.5, (predicted_s, taken_s)
    stored = sum(path.stat().st_size for path in (tmp_path / "tokens" / "shards").iterdir())
    assert found.bytes == pytest.approx(stored, rel=0.5)  # a tar of one clip is rounded up to 10 KiB

"""Clips to codes: full batches, and the codes of a frame are the codes of that frame."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset import (
    create_or_resume,
    finish,
    read_index,
    read_meta,
    read_payload,
    read_rejects,
    shard_path,
)
from pipeline.decode import FrameConfig
from pipeline.errors import ConfigError, DatasetError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.ledger import Ledger
from pipeline.schema import Reject
from pipeline.sharding import ShardSettings, describe_clips, plan_shards, write_clip_shard
from pipeline.tokenizing import (
    TokenizeSettings,
    decode_clip,
    describe_tokens,
    encode_clips,
    read_clip_rows,
    write_token_shard,
)
from pipeline.verify import verify
from tests.corpora import make_clip

SETTINGS = TokenizeSettings(frames=FrameConfig(fps=5, size_px=16), batch_frames=4)
TOKENIZER = {"fingerprint": "t1", "codebook_size": 65536, "patch": 8}


def hash_frames(frames: np.ndarray) -> np.ndarray:
    """A toy tokenizer: 2 x 2 codes of a frame from the SHA-256 of its bytes."""
    digests = [np.frombuffer(hashlib.sha256(frame.tobytes()).digest()[:8], np.uint16) for frame in frames]
    return np.stack(digests).reshape(-1, 2, 2)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 23), max_size=12), batch_frames=st.integers(1, 16))
def test_codes_belong_to_their_frames(lengths: list[int], batch_frames: int) -> None:
    rng = np.random.default_rng(0)
    clips = [({"clip": n}, rng.integers(0, 256, (length, 2, 2, 3), np.uint8)) for n, length in enumerate(lengths)]
    batches: list[int] = []

    def encode(frames: np.ndarray) -> np.ndarray:
        batches.append(len(frames))
        return hash_frames(frames)

    found = list(encode_clips(iter(clips), encode, batch_frames))
    assert [row for row, _ in found] == [row for row, _ in clips]
    for (_, codes), (_, frames) in zip(found, clips, strict=True):
        np.testing.assert_array_equal(codes, hash_frames(frames))
    assert set(batches) <= {batch_frames}
    assert len(batches) == -(-sum(lengths) // batch_frames)  # only the last one is padded


def test_it_works_while_clips_arrive() -> None:
    """A clip is handed on as soon as its last frame is encoded, so memory does not grow with the shard."""
    taken = []

    def arrive() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        for n in range(6):
            taken.append(n)
            yield {"clip": n}, np.zeros((4, 2, 2, 3), np.uint8)

    ahead = [len(taken) - row["clip"] for row, _ in encode_clips(arrive(), hash_frames, 4)]
    assert ahead == [1] * 6


def make_clips(folder: Path) -> Path:
    """A clip dataset of one shard with clips of 2 s, 1.2 s and 0.6 s."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for n, seconds in enumerate((2, 1.2, 0.6)):
        make_clip(corpus / f"{n}.mp4", seconds=seconds, seed=n)
    plan = plan_shards(corpus, ShardSettings())
    meta = create_or_resume(folder / "clips", describe_clips(plan, {}))
    write_clip_shard(folder / "clips", meta, 0, plan.root, plan.items[0], ShardSettings())
    finish(folder / "clips", meta, plan.rejects)
    return folder / "clips"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("tokenizing"))


def tokenize(clips: Path, out: Path, config: TokenizeSettings = SETTINGS) -> Ledger:
    meta = create_or_resume(out, describe_tokens(read_meta(clips, kind="clips"), asdict(config), TOKENIZER))
    rows = read_clip_rows(clips, 0)
    ledger = write_token_shard(out, meta, 0, rows, (decode_clip(clips, r, config) for r in rows), hash_frames, config)
    finish(out, meta, [])
    assert list(verify(out)) == []
    return ledger


def test_a_shard(clips: Path, tmp_path: Path) -> None:
    ledger = tokenize(clips, tmp_path)
    assert (ledger.planned, ledger.committed) == (3, 3)
    clip_rows, rows = read_index(clips).to_pylist(), read_index(tmp_path).to_pylist()
    samples = list(webdataset.WebDataset(str(shard_path(tmp_path, 0)), shardshuffle=False))
    assert sorted(row["num_frames"] for row in rows) == [3, 6, 10]
    for clip_row, row, sample in zip(clip_rows, rows, samples, strict=True):
        frames = decode_clip(clips, clip_row, SETTINGS)
        assert isinstance(frames, np.ndarray) and frames.shape[1:] == (16, 16, 3)
        codes = hash_frames(frames)
        read = np.load(io.BytesIO(sample["tokens.npy"]), allow_pickle=False)
        assert read.dtype == np.uint16 and read.shape == (row["num_frames"], row["height"], row["width"])
        np.testing.assert_array_equal(read, codes)
        assert read_payload(tmp_path, row) == codes.tobytes()
        assert (sample["__key__"], row["key"], row["clip_sha256"]) == (
            clip_row["key"],
            clip_row["key"],
            clip_row["sha256"],
        )
        assert all(row[name] == clip_row[name] for name in ("video_id", "source", "start_s", "end_s", "split"))
        assert row["fps"] == 5


def test_equal_in_every_run(clips: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        tokenize(clips, tmp_path / name)
    assert shard_path(tmp_path / "one", 0).read_bytes() == shard_path(tmp_path / "two", 0).read_bytes()


def test_a_damaged_clip_is_rejected_alone(tmp_path: Path) -> None:
    clips = make_clips(tmp_path)
    row = read_index(clips).to_pylist()[1]
    tar = bytearray(shard_path(clips, 0).read_bytes())
    tar[row["offset"] + row["size"] // 2] ^= 1
    shard_path(clips, 0).write_bytes(tar)
    ledger = tokenize(clips, tmp_path / "tokens")
    assert (ledger.planned, ledger.committed, ledger.rejected) == (3, 2, Counter({"corrupt": 1}))
    (reject,) = read_rejects(tmp_path / "tokens")
    assert (reject.key, reject.path, reject.stage) == (row["key"], row["source"], "tokenize")
    assert "not the ones that were committed" in reject.reason


def test_a_missing_shard(tmp_path: Path) -> None:
    clips = make_clips(tmp_path)
    shard_path(clips, 0).unlink()
    assert tokenize(clips, tmp_path / "tokens").rejected == Counter({"corrupt": 3})


def test_an_encoder_that_fails_leaves_nothing(clips: Path, tmp_path: Path) -> None:
    meta = create_or_resume(tmp_path, describe_tokens(read_meta(clips), asdict(SETTINGS), TOKENIZER))
    rows = read_clip_rows(clips, 0)
    decoded = [decode_clip(clips, row, SETTINGS) for row in rows]

    def lose_a_frame(frames: np.ndarray) -> np.ndarray:
        return hash_frames(frames)[1:]

    with pytest.raises(DatasetError, match="do not balance"):  # codes that are missing are never made up
        write_token_shard(tmp_path, meta, 0, rows, decoded, lose_a_frame, SETTINGS)
    with pytest.raises(ValueError, match="shorter"):
        write_token_shard(tmp_path, meta, 0, rows, decoded[:2], hash_frames, SETTINGS)
    assert not [p for part in ("shards", "index", "rejects") for p in (tmp_path / part).iterdir()]


class TestSettings:
    def test_frames(self, clips: Path) -> None:
        row = max(read_clip_rows(clips, 0), key=lambda row: row["end_s"])
        for fps, size_px, expected in ((5, 16, (10, 16, 16, 3)), (1, 16, (2, 16, 16, 3)), (5, 32, (10, 32, 32, 3))):
            frames = decode_clip(clips, row, TokenizeSettings(frames=FrameConfig(fps=fps, size_px=size_px)))
            assert isinstance(frames, np.ndarray) and frames.shape == expected

    def test_limits(self, clips: Path) -> None:
        row = read_clip_rows(clips, 0)[0]
        outcome = decode_clip(clips, row, TokenizeSettings(limits=FfmpegLimits(timeout_s=0.001)))
        assert isinstance(outcome, Reject) and outcome.reject_class == "timeout"

    def test_identity(self, clips: Path) -> None:
        meta = read_meta(clips)
        described = [
            describe_tokens(meta, asdict(SETTINGS), TOKENIZER),
            describe_tokens(meta, {**asdict(SETTINGS), "batch_frames": 5}, TOKENIZER),
            describe_tokens(meta, asdict(SETTINGS), {**TOKENIZER, "fingerprint": "t2"}),
        ]
        assert len({m.fingerprint for m in described}) == 3
        assert {m.parent_fingerprint for m in described} == {meta.fingerprint}

    def test_two_tokenizers_never_mix(self, clips: Path, tmp_path: Path) -> None:
        tokenize(clips, tmp_path)
        other = describe_tokens(read_meta(clips), asdict(SETTINGS), {**TOKENIZER, "fingerprint": "t2"})
        with pytest.raises(ConfigError, match=r"tokenizer = 't1' \(now 't2'\)"):
            create_or_resume(tmp_path, other)

    @pytest.mark.parametrize("value", [0, -1])
    def test_bad_values(self, value: int) -> None:
        with pytest.raises(ConfigError, match=f"batch_frames = {value}"):
            TokenizeSettings(batch_frames=value)

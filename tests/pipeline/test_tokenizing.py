"""Clips to codes: full batches, and the codes of a frame are the codes of that frame."""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import tokenizing
from pipeline.dataset import create_or_resume, finish, read_index, read_meta, read_rejects, shard_path
from pipeline.decode import FrameConfig
from pipeline.errors import ConfigError, DatasetError, TransientIO
from pipeline.ffmpeg import FfmpegLimits
from pipeline.ledger import Ledger
from pipeline.schema import Reject
from pipeline.shards import ShardInfo, read_payload, read_shard_info, read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import (
    TokenizeSettings,
    decode_clip,
    describe_tokens,
    encode_clips,
    write_token_shard,
)
from pipeline.verify import verify
from tests.corpora import make_clip
from tests.pipeline.datasets import make_clip_dataset

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
    return make_clip_dataset(corpus, folder / "clips", [["0.mp4", "1.mp4", "2.mp4"]])


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("tokenizing"))


def tokenize(clips: Path, out: Path, config: TokenizeSettings = SETTINGS) -> ShardInfo:
    meta = create_or_resume(out, describe_tokens(read_meta(clips, kind="clips"), asdict(config), TOKENIZER))
    source = Store.at(clips)
    decoded = (decode_clip(source, row, config) for row in read_shard_rows(source, 0))
    info, read_bytes = write_token_shard(source, Store.at(out), meta.fingerprint, 0, decoded, hash_frames, config)
    assert read_bytes == sum(row["size"] for row in read_shard_rows(source, 0))
    finish(out, meta, Ledger())
    assert list(verify(out, clips)) == []
    return info


def test_a_shard(clips: Path, tmp_path: Path) -> None:
    info = tokenize(clips, tmp_path)
    assert (info.ledger.planned, info.ledger.committed) == (3, 3)
    parent = read_shard_info(Store.at(clips), 0)
    assert parent is not None and (info.parent_content, parent.parent_content) == (parent.content, "")
    assert info.totals["frames"] == 19
    clip_rows, rows = read_index(clips).to_pylist(), read_index(tmp_path).to_pylist()
    samples = list(webdataset.WebDataset(str(shard_path(tmp_path, 0)), shardshuffle=False))
    assert sorted(row["num_frames"] for row in rows) == [3, 6, 10]
    for clip_row, row, sample in zip(clip_rows, rows, samples, strict=True):
        frames = decode_clip(Store.at(clips), clip_row, SETTINGS)
        assert isinstance(frames, np.ndarray) and frames.shape[1:] == (16, 16, 3)
        codes = hash_frames(frames)
        read = np.load(io.BytesIO(sample["tokens.npy"]), allow_pickle=False)
        assert read.dtype == np.uint16 and read.shape == (row["num_frames"], row["height"], row["width"])
        np.testing.assert_array_equal(read, codes)
        assert read_payload(Store.at(tmp_path), row) == codes.tobytes()
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


def test_a_damaged_clip_is_rejected_alone(clips: Path, tmp_path: Path) -> None:
    clips = Path(shutil.copytree(clips, tmp_path / "clips"))
    row = read_index(clips).to_pylist()[1]
    tar = bytearray(shard_path(clips, 0).read_bytes())
    tar[row["offset"] + row["size"] // 2] ^= 1
    shard_path(clips, 0).write_bytes(tar)
    ledger = tokenize(clips, tmp_path / "tokens").ledger
    assert (ledger.planned, ledger.committed, ledger.rejected) == (3, 2, Counter({"corrupt": 1}))
    (reject,) = read_rejects(tmp_path / "tokens")
    assert (reject.key, reject.path, reject.stage) == (row["key"], row["source"], "tokenize")
    assert "not the ones that were committed" in reject.reason


def test_a_missing_shard(clips: Path, tmp_path: Path) -> None:
    clips = Path(shutil.copytree(clips, tmp_path / "clips"))
    shard_path(clips, 0).unlink()
    assert tokenize(clips, tmp_path / "tokens").ledger.rejected == Counter({"unreadable": 3})
    (reject, *_) = read_rejects(tmp_path / "tokens")
    assert "No such file" in reject.reason and "000000.tar" in reject.reason


def test_a_full_disk_is_no_reject(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is this machine's trouble ends the task, so that Ray tries it again, instead of losing the clip."""

    def fail(data: bytes) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenizing, "open_bytes", fail)
    source = Store.at(clips)
    with pytest.raises(OSError, match="No space left"):
        decode_clip(source, read_shard_rows(source, 0)[0], SETTINGS)


def test_storage_that_fails_is_a_class_of_its_own(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: Store, row: dict[str, Any]) -> NoReturn:
        raise TransientIO("s3://bucket/x: reading shards/000000.tar: failed 5 times", attempts=5)

    monkeypatch.setattr(tokenizing, "read_payload", fail)
    outcome = decode_clip(Store.at(clips), read_index(clips).to_pylist()[0], SETTINGS)
    assert isinstance(outcome, Reject) and (outcome.reject_class, outcome.stage) == ("storage", "tokenize")
    assert "failed 5 times" in outcome.reason


def test_an_encoder_that_fails_leaves_nothing(clips: Path, tmp_path: Path) -> None:
    meta = create_or_resume(tmp_path, describe_tokens(read_meta(clips), asdict(SETTINGS), TOKENIZER))
    source, out = Store.at(clips), Store.at(tmp_path)
    decoded = [decode_clip(source, row, SETTINGS) for row in read_shard_rows(source, 0)]

    def lose_a_frame(frames: np.ndarray) -> np.ndarray:
        return hash_frames(frames)[1:]

    with pytest.raises(DatasetError, match="do not balance"):  # codes that are missing are never made up
        write_token_shard(source, out, meta.fingerprint, 0, decoded, lose_a_frame, SETTINGS)
    with pytest.raises(ValueError, match="shorter"):
        write_token_shard(source, out, meta.fingerprint, 0, decoded[:2], hash_frames, SETTINGS)
    assert not [p for part in ("shards", "index", "rejects") for p in (tmp_path / part).iterdir()]


class TestSettings:
    def test_frames(self, clips: Path) -> None:
        source = Store.at(clips)
        row = max(read_shard_rows(source, 0), key=lambda row: row["end_s"])
        for fps, size_px, expected in ((5, 16, (10, 16, 16, 3)), (1, 16, (2, 16, 16, 3)), (5, 32, (10, 32, 32, 3))):
            frames = decode_clip(source, row, TokenizeSettings(frames=FrameConfig(fps=fps, size_px=size_px)))
            assert isinstance(frames, np.ndarray) and frames.shape == expected

    def test_limits(self, clips: Path) -> None:
        row = read_shard_rows(Store.at(clips), 0)[0]
        outcome = decode_clip(Store.at(clips), row, TokenizeSettings(limits=FfmpegLimits(timeout_s=0.001)))
        assert isinstance(outcome, Reject) and outcome.reject_class == "timeout"

    def test_identity(self, clips: Path) -> None:
        meta = read_meta(clips)
        described = [
            describe_tokens(meta, asdict(SETTINGS), TOKENIZER),
            describe_tokens(meta, {**asdict(SETTINGS), "batch_frames": 5}, TOKENIZER),
            describe_tokens(meta, asdict(SETTINGS), {**TOKENIZER, "fingerprint": "t2"}),
        ]
        assert len({m.fingerprint for m in described}) == 3
        # Limits decide only what is refused: its rejects can be tried again under others, in the same dataset.
        patient = {**asdict(SETTINGS), "limits": asdict(FfmpegLimits(timeout_s=999))}
        assert describe_tokens(meta, patient, TOKENIZER) == described[0]
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

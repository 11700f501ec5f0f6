"""Clips to codes: full batches, and the codes of a frame are the codes of that frame."""

from __future__ import annotations

import errno
import io
import itertools
import re
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import webdataset

from pipeline import ffmpeg, tokenizing
from pipeline.dataset import create_or_resume, finish, read_index, read_meta, read_rejects
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
    decode_clips,
    describe_tokens,
    group_rows,
    write_token_shard,
)
from pipeline.verify import verify
from pipeline.views import ViewConfig
from tests.corpora import make_clip
from tests.pipeline.datasets import make_clip_dataset, shard_path
from tests.pipeline.test_encoding import hash_frames

SETTINGS = TokenizeSettings(frames=FrameConfig(fps=5, size_px=16), batch_frames=4)
TOKENIZER = {"fingerprint": "t1", "codebook_size": 65536, "patch": 8}


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
    rows = read_shard_rows(source, 0)
    pieces = itertools.chain.from_iterable(decode_clips(source, rows, config))
    written = write_token_shard(source, Store.at(out), meta.fingerprint, 0, rows, pieces, hash_frames, config)
    assert written.read_bytes == sum(row["size"] for row in rows)
    finish(out, meta, Ledger())
    assert list(verify(out, clips)) == []
    return written.info


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
    assert "No such file" in reject.reason and "train-000000.tar" in reject.reason


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
        raise TransientIO("s3://bucket/x: reading shards/train-000000.tar: failed 5 times")

    monkeypatch.setattr(tokenizing, "read_payload", fail)
    outcome = decode_clip(Store.at(clips), read_index(clips).to_pylist()[0], SETTINGS)
    assert isinstance(outcome, Reject) and (outcome.reject_class, outcome.stage) == ("storage", "tokenize")
    assert "failed 5 times" in outcome.reason


def test_an_encoder_that_fails_leaves_nothing(clips: Path, tmp_path: Path) -> None:
    meta = create_or_resume(tmp_path, describe_tokens(read_meta(clips), asdict(SETTINGS), TOKENIZER))
    source, out = Store.at(clips), Store.at(tmp_path)
    rows = read_shard_rows(source, 0)
    pieces = list(itertools.chain.from_iterable(decode_clips(source, rows, SETTINGS)))

    def lose_a_frame(frames: np.ndarray) -> np.ndarray:
        return hash_frames(frames)[1:]

    with pytest.raises(DatasetError, match="codes for 3 of 4 frames"):  # codes that are missing are never made up
        write_token_shard(source, out, meta.fingerprint, 0, rows, pieces, lose_a_frame, SETTINGS)
    with pytest.raises(ValueError, match="shorter"):
        write_token_shard(source, out, meta.fingerprint, 0, rows, pieces[:2], hash_frames, SETTINGS)
    assert not [p for part in ("shards", "index", "rejects") for p in (tmp_path / part).iterdir()]


class TestViews:
    VIEWS = ViewConfig(more_sizes_px=(32,), resizes=(1.0, 1.25), crops=("start", "center"), flip=True)

    def test_a_sample_for_each(self, clips: Path, tmp_path: Path) -> None:
        config = replace(SETTINGS, views=self.VIEWS)
        info = tokenize(clips, tmp_path / "all", config)
        assert (info.ledger.planned, info.ledger.committed) == (3 * 16, 3 * 16)
        rows = {row["key"]: row for row in read_index(tmp_path / "all").to_pylist()}
        assert (
            len({row["view"] for row in rows.values()}) == 16 and len({row["clip_key"] for row in rows.values()}) == 3
        )
        # Each is what a dataset of this one view holds.
        for view in config.all_views():
            alone = replace(
                SETTINGS,
                frames=replace(SETTINGS.frames, size_px=view.crop.size_px),
                views=ViewConfig(resizes=(view.crop.scaled_px / view.crop.size_px,), crops=(view.crop.place,)),
            )
            if view.flip:
                continue
            tokenize(clips, tmp_path / view.name, alone)
            for row in read_index(tmp_path / view.name).to_pylist():
                ours = rows[view.key(row["key"])]
                assert read_payload(Store.at(tmp_path / "all"), ours) == read_payload(
                    Store.at(tmp_path / view.name), row
                )
                mirrored = rows[f"{ours['key']}f"]
                assert mirrored["sha256"] != ours["sha256"] and mirrored["num_frames"] == ours["num_frames"]

    def test_a_mirrored_frame(self, clips: Path, tmp_path: Path) -> None:
        tokenize(clips, tmp_path, replace(SETTINGS, views=ViewConfig(flip=True)))
        clip = read_index(clips).to_pylist()[0]
        frames = decode_clip(Store.at(clips), clip, SETTINGS)
        assert isinstance(frames, np.ndarray)
        row = next(row for row in read_index(tmp_path).to_pylist() if row["key"] == f"{clip['key']}-16cf")
        assert read_payload(Store.at(tmp_path), row) == hash_frames(frames[:, :, ::-1]).tobytes()

    def test_a_clip_that_fails_costs_each_of_its_views(self, clips: Path, tmp_path: Path) -> None:
        clips = Path(shutil.copytree(clips, tmp_path / "clips"))
        shard_path(clips, 0).unlink()
        ledger = tokenize(clips, tmp_path / "tokens", replace(SETTINGS, views=ViewConfig(flip=True))).ledger
        assert (ledger.planned, ledger.rejected) == (6, Counter({"unreadable": 6}))
        assert len({reject.key for reject in read_rejects(tmp_path / "tokens")}) == 6


class TestPieces:
    def test_a_clip_in_many(self, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """However large a clip is, a few MB of it travel at a time, and the codes are the same."""
        whole = tokenize(clips, tmp_path / "whole")
        monkeypatch.setattr(tokenizing, "_GROUP_BYTES", 3 * 16 * 16 * 3)  # three frames
        rows = read_shard_rows(Store.at(clips), 0)
        groups = list(decode_clips(Store.at(clips), rows, SETTINGS))
        assert all(sum(len(piece.frames[0]) for piece in group) <= 5 for group in groups) and len(groups) >= 6
        assert tokenize(clips, tmp_path / "pieces").content == whole.content

    def test_groups_hold_all_rows(self, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = read_shard_rows(Store.at(clips), 0)
        assert list(group_rows(rows, SETTINGS)) == [rows]
        monkeypatch.setattr(tokenizing, "_GROUP_BYTES", 1)
        assert list(group_rows(rows, SETTINGS)) == [[row] for row in rows]
        assert list(group_rows([], SETTINGS)) == []


class TestSettings:
    def test_start_s(self, clips: Path, tmp_path: Path) -> None:
        """Clips of 2 s, 1.2 s and 0.6 s at 5 fps from 1 s on."""
        config = replace(SETTINGS, frames=replace(SETTINGS.frames, start_s=1.0))
        ledger = tokenize(clips, tmp_path, config).ledger
        assert (ledger.planned, ledger.committed, ledger.filtered) == (3, 2, Counter({"too-short": 1}))
        assert sorted(row["num_frames"] for row in read_index(tmp_path).to_pylist()) == [1, 5]

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

    def test_another_ffmpeg_is_named(self, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = create_or_resume(tmp_path, describe_tokens(read_meta(clips), asdict(SETTINGS), TOKENIZER))
        monkeypatch.setattr(ffmpeg, "identity", lambda: "ffmpeg 99")
        with pytest.raises(ConfigError, match=rf"decoder = {re.escape(before.decoder)} \(now ffmpeg 99\)"):
            create_or_resume(tmp_path, describe_tokens(read_meta(clips), asdict(SETTINGS), TOKENIZER))

    def test_two_tokenizers_never_mix(self, clips: Path, tmp_path: Path) -> None:
        tokenize(clips, tmp_path)
        other = describe_tokens(read_meta(clips), asdict(SETTINGS), {**TOKENIZER, "fingerprint": "t2"})
        with pytest.raises(ConfigError, match=r"tokenizer = 't1' \(now 't2'\)"):
            create_or_resume(tmp_path, other)

    @pytest.mark.parametrize("value", [0, -1])
    def test_bad_values(self, value: int) -> None:
        with pytest.raises(ConfigError, match=f"batch_frames = {value}"):
            TokenizeSettings(batch_frames=value)

"""Errors that nobody foresaw: each costs the input that raised it, and leaves everything else byte for byte as it was."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from pipeline import cutting, embedding, sharding, shards, tokenizing
from pipeline.clips import ClipConfig
from pipeline.dataset import read_index, read_rejects, write_meta
from pipeline.embedding import EmbedSettings
from pipeline.errors import BadVideo, ConfigError, DatasetError, OutputError, TransientIO
from pipeline.internal import as_bad_video
from pipeline.schema import Reject
from pipeline.sharding import ShardSettings
from pipeline.shards import read_shard_rows
from pipeline.storage import Store
from tests.corpora import make_clip
from tests.pipeline.datasets import describe, make_codes, make_row, open_writer
from tests.pipeline.test_embedding import embed
from tests.pipeline.test_sharding import shard
from tests.pipeline.test_tokenizing import make_clips, tokenize

ERRORS: list[Callable[[], Exception]] = [
    lambda: ValueError("no such thing at 0x7f0123456789"),
    lambda: OverflowError("int too large to convert"),
    lambda: KeyError("codec"),
    lambda: ZeroDivisionError(),
    lambda: RecursionError("maximum recursion depth exceeded"),
    lambda: OSError(errno.EINVAL, "Invalid argument"),
    lambda: UnicodeEncodeError("ascii", "\udcff", 0, 1, "ordinal not in range"),
    lambda: RuntimeError("name \udcff of a file"),
]


def plant(
    patch: pytest.MonkeyPatch, module: Any, name: str, is_victim: Callable[..., bool], error: Callable[[], Exception]
) -> None:
    """Have `module.name` raise for the calls that `is_victim` picks, after it has done its work, and work as ever for others."""
    original = getattr(module, name)

    def planted(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        if is_victim(*args, **options):
            raise error()
        return found

    patch.setattr(module, name, planted)


def bytes_of(folder: Path) -> dict[str, str]:
    """Digests of the tars, and the index rows."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "shards").iterdir())}
    return {**found, "rows": str(read_index(folder).to_pylist())}


def check_rejects(folder: Path, source: str, num: int) -> None:
    found = [one for one in read_rejects(folder) if one.reject_class != "too-short"]
    assert len(found) == num and {(one.path, one.reject_class) for one in found} == {(source, "internal")}
    for one in found:
        assert "Traceback" in one.stderr and "planted" in one.stderr and "0x7f" not in one.reason + one.stderr


VIDEOS = ("a.mp4", "b.mp4", "c.mkv")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internal")
    for n, name in enumerate(VIDEOS):
        make_clip(folder / name, seconds=1.2, seed=n)
    return folder


def is_file(folder: Path, victim: str) -> Callable[..., bool]:
    def is_victim(file: Any, *_: Any) -> bool:
        return os.path.samestat(os.fstat(file.fileno()), (folder / victim).stat())

    return is_victim


class TestShard:
    @pytest.mark.parametrize("seed", range(7))
    def test_only_its_input_is_missing(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
    ) -> None:
        draw = random.Random(seed)
        victim, error = draw.choice(VIDEOS), draw.choice(ERRORS)
        storage: Literal["copy", "remux", "transcode"] = draw.choice(["copy", "remux", "transcode"])
        settings = ShardSettings(storage=storage, videos_per_shard=len(VIDEOS))
        if storage == "transcode":
            settings = replace(settings, clips=ClipConfig(mode="window", window_s=0.6))
        without = tmp_path / "corpus"
        shutil.copytree(corpus, without)
        (without / victim).unlink()
        shard(without, tmp_path / "without", settings)
        of_file, of_row = is_file(corpus, victim), lambda _key, _id, ref, *_: ref.path == victim
        points = [
            (sharding, "probe", of_file),
            (sharding, "require_decodable", of_file),
            (sharding, "_hash", of_file),
            (cutting, f"_{storage}", of_file),
            (sharding, "_row", of_row),
            (shards, "sample_info", lambda row: row["source"] == victim),
            (shards, "check_row", lambda row, _: row["source"] == victim),
        ]
        # A copied video is not hashed apart, and a whole one that is transcoded not checked before.
        module, name, picks = draw.choice([one for one in points if storage != "copy" or one[1] != "_hash"])
        with monkeypatch.context() as patch:
            plant(patch, module, name, picks, error)
            ledger = shard(corpus, tmp_path / "out", settings)
        num = ledger.rejected["internal"]
        assert num == (2 if storage == "transcode" and name not in ("probe", "require_decodable") else 1), name
        assert ledger.planned == ledger.committed + num
        check_rejects(tmp_path / "out", victim, num)
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "without")
        shard(corpus, tmp_path / "out", settings, retry=["internal"])
        shard(corpus, tmp_path / "whole", settings)
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
        assert list(read_rejects(tmp_path / "out")) == []

    def test_a_video_that_fails_after_some_spans(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each span of a manifest is a sample or one reject, wherever in the video it ends."""
        folder = shutil.copytree(corpus, tmp_path / "c")
        (folder / "m.csv").write_text("video,start_s,end_s\n" + "".join(f"a.mp4,0.{n},1\n" for n in range(5)))
        original = sharding.cut_video

        def broken(*args: Any) -> Any:
            cuts = original(*args)
            yield next(cuts)
            yield next(cuts)
            raise ValueError("planted")

        settings = ShardSettings(storage="transcode", clips=ClipConfig(mode="manifest"))
        monkeypatch.setattr(sharding, "cut_video", broken)
        ledger = shard(folder / "m.csv", tmp_path / "out", settings)
        assert (ledger.planned, ledger.committed, ledger.rejected) == (5, 2, Counter({"internal": 3}))

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            MemoryError(),
            KeyboardInterrupt(),
            SystemExit(15),
            OutputError(errno.EIO, "Input/output error"),
            DatasetError("damaged"),
        ],
    )
    def test_what_is_not_the_inputs_fault_ends_the_shard(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(cutting, "_copy", fail)
        with pytest.raises(type(error)):
            shard(corpus, tmp_path / "out", ShardSettings())
        assert not list((tmp_path / "out" / "index").iterdir())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("internal-clips"))


class TestTokenize:
    @pytest.mark.parametrize("seed", range(5))
    def test_only_its_input_is_missing(
        self, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
    ) -> None:
        draw = random.Random(seed)
        rows = read_shard_rows(Store.at(clips), 0)
        victim, error = draw.choice(rows), draw.choice(ERRORS)
        points = [
            (tokenizing, "read_payload", lambda _clips, row: row["key"] == victim["key"]),
            (tokenizing, "iter_frames", lambda _file, seconds, *_: seconds == victim["end_s"] - victim["start_s"]),
            (tokenizing, "_token_row", lambda row, *_: row["key"] == victim["key"]),
            (shards, "sample_info", lambda row: row["key"] == victim["key"]),
        ]
        module, name, picks = draw.choice(points)
        tokenize(clips, tmp_path / "whole")
        with monkeypatch.context() as patch:
            plant(patch, module, name, picks, error)
            ledger = tokenize(clips, tmp_path / "out").ledger
        assert (ledger.planned, ledger.committed, ledger.rejected) == (3, 2, Counter({"internal": 1}))
        check_rejects(tmp_path / "out", victim["source"], 1)
        whole = {row["key"]: row["sha256"] for row in read_shard_rows(Store.at(tmp_path / "whole"), 0)}
        found = {row["key"]: row["sha256"] for row in read_shard_rows(Store.at(tmp_path / "out"), 0)}
        assert found == {key: digest for key, digest in whole.items() if key != victim["key"]}


class TestEmbed:
    @pytest.mark.parametrize("rows", ["clip", "window"])
    @pytest.mark.parametrize("name", ["_read_codes", "_cut", "_row", "check_row"])
    def test_only_its_input_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: Literal["clip", "window"]
    ) -> None:
        lengths, victim = (7, 2, 4), 2
        write_meta(tmp_path / "tokens", describe())
        writer = open_writer(tmp_path / "tokens")
        for number, length in enumerate(lengths):
            writer.add(*_sample(number, length))
        writer.commit(len(lengths), [])
        tokens, settings = Store.at(tmp_path / "tokens"), EmbedSettings(rows=rows, batch_windows=2)
        whole, _ = embed(tokens, tmp_path / "whole", settings)
        key = _key(victim)
        picks = {
            "_read_codes": lambda _file, sample: sample["key"] == key,
            "_cut": lambda codes, *_: codes[0, 0, 0] == victim,
            "_row": lambda sample, *_: sample["key"] == key,
            "check_row": lambda row, _: row["sample_key"] == key,
        }
        plant(monkeypatch, embedding, name, picks[name], lambda: OverflowError("too large"))
        found, _ = embed(tokens, tmp_path / "out", settings)
        assert found == [row for row in whole if row["sample_key"] != key] and len(found) < len(whole)
        check_rejects(tmp_path / "out", f"{key}.mp4", 1)


def test_a_row_that_arrow_refuses_costs_its_sample(tmp_path: Path) -> None:
    """Found when it is added: at the shard's end it would take all other samples with it."""
    writer = open_writer(tmp_path)
    for number, changes in enumerate(
        ({}, {"num_frames": 2**31}, {"end_s": float("inf")}, {"fps": float("nan")}, {"label": 3})
    ):
        try:
            writer.add(*_sample(number, 3, **changes))
        except (ValueError, OverflowError, TypeError):
            assert changes
    writer.add(*_sample(9, 3))
    info = writer.commit(2, [])
    assert info.ledger.committed == 2
    assert [row["key"] for row in read_shard_rows(Store.at(tmp_path), 0)] == [_key(0), _key(9)]


def test_a_reject_may_quote_any_name(tmp_path: Path) -> None:
    open_writer(tmp_path).commit(
        1, [Reject(path="a", stage="shard", reject_class="internal", reason="\udcff", stderr="\ud800")]
    )
    (found,) = read_rejects(tmp_path)
    assert (found.reason, found.stderr) == ("\\udcff", "\\ud800")


def test_classes() -> None:
    assert as_bad_video(TransientIO("x")).reject_class == "storage"
    assert as_bad_video(bad := BadVideo("corrupt", "x")) is bad
    with pytest.raises(ConfigError):
        as_bad_video(ConfigError("ffmpeg is not installed"))


def _key(number: int) -> str:
    return f"{number:016x}-000000000"


def _sample(number: int, length: int, **changes: Any) -> tuple[dict[str, Any], str, bytes, int]:
    buffer = io.BytesIO()
    codes = make_codes(number, length)
    np.save(buffer, codes, allow_pickle=False)
    return make_row(_key(number), length, **changes), "tokens.npy", buffer.getvalue(), buffer.tell() - codes.nbytes

"""Tokens that are not their clips' are found where every hash is right, because the job itself was wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from pipeline import tokenizing
from pipeline.audit import Audited, audit, draw_samples
from pipeline.dataset import create_or_resume, finish, listed_shards, read_meta
from pipeline.decode import FrameConfig
from pipeline.encoding import Encode, Piece
from pipeline.errors import TransientIO
from pipeline.ledger import Ledger
from pipeline.quality import QualityThresholds
from pipeline.schema import VideoRef
from pipeline.shards import ShardWriter, read_payload, read_shard_info, read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clip, describe_tokens, write_token_shard
from pipeline.verify import Problem, verify
from pipeline.views import ViewConfig
from tests.corpora import make_clip
from tests.pipeline.datasets import make_clip_dataset, make_token_dataset
from tests.pipeline.test_encoding import hash_frames
from tests.pipeline.test_tokenizing import TOKENIZER

SETTINGS = TokenizeSettings(frames=FrameConfig(fps=5, size_px=16), batch_frames=4)
SECONDS = ((2, 2), (1.2,))
Frames = list[np.ndarray]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of two clips of ten frames, and one of a clip of six."""
    folder = tmp_path_factory.mktemp("audit")
    shards = [[f"{shard}{n}.mp4" for n in range(len(lengths))] for shard, lengths in enumerate(SECONDS)]
    (folder / "corpus").mkdir()
    for shard, lengths in enumerate(SECONDS):
        for n, seconds in enumerate(lengths):
            make_clip(folder / "corpus" / shards[shard][n], seconds=seconds, seed=10 * shard + n)
    refs = [[VideoRef(path=name, caption=f"caption {name}") for name in names] for names in shards]
    return make_clip_dataset(folder / "corpus", folder / "clips", refs)


@pytest.fixture(scope="module")
def frames(clips: Path) -> list[Frames]:
    """Of each clip, by shard, in the order of the index."""
    store = Store.at(clips)
    decoded = [[decode_clip(store, row, SETTINGS) for row in read_shard_rows(store, shard)] for shard in (0, 1)]
    assert all(isinstance(one, np.ndarray) for shard in decoded for one in shard)
    return decoded  # type: ignore[return-value]


def tokenize(
    clips: Path,
    out: Path,
    frames: list[Frames],
    encode: Encode = hash_frames,
    settings: TokenizeSettings = SETTINGS,
) -> Path:
    """What the job writes where it takes `frames` for those of the clips, and `encode` for the tokenizer."""
    meta = create_or_resume(out, describe_tokens(read_meta(clips), asdict(settings), TOKENIZER))
    for shard, decoded in enumerate(frames):
        rows, pieces = read_shard_rows(Store.at(clips), shard), [Piece([frames], True) for frames in decoded]
        write_token_shard(Store.at(clips), Store.at(out), meta.fingerprint, shard, rows, pieces, encode, settings)
    finish(out, meta, Ledger())
    assert list(verify(out, clips)) == []  # every hash, offset and book is right
    return out


def run_audit(tokens: Path, clips: Path, *, share: float = 1.0, **changes: Any) -> list[Audited]:
    store = Store.at(tokens)
    drawn = draw_samples(store, listed_shards(store), share, 0)
    arguments = {"settings": SETTINGS, "encode": hash_frames, **changes}
    return list(audit(store, Store.at(clips), drawn, **arguments))


def problems_of(found: Iterable[Audited]) -> list[Problem]:
    return [one.problem for one in found if one.problem is not None]


def rewrite(tokens: Path, shard: int, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Commit a shard again with changed rows; tar, JSON, hashes and index agree."""
    store = Store.at(tokens)
    rows, info = read_shard_rows(store, shard), read_shard_info(store, shard)
    assert info is not None
    payloads = [read_payload(store, row) for row in rows]
    places = ("shard", "tar", "offset", "size", "sha256", "json_offset", "json_size")
    rows = [{name: value for name, value in row.items() if name not in places} for row in rows]
    change(rows)
    writer = ShardWriter(store, "tokens", info.fingerprint, shard)
    for row, payload in zip(rows, payloads, strict=True):
        codes = np.frombuffer(payload, np.uint16).reshape(-1, row["height"], row["width"])
        member, header_bytes = tokenizing._npy(codes)
        writer.add(row, "tokens.npy", member, header_bytes)
    writer.commit(len(rows), [], parent_content=info.parent_content)
    finish(tokens, read_meta(tokens), Ledger())


def test_tokens_of_their_clips(clips: Path, frames: list[Frames], tmp_path: Path) -> None:
    batches: list[int] = []

    def encode(batch: np.ndarray) -> np.ndarray:
        batches.append(len(batch))
        return hash_frames(batch)

    found = run_audit(tokenize(clips, tmp_path / "tokens", frames), clips, encode=encode)
    number = sum(len(one) for shard in frames for one in shard)
    assert problems_of(found) == [] and len(found) == 3
    assert sum(one.codes_compared for one in found) == 4 * number == 4 * 26
    assert sum(one.codes_different for one in found) == 0
    assert set(batches) == {SETTINGS.batch_frames} and len(batches) == -(-number // 4)  # shared by samples, over shards


def swap(frames: list[Frames]) -> list[Frames]:
    (first, second), other = frames
    return [[second, first], other]


def swap_over_shards(frames: list[Frames]) -> list[Frames]:
    (first, second), (other,) = frames
    return [[other, second], [first]]


def shift(*, by: int) -> Callable[[list[Frames]], list[Frames]]:
    """The frames as they are when the first ones were lost, or the first was repeated: as many, `by` places off."""

    def change(frames: list[Frames]) -> list[Frames]:
        (first, second), other = frames
        places = np.clip(np.arange(len(first)) + by, 0, len(first) - 1)
        return [[first[places], second], other]

    return change


def lose_the_first(frames: list[Frames]) -> list[Frames]:
    (first, second), other = frames
    return [[first[1:], second], other]


def flip(frames: list[Frames]) -> list[Frames]:
    (first, second), other = frames
    return [[first[:, :, ::-1], second], other]


def turn_one_frame(frames: list[Frames]) -> list[Frames]:
    (first, second), other = frames
    changed = first.copy()
    changed[7] = changed[7, ::-1]
    return [[changed, second], other]


@pytest.mark.parametrize(
    ("plant", "bad", "words"),
    [
        (swap, [(0, 0), (0, 1)], "codes differ, first in frame 0 of"),
        (swap_over_shards, [(0, 0), (1, 0)], ""),
        (shift(by=1), [(0, 0)], "first in frame 0 of 10; shifted: its frame t holds the codes of frame t + 1"),
        (shift(by=-2), [(0, 0)], "first in frame 1 of 10; shifted: its frame t holds the codes of frame t - 2"),
        (lose_the_first, [(0, 0)], "9 frames of 2x2 codes; its clip gives 10 frames of 2x2 codes; shifted: its frame t holds the codes of frame t + 1"),
        (flip, [(0, 0)], "100.00% of 40 codes differ, first in frame 0 of 10"),
        (turn_one_frame, [(0, 0)], "10.00% of 40 codes differ, first in frame 7 of 10"),
    ],
    ids=["swapped", "swapped over shards", "a frame on", "two frames back", "a frame lost", "flipped", "one frame turned"],
)  # fmt: skip
def test_wrong_frames(
    plant: Callable[[list[Frames]], list[Frames]],
    bad: list[tuple[int, int]],
    words: str,
    clips: Path,
    frames: list[Frames],
    tmp_path: Path,
) -> None:
    tokens = tokenize(clips, tmp_path / "tokens", plant(frames))
    found = problems_of(run_audit(tokens, clips))
    assert len(found) == len(bad)
    for problem, (shard, place) in zip(found, bad, strict=True):
        row = read_shard_rows(Store.at(clips), shard)[place]
        assert problem.shard == shard
        assert f"train-{shard:06d}.tar: sample {row['key']} of {row['source']}: " in problem.text
        assert words in problem.text, problem.text


@pytest.mark.parametrize("mix_up", ["rows reversed", "another batch"])
def test_wrong_rows_of_a_batch(mix_up: str, clips: Path, frames: list[Frames], tmp_path: Path) -> None:
    """Frames are right, and so are codes, but an encoder hands out those of other frames."""
    before = np.zeros((SETTINGS.batch_frames, 2, 2), np.uint16)

    def encode(batch: np.ndarray) -> np.ndarray:
        nonlocal before
        codes = hash_frames(batch)
        if mix_up == "rows reversed":
            return codes[::-1]
        before, late = codes, before
        return late

    tokens = tokenize(clips, tmp_path / "tokens", frames, encode)
    found = problems_of(run_audit(tokens, clips))
    assert len(found) == 3
    if mix_up == "another batch":  # of four frames, so that is what all are off by
        assert "shifted: its frame t holds the codes of frame t - 4" in found[0].text


def test_rows_that_are_another_clips(clips: Path, frames: list[Frames], tmp_path: Path) -> None:
    tokens = tokenize(clips, tmp_path / "tokens", frames)

    def exchange(rows: list[dict[str, Any]], name: str) -> None:
        rows[0][name], rows[1][name] = rows[1][name], rows[0][name]

    rewrite(tokens, 0, lambda rows: exchange(rows, "clip_sha256"))
    rewrite(tokens, 1, lambda rows: rows[0].update(caption="caption of another"))
    assert list(verify(tokens, clips)) == []
    found = problems_of(run_audit(tokens, clips))
    assert [problem.shard for problem in found] == [0, 0, 1]
    rows = read_shard_rows(Store.at(clips), 0)
    assert f"a clip with SHA-256 {rows[1]['sha256']}, but clip {rows[0]['key']} of" in found[0].text
    assert "not what its clip says: caption = 'caption of another' ('caption 10.mp4')" in found[2].text


def test_a_view_that_shows_another_one(clips: Path, frames: list[Frames], tmp_path: Path) -> None:
    settings = replace(SETTINGS, views=ViewConfig(flip=True))
    right = tokenize(clips, tmp_path / "right", frames, settings=settings)
    found = run_audit(right, clips, settings=settings)
    assert not problems_of(found) and len(found) == 6
    wrong = tokenize(
        clips, tmp_path / "wrong", [[frames[0][0][:, :, ::-1], *frames[0][1:]], frames[1]], settings=settings
    )
    problems = problems_of(run_audit(wrong, clips, settings=settings))
    assert len(problems) == 2 and all("100.00% of 40 codes differ" in problem.text for problem in problems)


def test_a_view_that_nobody_asked_for(clips: Path, frames: list[Frames], tmp_path: Path) -> None:
    tokens = tokenize(clips, tmp_path / "tokens", frames)
    rewrite(tokens, 1, lambda rows: rows[0].update(view="16e"))
    (problem,) = problems_of(run_audit(tokens, clips))
    assert problem.shard == 1 and "view '16e' of clip" in problem.text


def test_a_sample_of_no_clip(clips: Path, frames: list[Frames], tmp_path: Path) -> None:
    tokens = tokenize(clips, tmp_path / "tokens", frames)
    rewrite(tokens, 1, lambda rows: rows[0].update(key="f" * 16, clip_key="f" * 16))
    assert list(verify(tokens, clips)) == []
    (problem,) = problems_of(run_audit(tokens, clips))
    assert problem.shard == 1 and f"{clips} has no such clip" in problem.text


def test_tolerance(clips: Path, frames: list[Frames], tmp_path: Path) -> None:
    """Codes that another device rounds otherwise: counted always, a problem only beyond what is allowed."""
    changed = {hash_frames(one)[3].tobytes() for shard in frames for one in shard}

    def encode(batch: np.ndarray) -> np.ndarray:
        codes = hash_frames(batch)
        for frame in codes:
            if frame.tobytes() in changed:
                frame[0, 0] ^= 1
        return codes

    tokens = tokenize(clips, tmp_path / "tokens", frames, encode)
    for tolerance, expected in ((0.0, 3), (1 / 40, 1), (1 / 24, 0)):  # of 10, 10 and 6 frames
        found = run_audit(tokens, clips, tolerance=tolerance)
        assert sum(one.codes_different for one in found) == 3
        assert len(problems_of(found)) == expected


class TestClipsThatAreGone:
    """Making the tokens again would only lose them, so no shard of theirs is at fault."""

    def test_no_file(self, clips: Path, frames: list[Frames], tmp_path: Path) -> None:
        tokens = tokenize(clips, tmp_path / "tokens", frames)
        clips = Path(shutil.copytree(clips, tmp_path / "clips"))
        (clips / "shards" / "train-000001.tar").unlink()
        found = problems_of(run_audit(tokens, clips))
        assert [problem.shard for problem in found] == [None]
        assert all("its clip cannot be decoded again: unreadable" in problem.text for problem in found)

    @pytest.mark.parametrize("index", [b"no index", None])
    def test_no_index(self, index: bytes | None, clips: Path, frames: list[Frames], tmp_path: Path) -> None:
        tokens = tokenize(clips, tmp_path / "tokens", frames)
        clips = Path(shutil.copytree(clips, tmp_path / "clips"))
        path = clips / "index" / "000000.parquet"
        path.unlink() if index is None else path.write_bytes(index)
        found = run_audit(tokens, clips)
        assert [problem.shard for problem in problems_of(found)] == [None] * 2
        assert all("its clip is gone, the index of its shard in" in problem.text for problem in problems_of(found))
        assert sum(one.codes_compared for one in found) == 4 * 6  # the other shard's are compared all the same

    def test_storage_that_fails(
        self, clips: Path, frames: list[Frames], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokens = tokenize(clips, tmp_path / "tokens", frames)

        def fail(store: Store, row: dict[str, Any]) -> NoReturn:
            raise TransientIO("s3://bucket/x: failed 5 times")

        monkeypatch.setattr(tokenizing, "read_payload", fail)
        with pytest.raises(TransientIO, match="failed 5 times"):
            run_audit(tokens, clips)


def test_a_clip_that_the_thresholds_leave_out(clips: Path, frames: list[Frames], tmp_path: Path) -> None:
    tokens = tokenize(clips, tmp_path / "tokens", frames)
    strict = replace(SETTINGS, keep=QualityThresholds(max_motion=0.4))  # and these clips were never scored
    found = problems_of(run_audit(tokens, clips, settings=strict))
    assert [problem.shard for problem in found] == [0, 0, 1]
    assert all("its clip has no place in this dataset: motion nan" in problem.text for problem in found)


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.at(make_token_dataset(tmp_path_factory.mktemp("draw") / "tokens", [[1] * 30, [], [1] * 70]))


class TestDraw:
    def test_share(self, three_shards: Store) -> None:
        for share, number in ((0.0, 0), (1e-9, 1), (0.014, 1), (0.016, 2), (0.5, 50), (1.0, 100)):
            drawn = draw_samples(three_shards, [0, 1, 2], share, 0)
            assert sum(map(len, drawn.values())) == number
            assert all(places == sorted(set(places)) for places in drawn.values())
        assert drawn == {0: list(range(30)), 2: list(range(70))}

    def test_seed(self, three_shards: Store) -> None:
        drawn = [draw_samples(three_shards, [0, 1, 2], 0.3, seed) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]

    def test_every_sample_is_as_likely(self, three_shards: Store) -> None:
        counts = {0: np.zeros(30), 2: np.zeros(70)}
        for seed in range(100):
            for shard, places in draw_samples(three_shards, [0, 1, 2], 0.1, seed).items():
                counts[shard][places] += 1
        assert all(np.abs(found - 10).max() < 5 * 3 for found in counts.values())  # 10 +- 3 of 100
        assert abs(counts[0].mean() - 10) < 3

    def test_some_shards(self, three_shards: Store) -> None:
        assert draw_samples(three_shards, [2], 1.0, 0) == {2: list(range(70))}
        assert draw_samples(three_shards, [1], 1.0, 0) == draw_samples(three_shards, [], 1.0, 0) == {}

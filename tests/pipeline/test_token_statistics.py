"""Statistics of tokens: against counting by hand, additive, in bounded memory, honest about damage."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline import token_statistics
from pipeline.dataset import create_or_resume, finish, read_index
from pipeline.errors import DatasetError
from pipeline.ledger import Ledger
from pipeline.storage import Store
from pipeline.token_statistics import REST, TokenStatistics, sample_shards, scan_tokens, source_group
from tests.pipeline.datasets import add_codes, describe, make_row, make_token_dataset, open_writer, shard_path

K = 9
CLIPS = hnp.arrays(np.uint16, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=st.integers(0, K - 1))


def statistics_of(*clips: np.ndarray) -> TokenStatistics:
    statistics = TokenStatistics.empty(K)
    for clip in clips:
        statistics.add_clip(clip)
    return statistics


@given(CLIPS)
def test_counts_are_those_of_counting_by_hand(codes: np.ndarray) -> None:
    statistics = statistics_of(codes)
    uses = Counter(codes.flatten().tolist())
    assert statistics.uses.tolist() == [uses[code] for code in range(K)]
    shares = [count / codes.size for count in uses.values()]
    assert statistics.entropy_bits == pytest.approx(-sum(share * math.log2(share) for share in shares))
    assert 1 <= statistics.perplexity <= K + 1e-9 and statistics.used_share == len(uses) / K
    t, h, w = codes.shape
    same = [codes[f, y, x] == codes[f - 1, y, x] for f in range(1, t) for y in range(h) for x in range(w)]
    assert statistics.static_share == pytest.approx(sum(same) / len(same) if same else math.nan, nan_ok=True)
    assert (statistics.num_frames, statistics.num_tokens, statistics.num_pairs) == (t, codes.size, len(same))


@given(CLIPS, CLIPS)
def test_statistics_add_up(first: np.ndarray, second: np.ndarray) -> None:
    both = statistics_of(first) + statistics_of(second)
    assert both.summary() == pytest.approx(statistics_of(first, second).summary(), nan_ok=True)
    assert both.uses.tolist() == statistics_of(first, second).uses.tolist()


def test_a_clip_longer_than_a_chunk_is_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_statistics, "_CHUNK", 7)
    codes = np.random.default_rng(0).integers(0, K, (4, 3, 3)).astype(np.uint16)
    assert statistics_of(codes).uses.tolist() == np.bincount(codes.flatten(), minlength=K).tolist()


def test_a_code_beyond_the_codebook_is_refused_and_nothing_is_counted() -> None:
    statistics = TokenStatistics.empty(K)
    with pytest.raises(ValueError, match="code 9 of a codebook of 9"):
        statistics.add_clip(np.full((1, 1, 1), K, np.uint16))
    assert statistics.num_tokens == statistics.num_clips == 0


def test_a_source_is_its_folder_or_itself() -> None:
    assert [source_group(path) for path in ("a/b/c.mp4", "a/d.mp4", "e.mp4")] == ["a/b/", "a/", "e.mp4"]


def make_dataset(folder: Path) -> Path:
    """Two shards; sources a/ (5 frames, all alike), b/ (4 frames, none alike) and c.mp4 (1 frame)."""
    meta = create_or_resume(folder, describe(num_shards=2))
    clips = {"00-0": ("a/1.mp4", [3, 3]), "01-0": ("b/1.mp4", [1, 2, 1, 2]), "02-0": ("c.mp4", [5])}
    for shard, keys in enumerate((["00-0", "01-0"], ["02-0", "03-0"])):
        writer = open_writer(folder, shard)
        for key in keys:
            source, codes = clips.get(key, ("a/2.mp4", [3, 3, 3]))
            array = np.array(codes, np.uint16)[:, None, None] * np.ones((1, 2, 3), np.uint16)
            add_codes(writer, make_row(key, len(codes), source=source), array)
        writer.commit(len(keys), [])
    finish(folder, meta, Ledger())
    return folder


def test_a_scan_counts_sources_and_clips(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "tokens")
    store, index = Store.at(folder), read_index(folder)
    scan = scan_tokens(store, index, K, shards=[0, 1], num_sources=2)
    assert list(scan.by_source) == ["a/", "b/", REST]
    assert {name: one.static_share for name, one in scan.by_source.items()} == pytest.approx(
        {"a/": 1, "b/": 0, REST: math.nan}, nan_ok=True
    )
    assert scan.total.uses.tolist() == [0, 12, 12, 30, 0, 6, 0, 0, 0]
    keys = [index["key"][place].as_py() for place in scan.rows]
    assert dict(zip(keys, scan.static_share.tolist(), strict=True)) == pytest.approx(
        {"00-0": 1, "01-0": 0, "02-0": math.nan, "03-0": 1}, nan_ok=True
    )
    part = scan_tokens(store, index, K, shards=[1], num_sources=2)
    assert part.total.num_clips == 2 and list(part.by_source) == ["a/", REST]


def test_a_sample_of_shards_is_as_large_as_asked_and_always_the_same(tmp_path: Path) -> None:
    index = read_index(make_token_dataset(tmp_path / "tokens", [[10]] * 8))  # 60 tokens a shard
    assert sample_shards(index, 480) == list(range(8))
    assert len(sample_shards(index, 1)) == 1 and len(sample_shards(index, 180)) == 3
    assert sample_shards(index, 180) == sample_shards(index, 180)
    assert {tuple(sample_shards(index, 180, seed)) for seed in range(4)} != {tuple(sample_shards(index, 180))}


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "tokens")
    index = read_index(folder)
    with pytest.raises(DatasetError, match=r"code 3 of a codebook of 3.*tokenreel verify"):
        scan_tokens(Store.at(folder), index, 3, shards=[0, 1])
    with shard_path(folder, 1).open("r+b") as file:
        file.truncate(700)
    with pytest.raises(DatasetError, match=r"000001\.tar: the tokens at byte \d+ are not what the index says"):
        scan_tokens(Store.at(folder), index, K, shards=[0, 1])

"""The loader's bench: every loader delivers the same kind of batch, a missing one is named, an index is really opened."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jobs.bench.loader import BenchLoaderConfig, make_content, run
from jobs.bench.loader_peers import PEERS
from pipeline.errors import ConfigError
from pipeline.loader import WindowReader

SMALL = {"num_samples": 16, "num_frames": 8, "grid": (2, 3), "batch_size": 4, "round_s": 0.02, "rounds": 1}


def test_a_small_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)  # as where it is not installed
    result = run(BenchLoaderConfig(peers=("webdataset", "pread", "litdata"), **SMALL))
    assert (result.planned, result.committed) == (4, 3)
    assert set(result.figures["pairs_per_s"]) == {"tokenreel", "webdataset", "pread"}
    assert all(rate > 0 for rate in result.figures["pairs_per_s"].values())
    assert result.figures["missing"]["litdata"].startswith("pip install litdata")
    assert result.figures["sample_bytes"] == 8 * 2 * 3 * 2


@pytest.mark.parametrize("peer", ["webdataset", "pread"])
def test_windows_are_of_the_content(tmp_path, peer) -> None:
    content = make_content(tmp_path / "tokens", BenchLoaderConfig(**SMALL))
    (tmp_path / "peer").mkdir()
    tokens, keys = next(PEERS[peer](content, tmp_path / "peer"))
    for pair, key in zip(tokens.numpy(), keys, strict=True):
        sample = content.samples[content.keys.index(key)]
        windows = np.lib.stride_tricks.sliding_window_view(sample, 5, axis=0).transpose(0, 3, 1, 2)
        assert all((windows == clip).all(axis=(1, 2, 3)).any() for clip in pair)


def test_our_content_is_the_peers(tmp_path) -> None:
    content = make_content(tmp_path / "tokens", BenchLoaderConfig(**SMALL))
    reader = WindowReader(tmp_path / "tokens", "all", (8, 2, 3), 0)
    np.testing.assert_array_equal(reader.read(np.arange(16), np.zeros(16, int)), content.samples)


def test_an_index() -> None:
    result = run(BenchLoaderConfig(index_rows=5000, index_workers=2, num_frames=8, grid=(2, 3), batch_size=4))
    figures = result.figures
    assert figures["index_bytes"] >= 5000 * 64
    assert figures["cold"]["open_s"] > 0 and figures["warm"]["resume_s"] > 0
    assert len(figures["together"]["grown_pss_bytes"]) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rounds": 0}, "rounds = 0"),
        ({"batch_size": 5000}, "batch_size = 5000 exceeds"),
        ({"round_s": 0.0}, "round_s = 0.0 positive"),
        ({"peers": ("tfrecord",)}, "peers = "),
    ],
)
def test_bad_values(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchLoaderConfig(**values)

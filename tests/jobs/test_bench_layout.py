"""bench layout: packing loses nothing, and the table says what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.bench.layout import BenchLayoutConfig, layouts, pack_bits, run, unpack_bits
from pipeline.errors import ConfigError
from tests.pipeline.datasets import make_token_dataset

EXTRA = {"tokenizer": {"codebook_size": 60_000, "fingerprint": "t", "patch": 8}}


@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**32))
def test_packing_is_exact(bits: int, num_frames: int, num_codes: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (num_frames, num_codes)).astype(np.uint16)
    data = pack_bits(codes, bits)
    assert len(data) == num_frames * -(-num_codes // 8) * bits
    assert np.array_equal(unpack_bits(data, num_codes, bits), codes)


@pytest.mark.parametrize("codebook_size", [2, 512, 8192, 65_531])
def test_every_layout_gives_back_its_codes(codebook_size: int) -> None:
    codes = np.random.default_rng(0).integers(0, codebook_size, (5, 12)).astype(np.uint16)
    for layout in layouts(codebook_size):
        assert np.array_equal(layout.unpack(layout.pack(codes), 12), codes), layout.name


def test_the_table(tmp_path: Path) -> None:
    tokens = make_token_dataset(tmp_path / "tokens", [[40, 3], [20]], extra=EXTRA)
    figures = run(BenchLayoutConfig(tokens=str(tokens), batch_windows=8, batches=4, repeats=1)).figures
    assert figures["clips"] == 3 and figures["tokens"] == 63 * 6
    table = {row["layout"]: row for row in figures["table"]}
    assert table["uint16"]["bytes_per_token"] == 2 and table["packed, 16 bits"]["bytes_per_token"] == round(16 / 6, 4)
    assert table["zstd, whole clip"]["size_of_raw"] < table["zstd, each frame"]["size_of_raw"]
    assert all(row["window_us"] > 0 for row in table.values())
    with pytest.raises(ConfigError, match="window_frames = 41: no clip"):
        run(BenchLayoutConfig(tokens=str(tokens), window_frames=41))
    with pytest.raises(ConfigError, match="batches = 0"):
        BenchLayoutConfig(tokens="t", batches=0)

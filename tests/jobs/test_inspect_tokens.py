"""The page about tokens: its figures against the tokens and frames themselves, samples that say so, and a lost parent."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import inspect
from jobs.inspect import InspectConfig
from jobs.token_origin import original_frames
from models.tokenizers.base import load_tokenizer
from pipeline.dataset import find_parent, read_index, read_meta
from pipeline.errors import ConfigError
from pipeline.schema import Reject
from pipeline.storage import Store
from tests.conftest import Stages


def sections_of(page: Path) -> dict[str, str]:
    parts = re.split(r"<section><h2>(.*?)</h2>", page.read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def codes_of(tokens: Path, row: dict) -> np.ndarray:
    data = (tokens / row["tar"]).read_bytes()[row["offset"] : row["offset"] + row["size"]]
    return np.frombuffer(data, np.uint16).reshape(row["num_frames"], row["height"], row["width"])


def test_the_page_says_what_the_tokens_say(stages: Stages, tmp_path: Path) -> None:
    rows = read_index(stages.tokens).to_pylist()
    figures = inspect.run(
        InspectConfig(dataset=str(stages.tokens), page=tmp_path / "page.html", examples=3, bins=8, sample_clips=8)
    ).figures
    codes = {row["key"]: codes_of(stages.tokens, row) for row in rows}
    shares = np.bincount(np.concatenate([one.reshape(-1) for one in codes.values()]), minlength=64)
    shares = shares[shares > 0] / shares.sum()
    bits = -np.sum(shares * np.log2(shares))
    assert figures["entropy_bits"] == pytest.approx(bits, abs=1e-3)
    assert figures["perplexity"] == pytest.approx(2**bits, abs=0.01) and figures["codes_used"] == len(shares)
    same = sum(np.sum(one[1:] == one[:-1]) for one in codes.values())
    assert figures["static_share"] == pytest.approx(same / sum(one[1:].size for one in codes.values()), abs=1e-5)

    sections = sections_of(tmp_path / "page.html")
    assert list(sections)[:5] == ["size on disk", "code use", "sources", "static share", "PSNR"]
    size = sum(row["size"] for row in rows)
    assert "packed, 6 bits a token" in sections["size on disk"] and f"{size / 1000:.4g} kB" in sections["size on disk"]
    assert sections["code use"].count("<rect") == 8
    assert all(row["source"] in sections["sources"] for row in rows)
    examples = re.findall(r"<figcaption>PSNR ([\d.]+) dB [^<]* · (\S+)</figcaption>", sections["PSNR"])
    assert figures["clips_reconstructed"] == min(8, len(rows)) and len(examples) == 3
    assert [float(psnr_db) for psnr_db, _ in examples] == pytest.approx(
        [figures[f"psnr_db_{name}"] for name in ("min", "median", "max")], abs=0.01
    )
    meta, parent = read_meta(stages.tokens), find_parent(Store.at(stages.tokens), read_meta(stages.tokens))
    assert parent is not None
    tokenizer = load_tokenizer(stages.tokens / "tokenizer")
    for psnr_db, key in examples:
        row = next(row for row in rows if row["key"] == key)
        shown = np.unique(np.linspace(0, row["num_frames"] - 1, 8).round().astype(int))
        frames = original_frames(parent, meta, row)
        assert isinstance(frames, np.ndarray)
        decoded = tokenizer.decode(torch.from_numpy(codes[key][shown])).numpy().astype(float)
        expected_db = 10 * np.log10(255**2 / np.mean((frames[shown] - decoded) ** 2))
        assert float(psnr_db) == pytest.approx(float(expected_db), abs=0.01)
    assert sections["PSNR"].count("data:image/") == 6  # an original and a reconstruction of each example


def test_a_sample_reads_less_and_says_so(stages: Stages, tmp_path: Path) -> None:
    config = InspectConfig(
        dataset=str(stages.tokens), page=tmp_path / "page.html", sample_tokens=1, sample_clips=1, examples=1
    )
    figures = inspect.run(config).figures
    assert 0 < figures["tokens"] < figures["dataset_tokens"] and figures["clips_reconstructed"] == 1
    assert "statistics are of a sample" in config.page.read_text()


def test_tokens_whose_clips_are_gone_are_shown_alone(stages: Stages, tmp_path: Path) -> None:
    tokens = shutil.copytree(stages.tokens, tmp_path / "tokens")
    figures = inspect.run(InspectConfig(dataset=str(tokens), examples=1)).figures
    assert "psnr_db_min" not in figures
    sections = sections_of(tokens / "inspect.html")
    assert "not at hand" in sections["PSNR"] and sections["static share"].count("data:image/") == 1


def test_a_clip_that_is_gone_is_said(stages: Stages) -> None:
    meta, row = read_meta(stages.tokens), read_index(stages.tokens).to_pylist()[0]
    gone = original_frames(Store.at(stages.clips), meta, {**row, "clip_sha256": "0" * 64})
    assert isinstance(gone, Reject) and gone.key == row["key"]


def test_bad_use() -> None:
    with pytest.raises(ConfigError, match="sample_tokens = 0 must be 1 or more"):
        InspectConfig(dataset="x", sample_tokens=0)
    with pytest.raises(ConfigError, match="sample_clips = -1 0 or more"):
        InspectConfig(dataset="x", sample_clips=-1)

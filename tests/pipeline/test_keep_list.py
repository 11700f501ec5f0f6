"""A keep list is read for the tokens that it was made for, and for no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import read_meta
from pipeline.errors import ConfigError
from pipeline.keep_list import keep_list_digest, read_keep_list, to_parquet
from tests.pipeline.datasets import make_token_dataset


def test_it_names_its_dataset(tmp_path: Path) -> None:
    meta = read_meta(make_token_dataset(tmp_path / "tokens", [[3, 4]]))
    path = tmp_path / "keep.parquet"
    path.write_bytes(to_parquet(pa.table({"key": ["00001"]}), meta))
    assert read_keep_list(path, meta).to_pylist() == ["00001"]
    with pytest.raises(ConfigError, match=f"made for tokens of fingerprint {'f' * 32}; these have {'e' * 32}"):
        read_keep_list(path, replace(meta, fingerprint="e" * 32))
    with pytest.raises(ConfigError, match=f"of content {meta.content}; these have other"):
        read_keep_list(path, replace(meta, totals={"content": "other"}))
    before = keep_list_digest(path)
    path.write_bytes(to_parquet(pa.table({"key": ["00000"]}), meta))
    assert keep_list_digest(path) != before


def test_what_is_no_keep_list(tmp_path: Path) -> None:
    meta = read_meta(make_token_dataset(tmp_path / "tokens", [[3]]))
    path = tmp_path / "keep.parquet"
    with pytest.raises(ConfigError, match="no such file"):
        read_keep_list(path, meta)
    path.write_text("key\n00000\n")
    with pytest.raises(ConfigError, match="is none that tokenreel wrote"):
        read_keep_list(path, meta)
    pq.write_table(pa.table({"key": ["00000"]}), path)
    with pytest.raises(ConfigError, match="is none that tokenreel wrote"):
        read_keep_list(path, meta)

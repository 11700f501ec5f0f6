"""A list of samples to use, as a file: Parquet with a column `key`, and in its metadata the dataset that it was made for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa

from pipeline import shards
from pipeline.dataset import DatasetMeta
from pipeline.errors import ConfigError
from pipeline.parquet import parse_parquet

_MADE_FOR = b"tokenreel.made_for"


def to_parquet(table: pa.Table, meta: DatasetMeta) -> bytes:
    """A file of `table` that names the dataset `meta` that it is about."""
    made_for = json.dumps({"fingerprint": meta.fingerprint, "content": meta.content})
    return shards.to_parquet(table.replace_schema_metadata({_MADE_FOR: made_for}))


def read_keep_list(path: Path, meta: DatasetMeta) -> pa.ChunkedArray:
    """The keys of a keep list that was made for the dataset `meta`.

    Raises:
        ConfigError: no such file, no keep list, or one that was made for another dataset or for what this one held before
            rejects were tried again.
    """
    try:
        table = parse_parquet(path.read_bytes())
        made_for = json.loads((table.schema.metadata or {})[_MADE_FOR])
        keys = table["key"]
    except FileNotFoundError:
        raise ConfigError(f"keep list {path}: no such file; `tokenreel dedup` writes one") from None
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ConfigError(f"keep list {path} is none that tokenreel wrote: {' '.join(str(error).split())}") from error
    for name, here in (("fingerprint", meta.fingerprint), ("content", meta.content)):
        if made_for[name] != here:
            raise ConfigError(
                f"keep list {path} was made for tokens of {name} {made_for[name]}; these have {here}. "
                "Run `tokenreel dedup` on these"
            )
    return keys


def keep_list_digest(path: Path) -> str:
    """SHA-256 of the file, 32 hex digits: two runs with equal ones used the same samples."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]

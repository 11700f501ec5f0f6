"""An embedding dataset in memory: the vectors as one array, and what its index says of each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.dataset import Place, read_index, read_meta
from pipeline.embedding import vectors_of
from pipeline.storage import Store


def load_embeddings(place: Place, columns: Sequence[str] | None = None) -> tuple[np.ndarray, pa.Table]:
    """The vectors float32 (n d) of a dataset that `tokenreel embed` wrote, and n rows of its index in the same order.

    Args:
        columns: of the index; by default all. `shard` is always there.

    Raises:
        ConfigError: no finished embedding dataset there.
    """
    store = Store.at(place)
    meta = read_meta(store, kind="embeddings", complete=True)
    table = read_index(store, None if columns is None else [*columns, "embedding"])
    if not len(table):
        return np.empty((0, meta.extra["model"]["width"]), np.float32), table
    return vectors_of(table), table.drop_columns(["embedding"])

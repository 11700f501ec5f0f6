"""What the files of a dataset say, checked before it is believed: a dataset may come from anybody.

Nothing here follows a name that a file holds, and nothing allocates what a file only claims.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import BadVideo, DatasetError
from pipeline.schema import SPLITS
from pipeline.storage import Entry, Store

MAX_JSON_BYTES = 64 * 2**20
MAX_TABLE_BYTES = 2**30
"""Of an index or a file of rejects, which are read whole."""
MAX_SHARDS = 10**9
_MIN_ROW_BYTES = 4
"""A row of an index, with its own key and hash, takes more than this on disk however well it is packed."""
_MAX_COUNT = 2**62
_MAX_TEXT = 4096
_MAX_SIDE = 2**16
_NOT_A_FILE = (errno.EINVAL, errno.EISDIR, errno.ENXIO, errno.ELOOP)
_NEVER_NULL = frozenset(
    ("key", "video_id", "source", "start_s", "end_s", "offset", "size", "sha256", "split", "num_frames")
)


def open_member(store: Store, name: str, max_bytes: int | None = None) -> IO[bytes]:
    """`store.open` for a file of a dataset.

    Raises:
        FileNotFoundError, TransientIO, PermissionError: as `store.open` does.
        DatasetError: a link out of the dataset or to itself, a folder, a named pipe, a device, or more than `max_bytes`.
    """
    if store.is_local and store.path(name).is_symlink() and (target := link_out(store, name)):
        raise DatasetError(f"{store.where(name)}: a link out of the dataset, to {target}; it is not followed")
    try:
        return store.open(name, max_bytes=max_bytes)
    except BadVideo as error:
        size = entry.size_bytes if (entry := store.stat(name)) else None
        raise DatasetError(f"{store.where(name)}: {size} bytes; at most {max_bytes} are read") from error
    except OSError as error:
        if error.errno in _NOT_A_FILE:
            raise DatasetError(f"{store.where(name)}: {error.strerror}; it must be a regular file") from error
        raise


def link_out(store: Store, name: str) -> str:
    """Where the link `name` of a local dataset leads, "" within the dataset. A link to itself leads nowhere else."""
    root, target = os.path.realpath(store.path()), os.path.realpath(store.path(name))
    return "" if os.path.commonpath((root, target)) == root else target


def read_member(store: Store, name: str, max_bytes: int) -> bytes:
    """All of a file of at most `max_bytes`; errors as those of `open_member`."""
    with open_member(store, name, max_bytes) as file:
        return file.read()


def list_members(store: Store, folder: str) -> list[Entry]:
    """`store.list`, and DatasetError where the folder is a link to itself."""
    try:
        return store.list(folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DatasetError(f"{store.where(folder)}: {error.strerror}; it must be a folder") from error
        raise


def parse_object(data: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DatasetError: not UTF-8, not JSON, too deep, or no object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(value, dict):
        raise DatasetError(f"{where} cannot be read: it holds no JSON object")
    return value


def require_fields(data: Mapping[str, Any], fields: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Raise `DatasetError` naming the first of `fields` that `data` lacks or has with another type.

    Args:
        fields: name to `str`, `int` (a count, from 0 on), `float`, `dict`, or a tuple of the values allowed.
    """
    for name, kind in fields.items():
        value = data.get(name)
        if kind is int:
            is_good, wanted = _is_count(value), f"a whole number in [0, {_MAX_COUNT}]"
        elif kind is float:
            is_good, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        elif kind is str:
            is_good = isinstance(value, str) and len(value) <= _MAX_TEXT
            wanted = f"a text of at most {_MAX_TEXT} characters"
        elif kind is dict:
            is_good, wanted = isinstance(value, dict), "an object"
        else:
            is_good, wanted = isinstance(value, str) and value in kind, f"one of {', '.join(map(repr, kind))}"
        if not is_good:
            raise DatasetError(f"{where} cannot be read: {prefix}{name} = {_show(value)}: must be {wanted}")


def require_counts(data: Mapping[str, Any], where: str, prefix: str) -> None:
    """Raise `DatasetError` unless every value of `data` is a count."""
    require_fields(data, dict.fromkeys(data, int), where, prefix)


def check_num_rows(num_rows: int, size_bytes: int, where: str) -> None:
    """Raise `DatasetError` where a Parquet file claims more rows than its bytes can hold."""
    if num_rows * _MIN_ROW_BYTES > size_bytes:
        raise DatasetError(f"{where} cannot be read: it claims {num_rows} rows in {size_bytes} bytes")


def check_columns(table: pa.Table, schema: pa.Schema, where: str) -> None:
    """Raise `DatasetError` where a column that `schema` names has another type, or lacks a value that every row has."""
    for field in table.schema:
        if field.name not in schema.names:
            continue
        if field.type != (wanted := schema.field(field.name).type):
            raise DatasetError(f"{where} cannot be read: column {field.name} is of {field.type}; must be {wanted}")
        if field.name in _NEVER_NULL and table[field.name].null_count:
            raise DatasetError(f"{where} cannot be read: column {field.name} lacks values")


def check_places(table: pa.Table, tars: Mapping[str, int], where: str) -> None:
    """Raise `DatasetError` where a row of an index points out of its tar. Only columns that are there are looked at.

    Args:
        tars: bytes of the tar of each split; of all of them under "".
    """
    rows = {
        name: table[name].to_numpy()
        for name in ("offset", "size", "json_offset", "json_size")
        if name in table.column_names
    }
    sides = {name: table[name].to_numpy() for name in ("num_frames", "height", "width") if name in table.column_names}
    if not len(table):
        return
    splits = table["split"]
    known = pc.is_in(splits, pa.array([split for split in SPLITS if not tars or "" in tars or split in tars]))
    if not pc.all(known).as_py():
        odd = splits.filter(pc.invert(known))[0].as_py()
        raise DatasetError(
            f"{where} cannot be read: column split: {_show(odd)}; its tars are of {', '.join(tars) or 'none'}"
        )
    if "" in tars:
        ends = np.full(len(table), tars[""], np.int64)
    else:
        encoded = splits.combine_chunks().dictionary_encode()
        ends = np.array([tars[split] for split in encoded.dictionary.to_pylist()], np.int64)[encoded.indices.to_numpy()]
    for name, values in {**rows, **sides}.items():
        highest = _MAX_SIDE if name in ("height", "width") else _MAX_COUNT
        if len(odd := np.flatnonzero((values < 0) | (values > highest))):
            raise DatasetError(f"{where} cannot be read: column {name}: {values[odd[0]]}; must be in [0, {highest}]")
    for offset, size in (("offset", "size"), ("json_offset", "json_size")):
        if offset in rows:
            length = rows.get(size, np.zeros(len(table), np.int64))
            if len(odd := np.flatnonzero((rows[offset] > ends) | (length > ends - rows[offset]))):
                raise DatasetError(
                    f"{where} cannot be read: column {offset}: [{rows[offset][odd[0]]}, + {length[odd[0]]}) leads out of a tar of "
                    f"{ends[odd[0]]} bytes"
                )


def check_windows(table: pa.Table, tars: Mapping[str, int], where: str) -> None:
    """`check_places` for tokens without `size`: raise `DatasetError` where the frames of a row do not fit into its tar."""
    shapes = [table[name].to_numpy().astype(np.float64) for name in ("num_frames", "height", "width")]
    ends = table["offset"].to_numpy() + 2 * np.prod(shapes, axis=0)
    highest = np.float64(max(tars.values(), default=0))
    if len(odd := np.flatnonzero(ends > highest)):
        raise DatasetError(
            f"{where} cannot be read: column num_frames: {int(shapes[0][odd[0]])} frames of {int(shapes[1][odd[0]])} x "
            f"{int(shapes[2][odd[0]])} tokens lead out of a tar of {int(highest)} bytes"
        )


def check_codes(codes: np.ndarray, codebook_size: int, what: str) -> np.ndarray:
    """`codes`, or `DatasetError` where one is not in the codebook."""
    if (highest := int(codes.max(initial=0))) >= codebook_size:
        raise DatasetError(f"{what} holds code {highest}; its codebook has {codebook_size}")
    return codes


def parse_codes(data: bytes, row: Mapping[str, Any], codebook_size: int, where: str) -> np.ndarray:
    """(t h w) uint16: the payload of an index row of tokens.

    Raises:
        DatasetError: it is not of the shape that its row says, or holds a code beyond the codebook.
    """
    shape: Sequence[int] = [row["num_frames"], row["height"], row["width"]]
    if len(data) != 2 * shape[0] * shape[1] * shape[2]:
        raise DatasetError(
            f"{where}: sample {row['key']} has {len(data)} bytes; its index says {shape} tokens of 2 bytes"
        )
    return check_codes(np.frombuffer(data, "<u2").reshape(shape), codebook_size, f"{where}: sample {row['key']}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT


def _show(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict | list) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."

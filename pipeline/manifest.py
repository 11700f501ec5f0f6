"""A manifest as Arrow tables, one row each for what it names.

Rows are counted from 1, without the header and blank lines. A row that cannot be an input stays a row, with its class
and reason, so that the books account for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.manifest_formats import FORMATS, Record, to_plain
from pipeline.schema import PLAN_SCHEMA, Split
from pipeline.storage import Store

ROWS = pa.schema([("row", pa.int64()), *list(PLAN_SCHEMA)[1:], ("reject_class", pa.string()), ("reason", pa.string())])
"""A row on its way into the plan; `reject_class` and `reason` are null while it is good."""
MAX_PATH_BYTES = 4096
_TEXTS = ("caption", "label", "split")
_NUMBERS = ("start_s", "end_s", "size_bytes")
_KNOWN = frozenset(("video", *_TEXTS, *_NUMBERS))
_SECONDS = r"^\d{1,15}(\.\d{1,30})?([eE][+-]?\d{1,2})?$"
_BYTES = r"^\d{1,18}$"


def read_manifest(store: Store, name: str) -> Iterator[pa.Table]:
    """The rows of a manifest as tables of schema `ROWS`, in its order, with `path` as it is written.

    Texts stay texts: a label "007" never becomes a number. Columns that are not known are carried as a JSON object
    with sorted keys in `extra`. Empty values count as absent.

    Args:
        name: a .txt (a path a line), .csv (with a header), .jsonl (an object a line) or .parquet file in `store`.

    Raises:
        ConfigError: the file cannot be read at all, or has no column `video`.
    """
    shown = f"manifest {name} in {store.url}"
    num_rows = 0
    try:
        with store.open(name) as file:
            for records in FORMATS[PurePosixPath(name).suffix.lower()](file, shown):
                yield _to_rows(records, num_rows + 1)
                num_rows += len(records)
    except (OSError, pa.ArrowException, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{shown} cannot be read: {error}") from error


def _to_rows(records: list[Record], first_row: int) -> pa.Table:
    reasons: list[str | None] = [None if isinstance(record, dict) else record for record in records]
    dicts = [record if isinstance(record, dict) else {} for record in records]
    found = frozenset().union(*(record.keys() for record in dicts))
    texts = {
        name: _texts([r.get(name) for r in dicts] if name in found else [None] * len(dicts), is_number=name in _NUMBERS)
        for name in _KNOWN
    }
    for index, one in enumerate(dicts):
        if type(one.get("video")) is not str and one.get("video") is not None:
            reasons[index] = "names a video that is not text"
    reason = pa.array(reasons, pa.string())
    values: dict[str, pa.Array] = {}
    for name, pattern in zip(_NUMBERS, (_SECONDS, _SECONDS, _BYTES), strict=True):
        values[name], reason = _numbers(texts[name], name, pattern, reason)
    start_s, end_s, video, split = values["start_s"], values["end_s"], texts["video"], texts["split"]
    for bad, why in (
        (pc.is_null(video), "names no video"),
        (pc.greater(pc.binary_length(video), MAX_PATH_BYTES), f"names a video of more than {MAX_PATH_BYTES} bytes"),
        (pc.invert(pc.is_in(split, pa.array([None, *get_args(Split)]))), "has another split than train, val or test"),
        (pc.greater_equal(start_s, end_s), "has a start_s that is not before its end_s"),
    ):
        reason = pc.coalesce(reason, pc.if_else(pc.fill_null(bad, False), why, None))
    row = pa.array(range(first_row, first_row + len(records)), pa.int64())
    is_bad = pc.is_valid(reason)
    null = pa.nulls(len(records))
    columns = {
        "row": row,
        "path": pc.utf8_slice_codeunits(pc.fill_null(video, ""), 0, MAX_PATH_BYTES),
        **values,
        **{name: texts[name] for name in _TEXTS},
        "extra": pa.array([_extra(record) for record in dicts] if found - _KNOWN else null, pa.string()),
        "mtime_ns": null.cast(pa.int64()),
        "reject_class": pc.if_else(is_bad, "bad-row", None),
        "reason": pc.binary_join_element_wise("row ", row.cast(pa.string()), " ", reason, ""),
    }
    return pa.table({name: columns[name] for name in ROWS.names}).cast(ROWS)


def _numbers(texts: pa.Array, name: str, pattern: str, reason: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The column as numbers, null where it is none; and `reason` with those rows named."""
    trimmed = pc.utf8_trim_whitespace(texts)
    good = pc.match_substring_regex(trimmed, pattern)
    why = pc.binary_join_element_wise(
        f"has {name} = ", pc.utf8_slice_codeunits(texts, 0, 40), "; it must be a number of 0 or more", ""
    )
    numbers = pc.cast(pc.if_else(good, trimmed, None), ROWS.field(name).type)
    return numbers, pc.coalesce(reason, pc.if_else(pc.fill_null(pc.invert(good), False), why, None))


def _texts(values: list[Any], *, is_number: bool) -> pa.Array:
    try:
        texts = pa.array(values, pa.string())
    except (pa.ArrowTypeError, pa.ArrowInvalid):  # not all of them are texts
        texts = pa.array([_text(value, is_number) for value in values], pa.string())
    return pc.if_else(pc.equal(texts, ""), None, texts).cast(pa.string())


def _text(value: Any, is_number: bool) -> str | None:
    if isinstance(value, str | None):
        return value
    if is_number and isinstance(value, float):
        # "nan" and "inf" fail as numbers later. Whole ones are written as such: a table with gaps made them floats.
        return str(int(value)) if value.is_integer() else repr(value)
    if type(value) is int:
        return str(value)
    plain = to_plain(value)
    return plain if isinstance(plain, str | None) else _json(plain)


def _extra(record: dict[str, Any]) -> str | None:
    others = {name: value for name, value in record.items() if name not in _KNOWN and value not in (None, "")}
    return _json(others) if others else None


def _json(value: Any) -> str:
    return json.dumps(to_plain(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))

"""A manifest as Arrow tables, one row each for what it names.

Rows are counted from 1, without the header and blank lines. A row that cannot be an input stays a row, with its class
and reason, so that the books account for it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.manifest_formats import FORMATS, KNOWN, Record, plain_name, to_plain
from pipeline.schema import PLAN_SCHEMA, Split
from pipeline.storage import Store

log = logging.getLogger(__name__)

ROWS = pa.schema([("row", pa.int64()), *list(PLAN_SCHEMA)[1:], ("reject_class", pa.string()), ("reason", pa.string())])
"""A row on its way into the plan; `reject_class` and `reason` are null while it is good."""
MAX_PATH_BYTES = 4096
MAX_TIME_S = 1e9
"""Of a span, in seconds: keys name spans by milliseconds, in few digits."""
MAX_SIZE_BYTES = 2**43
"""Of a file: so that the sizes of a corpus can be added up in 64 bits."""
_CAPTIONS = "captions"
_SAMPLED_LABELS = 1000
_ALLOWED = {"caption": "a list of texts", "label": "a number"}
_TEXTS = ("caption", "label", "split")
_NUMBERS = ("start_s", "end_s", "size_bytes")
_SECONDS = r"^(\d{1,15}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,2})?$"
_BYTES = r"^\d{1,18}$"


def read_manifest(store: Store, name: str) -> Iterator[pa.Table]:
    """The rows of a manifest as tables of schema `ROWS`, in its order, with `path` as it is written.

    Texts stay texts: a label "007" never becomes a number. Columns that are not known are carried as a JSON object
    with sorted keys in `extra`. Empty values count as absent. Of several captions the first stands in `caption`, and all of them
    in `extra` as `captions`.

    Args:
        name: a .txt (a path a line), .csv (with a header), .jsonl (an object a line) or .parquet file in `store`.

    Raises:
        ConfigError: the file cannot be read at all, has no column `video`, or a quote in it is not closed.
    """
    shown = f"manifest {name} in {store.url}"
    num_rows, has_warned = 0, False
    try:
        with store.open(name) as file:
            for records in FORMATS[PurePosixPath(name).suffix.lower()](file, shown):
                table = _to_rows(records, num_rows + 1)
                sample = table["label"].slice(0, _SAMPLED_LABELS)
                if not has_warned and pc.any(pc.match_substring_regex(sample, r"^\d+\.0$")).as_py():
                    log.warning(
                        f"{shown}: texts such as '1.0' are labels as they are; a table with gaps may have made them of '1'"
                    )
                    has_warned = True
                yield table
                num_rows += len(records)
    except (OSError, pa.ArrowException, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{shown} cannot be read: {error}") from error


def _to_rows(records: list[Record], first_row: int) -> pa.Table:
    reasons: list[str | None] = [None if isinstance(record, dict) else record for record in records]
    dicts = [record if isinstance(record, dict) else {} for record in records]
    found = frozenset().union(*(record.keys() for record in dicts))
    if any(plain_name(name) != name for name in found):  # the other formats name their columns once, and plainly
        dicts = [{plain_name(name): value for name, value in record.items()} for record in dicts]
        found = frozenset().union(*(record.keys() for record in dicts))
    texts: dict[str, pa.Array] = {}
    for name in sorted(KNOWN):
        cells = [record.get(name) if name in found else None for record in dicts]
        try:
            column = pa.array(cells, pa.string())
        except (pa.ArrowTypeError, pa.ArrowInvalid):  # not all of them are texts
            column = pa.array([_text(name, dicts, index, reasons) for index in range(len(dicts))], pa.string())
        if name in ("label", "split"):
            column = pc.ascii_trim_whitespace(column)
        texts[name] = pc.if_else(pc.equal(column, ""), None, column).cast(pa.string())
    has_extra = bool(found - KNOWN) or any(_CAPTIONS in record for record in dicts)
    for index, one in enumerate(dicts):
        if type(one.get("video")) is not str and one.get("video") is not None:
            reasons[index] = "names a video that is not text"
    reason = pa.array(reasons, pa.string())
    values: dict[str, pa.Array] = {}
    for name, pattern in zip(_NUMBERS, (_SECONDS, _SECONDS, _BYTES), strict=True):
        values[name], reason = _numbers(texts[name], name, pattern, reason)
    start_s, end_s, video, split = values["start_s"], values["end_s"], texts["video"], texts["split"]
    has_nul = pa.array([False] * len(records))
    for column in (video, texts["caption"], texts["label"]):
        data = column.buffers()[2]
        if data is not None and b"\0" in data.to_pybytes():  # a tenth of the time that looking at each text takes
            has_nul = pc.or_(has_nul, pc.fill_null(pc.match_substring(column, "\0"), False))
    for bad, why in (
        (pc.is_null(video), "names no video"),
        (has_nul, "has a NUL character in its video, caption or label; remove it"),
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
        "extra": pa.array([_extra(record) for record in dicts] if has_extra else null, pa.string()),
        "mtime_ns": null.cast(pa.int64()),
        "reject_class": pc.if_else(is_bad, "bad-row", None),
        "reason": pc.binary_join_element_wise("row ", row.cast(pa.string()), " ", reason, ""),
    }
    return pa.table({name: columns[name] for name in ROWS.names}).cast(ROWS)


def _numbers(texts: pa.Array, name: str, pattern: str, reason: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The column as numbers, null where it is none or too large; and `reason` with those rows named."""
    trimmed = pc.utf8_trim_whitespace(texts)
    good = pc.match_substring_regex(trimmed, pattern)
    most: float = MAX_SIZE_BYTES if name == "size_bytes" else MAX_TIME_S
    why = pc.binary_join_element_wise(
        f"has {name} = ", pc.utf8_slice_codeunits(texts, 0, 40), f"; it must be a number from 0 to {most:.0f}", ""
    )
    numbers = pc.cast(pc.if_else(good, trimmed, None), ROWS.field(name).type)
    good = pc.and_(good, pc.fill_null(pc.less_equal(numbers, most), True))
    return pc.if_else(good, numbers, None), pc.coalesce(
        reason, pc.if_else(pc.fill_null(pc.invert(good), False), why, None)
    )


def _text(name: str, records: list[dict[str, Any]], index: int, reasons: list[str | None]) -> str | None:
    """The value of column `name` as the text that a person would write, or None, with its row's reason where it is none.

    A whole number is written as one, as gaps in a column of integers make them floats: 1.0 is "1". Several captions also go to the
    record's `captions`.
    """
    value = records[index].get(name)
    if isinstance(value, float | Decimal):
        if name in ("caption", "label") and value != value:  # a gap
            return None
        is_whole = value == value and abs(float(value)) < 2**53 and value == int(value)
        return str(int(value)) if is_whole else str(value)
    if isinstance(value, list | tuple | dict) and name in ("caption", "label"):
        texts: list[Any] = [value] if isinstance(value, dict) else [one for one in value if one not in (None, "")]
        if not all(isinstance(one, str) for one in texts) or (name == "label" and len(texts) > 1):
            reasons[index] = f"has a {name} that is neither a text nor {_ALLOWED[name]}"
        elif len(texts) > 1 and _CAPTIONS in records[index]:
            reasons[index] = f"has several captions, and a column {_CAPTIONS!r} besides; rename that"
        elif len(texts) > 1:
            records[index] = {**records[index], _CAPTIONS: texts}
        return texts[0] if texts and reasons[index] is None else None
    if type(value) is int:
        return str(value)
    plain = to_plain(value)
    return plain if isinstance(plain, str | None) else _json(plain)


def _extra(record: dict[str, Any]) -> str | None:
    others = {name: value for name, value in record.items() if name not in KNOWN and value not in (None, "")}
    return _json(others) if others else None


def _json(value: Any) -> str:
    return json.dumps(to_plain(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))

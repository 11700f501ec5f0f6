"""The four formats of a manifest as records. Files that strangers wrote: every size has a bound."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import ConfigError

MAX_ROW_BYTES = 2**20
MAX_COLUMNS = 1000
_MAX_DEPTH = 64
_CHUNK_ROWS = 2**16
_CHUNK_BYTES = 2**24

Record = dict[str, Any] | str
"""A row as {column: value}, or the reason why there is none."""


class _Lines:
    """The lines of a file, decoded, with their line break; `problem` says what is wrong with those since `take`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._problem = ""
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(_split_lines(self._file)):
            self.num_bytes += len(line)
            if len(line) > MAX_ROW_BYTES:
                self._problem, line = f"is longer than {MAX_ROW_BYTES} bytes", b"?"
            try:
                text = line.decode()
            except UnicodeDecodeError:
                self._problem, text = "is not UTF-8", line.decode(errors="replace")
            yield (text.removeprefix("\ufeff") if number == 0 else text) + "\n"

    def take(self) -> str:
        problem, self._problem = self._problem, ""
        return problem


def _split_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines without their break; what is over-long comes cut, but still over-long."""
    tail = b""
    while block := file.read(MAX_ROW_BYTES):
        *lines, tail = (tail + block).split(b"\n")
        yield from lines
        tail = tail[: MAX_ROW_BYTES + 1]
    if tail:
        yield tail


def _chunked(records: Iterable[Record], lines: _Lines) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    for record in records:
        chunk.append(record)
        if len(chunk) >= _CHUNK_ROWS or lines.num_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, lines.num_bytes = [], 0
    if chunk:
        yield chunk


def _read_txt(file: IO[bytes], shown: str) -> Iterator[list[Record]]:
    lines = _Lines(file)
    texts = (line[:-1].removesuffix("\r") for line in lines)
    return _chunked((lines.take() or {"video": text} for text in texts if text), lines)


def _read_csv(file: IO[bytes], shown: str) -> Iterator[list[Record]]:
    lines = _Lines(file)
    reader = csv.reader(lines)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise ConfigError(f"{shown} cannot be read: its header: {error}") from error
    if problem := lines.take():
        raise ConfigError(f"{shown} cannot be read: its header {problem}")
    _check_columns(shown, header)
    return _chunked(_csv_records(reader, lines, header), lines)


def _csv_records(reader: Any, lines: _Lines, header: list[str]) -> Iterator[Record]:
    width = len(header)
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.take()
            yield f"is no CSV: {error}"
            continue
        if problem := lines.take():
            yield problem
        elif len(values) == width:
            yield dict(zip(header, values, strict=True))
        elif values:
            yield f"has {len(values)} values; the header names {width} columns"


def _read_jsonl(file: IO[bytes], shown: str) -> Iterator[list[Record]]:
    lines = _Lines(file)
    return _chunked((lines.take() or _parse(line) for line in lines if not line.isspace()), lines)


def _parse(line: str) -> Record:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
        if "\\u" in line:
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate cannot be stored
        if line.count("[") + line.count("{") > _MAX_DEPTH:
            to_plain(record)
    except (ValueError, RecursionError) as error:
        return f"is no JSON: {error}"
    return record if isinstance(record, dict) else "is no JSON object"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _read_parquet(file: IO[bytes], shown: str) -> Iterator[list[Record]]:
    schema = pq.read_schema(file)
    _check_columns(shown, schema.names)
    kind = schema.field("video").type
    if not _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
        raise ConfigError(f"{shown}: its column 'video' is {kind}; it must be text")
    texts = [field.name for field in schema if _is_text(field.type) or pa.types.is_dictionary(field.type)]
    is_plain = all(pa.types.is_primitive(field.type) or field.name in texts for field in schema)
    # Read as dictionaries: a few bytes on disk may stand for a long text in each of a million rows.
    parquet = pq.ParquetFile(file, read_dictionary=texts)
    for batch in parquet.iter_batches(batch_size=2**13 if is_plain else 2**8):
        sizes = np.zeros(len(batch), np.int64)
        for column in batch.columns:
            if isinstance(column, pa.DictionaryArray):  # `take` also checks that the dictionary has what is asked for
                lengths = pc.binary_length(column.dictionary).take(column.indices)
                sizes += pc.fill_null(lengths, 0).to_numpy()
        if sizes.max(initial=0) <= MAX_ROW_BYTES and sizes.sum() <= _CHUNK_BYTES:
            yield _to_records(batch)
        else:
            for index, size in enumerate(sizes.tolist()):
                is_long = size > MAX_ROW_BYTES
                yield [f"is longer than {MAX_ROW_BYTES} bytes"] if is_long else _to_records(batch.slice(index, 1))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _to_records(batch: pa.RecordBatch) -> list[Record]:
    columns = [c.dictionary_decode() if isinstance(c, pa.DictionaryArray) else c for c in batch.columns]
    try:
        values = zip(*(column.to_pylist() for column in columns), strict=True)
        return [dict(zip(batch.schema.names, row, strict=True)) for row in values]
    except UnicodeDecodeError:
        if len(batch) == 1:
            return ["is not UTF-8"]
        return [record for index in range(len(batch)) for record in _to_records(batch.slice(index, 1))]


def _check_columns(shown: str, names: list[str]) -> None:
    if len(names) > MAX_COLUMNS:
        raise ConfigError(f"{shown} has {len(names)} columns; at most {MAX_COLUMNS} are allowed")
    if "video" not in names:
        raise ConfigError(f"{shown} has columns {names}; a column 'video' is needed")
    if len(set(names)) < len(names):
        raise ConfigError(f"{shown} names a column twice: {names}")


FORMATS: dict[str, Callable[[IO[bytes], str], Iterator[list[Record]]]] = {
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""By the suffix of the file: (file, its name in messages) -> chunks of records, in order, of bounded size."""


def to_plain(value: Any, depth: int = 0) -> Any:
    """`value` as plain JSON: other types as text, numbers that JSON has no word for as null.

    Raises:
        ValueError: it is nested more than 64 deep.
    """
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict):
        return {str(name): to_plain(one, depth + 1) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(one, depth + 1) for one in value]
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)

"""The four formats of a manifest as records. Files that strangers wrote: every size has a bound."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import ConfigError

log = logging.getLogger(__name__)

MAX_ROW_BYTES = 2**20
MAX_COLUMNS = 1000
_MAX_DEPTH = 64
_CHUNK_ROWS = 2**16
_CHUNK_BYTES = 2**24

KNOWN = frozenset(("video", "caption", "label", "split", "start_s", "end_s", "size_bytes"))
"""Columns that mean something; all others are carried along."""
_DELIMITERS = ",;\t|"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

Record = dict[str, Any] | str
"""A row as {column: value}, or the reason why there is none."""


class _Lines:
    """The lines of a file, decoded, with their line break; `take` says what is wrong with those since it was last called.

    Raises:
        ConfigError: the file is UTF-16.
    """

    def __init__(self, file: IO[bytes], shown: str) -> None:
        self._file = file
        if file.read(2) in _UTF16:
            raise ConfigError(
                f"{shown} is UTF-16; save it as UTF-8, for example by iconv -f UTF-16 -t UTF-8 (in Excel: CSV UTF-8)"
            )
        file.seek(0)
        self.problem = ""
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(_split_lines(self._file)):
            self.num_bytes += len(line)
            if len(line) > MAX_ROW_BYTES:
                self.problem, line = f"is longer than {MAX_ROW_BYTES} bytes", b"?"
            try:
                text = line.decode()
            except UnicodeDecodeError:
                self.problem, text = "is not UTF-8; save the file as UTF-8", line.decode(errors="replace")
            yield (text.removeprefix("\ufeff") if number == 0 else text) + "\n"

    def take(self) -> str:
        problem, self.problem = self.problem, ""
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
    lines = _Lines(file, shown)
    texts = (line[:-1].removesuffix("\r") for line in lines)
    return _chunked((lines.take() or {"video": text} for text in texts if text and not text.isspace()), lines)


def _read_csv(file: IO[bytes], shown: str) -> Iterator[list[Record]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _Lines(file, shown)
    texts = iter(lines)
    first = next(texts, "")
    if problem := lines.take():
        raise ConfigError(f"{shown} cannot be read: its header {problem}")
    delimiter, header = _read_header(first, shown)
    # Strict: a quote that stays open, or that closes in the middle of a value, is an error, and no part of the next value.
    reader = csv.reader(texts, delimiter=delimiter, strict=True, skipinitialspace=True)
    return _chunked(_csv_records(reader, lines, header, delimiter, shown), lines)


def _read_header(line: str, shown: str) -> tuple[str, list[str]]:
    """The delimiter by which `line` names a column `video`, and its columns."""
    failed: csv.Error | None = None
    headers: dict[str, list[str]] = {}
    for delimiter in _DELIMITERS:
        try:
            names = next(csv.reader([line], delimiter=delimiter, strict=True, skipinitialspace=True), [])
        except csv.Error as error:
            failed = failed or error
            continue
        headers[delimiter] = [plain_name(name) for name in names]
        if "video" in headers[delimiter]:
            _check_columns(shown, headers[delimiter])
            return delimiter, headers[delimiter]
    if not headers:
        raise ConfigError(f"{shown} cannot be read: its header: {failed}; lines must end in LF or CRLF") from failed
    _check_columns(shown, max(headers.values(), key=len))
    raise AssertionError("a header without a column `video` passed")


def _csv_records(reader: Any, lines: _Lines, header: list[str], delimiter: str, shown: str) -> Iterator[Record]:
    width, num_lines, num_broken = len(header), 0, 0
    is_done = False
    while not is_done:
        error: csv.Error | None = None
        try:
            for values in reader:
                num_lines += 1
                if reader.line_num == num_lines and len(values) == width and not lines.problem:
                    yield dict(zip(header, values, strict=True))
                    continue
                first, num_lines, problem = num_lines + 1, reader.line_num, lines.take()  # the header is line 1
                if num_lines >= first:
                    num_broken += 1
                    if len(values) != width or _holds_a_row(values, header, delimiter):
                        raise _open_quote(shown, first)
                if problem:
                    yield problem
                elif len(values) == width:
                    yield dict(zip(header, values, strict=True))
                elif values not in ([], [""]):
                    yield f"has {len(values)} values; the header names {width} columns"
            is_done = True
        except csv.Error as caught:
            error = caught
        if error:
            first, num_lines, problem = num_lines + 2, reader.line_num, lines.take()
            if num_lines >= first or "end of data" in str(error):
                raise _open_quote(shown, first)
            if "expected after" in str(error):
                problem = problem or 'has a quote in the middle of a value; write "" for a quote within quotes'
            yield problem or f"is no CSV: {error}"
    if num_broken:
        log.warning(
            f"{shown}: {num_broken} rows have a line break within quotes; look whether a quote is missing there"
        )


def _holds_a_row(values: list[str], header: list[str], delimiter: str) -> bool:
    """Whether a line within a quoted value names a video like that of the row: the quote was to be closed before."""
    place = header.index("video")
    suffix = PurePosixPath(values[place].split("\n")[0]).suffix.lower()
    inner = [line.split(delimiter) for value in values for line in value.split("\n")[1:]]
    return bool(suffix) and any(
        len(parts) > place and PurePosixPath(parts[place].strip(' "')).suffix.lower() == suffix for parts in inner
    )


def _open_quote(shown: str, line: int) -> ConfigError:
    return ConfigError(
        f"{shown}: a quote that opens in line {line} is not closed where its value ends, so that rows would run into each other; "
        'close it, and write "" for a quote within quotes'
    )


def _read_jsonl(file: IO[bytes], shown: str) -> Iterator[list[Record]]:
    lines = _Lines(file, shown)
    return _chunked((lines.take() or _parse(line) for line in lines if not line.isspace()), lines)


def _parse(line: str) -> Record:
    try:
        record = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_to_object)
        if "\\u" in line:
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate cannot be stored
        if line.count("[") + line.count("{") > _MAX_DEPTH:
            to_plain(record)
    except (ValueError, RecursionError) as error:
        return f"is no JSON: {error}"
    if not isinstance(record, dict):
        return "is no JSON object"
    if len({plain_name(name) for name in record}) < len(record):
        return f"names a column twice: {[name[:80] for name in record if plain_name(name) in KNOWN]}"
    return record


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("an object names a value twice")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _read_parquet(file: IO[bytes], shown: str) -> Iterator[list[Record]]:
    schema = pq.read_schema(file)
    names = [plain_name(name) for name in schema.names]
    _check_columns(shown, names)
    kind = schema.field(names.index("video")).type
    if not _is_text(kind):
        raise ConfigError(f"{shown}: its column 'video' is {kind}; it must be text")
    texts = [field.name for field in schema if _is_text(field.type)]
    is_plain = all(pa.types.is_primitive(field.type) or field.name in texts for field in schema)
    # Read as dictionaries: a few bytes on disk may stand for a long text in each of a million rows.
    parquet = pq.ParquetFile(file, read_dictionary=texts)
    for batch in parquet.iter_batches(batch_size=2**13 if is_plain else 2**8):
        sizes = np.zeros(len(batch), np.int64)
        for column in batch.columns:
            if isinstance(column, pa.DictionaryArray) and _is_text(
                column.type
            ):  # `take` also checks that the dictionary has what is asked for
                lengths = pc.binary_length(column.dictionary).take(column.indices)
                sizes += pc.fill_null(lengths, 0).to_numpy()
        if sizes.max(initial=0) <= MAX_ROW_BYTES and sizes.sum() <= _CHUNK_BYTES:
            yield _to_records(batch, names)
        else:
            for index, size in enumerate(sizes.tolist()):
                is_long = size > MAX_ROW_BYTES
                yield (
                    [f"is longer than {MAX_ROW_BYTES} bytes"] if is_long else _to_records(batch.slice(index, 1), names)
                )


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _to_records(batch: pa.RecordBatch, names: list[str]) -> list[Record]:
    columns = [c.dictionary_decode() if isinstance(c, pa.DictionaryArray) else c for c in batch.columns]
    try:
        values = zip(*(column.to_pylist() for column in columns), strict=True)
        return [dict(zip(names, row, strict=True)) for row in values]
    except UnicodeDecodeError:
        if len(batch) == 1:
            return ["is not UTF-8"]
        return [record for index in range(len(batch)) for record in _to_records(batch.slice(index, 1), names)]


def plain_name(name: str) -> str:
    """A column's name without blanks around it; one that means something is found in any case."""
    name = name.strip()
    return name.casefold() if name.casefold() in KNOWN else name


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

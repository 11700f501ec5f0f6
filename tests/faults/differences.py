"""In which files, and where in them, a run differs from the unbroken one: rows of a table, members of a tar, or bytes."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_SHOWN = 5
"""Rows, members or columns of one file."""


def describe_differences(ours: Mapping[str, bytes], whole: Mapping[str, bytes]) -> list[str]:
    """A line or more for each file that only one of them has, or that has other bytes; none where all are equal."""
    lines = []
    for name in sorted(ours.keys() | whole.keys()):
        left, right = ours.get(name), whole.get(name)
        if left is None or right is None:
            lines.append(f"{name}: {'missing' if left is None else 'not in the unbroken run'}")
        elif left != right:
            lines.append(
                f"{name}: {len(left)} bytes, {len(right)} in the unbroken run, first difference at byte {_first(left, right)}"
            )
            lines += [f"  {line}" for line in itertools.islice(_inside(name, left, right), _SHOWN)]
    return lines


def _first(left: bytes, right: bytes) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _inside(name: str, left: bytes, right: bytes) -> Iterator[str]:
    try:
        if name.endswith(".parquet"):
            yield from _rows(*(pq.read_table(io.BytesIO(data)).to_pylist() for data in (left, right)))
        elif name.endswith(".tar"):
            ours, theirs = (_members(data) for data in (left, right))
            for member in [*ours.keys(), *(theirs.keys() - ours.keys())]:
                if ours.get(member) != theirs.get(member):
                    sizes = [
                        "missing" if data is None else f"{len(data)} bytes"
                        for data in (ours.get(member), theirs.get(member))
                    ]
                    yield f"{member}: {sizes[0]}, in the unbroken run {sizes[1]}"
    except (pa.ArrowException, tarfile.TarError, OSError) as error:
        yield f"cannot be read: {error}"


def _rows(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[str]:
    for number, (left, right) in enumerate(itertools.zip_longest(ours, theirs)):
        if left is None or right is None:
            yield f"row {number}: {'missing' if left is None else 'not in the unbroken run'}: {left or right}"
        elif left != right:
            columns = {
                name: (left.get(name), right.get(name)) for name in left | right if left.get(name) != right.get(name)
            }
            yield f"row {number} ({left.get('key') or left.get('path')}), here and there: {columns}"


def _members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member))}

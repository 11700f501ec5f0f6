"""Manifests as rows: texts stay texts, and what strangers write costs a row, not the job."""

from __future__ import annotations

import datetime
import json
import os
import random
import resource
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from pipeline.manifest import ROWS, read_manifest
from pipeline.manifest_formats import MAX_COLUMNS, MAX_ROW_BYTES
from pipeline.storage import Store


def read(path: Path) -> list[dict[str, Any]]:
    tables = list(read_manifest(Store.at(path.parent), path.name))
    assert all(table.schema == ROWS for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def good(path: Path) -> list[str]:
    """Paths of the rows that can be an input, once each row was found to be counted in order."""
    rows = read(path)
    assert [row["row"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(row["reason"].startswith(f"row {row['row']} ") for row in rows if row["reject_class"])
    return [row["path"] for row in rows if row["reject_class"] is None]


def reasons(path: Path) -> list[str | None]:
    return [row["reason"] for row in read(path)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        quoted = [[str(row.get(n) or "").replace('"', '""') for n in names] for row in rows]
        path.write_text("".join(",".join(f'"{v}"' for v in values) + "\n" for values in [names, *quoted]))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
class TestAllFormats:
    def test_texts_stay_texts(self, tmp_path: Path, suffix: str) -> None:
        rows = [
            {
                "video": "0001",
                "label": "007",
                "caption": 'a "dog", running\nfast',
                "split": "val",
                "z": "08",
                "a": "1e5",
            },
            {"video": "b.mp4", "label": None, "caption": "true", "split": "train", "z": None, "a": "é"},
        ]
        found = read(write(tmp_path / f"m{suffix}", rows))
        assert [[row[n] for n in ("path", "label", "caption", "split")] for row in found] == [
            ["0001", "007", 'a "dog", running\nfast', "val"],
            ["b.mp4", None, "true", "train"],
        ]
        assert [row["extra"] for row in found] == ['{"a":"1e5","z":"08"}', '{"a":"é"}']

    def test_numbers(self, tmp_path: Path, suffix: str) -> None:
        rows = [{"video": "a", "start_s": 1.25, "end_s": 3.0, "size_bytes": 12}, {"video": "b", "start_s": 1e-05}]
        found = read(write(tmp_path / f"m{suffix}", rows))
        assert [(r["start_s"], r["end_s"], r["size_bytes"]) for r in found] == [(1.25, 3.0, 12), (1e-05, None, None)]

    def test_bad_rows(self, tmp_path: Path, suffix: str) -> None:
        rows = [
            {"video": "a", "split": "test", "start_s": "0", "end_s": "1", "size_bytes": "5"},
            {"video": None},
            {"video": "b", "split": "holdout"},
            {"video": "c", "start_s": "2", "end_s": "2"},
            {"video": "d", "start_s": "-1"},
            {"video": "e", "end_s": "nan"},
            {"video": "f", "end_s": "inf"},
            {"video": "g", "end_s": "1e999"},
            {"video": "h", "start_s": "1:30"},
            {"video": "i", "size_bytes": "-5"},
            {"video": "j" * 5000},
            {"video": "k"},
        ]
        found = reasons(write(tmp_path / f"m{suffix}", rows))
        assert found[0] is None and found[-1] is None
        assert found[1] == "row 2 names no video"
        assert found[2] == "row 3 has another split than train, val or test"
        assert found[3] == "row 4 has a start_s that is not before its end_s"
        for index, text in zip(
            range(4, 10),
            ("start_s = -1", "end_s = nan", "end_s = inf", "end_s = 1e999", "start_s = 1:30", "size_bytes = -5"),
            strict=True,
        ):
            assert found[index] is not None and found[index].startswith(
                f"row {index + 1} has {text}; it must be a number from 0 to "
            )
        assert found[10] == "row 11 names a video of more than 4096 bytes"

    def test_missing_column(self, tmp_path: Path, suffix: str) -> None:
        path = write(tmp_path / f"m{suffix}", [{"path": "a.mp4"}])
        if suffix == ".jsonl":  # every line has columns of its own
            assert reasons(path) == ["row 1 names no video"]
        else:
            with pytest.raises(ConfigError, match=r"path.*'video' is needed"):
                read(path)

    def test_cannot_be_read(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / f"m{suffix}").mkdir()
        with pytest.raises(ConfigError, match=rf"manifest m{suffix} in .* cannot be read"):
            read(tmp_path / f"m{suffix}")

    def test_more_rows_than_a_chunk(self, tmp_path: Path, suffix: str) -> None:
        paths = [f"{index}.mp4" for index in range(70_000)]
        assert good(write(tmp_path / f"m{suffix}", [{"video": path} for path in paths])) == paths


class TestTxt:
    def test_a_path_a_line(self, tmp_path: Path) -> None:
        (tmp_path / "m.txt").write_bytes(b"\xef\xbb\xbfa, b.mp4\r\n\n \xc3\xa9.mp4\nlast")
        assert good(tmp_path / "m.txt") == ["a, b.mp4", " é.mp4", "last"]

    def test_lines_that_are_none(self, tmp_path: Path) -> None:
        long = b"x" * (3 * MAX_ROW_BYTES)
        (tmp_path / "m.txt").write_bytes(b"a\n\xff\n" + long + b"\nb\n" + long)
        assert good(tmp_path / "m.txt") == ["a", "b"]
        found = reasons(tmp_path / "m.txt")
        assert (
            found[1] == "row 2 is not UTF-8; save the file as UTF-8"
            and found[2] == f"row 3 is longer than {MAX_ROW_BYTES} bytes"
        )

    def test_an_endless_line_takes_no_memory(self, tmp_path: Path) -> None:
        with (tmp_path / "m.txt").open("wb") as file:
            file.truncate(2**28)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert len(read(tmp_path / "m.txt")) == 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


class TestCsv:
    def test_hostile_rows(self, tmp_path: Path) -> None:
        lines = [
            b"video,caption",
            b"a,1",
            b"too,many,values",
            b"few",
            b"",
            b"b,nul\0",
            b"lone\rreturn,1",
            b"\xff,1",
            b'c,"' + b"x" * 200_000 + b'"',
            b"," * 2_000_000,
            b"d,2\r",
        ]
        (tmp_path / "m.csv").write_bytes(b"\n".join(lines))
        assert good(tmp_path / "m.csv") == ["a", "c", "d"]
        found = [reason for reason in reasons(tmp_path / "m.csv") if reason]
        expected = [
            "row 2 has 3 values; the header names 2 columns",
            "row 3 has 1 values",
            "row 4 has a NUL character in its video, caption or label",
            "row 5 is no CSV: new-line",
            "row 6 is not UTF-8",
            f"row 8 is longer than {MAX_ROW_BYTES} bytes",
        ]
        assert [reason[: len(start)] for reason, start in zip(found, expected, strict=True)] == expected

    @pytest.mark.parametrize(
        ("lines", "line"),
        [
            (
                ['a.mp4,"she said ""hi"",2', "b.mp4,a dog,3", 'c.mp4,"quoted end",5', "d.mp4,last,6"],
                2,
            ),  # one quote too few
            (
                ["a.mp4,first,1", 'b.mp4,"open quote,2', 'c.mp4,"third",3', "d.mp4,fourth,4"],
                3,
            ),  # closed by the next one
            (["a.mp4,first,1", 'b.mp4,"never closed,2'], 3),
            (['a.mp4,"two\nlines",1', "b.mp4,x,1", 'c.mp4,"open,2', "d.mp4,x,3"], 5),
            (['a.mp4,"two,1', 'b.mp4,two",2'], 2),  # as many values as there are columns
            (['a.mp4,"open,1', *(f"{n:06d}.mp4,x,1" for n in range(100_000))], 2),
        ],
    )
    def test_a_quote_that_is_not_closed(self, tmp_path: Path, lines: list[str], line: int) -> None:
        """It would swallow rows, and give one video the label of another: the manifest is refused by its line."""
        (tmp_path / "m.csv").write_text("\n".join(["video,caption,label", *lines]))
        with pytest.raises(ConfigError, match=rf"m\.csv in .*: a quote that opens in line {line} is not closed"):
            read(tmp_path / "m.csv")

    def test_line_breaks_within_quotes_are_kept_and_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "m.csv").write_text('video,caption\na.mp4,"a dog, running\nfast, then ""slow""\r\n"\nb.mp4,x\n')
        assert [row["caption"] for row in read(tmp_path / "m.csv")] == ['a dog, running\nfast, then "slow"\r\n', "x"]
        assert "1 rows have a line break within quotes" in caplog.text

    def test_labels_that_look_like_floats_are_kept_and_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "m.csv").write_text("video,label\na.mp4,1.0\nb.mp4,\n")
        assert [row["label"] for row in read(tmp_path / "m.csv")] == ["1.0", None]
        assert "texts such as '1.0' are labels as they are" in caplog.text

    def test_a_quote_in_the_middle_of_a_value_costs_its_row(self, tmp_path: Path) -> None:
        (tmp_path / "m.csv").write_text('video,caption\na.mp4,"x"y\nb.mp4,x"y\n')
        assert good(tmp_path / "m.csv") == ["b.mp4"]
        assert "has a quote in the middle of a value" in str(reasons(tmp_path / "m.csv")[0])

    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", ", "])
    @pytest.mark.parametrize("ending", ["\n", "\r\n", "\r\n\r\n \r\n"])
    def test_dialects(self, tmp_path: Path, delimiter: str, ending: str) -> None:
        """Other delimiters, a header in other case, blanks after commas, a byte-order mark, blank last lines."""
        rows = [["Caption", "VIDEO", "Label", "Start_s", "camera"], ['"a, b"', "x y.mp4", "cat ", ".2", "North"]]
        text = "\r\n".join(delimiter.join(row) for row in rows) + ending
        (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
        (row,) = read(tmp_path / "m.csv")
        assert [row[name] for name in ("path", "caption", "label", "start_s", "extra", "reject_class")] == [
            "x y.mp4", "a, b", "cat", 0.2, '{"camera":"North"}', None,
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (b"video,a,a", "twice"),
            (b"video," + b",".join(b"%d" % n for n in range(MAX_COLUMNS)), f"{MAX_COLUMNS + 1} columns"),
            (b"video" + b"," * 2_000_000, "header is longer"),
            (b"video,\xff", "header is not UTF-8"),
            (b"video\ra", "header: .*LF or CRLF"),
            (b"video,Video ", "twice"),
            (b"Path;Label", r"\['Path', 'label'\]; a column 'video' is needed"),
            (b"", "'video' is needed"),
        ],
    )
    def test_header(self, tmp_path: Path, header: bytes, message: str) -> None:
        (tmp_path / "m.csv").write_bytes(header + b"\na,b,c\n")
        with pytest.raises(ConfigError, match=message):
            read(tmp_path / "m.csv")


class TestJsonl:
    def test_types(self, tmp_path: Path) -> None:
        row = {
            "video": "a",
            "label": 7,
            "caption": ["x", "y"],
            "n": 1,
            "deep": {"b": [1.5, None], "a": "é"},
            "no": None,
        }
        found = read(write(tmp_path / "m.jsonl", [row]))[0]
        assert (found["label"], found["caption"]) == ("7", "x")
        assert found["extra"] == '{"captions":["x","y"],"deep":{"a":"é","b":[1.5,null]},"n":1}'

    def test_hostile_rows(self, tmp_path: Path) -> None:
        lines = [
            '{"video": "a"}',
            '{"video": "b"',
            "[1]",
            "null",
            '{"video": 5}',
            '{"video": ["a"]}',
            '{"video": true}',
            '{"video": "c", "start_s": true}',
            '{"video": "d", "start_s": NaN}',
            '{"video": "e", "x": Infinity}',
            '{"video": "\\ud800"}',
            '{"video": "f", "x": ' + "[" * 100_000,
            '{"video": "g", "x": ' + "[" * 300 + "]" * 300 + "}",
            '{"video": "h", "size_bytes": 1' + "0" * 5000 + "}",
            '{"video": "i", "size_bytes": 1.5}',
            '{"video": "j", "caption": "' + "x" * MAX_ROW_BYTES + '"}',
            '{"video": "k", "x": 1e999}',
            '{"video": "l", "label": ["cat", "dog"]}',
            '{"video": "m", "label": {"cat": 1}}',
            '{"video": "n", "caption": ["x", 5]}',
            '{"video": "o", "caption": {"en": "x"}}',
            '{"video": "p", "caption": ["x", "y"], "captions": 1}',
            '{"video": "q", "caption": "nul\\u0000"}',
        ]
        (tmp_path / "m.jsonl").write_text("\n".join(lines))
        assert good(tmp_path / "m.jsonl") == ["a", "k"]
        found = reasons(tmp_path / "m.jsonl")
        assert found[4] == "row 5 names a video that is not text" and found[2] == "row 3 is no JSON object"
        assert read(tmp_path / "m.jsonl")[16]["extra"] == '{"x":null}'
        wrong = [
            "has a label that is neither a text nor a number",
            "has a label that is neither a text nor a number",
            "has a caption that is neither a text nor a list of texts",
            "has a caption that is neither a text nor a list of texts",
            "has several captions, and a column 'captions' besides; rename that",
            "has a NUL character in its video, caption or label; remove it",
        ]
        assert found[17:] == [f"row {row} {reason}" for row, reason in enumerate(wrong, 18)]

    def test_names_in_another_case(self, tmp_path: Path) -> None:
        lines = [
            '\ufeff{"Video": "a.mp4", " LABEL ": 3.0, "Camera": "x"}',
            "",
            '{"video": "b.mp4", "label": "x "}',
            "  ",
        ]
        (tmp_path / "m.jsonl").write_text("\r\n".join(lines))
        rows = read(tmp_path / "m.jsonl")
        assert [(row["path"], row["label"], row["extra"]) for row in rows] == [
            ("a.mp4", "3", '{"Camera":"x"}'),
            ("b.mp4", "x", None),
        ]

    def test_a_column_named_twice(self, tmp_path: Path) -> None:
        lines = [
            '{"video": "a.mp4", "video": "b.mp4"}',
            '{"video": "b.mp4", "Video": "c.mp4"}',
            '{"video": "d.mp4", " label ": 1, "label": 2}',
            '{"video": "e.mp4", "x": {"y": 1, "y": 2}}',
            '{"video": "f.mp4", "x": {"y": 1, "Y": 2}, "Y": 3, "y": 4}',
        ]
        (tmp_path / "m.jsonl").write_text("\n".join(lines))
        assert good(tmp_path / "m.jsonl") == ["f.mp4"]
        found = [reason for reason in reasons(tmp_path / "m.jsonl") if reason]
        assert len(found) == 4 and all(
            text.startswith(f"row {row} ") and "twice" in text for row, text in enumerate(found, 1)
        )

    def test_every_reason_can_be_stored(self, tmp_path: Path) -> None:
        (tmp_path / "m.jsonl").write_bytes(b'{"video": "\\udc80", "x": 1}\n\xff\xfe\n{"\\ud800": 1}\n')
        assert good(tmp_path / "m.jsonl") == []
        for reason in reasons(tmp_path / "m.jsonl"):
            assert reason is not None
            reason.encode()


class TestParquet:
    def test_types(self, tmp_path: Path) -> None:
        table = pa.table(
            {
                "video": pa.array(["a", "b", None]).cast(pa.large_string()),
                "label": pa.array([7, 8, 9]),
                "caption": pa.array(["x", "y", "z"]).dictionary_encode(),
                "start_s": pa.array([Decimal("1.5"), None, Decimal("0.0")]),
                "size_bytes": pa.array([1.0, None, 2.0]),
                "struct": [{"n": [1, 2], "t": "é"}, None, {"n": [], "t": None}],
                "when": [datetime.datetime(2020, 1, 2), None, None],
                "bytes": [b"\xff", b"ok", None],
                "real": [float("nan"), 0.5, None],
            }
        )
        pq.write_table(table, tmp_path / "m.parquet")
        rows = read(tmp_path / "m.parquet")
        assert [row["reject_class"] for row in rows] == [None, None, "bad-row"]
        assert [row["label"] for row in rows] == ["7", "8", "9"]
        assert [row["caption"] for row in rows] == ["x", "y", "z"]
        assert [row["start_s"] for row in rows] == [1.5, None, 0.0]
        assert [row["size_bytes"] for row in rows] == [1, None, 2]
        assert json.loads(rows[0]["extra"]) == {
            "struct": {"n": [1, 2], "t": "é"},
            "when": "2020-01-02 00:00:00",
            "bytes": "\\xff",
            "real": None,
        }
        assert rows[1]["extra"] == '{"bytes":"ok","real":0.5}'

    def test_labels_with_gaps_and_lists_of_captions(self, tmp_path: Path) -> None:
        """A gap makes floats of a column of integers: labels 1, 2 and not 1.0, 2.0."""
        table = pa.table(
            {
                "Video": ["a", "b", "c", "d"],
                "label": pa.array([1.0, None, 2.0, float("nan")]),
                "caption": [["one", "two"], ["one"], [], None],
                "kind": pa.array([1, 2, 1, None]).dictionary_encode(),
                "end_s": pa.array([3.0, None, 2.5, None], pa.float32()),
            }
        )
        pq.write_table(table, tmp_path / "m.parquet")
        rows = read(tmp_path / "m.parquet")
        assert [row["label"] for row in rows] == ["1", None, "2", None]
        assert [row["caption"] for row in rows] == ["one", "one", None, None]
        assert [row["extra"] for row in rows] == [
            '{"captions":["one","two"],"kind":1}',
            '{"kind":2}',
            '{"kind":1}',
            None,
        ]
        assert [row["end_s"] for row in rows] == [3.0, None, 2.5, None]

    @pytest.mark.parametrize("values", [[1], [[1]], [b"a"], [True]])
    def test_a_video_column_of_another_type(self, tmp_path: Path, values: list[Any]) -> None:
        pq.write_table(pa.table({"video": values}), tmp_path / "m.parquet")
        with pytest.raises(ConfigError, match=r"'video' is .*; it must be text"):
            read(tmp_path / "m.parquet")

    def test_too_many_columns(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"video": ["a"], **{str(n): [n] for n in range(MAX_COLUMNS)}}), tmp_path / "m.parquet")
        with pytest.raises(ConfigError, match=f"{MAX_COLUMNS + 1} columns"):
            read(tmp_path / "m.parquet")

    def test_not_utf8(self, tmp_path: Path) -> None:
        texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
        pq.write_table(pa.table({"video": texts}), tmp_path / "m.parquet")
        assert good(tmp_path / "m.parquet") == ["a", "c"]
        assert reasons(tmp_path / "m.parquet")[1] == "row 2 is not UTF-8"

    def test_a_small_file_of_large_texts(self, tmp_path: Path) -> None:
        """20,000 captions of 1 MB are one dictionary entry: 20 GB if all were text at once."""
        small = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 10**6]))
        large = pa.DictionaryArray.from_arrays(pa.array([0] * 10, pa.int32()), pa.array(["x" * (MAX_ROW_BYTES + 1)]))
        for name, captions, kept in (("small", small, 20_000), ("large", large, 0)):
            path = tmp_path / f"{name}.parquet"
            pq.write_table(pa.table({"video": [str(n) for n in range(len(captions))], "caption": captions}), path)
            assert path.stat().st_size < 10**6
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            tables = read_manifest(Store.at(tmp_path), path.name)
            seen = [table["reject_class"].null_count for table, _ in zip(tables, range(300), strict=False)]
            assert sum(seen) == min(kept, 300)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB

    @pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + bytes(1000) + b"PAR1", b"no parquet at all" * 100])
    def test_damaged(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "m.parquet").write_bytes(data)
        with pytest.raises(ConfigError, match="cannot be read"):
            read(tmp_path / "m.parquet")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf_16(tmp_path: Path, suffix: str, encoding: str) -> None:
    (tmp_path / f"m{suffix}").write_text("video\na.mp4\n", encoding=encoding)
    if encoding == "utf-16":
        with pytest.raises(ConfigError, match="is UTF-16; save it as UTF-8"):
            read(tmp_path / f"m{suffix}")
    elif suffix == ".csv":
        with pytest.raises(ConfigError, match="'video' is needed"):
            read(tmp_path / f"m{suffix}")
    else:
        assert good(tmp_path / f"m{suffix}") == []


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("start_s", "end_s", "size_bytes", "is_good"),
    [
        ("0", "1e9", "1", True), ("0", "1e99", "1", False), ("0", "1000000001", "1", False), ("-0.5", "1", "1", False),
        ("nan", "1", "1", False), ("0", "1", "8796093022208", True), ("0", "1", "8796093022209", False),
        ("0", "1", "999999999999999999", False), (".5", "1.", "0", True), ("0", "+1", "0", False),
    ],
)  # fmt: skip
def test_bounds(tmp_path: Path, suffix: str, start_s: str, end_s: str, size_bytes: str, is_good: bool) -> None:
    """Numbers that do not fit where they go cost their row: keys in milliseconds, sums in 64 bits."""
    row = {"video": "a", "start_s": start_s, "end_s": end_s, "size_bytes": size_bytes}
    (found,) = read(write(tmp_path / f"m{suffix}", [row]))
    assert (found["reject_class"] is None) == is_good
    if is_good:
        assert (found["start_s"], found["end_s"]) == (float(start_s), float(end_s))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".txt"])
def test_damage_costs_rows_or_is_refused(tmp_path: Path, suffix: str) -> None:
    rows = [{"video": f"{n}é.mp4", "label": f"{n % 3}", "start_s": n / 3, "x": f'{n}"'} for n in range(30)]
    path = tmp_path / f"m{suffix}"
    if suffix == ".txt":
        path.write_text("".join(f"{row['video']}\n" for row in rows))
    else:
        write(path, rows)
    whole, draw, outcomes = path.read_bytes(), random.Random(1), set()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 2, 8])):
            data[draw.randrange(len(data))] = draw.choice([0, 10, 13, 34, 44, 92, 255, draw.randrange(256)])
        path.write_bytes(data)
        try:
            outcomes.add(any(row["reject_class"] for row in read(path)))
        except ConfigError as error:
            outcomes.add(type(error))
    assert outcomes & {True, ConfigError}


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.csv")
    failed: list[ConfigError] = []

    def attempt() -> None:
        try:
            read(tmp_path / "m.csv")
        except ConfigError as error:
            failed.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert failed and "not a regular file" in str(failed[0])

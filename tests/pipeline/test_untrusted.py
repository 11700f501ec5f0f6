"""Datasets of anybody: whatever their files say, every reader names the file and the field, follows nothing, and allocates nothing.

Each case is a sound dataset with one thing made wrong; each goes through every reader in a process whose memory is bounded.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import find_parent, read_index, read_meta, read_rejects
from pipeline.errors import ConfigError, DatasetError
from pipeline.loader import CacheConfig, LoaderConfig, TokenLoader
from pipeline.schema import Reject
from pipeline.shards import read_payload, read_shard_rows, write_rejects
from pipeline.storage import Store
from pipeline.token_statistics import scan_tokens
from pipeline.verify import verify
from tests.pipeline.datasets import GRID, PAD, describe, make_token_dataset

CODES = 512
ROOM_BYTES = 2**30
"""More than this, beside what the process has, no reader may allocate."""
REJECT = Reject(path="a.mp4", stage="tokenize", reject_class="corrupt", reason="no")


def make(folder: Path) -> Path:
    tokenizer = {"fingerprint": "t" * 32, "codebook_size": CODES, "patch": 16}
    make_token_dataset(folder, [[4, 3], [5]], splits=["train", "val", "train"], extra={"tokenizer": tokenizer})
    write_rejects(Store.at(folder), "rejects/plan.parquet", [REJECT])
    return folder


def meta(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "dataset.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return apply


def raw(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data)  # type: ignore[return-value]


def rows(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    """Change rows of the first index; its own metadata stays."""

    def apply(folder: Path) -> None:
        path = folder / "index" / "000000.parquet"
        table = pq.read_table(path)
        found = table.to_pylist()
        change(found)
        pq.write_table(pa.Table.from_pylist(found, schema=table.schema), path)

    return apply


def column(name: str, values: pa.Array) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "index" / "000000.parquet"
        table = pq.read_table(path)
        place = table.schema.get_field_index(name)
        pq.write_table(table.set_column(place, name, values), path)

    return apply


def info(change: Callable[[dict[str, Any]], Any] | bytes) -> Callable[[Path], None]:
    """Change what the first index says of its shard."""

    def apply(folder: Path) -> None:
        path = folder / "index" / "000000.parquet"
        table = pq.read_table(path)
        data = json.loads(table.schema.metadata[b"tokenreel.shard"])
        if isinstance(change, bytes):
            text = change
        else:
            change(data)
            text = json.dumps(data).encode()
        pq.write_table(table.replace_schema_metadata({b"tokenreel.shard": text}), path)

    return apply


def instead(name: str, place: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        place(folder / name)

    return apply


def codes(folder: Path) -> None:
    """A code beyond the codebook, where no hash is looked at."""
    row = read_shard_rows(Store.at(folder), 0)[0]
    with (folder / row["tar"]).open("r+b") as tar:
        tar.seek(row["offset"])
        tar.write(np.array([29_952], "<u2").tobytes())


def sparse(path: Path, size_bytes: int = 6 * 2**30) -> None:
    """A file of zeros that takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(size_bytes)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def folder_loop(path: Path) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shutil.rmtree(folder / path)
        loop(folder / path)

    return apply


def copied(name: str) -> Callable[[Path], None]:
    """The first index once more, under a name that the writer of shard 0 does not give it."""
    return lambda folder: shutil.copyfile(folder / "index/000000.parquet", folder / name)  # type: ignore[return-value]


TAR = "shards/train-000000.tar"
DEEP = b"[" * 200_000 + b"]" * 200_000
CASES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # name: (what is wrong, file, field or words)
    "not JSON": (raw("dataset.json", b"{"), "dataset.json", "cannot be read"),
    "not UTF-8": (raw("dataset.json", b'{"kind": "\xff\xfe"}'), "dataset.json", "cannot be read"),
    "no object": (raw("dataset.json", b"[1]"), "dataset.json", "no JSON object"),
    "deep": (raw("dataset.json", DEEP), "dataset.json", "cannot be read"),
    "deep config": (raw("dataset.json", b'{"kind": "tokens", "config": ' + DEEP + b"}"), "dataset.json", "cannot be read"),
    "kind": (meta(lambda d: d.update(kind="models")), "dataset.json", "kind = 'models'"),
    "no fingerprint": (meta(lambda d: d.pop("fingerprint")), "dataset.json", "fingerprint = None"),
    "fingerprint": (meta(lambda d: d.update(fingerprint=["x"])), "dataset.json", "fingerprint = a list"),
    "config": (meta(lambda d: d.update(config="x")), "dataset.json", "config = 'x'"),
    "unknown": (meta(lambda d: d.update(surprise=1)), "dataset.json", "unknown field 'surprise'"),
    "10^12 shards": (meta(lambda d: d.update(num_shards=10**12)), "dataset.json", "num_shards = 1000000000000"),
    "-1 shards": (meta(lambda d: d.update(num_shards=-1)), "dataset.json", "num_shards = -1"),
    "true shards": (meta(lambda d: d.update(num_shards=True)), "dataset.json", "num_shards = True"),
    "10^8 shards": (meta(lambda d: d.update(num_shards=10**8)), "", "100000000"),
    "totals": (meta(lambda d: d.update(totals=7)), "dataset.json", "totals = 7"),
    "no content": (meta(lambda d: d["totals"].pop("content")), "dataset.json", "totals.content = None"),
    "rejected": (meta(lambda d: d["totals"].update(rejected={"x": "y"})), "dataset.json", "totals.rejected.x = 'y'"),
    "committed": (meta(lambda d: d["totals"].update(committed=2**40)), "dataset.json", str(2**40)),
    "hours": (meta(lambda d: d["totals"].update(hours="x")), "dataset.json", "totals.hours = 'x'"),
    "tars": (meta(lambda d: d["totals"].update(tars={"train": [10**9]})), "dataset.json", "totals.tars"),
    "tokenizer": (meta(lambda d: d.update(extra={"tokenizer": 3})), "dataset.json", "extra.tokenizer = 3"),
    "codebook": (meta(lambda d: d["extra"]["tokenizer"].update(codebook_size=0)), "dataset.json", "codebook_size = 0"),
    "a pipe as dataset.json": (instead("dataset.json", os.mkfifo), "dataset.json", "regular file"),
    "a folder as dataset.json": (instead("dataset.json", Path.mkdir), "dataset.json", "regular file"),
    "a link as dataset.json": (instead("dataset.json", lambda p: p.symlink_to("/etc/hostname")), "dataset.json", "a link out"),
    "a pipe as a tar": (instead(TAR, os.mkfifo), TAR, "regular file"),
    "a link as a tar": (instead(TAR, lambda p: p.symlink_to("/etc/hostname")), TAR, "a link out of the dataset"),
    "a link as an index": (
        instead("index/000000.parquet", lambda p: p.symlink_to("/etc/hostname")), "index/000000.parquet", "a link out of",
    ),
    **{
        f"6 GiB of {name}": (instead(name, sparse), name, f"{6 * 2**30} bytes; at most {most}")
        for name, most in (
            ("dataset.json", 2**26), ("splits/train.txt", 2**26), ("index/000000.parquet", 2**30), ("rejects/plan.parquet", 2**30),
        )
    },
    **{
        f"{name} is a link to itself": (instead(name, loop), name, words)
        for name, words in (
            ("dataset.json", "symbolic links"), ("index/000000.parquet", "symbolic links"), (TAR, "symbolic links"),
            ("splits/train.txt", "link to nowhere or to itself"), ("rejects/plan.parquet", "to itself"),
        )
    },
    **{f"{name} is a link to itself": (folder_loop(Path(name)), name, "symbolic links") for name in ("shards", "index", "splits")},
    "a pipe as a list": (instead("splits/train.txt", os.mkfifo), "splits/train.txt", "regular file"),
    "a folder as a list": (instead("splits/train.txt", Path.mkdir), "splits/train.txt", "regular file"),
    **{
        f"index {name}": (copied(f"index/{name}.parquet"), f"index/{name}.parquet", "no index counts it")
        for name in ("\u0663", "0", "00000000", "00000\u0660", "9999999999")
    },
    "offset": (rows(lambda r: r[0].update(offset=10**6)), "index/000000.parquet", "column offset"),
    "offset -1": (rows(lambda r: r[0].update(offset=-1)), "index/000000.parquet", "column offset: -1"),
    "offset 2^62": (rows(lambda r: r[0].update(offset=2**62)), "index/000000.parquet", "column offset"),
    "size": (rows(lambda r: r[0].update(size=2**40)), "index/000000.parquet", "offset"),
    "size -1": (rows(lambda r: r[0].update(size=-1)), "index/000000.parquet", "column size: -1"),
    "frames": (rows(lambda r: r[0].update(num_frames=2**31 - 1)), "index/000000.parquet", "num_frames"),
    "no frames": (rows(lambda r: r[0].update(num_frames=None)), "index/000000.parquet", "column num_frames lacks"),
    "split": (rows(lambda r: r[0].update(split="../x")), "index/000000.parquet", "column split: '../x'"),
    "no key": (rows(lambda r: r[0].update(key=None)), "index/000000.parquet", "column key lacks"),
    "type": (column("offset", pa.array(["1", "2"])), "index/000000.parquet", "column offset is of string"),
    "type of key": (column("key", pa.array([[1], [2]])), "index/000000.parquet", "column key is of list"),
    "no tokenreel": (info(b"{}"), "index/000000.parquet", "fingerprint = None"),
    "deep info": (info(DEEP), "index/000000.parquet", "cannot be read"),
    "tars of info": (info(lambda d: d.update(tars={"train": "x"})), "index/000000.parquet", "tars.train = 'x'"),
    "splits of info": (info(lambda d: d.update(tars={"../../x": 1})), "index/000000.parquet", "tars"),
    "ledger": (info(lambda d: d.update(ledger=[])), "index/000000.parquet", "ledger = a list"),
    "2^40 bytes": (info(lambda d: d["tars"].update(train=2**40)), "", ""),
    "codes": (codes, TAR, "29952"),
    "no Parquet": (raw("index/000000.parquet", b"PAR1"), "index/000000.parquet", "no tokenreel index"),
    "rejects": (raw("rejects/plan.parquet", b"PAR1"), "rejects/plan.parquet", "cannot be read"),
    "rejects of others": (
        lambda folder: pq.write_table(pa.table({"path": [1]}), folder / "rejects/plan.parquet"), "rejects/plan.parquet", "columns",
    ),
}  # fmt: skip


def read_windows(folder: Path, cache: Path) -> None:
    config = LoaderConfig(batch_size=2, cache=CacheConfig(folder=cache))
    loader = TokenLoader(folder, config, window=(2, *GRID), num_views=1, pad=PAD, rank=0, world_size=1)
    for step in range(24):
        loader.batch(step)


def read_clips(folder: Path, cache: Path) -> None:
    """As tokenize reads its input, and embed."""
    store = Store.at(folder)
    for shard in range(2):
        for row in read_shard_rows(store, shard):
            read_payload(store, row)


def read_statistics(folder: Path, cache: Path) -> None:
    """As inspect does."""
    scan_tokens(
        Store.at(folder), read_index(folder), read_meta(folder).extra["tokenizer"]["codebook_size"], shards=[0, 1]
    )
    list(read_rejects(folder))


@pytest.fixture
def bounded() -> Iterator[None]:
    """No connection, and little memory beside what the process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", CASES)
def test_every_reader_names_the_file_and_the_field(
    name: str, tmp_path: Path, bounded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_connection(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", no_connection)
    spoil, file, words = CASES[name]
    folder = make(tmp_path / "tokens")
    spoil(folder)
    found = []
    for reader in (read_windows, read_clips, read_statistics):
        try:
            reader(folder, tmp_path / "cache")
        except (DatasetError, ConfigError, FileNotFoundError) as error:
            assert len(str(error)) < 2000
            found.append(str(error))
    try:
        found += [problem.text for problem in verify(folder)]
    except DatasetError as error:
        found.append(str(error))
    assert any(file in text and words in text for text in found), found


def test_a_sound_one_has_nothing_to_say(tmp_path: Path, bounded: None) -> None:
    folder = make(tmp_path / "tokens")
    (folder / "rejects" / "plan.parquet").unlink()
    for reader in (read_windows, read_clips, read_statistics):
        reader(folder, tmp_path / "cache")
    assert list(verify(folder)) == []


@pytest.mark.parametrize("reader", [read_windows, read_clips, read_statistics])
def test_codes_beyond_the_codebook_reach_nobody(reader: Callable[[Path, Path], None], tmp_path: Path) -> None:
    """They would be an index into an embedding of 512 rows."""
    folder = make(tmp_path / "tokens")
    (folder / "rejects" / "plan.parquet").unlink()
    codes(folder)
    with pytest.raises(DatasetError, match=r"train-000000\.tar.*(29952|not the ones that were committed)"):
        reader(folder, tmp_path / "cache")


class TestParents:
    """The place that a dataset names for its parent is followed within its own storage alone."""

    def tokens(self, folder: Path, place: Any) -> Store:
        make_token_dataset(folder / "in" / "tokens", [[3]])
        clips = make_token_dataset(folder / "in" / "clips", [[3]], kind="clips", fingerprint="p" * 32)
        meta(lambda d: d.update(parent_fingerprint="p" * 32))(folder / "in" / "tokens")
        meta(lambda d: d["extra"].update(clips=place))(folder / "in" / "tokens")
        shutil.copytree(clips, folder / "elsewhere")
        return Store.at(folder / "in" / "tokens")

    def test_beside_it(self, tmp_path: Path) -> None:
        store = self.tokens(tmp_path, "../clips")
        parent = find_parent(store, read_meta(store))
        assert parent is not None and parent.path().resolve() == tmp_path / "in" / "clips"

    @pytest.mark.parametrize(
        "place",
        ["ABSOLUTE", "s3://bucket/clips", "http://127.0.0.1:9/clips", "file:///etc", 7, ["x"], "a\0b", "", "gone"],
    )
    def test_nothing_else_is_followed(self, place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = self.tokens(tmp_path, str(tmp_path / "elsewhere") if place == "ABSOLUTE" else place)
        monkeypatch.setattr("pipeline.storage._open_remote", lambda url: pytest.fail(f"{url} was followed"))
        assert find_parent(store, read_meta(store)) is None
        given = find_parent(store, read_meta(store), tmp_path / "elsewhere")
        assert given is not None and given.path() == tmp_path / "elsewhere"

    def test_in_an_object_store(self) -> None:
        store = Store.at("s3://bucket/tokens?endpoint_override=http://127.0.0.1:9&anonymous=true")
        for place, followed in (
            ("s3://bucket/clips?endpoint_override=http://127.0.0.1:9&anonymous=true", True),
            ("s3://bucket/clips?endpoint_override=http://evil:9&anonymous=true", False),
            ("s3://other/clips?endpoint_override=http://127.0.0.1:9&anonymous=true", False),
            ("/etc", False),
            ("../clips", False),
        ):
            from pipeline.dataset import _parent_nearby

            assert (_parent_nearby(store, place) is not None) == followed, place

    def test_another_dataset_is_refused(self, tmp_path: Path) -> None:
        store = self.tokens(tmp_path, "../clips")
        make_token_dataset(tmp_path / "other", [[3]], kind="clips", fingerprint="q" * 32)
        with pytest.raises(ConfigError, match=f"is dataset {'q' * 32}; .* was made from {'p' * 32}"):
            find_parent(store, read_meta(store), tmp_path / "other")
        assert describe().parent_fingerprint == "p" * 32

"""One embedding shard: which windows of which samples, what their rows say, and a damaged sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import create_or_resume, finish, read_index, read_meta, read_rejects
from pipeline.embedding import EmbedSettings, describe_embeddings, vectors_of, write_embedding_shard
from pipeline.errors import ConfigError, DatasetError
from pipeline.ledger import Ledger
from pipeline.shards import index_name, to_parquet
from pipeline.storage import Store
from pipeline.verify import verify
from tests.pipeline.datasets import GRID, PAD, add_codes, describe, make_codes, make_row, open_writer, shard_path

LENGTHS = (7, 2, 4)


class SumOfCodes:
    """A model of which a test knows every output: sample, number of the last frame, and how many positions are PAD."""

    window, pad, width = (3, *GRID), PAD, 3

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        self.batches.append(windows)
        flat = windows.reshape(len(windows), -1)
        return np.stack([flat[:, 0], windows[:, -1, 0, 1], (flat == PAD).sum(1)], axis=1).astype(np.float32)


@pytest.fixture
def tokens(tmp_path: Path) -> Store:
    """Three samples of the model's grid and one of another."""
    folder = tmp_path / "tokens"
    meta = create_or_resume(folder, describe())
    writer = open_writer(folder)
    for number, length in enumerate(LENGTHS):
        add_codes(writer, make_row(f"{number:016x}-000000000", length), make_codes(number, length))
    row = make_row(f"{'f' * 16}-000000000", 3, height=2 * GRID[0])
    add_codes(writer, row, np.zeros((3, 2 * GRID[0], GRID[1]), np.uint16))
    writer.commit(4, [])
    finish(folder, meta, Ledger())
    return Store.at(folder)


def embed(tokens: Store, out: Path, settings: EmbedSettings) -> tuple[list[dict], SumOfCodes]:
    model = SumOfCodes()
    meta = describe_embeddings(read_meta(tokens), {}, {"fingerprint": "m", "width": 3})
    write_embedding_shard(tokens, Store.at(out), meta.fingerprint, 0, model, settings)
    return read_index(out).to_pylist(), model


def vector(number: int, start: int) -> list[float]:
    codes = make_codes(number, LENGTHS[number])[start : start + 3]
    num_pad = (3 - len(codes)) * GRID[0] * GRID[1]
    return [float(number), float(PAD if num_pad else start + 2), float(num_pad)]


def test_windows_at_a_stride_become_rows(tokens: Store, tmp_path: Path) -> None:
    rows, model = embed(tokens, tmp_path / "out", EmbedSettings(rows="window", stride_frames=2, batch_windows=4))
    places = [(0, 0), (0, 2), (0, 4), (1, 0), (2, 0)]
    assert [row["embedding"] for row in rows] == [vector(*place) for place in places]
    assert [(row["key"], row["first_frame"], row["num_frames"]) for row in rows] == [
        (f"{number:016x}-000000000-w{start:06d}", start, min(3, LENGTHS[number])) for number, start in places
    ]
    assert [(row["start_s"], row["end_s"]) for row in rows[:3]] == [(0.0, 1.5), (1.0, 2.5), (2.0, 3.5)]
    assert [len(batch) for batch in model.batches] == [4, 4]  # of one size, so that rounding is the same


def test_windows_of_a_clip_are_averaged(tokens: Store, tmp_path: Path) -> None:
    rows, _ = embed(tokens, tmp_path / "out", EmbedSettings())
    assert [row["num_windows"] for row in rows] == [2, 1, 1]
    assert rows[0]["embedding"] == np.mean([vector(0, 0), vector(0, 3)], axis=0).tolist()
    assert [row["key"] for row in rows] == [row["sample_key"] for row in rows]
    assert (rows[0]["start_s"], rows[0]["end_s"], rows[0]["num_frames"]) == (0.0, 3.5, 7)


def test_the_bytes_are_the_same_whatever_the_batch(tokens: Store, tmp_path: Path) -> None:
    for name, size in (("one", 32), ("two", 1)):
        embed(tokens, tmp_path / name, EmbedSettings(batch_windows=size))
    one, two = ((tmp_path / name / index_name(0)).read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_damaged_sample_becomes_a_reject(tokens: Store, tmp_path: Path) -> None:
    row = read_index(tokens).to_pylist()[1]
    tar = bytearray(shard_path(tokens.path(), 0).read_bytes())
    tar[row["offset"]] ^= 1
    shard_path(tokens.path(), 0).write_bytes(tar)
    rows, _ = embed(tokens, tmp_path / "out", EmbedSettings())
    assert [one["key"][:16] for one in rows] == [f"{0:016x}", f"{2:016x}"]
    [reject] = read_rejects(tmp_path / "out")
    assert (reject.key, reject.stage, reject.reject_class) == (row["key"], "embed", "corrupt")


def test_a_model_that_loses_windows_commits_nothing(tokens: Store, tmp_path: Path) -> None:
    class Lossy(SumOfCodes):
        def __call__(self, windows: np.ndarray) -> np.ndarray:
            return super().__call__(windows)[1:]

    with pytest.raises(DatasetError, match="32 windows"):
        write_embedding_shard(tokens, Store.at(tmp_path / "out"), "f", 0, Lossy(), EmbedSettings())
    assert not (tmp_path / "out" / index_name(0)).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": "frame"},
        {"pool": "max"},
        {"stride_frames": 0},
        {"layer": 0},
        {"layer": -1},
        {"batch_windows": 0},
        {"precision": "fp8"},
    ],
)
def test_settings_that_are_refused(changes: dict) -> None:
    with pytest.raises(ConfigError):
        replace(EmbedSettings(), **changes)


def test_verify_sees_what_was_changed(tokens: Store, tmp_path: Path) -> None:
    out = Store.at(tmp_path / "out")
    meta = create_or_resume(out, describe_embeddings(read_meta(tokens), {}, {"fingerprint": "m", "width": 3}))
    write_embedding_shard(tokens, out, meta.fingerprint, 0, SumOfCodes(), EmbedSettings())
    finish(out, meta, Ledger())
    assert list(verify(out, tokens)) == []
    table = pq.read_table(out.path(index_name(0)))
    changed = vectors_of(table).copy()
    changed[1, 2] += 1
    array = pa.FixedSizeListArray.from_arrays(pa.array(changed.ravel()), 3)
    out.write(index_name(0), to_parquet(table.set_column(table.num_columns - 1, "embedding", array)))
    [problem] = verify(out, tokens)
    assert problem.shard == 0 and f"the embedding of {1:016x}-000000000 is not the one" in problem.text
    out.write(index_name(0), to_parquet(table.slice(1)))
    assert {text for one in verify(out, tokens) for text in ("2 rows", "not the ones") if text in one.text} == {
        "2 rows",
        "not the ones",
    }

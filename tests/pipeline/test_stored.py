"""What an index says of a clip, against counts that plain ffmpeg makes of the stored bytes, in every container."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.ffmpeg import FfmpegLimits
from pipeline.shards import read_shard_rows
from pipeline.storage import Store
from pipeline.stored import count_frames, count_packets
from pipeline.verify import verify
from tests.pipeline.datasets import make_clip_dataset

VIDEOS = {"a.mp4": 12, "b.mkv": 9, "c.avi": 7, "d.ts": 11}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    for name, num_frames in VIDEOS.items():
        source = f"testsrc2=s=64x48:r=10:d={num_frames / 10}"
        codec = "mpeg4" if name.endswith("avi") else "libx264"
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-c:v", codec, "-pix_fmt", "yuv420p"]
        subprocess.run([*command, str(folder / name)], check=True)
    return folder


@pytest.mark.parametrize("name", VIDEOS)
def test_counts(name: str, corpus: Path) -> None:
    with (corpus / name).open("rb") as clip:
        assert count_packets(clip, FfmpegLimits()) == count_frames(clip, FfmpegLimits()) == VIDEOS[name]


def set_column(folder: Path, name: str, values: list[int]) -> None:
    path = folder / "index" / "000000.parquet"
    table = pq.read_table(path)
    if name in table.column_names:
        table = table.drop_columns([name])
    pq.write_table(table.append_column(name, pa.array(values, pa.int32())), path)


@pytest.mark.parametrize(
    ("name", "deep", "words"),
    [
        ("num_packets", False, "packets; its index says num_packets ="),
        ("num_frames", True, "frames; its index says num_frames ="),
    ],
)
def test_a_wrong_count_is_found(name: str, deep: bool, words: str, corpus: Path, tmp_path: Path) -> None:
    folder = make_clip_dataset(corpus, tmp_path / "clips", [list(VIDEOS)])
    rows = read_shard_rows(Store.at(folder), 0)
    right = [VIDEOS[row["source"]] for row in rows]
    set_column(folder, name, right)
    assert not [one for one in verify(folder, deep=deep) if words in one.text]
    set_column(folder, name, [right[0] + 1, *right[1:]])
    (problem,) = [one for one in verify(folder, deep=deep) if words in one.text]
    assert rows[0]["key"] in problem.text and problem.shard == 0
    assert f"{right[0]} {name[4:]}; its index says {name} = {right[0] + 1}" in problem.text

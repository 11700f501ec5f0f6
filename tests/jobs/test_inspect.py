"""The page about a dataset: what it shows is what the index says, and hostile names do nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jobs import inspect, shard
from jobs.inspect import InspectConfig
from jobs.shard import ShardConfig
from pipeline.errors import ConfigError
from pipeline.quality import QualityConfig
from pipeline.schema import SCORES
from pipeline.sharding import ShardSettings
from tests.corpora import make_clip


@pytest.fixture(scope="module")
def clips(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "corpus").mkdir()
    make_clip(folder / "corpus" / "moving.mp4", seconds=1)
    make_clip(folder / "corpus" / "black.mp4", seconds=2, source="color=black")
    (folder / "corpus" / "<script>alert(1)<").mkdir()
    (folder / "corpus" / "<script>alert(1)<" / "bad.mp4").write_text("no video")
    settings = ShardSettings(quality=QualityConfig(score=True))
    shard.run(ShardConfig(corpus=str(folder / "corpus"), out=str(folder / "clips"), settings=settings))
    return folder / "clips"


def test_the_page_shows_scores_examples_and_rejects(clips: Path) -> None:
    result = inspect.run(InspectConfig(dataset=str(clips), examples=2, bins=4))
    page = (clips / "inspect.html").read_text()
    assert result.figures["page"] == str(clips / "inspect.html") and "<script" not in page
    for name in (*SCORES, "duration", "short side"):
        section = page.split(f"<h2>{name}</h2>")[1].split("</section>")[0]
        assert section.count("<rect") == 4 and section.count("data:image/") == 2
    black = page.split("<h2>black</h2>")[1].split("</section>")[0]
    assert re.findall(r"<figcaption>black (\d) · (\w+)\.mp4", black) == [("0", "moving"), ("1", "black")]
    assert "--keep.max-black" in black
    rejects = page.split("<h2>rejects</h2>")[1]
    assert "not-video" in rejects and "&lt;script&gt;" in rejects


def test_a_dataset_without_scores_or_examples(clips: Path, tmp_path: Path) -> None:
    page = tmp_path / "here.html"
    inspect.run(InspectConfig(dataset=str(clips), page=page, examples=0))
    assert "data:image/" not in page.read_text() and "<rect" in page.read_text()


def test_an_unfinished_dataset_says_so(clips: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(clips, tmp_path / "clips")
    meta = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**meta, "totals": None}))
    inspect.run(InspectConfig(dataset=str(copy)))
    assert "unfinished" in (copy / "inspect.html").read_text()


def test_bad_use(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a dataset"):
        inspect.run(InspectConfig(dataset=str(tmp_path)))
    with pytest.raises(ConfigError, match="bins = 0"):
        InspectConfig(dataset="x", bins=0)

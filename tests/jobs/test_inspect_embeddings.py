"""The map of a corpus: places that do not depend on chance, classes by size, names escaped, frames where clips are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA

from jobs import embed, inspect
from jobs.embed import EmbedConfig
from jobs.inspect import InspectConfig
from jobs.inspect_embeddings import principal_components
from jobs.scatter import COLOURS, Scatter, render_scatter
from pipeline.embedding import EmbedSettings
from pipeline.errors import ConfigError
from pipeline.shards import to_parquet
from tests.conftest import Stages


def test_places_are_principal_components() -> None:
    rows = (np.random.default_rng(0).normal(size=(500, 20)) * np.linspace(1, 5, 20) + 100).astype(np.float32)
    places, shares = principal_components(rows)
    reference = PCA(2, svd_solver="full").fit(rows.astype(np.float64))
    np.testing.assert_allclose(np.abs(places), np.abs(reference.transform(rows)), atol=1e-3)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, atol=1e-5)
    again, _ = principal_components(rows[::-1])
    np.testing.assert_allclose(again[::-1], places, atol=1e-3)
    flat, shares = principal_components(np.ones((3, 1), np.float32))
    assert flat.shape == (3, 2) and not flat.any() and not shares.any()


def test_points_are_coloured_and_escaped() -> None:
    count = len(COLOURS) + 3
    names = [f'<script>"{number}"' for number in range(count)]
    picture = np.zeros((4, 4, 3), np.uint8)
    html = render_scatter(
        Scatter(
            places=np.random.default_rng(0).normal(size=(count, 2)),
            names=names,
            classes=np.arange(count),
            class_names=names,
            pictures={2: picture},
        )
    )
    assert "<script" not in html and html.count("<circle") == html.count("<title>") == count
    assert html.count("data:image/webp") == 1 and "3 others" in html
    assert all(colour in html for colour in COLOURS)


def test_the_page_of_real_embeddings(stages: Stages, tmp_path: Path) -> None:
    out = tmp_path / "embeddings"
    embed.run(
        EmbedConfig(tokens=str(stages.tokens), run=stages.model, out=str(out), settings=EmbedSettings(rows="window"))
    )
    figures = inspect.run(InspectConfig(dataset=str(out), sample_clips=2)).figures
    page = (out / "inspect.html").read_text()
    assert page.count("<circle") == figures["points"] > 2 and page.count("data:image/webp") == figures["pictures"] == 2
    assert "map by source" in page and "map by label" not in page and "<script" not in page
    few = inspect.run(
        InspectConfig(dataset=str(out), sample_clips=0, sample_points=3, page=tmp_path / "few.html")
    ).figures
    assert (few["points"], few["pictures"]) == (3, 0) and "the map is of a sample" in (
        tmp_path / "few.html"
    ).read_text()
    for path in (out / "index").glob("*.parquet"):  # as if the corpus had labels
        table = pq.read_table(path)
        place = table.column_names.index("label")
        path.write_bytes(to_parquet(table.set_column(place, "label", pa.array(["<i>run"] * len(table)))))
    inspect.run(InspectConfig(dataset=str(out), sample_clips=0))
    assert "map by label" in (page := (out / "inspect.html").read_text()) and "&lt;i&gt;run" in page


def test_bad_use() -> None:
    with pytest.raises(ConfigError, match="sample_points = 0: must be 1 or more"):
        InspectConfig(dataset="x", sample_points=0)

"""What `tokenreel inspect` shows of an embedding dataset: a map of the corpus, coloured by label and by source."""

from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from jobs.contact_sheet import Section
from jobs.embeddings import load_embeddings
from jobs.inspect import InspectConfig
from jobs.scatter import Scatter
from jobs.token_origin import original_frames
from pipeline.dataset import DatasetMeta, find_parent, read_index, read_meta
from pipeline.storage import Store

log = logging.getLogger(__name__)
_COLUMNS = ["key", "sample_key", "source", "label", "start_s", "end_s", "first_frame", "num_frames"]
_PICTURE_PX = 160
_DECODE_THREADS = 4


def describe(
    store: Store, meta: DatasetMeta, config: InspectConfig
) -> tuple[pa.Table, list[tuple[str, str]], list[Section], dict[str, Any]]:
    """The rows of the index, facts and sections of the page, and figures for the result.

    Raises:
        ConfigError: the dataset is unfinished.
    """
    values, index = load_embeddings(store, _COLUMNS)
    facts = [
        ("model", meta.config["model"]),
        ("width", f"{values.shape[1]:,}"),
        ("rows are", f"{meta.config['rows']}s"),
    ]
    if not len(index):
        return index, facts, [], {}
    shown = np.sort(np.random.default_rng(0).permutation(len(index))[: config.sample_points])
    places, shares = principal_components(values[shown])
    facts.append(("variance in the map", f"{shares[0]:.1%} + {shares[1]:.1%}"))
    if len(shown) < len(index):
        facts.append(("the map is of a sample", f"{len(shown):,} of {len(index):,} rows, drawn at random"))
    rows = index.take(shown).to_pylist()
    pictures = _pictures(store, meta, rows, config.sample_clips)
    names = [f"{row['key']} · {row['source']} [{row['start_s']:.2f}, {row['end_s']:.2f}) s" for row in rows]
    colourings = {"source": [row["source"].rpartition("/")[0] or row["source"] for row in rows]}
    if any(row["label"] for row in rows):
        colourings = {"label": [row["label"] or "no label" for row in rows], **colourings}
    sections = []
    for name, texts in colourings.items():
        class_names = [text for text, _ in Counter(texts).most_common()]
        number = {text: place for place, text in enumerate(class_names)}
        classes = np.array([number[text] for text in texts])
        sections.append(
            Section(
                heading=f"map by {name}",
                note="The first two principal components of the embeddings: what lies together looks alike to the model, as far "
                "as two directions can say. Ringed points show a frame of their clip under the pointer.",
                scatter=Scatter(
                    places=places, names=names, classes=classes, class_names=class_names, pictures=pictures
                ),
            )
        )
    return index, facts, sections, {"points": len(shown), "pictures": len(pictures)}


def principal_components(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places (n 2) of rows (n d) along the two directions of most variance, and the shares of it (2,); always the same for
    the same rows, the sign too."""
    centered = values - values.mean(axis=0, dtype=np.float64)
    covariance = centered.T @ centered
    variances, directions = np.linalg.eigh(covariance)
    directions = directions[:, ::-1][:, :2]
    if directions.shape[1] < 2:
        directions = np.pad(directions, ((0, 0), (0, 1)))
    strongest = directions[np.abs(directions).argmax(axis=0), [0, 1]]
    directions = directions * np.where(strongest < 0, -1, 1)
    shares = np.pad(variances[::-1], (0, 2))[:2] / max(float(variances.sum()), 1e-30)
    return centered @ directions, shares


def _pictures(store: Store, meta: DatasetMeta, rows: list[dict[str, Any]], wanted: int) -> dict[int, np.ndarray]:
    """A frame of up to `wanted` rows by their place, where the clips that the tokens were made from are at hand."""
    tokens = find_parent(store, meta)
    token_meta = None if tokens is None else read_meta(tokens)
    clips = None if tokens is None or token_meta is None else find_parent(tokens, token_meta)
    if tokens is None or token_meta is None or clips is None or not wanted:
        return {}
    places = np.unique(np.linspace(0, len(rows) - 1, min(wanted, len(rows))).round().astype(int)).tolist()
    needed = {rows[place]["sample_key"] for place in places}
    columns = ["key", "source", "view", "clip_sha256"]
    samples = {row["key"]: row for row in read_index(tokens, columns).to_pylist() if row["key"] in needed}

    def picture(place: int) -> np.ndarray | None:
        row = rows[place]
        frames = original_frames(clips, token_meta, samples[row["sample_key"]])
        if not isinstance(frames, np.ndarray):
            log.warning("inspect: %s cannot be shown: %s", row["key"], frames.reason)
            return None
        frame = frames[min(row["first_frame"] + row["num_frames"] // 2, len(frames) - 1)]
        image = Image.fromarray(frame)
        image.thumbnail((_PICTURE_PX, _PICTURE_PX))
        return np.asarray(image)

    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        return {
            place: found for place, found in zip(places, pool.map(picture, places), strict=True) if found is not None
        }

"""Frozen-feature probes on labels that come with the data at no cost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.loader import WindowReader

_NUM_FOLDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeTask:
    """A question about views of the same windows: row r of view v has the label `labels[v][r]`.

    Each fold is (train, test): rows of every view. All views of a row stand on one side.
    """

    name: str
    question: str
    split_by: str
    views: tuple[str, ...]
    labels: np.ndarray
    folds: list[tuple[np.ndarray, np.ndarray]]

    @property
    def majority(self) -> float:
        """Accuracy of always naming the most frequent label of the training folds."""
        hits = []
        for train, test in self.folds:
            top = np.bincount(self.labels[:, train].ravel()).argmax()
            hits.append((self.labels[:, test] == top).ravel())
        return float(np.concatenate(hits).mean())


def read_views(reader: WindowReader, max_windows: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Windows as they are, played backward, and at double speed: each (n t h w) uint16.

    Returns:
        (views by name, video number of each row (n,), start of each row in seconds (n,))
    """
    samples, starts = _spread_windows(reader, 2 * reader.num_frames - 1, max_windows)
    normal = reader.read(samples, starts)
    views = {"normal": normal, "backward": normal[:, ::-1], "double": reader.read(samples, starts, stride=2)}
    videos = np.unique(np.array(reader.index["video_id"].to_pylist())[samples], return_inverse=True)[1]
    fps = np.array(reader.index["fps"].to_pylist())[samples]
    return views, videos, np.array(reader.index["start_s"].to_pylist())[samples] + starts / fps


def make_tasks(videos: np.ndarray, times_s: np.ndarray) -> Iterator[ProbeTask]:
    """The three tasks, as far as the data allows them: forward or backward; normal or double speed; which source video.

    The first two hold out source videos. The label of the third is the video itself, so it is split by time.
    """
    num_rows = len(videos)
    folds = _by_video(videos)
    if folds:
        for name, question, view in (
            ("direction", "is the clip played forward or backward?", "backward"),
            ("speed", "is the clip played at normal or at double speed?", "double"),
        ):
            labels = np.repeat([[0], [1]], num_rows, axis=1)
            yield ProbeTask(
                name=name,
                question=question,
                split_by="source video",
                views=("normal", view),
                labels=labels,
                folds=folds,
            )
    folds = _by_time(videos, times_s)
    if folds:
        question = f"which of {len(np.unique(videos[folds[0][0]]))} source videos is the clip from?"
        split_by = "time: the first two thirds of each video against the rest"
        yield ProbeTask(
            name="source", question=question, split_by=split_by, views=("normal",), labels=videos[None], folds=folds
        )


def probe(task: ProbeTask, features: dict[str, np.ndarray]) -> np.ndarray:
    """Cross-validated hits (bool, one a tested window) of a linear classifier on frozen features (n d) of each view."""
    hits = []
    for train, test in task.folds:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # an unconverged probe is still a probe
            classifier.fit(
                np.concatenate([features[view][train] for view in task.views]), task.labels[:, train].ravel()
            )
        predicted = classifier.predict(np.concatenate([features[view][test] for view in task.views]))
        hits.append(predicted == task.labels[:, test].ravel())
    return np.concatenate(hits)


def _spread_windows(reader: WindowReader, length: int, max_windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `max_windows` windows of `length` frames without overlap: (samples, starts).

    No video gives more than twice an equal share, so that one long film does not decide the figures.
    """
    by_video: dict[str, list[tuple[int, int]]] = {}
    for sample, video in enumerate(reader.index["video_id"].to_pylist()):
        for start in range(0, int(reader.lengths[sample]) - length + 1, length):
            by_video.setdefault(video, []).append((sample, start))
    share = max(1, 2 * max_windows // max(1, len(by_video)))
    while share > 1 and sum(min(share, len(windows)) for windows in by_video.values()) > max_windows:
        share -= 1
    chosen = [
        windows[place]
        for windows in by_video.values()
        for place in np.linspace(0, len(windows) - 1, min(share, len(windows))).astype(int)
    ]
    samples, starts = np.array(chosen, np.int64).reshape(-1, 2).T
    return samples, starts


def _by_video(videos: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    folds = min(_NUM_FOLDS, len(np.unique(videos)))
    return list(GroupKFold(folds).split(videos, groups=videos)) if folds >= 2 else []


def _by_time(videos: np.ndarray, times_s: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """One fold over the videos that have at least three windows: earlier windows train, later ones test."""
    train: list[int] = []
    test: list[int] = []
    for video in np.unique(videos):
        rows = np.flatnonzero(videos == video)
        rows = rows[np.argsort(times_s[rows], kind="stable")]
        if len(rows) >= 3:
            cut = (2 * len(rows) + 2) // 3
            train += list(rows[:cut])
            test += list(rows[cut:])
    return [(np.array(train), np.array(test))] if len(np.unique(videos[train])) >= 2 else []

"""Frozen-feature probes on labels that come with the data at no cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupKFold

from jobs.evaluation.frozen import Features, ProbeResult, hold_out, linear_probe, majority, pool
from pipeline.loader import WindowReader

_NUM_FOLDS = 5
_VAL_SHARE = 0.25
Fold = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeTask:
    """A question about views of the same windows: row r of view v has the label `labels[v][r]`.

    videos: (n,) source video of each row. Each fold is (train, val, test): rows of every view. All views of a row stand on
    one side.
    """

    name: str
    question: str
    split_by: str
    views: tuple[str, ...]
    labels: np.ndarray
    videos: np.ndarray
    folds: list[Fold]

    def split(self, fold: Fold, features: dict[str, np.ndarray]) -> list[Features]:
        """Train, val and test of one fold, of features (n d) of each view."""
        return [
            Features(
                values=np.concatenate([features[view][rows] for view in self.views]),
                labels=self.labels[:, rows].ravel(),
                groups=np.tile(self.videos[rows], len(self.views)),
            )
            for rows in fold
        ]


def read_views(reader: WindowReader, max_windows: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Windows as they are, played backward, and at double speed: each (n t h w) uint16.

    Returns:
        (views by name, video number of each row (n,), start of each row in seconds (n,))
    """
    samples, starts = spread_windows(reader, 2 * reader.num_frames - 1, max_windows)
    normal = reader.read(samples, starts)
    views = {"normal": normal, "backward": normal[:, ::-1], "double": reader.read(samples, starts, stride=2)}
    videos = np.unique(np.array(reader.index["video_id"].to_pylist())[samples], return_inverse=True)[1]
    fps = np.array(reader.index["fps"].to_pylist())[samples]
    return views, videos, np.array(reader.index["start_s"].to_pylist())[samples] + starts / fps


def make_tasks(videos: np.ndarray, times_s: np.ndarray) -> Iterator[ProbeTask]:
    """The three tasks, as far as the data allows them: forward or backward; normal or double speed; which source video.

    The first two hold out source videos, of which there must be three. The label of the third is the video itself, so it is split by time.
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
                videos=videos,
                folds=folds,
            )
    folds = _by_time(videos, times_s)
    if folds:
        question = f"which of {len(np.unique(videos[folds[0][0]]))} source videos is the clip from?"
        split_by = "time: the first two thirds of each video against the rest"
        yield ProbeTask(
            name="source",
            question=question,
            split_by=split_by,
            views=("normal",),
            labels=videos[None],
            videos=videos,
            folds=folds,
        )


def probe(task: ProbeTask, features: dict[str, np.ndarray]) -> tuple[ProbeResult, ProbeResult]:
    """The linear probe on frozen features (n d) of each view, and naming the most frequent label; both over all folds."""
    splits = [task.split(fold, features) for fold in task.folds]
    return (
        pool([linear_probe(*parts) for parts in splits]),
        pool([majority(parts[0], parts[2]) for parts in splits]),
    )


def spread_windows(reader: WindowReader, length: int, max_windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `max_windows` windows of `length` frames without overlap: (samples, starts).

    No video gives more than twice an equal share, so that one long film does not decide the figures. Of more videos than
    windows, as many are drawn.
    """
    by_video: dict[str, list[tuple[int, int]]] = {}
    for sample, video in enumerate(reader.index["video_id"].to_pylist()):
        for start in range(0, int(reader.lengths[sample]) - length + 1, length):
            by_video.setdefault(video, []).append((sample, start))
    if len(by_video) > max_windows:
        kept = np.random.default_rng(0).permutation(sorted(by_video))[:max_windows]
        by_video = {video: by_video[video] for video in sorted(kept.tolist())}
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


def _by_video(videos: np.ndarray) -> list[Fold]:
    """Folds that hold out source videos, for val too; none where there are fewer than three."""
    if len(np.unique(videos)) < 3:
        return []
    folds = []
    for rest, test in GroupKFold(min(_NUM_FOLDS, len(np.unique(videos)))).split(videos, groups=videos):
        train, val = hold_out(videos[rest], _VAL_SHARE)
        folds.append((rest[train], rest[val], test))
    return folds


def _by_time(videos: np.ndarray, times_s: np.ndarray) -> list[Fold]:
    """One fold over the videos that have at least three windows: the later third tests, a quarter of the rest before it is
    val, what is earlier trains."""
    parts: tuple[list[int], ...] = ([], [], [])
    for video in np.unique(videos):
        rows = np.flatnonzero(videos == video)
        rows = rows[np.argsort(times_s[rows], kind="stable")]
        if len(rows) >= 3:
            test = (2 * len(rows) + 2) // 3
            val = test - max(1, round(_VAL_SHARE * test))
            for part, chosen in zip(parts, np.split(rows, [val, test]), strict=True):
                part += list(chosen)
    train, val_rows, test_rows = map(np.array, parts)
    return [(train, val_rows, test_rows)] if len(np.unique(videos[parts[0]])) >= 2 else []

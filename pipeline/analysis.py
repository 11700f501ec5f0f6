"""Small grey frames in, scores and cuts out: the one definition of every score. Pure numpy, streaming.

A clip is looked at `rate_hz` times a second, as thumbnails of 64 x 64 px (the whole picture, squeezed), and twice a
second as a square from its centre at its own resolution. All are uint8, 0 black to 255 white.

| score | unit | what it is |
|---|---|---|
| black | share of frames, 0 to 1 | frames with 98 % of their thumbnail below level 26 |
| frozen | share of steps of 1/8 s, 0 to 1 | steps in which less than 0.2 % of the thumbnail changes by more than 4 levels |
| letterbox | share of the picture, 0 to 1 | bars along the edges that are black and even in every frame that is not black |
| brightness | 0 to 1 | mean level / 255 |
| sharpness | levels squared | median of the variance of the 4-neighbour Laplacian of the squares |
| motion | 0 to 1 | mean absolute change of a thumbnail pixel / 255 in a step of 1/8 s; steps across a cut left out |
| cuts_per_min | cuts a minute | cuts within the clip |

Bars are seen to 1/64 of a side. A clip shorter than a step has frozen and motion 0. The squares, and the frames looked at
for bars, stand half a second apart from the video's start; a clip between two of them takes the one before it.
"""

from __future__ import annotations

import numpy as np

from pipeline.quality import Scores
from pipeline.schema import ClipSpan

THUMB_PX = 64
CROP_PX = 256
"""Side of the squares for sharpness; that of the video where it is smaller."""
LOOKAHEAD_FRAMES = 2
"""Frames after a cut that are needed to know it."""

_STEPS_PER_S = 8
_SAMPLES_PER_S = 2
_BLACK_LEVEL, _BLACK_SHARE = 26, 0.98
_STILL_LEVELS, _STILL_SHARE = 4, 0.002
_BAR_LEVEL, _BAR_RANGE = 32, 16
_POOLED_PX = 16
_HISTORY_FRAMES = 12
_LEAST_SHOT_S = 0.25
# A change counts only where it stands out of the motion around it (the median, the next frames) and where it lasts: a
# flash is two jumps within three frames, and leads back to a picture like the one before it.
_STANDS_OUT, _STANDS_OUT_OF_NEXT = 0.25, 0.12
_LASTING, _SECOND_JUMP = 0.7, 0.6


class Analyzer:
    """Takes the frames of one video in order, finds its cuts as they come, and scores any span of it.

    Memory: 25 bytes a frame, and 140 bytes for each half second.

    Args:
        rate_hz: thumbnails a second; frame n stands at n / rate_hz seconds.
        cut_threshold: how different two frames in a row must be for a cut, 0 to 1.
    """

    def __init__(self, rate_hz: float, cut_threshold: float) -> None:
        self.rate_hz = rate_hz
        self.num_frames = 0
        self.cuts: list[int] = []
        """Frames that begin a shot, ascending, the first frame left out; final up to `num_decided`."""
        self.num_decided = 0
        self.sample_step = max(1, round(rate_hz / _SAMPLES_PER_S))
        """Frames from one square to the next; the first belongs to frame 0."""
        self._lag = max(1, round(rate_hz / _STEPS_PER_S))
        self._threshold = cut_threshold
        self._black, self._level = _Rows(np.bool_), _Rows(np.float32)
        self._motion, self._still = _Rows(np.float32), _Rows(np.bool_)  # row i: from frame i * lag to (i + 1) * lag
        self._bars, self._sharpness = _Rows(np.bool_, 2 * THUMB_PX), _Rows(np.float32)
        self._change = _Rows(np.float32)  # row n: from frame n - 1 to frame n
        self._pooled = np.empty((0, _POOLED_PX**2), np.float32)  # the last frames, for comparisons over a cut
        self._last_step: np.ndarray | None = None

    def add(self, thumbs: np.ndarray) -> None:
        """Take the next thumbnails: uint8 (n, 64, 64)."""
        if not len(thumbs):
            return
        flat = thumbs.reshape(len(thumbs), -1)
        self._black.extend(np.count_nonzero(flat < _BLACK_LEVEL, axis=1) >= _BLACK_SHARE * flat.shape[1])
        pooled = thumbs.reshape(-1, _POOLED_PX, 4, THUMB_PX).sum(2, dtype=np.uint16)
        pooled = pooled.reshape(-1, _POOLED_PX**2, 4).sum(2, dtype=np.uint16).astype(np.float32) / 16
        self._level.extend(pooled.mean(1) / 255)
        self._add_steps(flat)
        self._add_bars(thumbs)
        before = self._pooled[-1:] if len(self._pooled) else pooled[:1]
        self._change.extend(_difference(np.concatenate([before, pooled[:-1]]), pooled))
        self._pooled = np.concatenate([self._pooled, pooled])
        self.num_frames += len(thumbs)
        self._decide(self.num_frames - LOOKAHEAD_FRAMES)
        self._pooled = self._pooled[-(LOOKAHEAD_FRAMES + 4) :]

    def add_squares(self, squares: np.ndarray) -> None:
        """Take the next squares of every `sample_step`-th frame: uint8 (n, side, side), side 3 px or more."""
        for square in squares:
            x = square.astype(np.int16)
            laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
            self._sharpness.extend(np.array([laplacian.astype(np.float32).var()], np.float32))

    def finish(self) -> None:
        """Settle the last frames; the last of all cannot begin a shot."""
        self._decide(self.num_frames - 1)
        self.num_decided = self.num_frames

    @property
    def cuts_s(self) -> list[float]:
        """The cuts in seconds."""
        return [frame / self.rate_hz for frame in self.cuts]

    def frame_at(self, time_s: float) -> int:
        """The first frame at or after a time."""
        return int(np.ceil(time_s * self.rate_hz - 1e-6))

    def scores(self, span: ClipSpan) -> Scores:
        """The scores of a span; of the last frame where the span holds none."""
        start = min(self.frame_at(span.start_s), self.num_frames - 1)
        stop = max(start + 1, min(self.frame_at(span.end_s), self.num_frames))
        cuts = [cut for cut in self.cuts if start < cut < stop]
        black = self._black[start:stop]
        steps = np.arange(-(-start // self._lag), (stop - 1) // self._lag)
        cut_steps = [(cut - 1) // self._lag for cut in cuts]
        moving = steps[~np.isin(steps, cut_steps)]
        return {
            "black": float(black.mean()),
            "frozen": float(self._still[steps].mean()) if len(steps) else 0.0,
            "letterbox": self._letterbox(start, stop),
            "brightness": float(self._level[start:stop].mean()),
            "sharpness": float(np.median(self._sharpness[self._samples(start, stop, len(self._sharpness))])),
            "motion": float(self._motion[moving].mean()) if len(moving) else 0.0,
            "cuts_per_min": len(cuts) * 60 * self.rate_hz / (stop - start),
        }

    def _add_steps(self, flat: np.ndarray) -> None:
        first = -self.num_frames % self._lag
        frames = flat[first :: self._lag].astype(np.int16)
        if self._last_step is not None:
            frames = np.concatenate([self._last_step, frames])
        if len(frames):
            change = np.abs(np.diff(frames, axis=0))
            self._motion.extend(change.mean(1, dtype=np.float32) / 255)
            self._still.extend(np.count_nonzero(change > _STILL_LEVELS, axis=1) < _STILL_SHARE * flat.shape[1])
            self._last_step = frames[-1:]

    def _add_bars(self, thumbs: np.ndarray) -> None:
        for thumb in thumbs[-self.num_frames % self.sample_step :: self.sample_step]:
            bars = [
                (thumb.max(axis) <= _BAR_LEVEL) & (np.ptp(thumb, axis).astype(np.int16) <= _BAR_RANGE)
                for axis in (1, 0)
            ]
            self._bars.extend(np.concatenate(bars)[None])

    def _samples(self, start: int, stop: int, count: int) -> np.ndarray:
        samples = np.arange(-(-start // self.sample_step), -(-stop // self.sample_step))
        samples = samples[samples < count]
        return samples if len(samples) else np.array([min(start // self.sample_step, count - 1)])

    def _letterbox(self, start: int, stop: int) -> float:
        samples = self._samples(start, stop, len(self._bars))
        bars: np.ndarray = self._bars[samples]
        bars = bars[~bars.all(axis=1)]  # a black frame is no bar
        if not len(bars):
            return 0.0
        live = np.logical_not(np.all(bars, axis=0))
        sides = [np.flatnonzero(side) for side in (live[:THUMB_PX], live[THUMB_PX:])]
        share = np.prod([(side[-1] - side[0] + 1) / THUMB_PX if len(side) else 0.0 for side in sides])
        return float(1 - share)

    def _decide(self, stop: int) -> None:
        """Settle whether the frames up to `stop` begin a shot."""
        begin = max(1, self.num_decided)
        for offset in np.flatnonzero(self._change[begin : max(begin, stop)] >= self._threshold):
            frame = begin + int(offset)
            if self._is_cut(frame):
                self.cuts.append(frame)
        self.num_decided = max(self.num_decided, stop)

    def _is_cut(self, frame: int) -> bool:
        last = self.cuts[-1] if self.cuts else 0
        if frame - last < _LEAST_SHOT_S * self.rate_hz:
            return False
        change = self._change[frame]
        after = self._change[frame + 1 : frame + 1 + LOOKAHEAD_FRAMES]
        before = self._change[max(last + 1, 1, frame - _HISTORY_FRAMES) : frame]
        around = np.concatenate([before, after])
        if len(around) and change < np.median(around) + _STANDS_OUT:
            return False
        if len(before) and before[-LOOKAHEAD_FRAMES - 1 :].max() >= _SECOND_JUMP * change:
            return False
        if len(after) and change < after.max() + _STANDS_OUT_OF_NEXT:
            return False
        # A flash goes back to the picture before it: look over it in both directions.
        first = self.num_frames - len(self._pooled)
        least = self._threshold * _LASTING
        earlier = self._pooled[max(0, frame - 3 - first) : frame - first]
        later = self._pooled[frame - first : frame + LOOKAHEAD_FRAMES + 1 - first]
        return bool(_difference(earlier[-1:], later).min() >= least and _difference(earlier, later[:1]).min() >= least)


class _Rows:
    """Rows of an array that grows; indexing reads what was added."""

    def __init__(self, dtype: type, width: int = 0) -> None:
        self._data: np.ndarray = np.empty((256, width) if width else 256, dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, which: slice | int | np.ndarray) -> np.ndarray:
        rows: np.ndarray = self._data[: self._length][which]
        return rows

    def extend(self, rows: np.ndarray) -> None:
        while self._length + len(rows) > len(self._data):
            self._data = np.concatenate([self._data, np.empty_like(self._data)])
        self._data[self._length : self._length + len(rows)] = rows
        self._length += len(rows)


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How different pictures are, 0 (equal) to 1: one minus structural similarity over the whole picture.

    Brightness and contrast may drift without a word from it; another arrangement of light and dark is what counts, and a
    mean level that is another altogether.

    Args:
        a, b: float32 (n, pixels) and (n, pixels), or one of them (1, pixels).
    """
    mean_a, mean_b = a.mean(1), b.mean(1)
    a, b = a - mean_a[:, None], b - mean_b[:, None]
    covariance = (a * b).mean(1)
    deviation = np.sqrt((a * a).mean(1) * (b * b).mean(1))
    structure = (covariance + 20) / (deviation + 20)
    level = (2 * mean_a * mean_b + 200) / (mean_a**2 + mean_b**2 + 200)
    return np.clip(1 - structure * level, 0, 1).astype(np.float32)

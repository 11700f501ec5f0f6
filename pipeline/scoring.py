"""Pictures from ffmpeg to the analyzer: the filters that make them, the pipes that bring them."""

from __future__ import annotations

import math
from typing import IO

import numpy as np

from pipeline import ffmpeg
from pipeline.analysis import CROP_PX, THUMB_PX, Analyzer
from pipeline.display import AS_DISPLAYED, DisplayConfig, deinterlacing, tone_mapping
from pipeline.errors import BadVideo
from pipeline.ffmpeg import FfmpegLimits, Pipe, Process
from pipeline.probe import VideoInfo
from pipeline.quality import Scores
from pipeline.schema import ClipSpan
from pipeline.timeline import at_rate, same_size

SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int+bitexact"
"""Exact rounding: the same pixels on every CPU, whatever SIMD it has."""
_MAX_RATE_HZ = 120.0


def frame_rate(info: VideoInfo) -> float:
    """Frames a second at which a video is looked at: a rate at which none is left out, at most 120."""
    return min(info.rate_hz or info.fps, _MAX_RATE_HZ)


class Watch:
    """The analyzer's two pipes, their place in a filter graph, and what comes through them.

    Args:
        duration_s: how long the watched part is said to be; more than about this many frames is refused.
        batch_frames: thumbnails that are analyzed together; each call costs as much as ten frames in it.
    """

    def __init__(
        self,
        info: VideoInfo,
        duration_s: float,
        cut_threshold: float,
        batch_frames: int = 32,
        display: DisplayConfig = AS_DISPLAYED,
    ) -> None:
        self.analyzer = Analyzer(frame_rate(info), cut_threshold)
        self._side = min(CROP_PX, info.width, info.height)
        self._square = "" if info.picture.is_square else f"scale={info.width}:{info.height}:flags={SCALE_FLAGS},"
        self._tone = "".join(f"{word}," for word in tone_mapping(info.picture, display, "yuv420p"))
        num_frames = math.ceil((duration_s * 1.2 + 1) * self.analyzer.rate_hz) + 1
        num_squares = num_frames // self.analyzer.sample_step + 1
        self._thumbs = _Pictures(THUMB_PX, num_frames, batch_frames)
        self._squares = _Pictures(self._side, num_squares, 1)
        self.num_squares = 0

    @property
    def pipes(self) -> list[Pipe]:
        return [self._thumbs.pipe, self._squares.pipe]

    def graph(self, label: str) -> str:
        """The filters from frames at `frame_rate` under `label` to the two outputs."""
        side, flags = self._side, SCALE_FLAGS
        return (
            f"[{label}]split=2[watch_a][watch_b];"
            f"[watch_a]scale={THUMB_PX}:{THUMB_PX}:flags={flags.replace('bicubic', 'area')},{self._tone}"
            f"format=gray[thumbs];[watch_b]framestep={self.analyzer.sample_step},{self._square}"
            f"crop=min(iw\\,{side}):min(ih\\,{side}),scale={side}:{side}:flags={flags},{self._tone}format=gray[squares]"
        )

    def outputs(self) -> list[str]:
        """The output options of the two pipes."""
        raw = ["-f", "rawvideo", "-c:v", "rawvideo", "-threads", "1"]
        return ["-map", "[thumbs]", *raw, self._thumbs.pipe.url, "-map", "[squares]", *raw, self._squares.pipe.url]

    def take(self, pipe: Pipe, chunk: bytes) -> None:
        """Give the analyzer what came through one of the pipes."""
        if pipe is self._thumbs.pipe:
            self.analyzer.add(self._thumbs.take(chunk))
        elif pipe is self._squares.pipe:
            squares = self._squares.take(chunk)
            self.analyzer.add_squares(squares)
            self.num_squares += len(squares)

    def finish(self) -> Analyzer:
        """The analyzer, after all has come.

        Raises:
            BadVideo: `corrupt`, nothing has.
        """
        self.analyzer.add(self._thumbs.rest())
        if not self.analyzer.num_frames or not self.num_squares:
            raise BadVideo("corrupt", "not one frame could be decoded")
        self.analyzer.finish()
        return self.analyzer

    def scores(self) -> Scores:
        """The scores of all that was watched, after all has come."""
        analyzer = self.finish()
        return analyzer.scores(ClipSpan(start_s=0.0, end_s=analyzer.num_frames / analyzer.rate_hz))


def watch_file(
    file: IO[bytes],
    info: VideoInfo,
    cut_threshold: float,
    limits: FfmpegLimits,
    display: DisplayConfig = AS_DISPLAYED,
) -> Analyzer:
    """The analyzer of a whole video file: one pass of decoding.

    Raises:
        BadVideo: it cannot be decoded, or a limit was exceeded.
    """
    watch = Watch(info, info.duration_s, cut_threshold, display=display)
    first = ",".join([same_size(info), at_rate(frame_rate(info), info.start_s), *deinterlacing(info.picture, display)])
    graph = f"[0:{info.stream}]{first}[frames];{watch.graph('frames')}"
    command = [*ffmpeg.command(), *ffmpeg.input_words(limits), "-copyts", "-i", ffmpeg.source_url(file)]
    command += ["-filter_complex", graph]
    with Process([*command, *watch.outputs()], [file], limits, pipes=watch.pipes) as process:
        for pipe, chunk in process.read():
            watch.take(pipe, chunk)
        process.finish()
    return watch.finish()


class _Pictures:
    """Grey squares that come through a pipe in pieces, and leave it in batches."""

    def __init__(self, side_px: int, count: int, batch: int) -> None:
        self._side_px = side_px
        self._batch_bytes = batch * side_px**2
        self._waiting = bytearray()
        self.pipe = Pipe(count * side_px**2)

    def take(self, chunk: bytes) -> np.ndarray:
        """The pictures that are whole now, once a batch has come: uint8 (n, side, side)."""
        self._waiting += chunk
        return self._pop() if len(self._waiting) >= self._batch_bytes else self._shape(b"")

    def rest(self) -> np.ndarray:
        """What is left of whole pictures."""
        return self._pop()

    def _pop(self) -> np.ndarray:
        whole = len(self._waiting) // self._side_px**2 * self._side_px**2
        data = bytes(self._waiting[:whole])
        del self._waiting[:whole]
        return self._shape(data)

    def _shape(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).reshape(-1, self._side_px, self._side_px)

"""A video to one file a shot, in one pass: what is decoded once is looked at, cut and encoded as it comes.

One decoder process; its frames go through here to one encoder process at a time. The stored clips have a constant frame
rate (that of `scoring.frame_rate`, or `transcode.fps`), because frame numbers are what cuts them.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import IO

from pipeline import ffmpeg
from pipeline.cut import Cut, CutSettings
from pipeline.display import deinterlacing, tagging, transcoded
from pipeline.errors import BadVideo
from pipeline.ffmpeg import Pipe, Process
from pipeline.probe import VideoInfo
from pipeline.sampling import sampling_filters
from pipeline.schema import ClipSpan
from pipeline.scoring import Watch, frame_rate
from pipeline.timeline import at_rate, same_size
from pipeline.transcode import MP4, add_sound, describe_mp4, encoder_words, max_encoded_bytes, scaling, stored_size

_WAITING_BYTES = 16 * 2**20
"""Frames of about this size wait for the analyzer together."""


def encode_shots(file: IO[bytes], info: VideoInfo, settings: CutSettings) -> Iterator[Cut]:
    """One `Cut` for each shot, as `plan_clips` has them for the cuts of the whole video, with its file and scores.

    Memory: some frames that wait for the analyzer, whatever the video's length.

    Raises:
        BadVideo: not one frame could be decoded.
    """
    with contextlib.closing(_Stream(file, info, settings)) as stream:
        yield from stream.run()


class _Stream:
    """The frames between the decoder and the encoders."""

    def __init__(self, file: IO[bytes], info: VideoInfo, settings: CutSettings) -> None:
        self._file, self._info, self._settings = file, info, settings
        self._width, self._height = stored_size(info, settings.transcode)
        self._frame_bytes = self._width * self._height * 3 // 2
        self._rate_hz = frame_rate(info)
        batch = max(4, min(32, _WAITING_BYTES // self._frame_bytes))
        self._watch = Watch(info, info.duration_s, settings.clips.cut_threshold, batch, settings.display)
        num_frames = int((info.duration_s * 1.2 + 1) * self._rate_hz) + 1
        self._frames = Pipe(num_frames * self._frame_bytes)
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._num_encoded = self._num_cuts = 0
        self._shot_s, self._part = 0.0, 0  # start of the shot, and which part of it is being encoded
        self._encoder: _Encoder | None = None

    def run(self) -> Iterator[Cut]:
        limits = self._settings.limits
        pipes = [self._frames, *self._watch.pipes]
        try:
            with Process(self._command(), [self._file], limits, pipes=pipes) as decoder:
                for pipe, chunk in decoder.read():
                    if pipe is self._frames:
                        self._waiting.append(memoryview(chunk))
                        self._waiting_bytes += len(chunk)
                    else:
                        self._watch.take(pipe, chunk)
                    yield from self._encode(self._num_settled())
                decoder.finish()
            self._watch.finish()
        except BadVideo as bad:
            if not self._watch.analyzer.num_frames:
                raise
            rest = ClipSpan(start_s=self._start_s, end_s=self._info.duration_s)
            yield Cut(planned=rest, span=rest, error=bad)
            return
        yield from self._encode(self._watch.analyzer.num_frames)
        if self._encoder:
            yield self._finish_clip(self._num_encoded / self._rate_hz)

    def close(self) -> None:
        if self._encoder:
            self._encoder.close()

    @property
    def _start_s(self) -> float:
        return self._shot_s + self._part * self._settings.clips.max_s

    def _command(self) -> list[str]:
        settings, picture = self._settings, self._info.picture
        first = ",".join(
            [
                same_size(self._info),
                at_rate(self._rate_hz, self._info.start_s),
                *deinterlacing(picture, settings.display),
            ]
        )
        scale = ",".join(scaling(self._info, settings.transcode, settings.display))
        graph = (
            f"[0:{self._info.stream}]{first},split=2[picture][look];{self._watch.graph('look')};"
            f"[picture]{scale},format=yuv420p[video]"
        )
        command = [
            *ffmpeg.command(),
            *ffmpeg.input_words(self._settings.limits),
            "-copyts",
            "-i",
            ffmpeg.source_url(self._file),
        ]
        command += ["-filter_complex", graph, "-map", "[video]", "-f", "rawvideo", "-c:v", "rawvideo", "-threads", "1"]
        return [*command, self._frames.url, *self._watch.outputs()]

    def _num_settled(self) -> int:
        """Frames that may be encoded: their place in a shot is known, and so are the squares of the shots they end.

        A matter of the video alone, not of how its bytes came through the pipes.
        """
        squares = self._watch.num_squares * self._watch.analyzer.sample_step
        return min(
            self._watch.analyzer.num_decided, squares, self._waiting_bytes // self._frame_bytes + self._num_encoded
        )

    def _encode(self, stop: int) -> Iterator[Cut]:
        """Encode frames up to `stop`, and give every clip that ends on the way."""
        analyzer = self._watch.analyzer
        stop = min(stop, self._num_encoded + self._waiting_bytes // self._frame_bytes)
        while self._num_encoded < stop:
            cut = analyzer.cuts[self._num_cuts] if self._num_cuts < len(analyzer.cuts) else stop
            split_s = self._shot_s + (self._part + 1) * self._settings.clips.max_s
            split = analyzer.frame_at(split_s)
            if self._encoder and self._num_encoded == cut:
                yield self._finish_clip(cut / self._rate_hz)
                self._shot_s, self._part, self._num_cuts = cut / self._rate_hz, 0, self._num_cuts + 1
            elif self._encoder and self._num_encoded == split:
                yield self._finish_clip(split_s)
                self._part += 1
            else:
                if not self._encoder:
                    self._encoder = _Encoder(self._info, self._settings, self._width, self._height)
                until = min(stop, split, cut)
                self._encoder.write(self._take((until - self._num_encoded) * self._frame_bytes))
                self._num_encoded = until

    def _take(self, size: int) -> list[memoryview]:
        self._waiting_bytes -= size
        taken = []
        while size:
            chunk = self._waiting[0]
            taken.append(chunk[:size])
            if len(chunk) > size:
                self._waiting[0] = chunk[size:]
            else:
                self._waiting.popleft()
            size -= len(taken[-1])
        return taken

    def _finish_clip(self, end_s: float) -> Cut:
        assert self._encoder is not None
        encoder, self._encoder = self._encoder, None
        span = ClipSpan(start_s=self._start_s, end_s=end_s)
        cut = Cut(planned=span, span=span)
        if self._settings.quality.score:
            cut = replace(cut, scores=self._watch.analyzer.scores(span))
        try:
            clip, stored = encoder.finish(self._file, span)
            return replace(cut, clip=clip, info=stored, ext="mp4")
        except BadVideo as bad:
            encoder.close()
            return replace(cut, error=bad)


class _Encoder:
    """One encoder process and its file; what goes wrong with it is told at its end, and costs its clip alone."""

    def __init__(self, info: VideoInfo, settings: CutSettings, width: int, height: int) -> None:
        self._info, self._settings = info, settings
        bound = max_encoded_bytes(info, min(settings.clips.max_s, info.duration_s), settings.transcode, settings.limits)
        self._out = ffmpeg.open_unnamed(bound)
        self._error: BadVideo | None = None
        command = [*ffmpeg.command(), "-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", f"{width}x{height}"]
        command += ["-framerate", f"{frame_rate(info):.10g}", "-i", "pipe:0"]
        # Raw frames carry no colours.
        rate = [sampling_filters(settings.transcode.fps)] if settings.transcode.fps else []
        filters = [*rate, *tagging(transcoded(info.picture, settings.display, settings.transcode.codec))]
        command += ["-vf", ",".join(filters)] if filters else []
        command += [*encoder_words(settings.transcode), *MP4, ffmpeg.source_url(self._out)]
        try:
            self._process = Process(command, [self._out], settings.limits, fed=True, max_file_bytes=bound)
        except BaseException:
            self._out.close()
            raise

    def write(self, frames: list[memoryview]) -> None:
        """Feed frames; after a failure they are dropped."""
        try:
            for data in frames if not self._error else ():
                self._process.write(data)
        except BadVideo as bad:
            self._error = bad

    def finish(self, source: IO[bytes], span: ClipSpan) -> tuple[IO[bytes], VideoInfo]:
        """The file, with the source's sound if asked for, and its metadata."""
        with self._process:
            if self._error:
                raise self._error
            self._process.finish()
        config, info = self._settings.transcode, self._info
        if self._settings.audio and info.audio_codec:
            silent = self._out
            self._out = add_sound(silent, source, info, span, self._settings.limits)
            silent.close()
        stored = describe_mp4(
            self._out,
            config.codec,
            "aac" if self._settings.audio and info.audio_codec else "",
            transcoded(info.picture, self._settings.display, config.codec),
        )
        if stored is None:
            raise BadVideo("corrupt", f"no frame in [{span.start_s:g}, {span.end_s:g}) s could be encoded")
        return self._out, stored

    def close(self) -> None:
        self._process.__exit__(None, None, None)
        self._out.close()

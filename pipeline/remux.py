"""Spans of video files to video files, without decoding: packets are copied, from a keyframe on."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import IO

from pipeline import ffmpeg
from pipeline.containers import choose_container
from pipeline.errors import BadVideo
from pipeline.ffmpeg import FfmpegLimits, Process
from pipeline.packets import PacketTimes
from pipeline.probe import VideoInfo
from pipeline.schema import ClipSpan
from pipeline.transcode import MP4_CONTAINER

_LEADS_S = (0.0, 3.0, 12.0)
"""How much earlier to look for the keyframe, one after the other, where a container without an index missed it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remuxed:
    """A file without a name; `span` is what it holds of the source, `info` and `ext` are its own."""

    file: IO[bytes]
    span: ClipSpan
    info: VideoInfo
    ext: str


def remux_span(
    file: IO[bytes], info: VideoInfo, span: ClipSpan, limits: FfmpegLimits, source_bytes: int, audio: bool = False
) -> Remuxed:
    """The span's packets as an MP4 with its index in front, or as Matroska where MP4 has no place for the codec.

    The file begins at the last keyframe at or before `span.start_s` (the one before that, where a container's index is
    not exact) and ends at `span.end_s`; where no keyframe stands there, up to a few frames later, because of frames that
    are stored out of order. So it covers the span, and `Remuxed.span` says what that came to.

    Args:
        source_bytes: size of the source; the file cannot be larger, its index aside.
        audio: keep the first audio stream as it is.

    Raises:
        BadVideo: it cannot be read, the span holds no packet, or a limit was exceeded.
    """
    for lead_s in _LEADS_S:
        start_s = max(0.0, span.start_s - lead_s)
        made = _copy_packets(file, info, replace(span, start_s=start_s), limits, source_bytes, audio)
        last = start_s <= 0 or lead_s == _LEADS_S[-1]
        if made and (last or made.span.start_s <= span.start_s + 0.5 / info.fps):
            return made
        if last:
            raise BadVideo("corrupt", f"no packet in [{span.start_s:g}, {span.end_s:g}) s")
        if made:
            made.file.close()
    raise AssertionError("the last lead returns or raises")


def _copy_packets(
    file: IO[bytes], info: VideoInfo, span: ClipSpan, limits: FfmpegLimits, source_bytes: int, audio: bool
) -> Remuxed | None:
    """The packets from the keyframe that a seek to `span.start_s` finds; None where it finds none."""
    sound = audio and info.audio_codec
    container = choose_container(info, info.audio_codec if sound else "")
    num_frames = (info.duration_s * 1.2 + 1) * min(info.fps, 1000)
    share = min(1.0, (span.duration_s + 10) / info.duration_s)
    bound = min(limits.max_file_bytes, int(1.1 * source_bytes + 64 * num_frames) + 2**20)
    whole = span.start_s <= 0 and span.end_s >= info.duration_s
    # Packets as a second output sees them, with the times that they have relative to the span's start.
    packets = PacketTimes(2 * num_frames)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(ffmpeg.open_unnamed(int(source_bytes * share)))
        cut = [] if whole else _end_words(info, span.duration_s)
        command = [*ffmpeg.command(), *ffmpeg.input_words(limits), "-fflags", "+genpts"]
        command += [
            *ffmpeg.start_words(span.start_s),
            "-i",
            ffmpeg.source_url(file),
            "-map",
            "0:V:0",
            *(["-map", "0:a:0"] if sound else []),
        ]
        command += ["-c", "copy", *cut, "-avoid_negative_ts", "make_zero", *container.words]
        command += [ffmpeg.source_url(out), "-map", "0:V:0", *cut, *packets.output()]
        with Process(command, [file, out], limits, pipes=[packets.pipe], max_file_bytes=bound) as process:
            for _, chunk in process.read():
                packets.take(chunk)
            process.finish()
        if not packets.count:
            return None
        out.seek(0)
        stack.pop_all()
    stored = replace(
        info,
        container=container.name,
        duration_s=packets.end_s - packets.first_s,
        audio_codec=info.audio_codec if sound else "",
    )
    held = (
        span
        if whole
        else ClipSpan(start_s=max(0.0, span.start_s + packets.first_s), end_s=span.start_s + packets.end_s)
    )
    return Remuxed(file=out, span=held, info=stored, ext=container.ext)


def _end_words(info: VideoInfo, duration_s: float) -> list[str]:
    """Output options that end a copy: -t counts in decoding order, so a keyframe at the end would slip through."""
    words = ["-t", f"{duration_s:.9f}"]
    if info.container != MP4_CONTAINER:  # elsewhere the filter does not see the unit of pts
        return words
    at_end = f"between(pts*tb\\,{duration_s - 1e-3:.9f}\\,1e9)"  # false for a packet without a time
    return [*words, "-bsf:v", f"noise=drop=st(0\\,max(ld(0)\\,key*{at_end}))"]

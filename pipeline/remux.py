"""Spans of video files to video files, without decoding: packets are copied, from a keyframe on."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from typing import IO

from pipeline import ffmpeg
from pipeline.containers import choose_container
from pipeline.errors import BadVideo
from pipeline.ffmpeg import FfmpegLimits, Process
from pipeline.mp4 import MP4_CONTAINER, has_several_edits, keyframe_lead, read_video_track
from pipeline.packets import CopiedPackets, list_packets
from pipeline.probe import VideoInfo
from pipeline.schema import ClipSpan
from pipeline.timeline import NO_SEEK_S, TOLERANCE_S

_LEADS_S = (0.0, 3.0, 12.0)
"""How much earlier to look for the keyframe, one after the other, where a container without an index missed it."""
_MATROSKA_HZ = 1000
"""The unit of its times."""
_LEAST_MP4_HZ, _MOST_MP4_HZ, _USUAL_MP4_HZ = 10_000, 10_000_000, 90_000
_MOST_REORDERED = 20
"""Frames that may be stored before one that is shown earlier: more than any codec allows."""
_PACKED = re.compile(rb"DivX\d+(?:b|Build)\d+p")
_PACKED_MARK_BYTES = 2**20


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
    not exact) and ends at `span.end_s`; where frames are stored out of order, up to a few frames later, so that none
    before that is missing. So it covers the span. What `Remuxed` says of it is measured on the bytes written.

    Args:
        source_bytes: size of the source; the file cannot be larger, its index aside.
        audio: keep the first audio stream as it is.

    Raises:
        BadVideo: it cannot be read, the span holds no packet, or a limit was exceeded; `unsupported` where copied packets
            would show something else than the source.
    """
    _require_copyable(file, info, span)
    for lead_s in _LEADS_S:
        read_s = max(0.0, span.start_s - lead_s)
        made = _copy_packets(file, info, read_s, span, limits, source_bytes, audio)
        last = read_s <= 0 or lead_s == _LEADS_S[-1]
        if made and (last or made.span.start_s <= span.start_s + TOLERANCE_S):
            return made
        if last:
            raise BadVideo("corrupt", f"no packet in [{span.start_s:g}, {span.end_s:g}) s")
        if made:
            made.file.close()
    raise AssertionError("the last lead returns or raises")


def _require_copyable(file: IO[bytes], info: VideoInfo, span: ClipSpan) -> None:
    way_out = "use --storage transcode, or copy for whole videos"
    if info.codec == "gif":
        raise BadVideo("unsupported", f"pictures of a GIF cannot be stored in another container; {way_out}")
    if info.container == MP4_CONTAINER and has_several_edits(file, info.stream):
        raise BadVideo(
            "unsupported",
            f"an edit list shows several parts of it, and copied packets would show what it hides between them; {way_out}",
        )
    if info.container == "mpeg" and span.start_s > 0:
        # After a seek ffmpeg takes the times of what follows from the first packet that has one, up to some frames off.
        raise BadVideo(
            "unsupported",
            f"MPEG-PS states the times of few packets, so a part of it cannot be copied with the right ones; {way_out}",
        )
    if info.container == "avi" and info.reorders:
        # AVI has no times of frames. Those of MPEG-4 follow from its packets, unless two frames share one.
        file.seek(0)
        if info.codec != "mpeg4" or _PACKED.search(file.read(_PACKED_MARK_BYTES)):
            raise BadVideo(
                "unsupported",
                f"AVI does not say when frames of {info.codec} that are stored out of order begin; {way_out}",
            )


def _copy_packets(
    file: IO[bytes],
    info: VideoInfo,
    read_s: float,
    span: ClipSpan,
    limits: FfmpegLimits,
    source_bytes: int,
    audio: bool,
    hidden: bool = False,
) -> Remuxed | None:
    """The packets from the keyframe that a seek to `read_s` finds; None where it finds none.

    Args:
        hidden: the container hides what comes first, and so does the file made.
    """
    sound = audio and info.audio_codec
    container = choose_container(info, info.audio_codec if sound else "")
    mp4 = container.name == MP4_CONTAINER
    if hidden and not mp4:
        raise BadVideo(
            "unsupported",
            f"an edit list hides its first frames, which Matroska cannot, and MP4 has no place for {info.codec} and "
            f"{info.audio_codec}; use --storage transcode",
        )
    num_frames = (info.duration_s * 1.2 + 1) * min(info.fps, 1000)
    share = min(1.0, (span.duration_s + 10) / info.duration_s)
    bound = min(limits.max_file_bytes, int(1.1 * source_bytes + 64 * num_frames) + 2**20)
    seek_s = read_s + info.start_s - info.container_start_s if read_s > 0 else 0.0
    seek_s -= info.seek_lead_s
    if info.container == MP4_CONTAINER and seek_s > 0:
        seek_s -= keyframe_lead(file, info.stream, read_s + info.start_s)
    sought = seek_s > NO_SEEK_S
    unit_hz = _mp4_unit_hz(info) if mp4 else _MATROSKA_HZ
    whole = span.start_s <= 0 and span.end_s >= info.duration_s and info.num_packets == info.num_frames
    first = CopiedPackets(num_frames)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(ffmpeg.open_unnamed(int(source_bytes * share)))
        end_s = info.start_s + (info.duration_s if whole else span.end_s)
        cut = [] if whole and not mp4 else _end_words(info, end_s, unit_hz, mp4, sought, whole)
        command = [*ffmpeg.command(), *ffmpeg.input_words(limits), "-fflags", "+genpts", "-copyts"]
        command += ["-ss", f"{seek_s:.9f}"] if sought else []
        command += ["-i", ffmpeg.source_url(file), "-map", f"0:{info.stream}", *(["-map", "0:a:0"] if sound else [])]
        command += ["-c", "copy", *cut]
        # What MP4 has before 0 is hidden, which is what the source hides; in all other files nothing is.
        hide = ["-avoid_negative_ts", "disabled", "-output_ts_offset", f"{-info.start_s:.9f}"]
        command += hide if hidden else ["-avoid_negative_ts", "make_zero"]
        command += [*container.words, *(["-video_track_timescale", f"{unit_hz}"] if mp4 else [])]
        command += [ffmpeg.source_url(out), "-map", f"0:{info.stream}", "-frames:v", "1", *first.output()]
        with Process(command, [file, out], limits, pipes=[first.pipe], max_file_bytes=bound) as process:
            for _, chunk in process.read():
                first.take(chunk)
            process.finish()
        if not first.num_packets:
            return None
        if first.hidden_first and not hidden:
            return _copy_packets(file, info, 0.0, span, limits, source_bytes, audio, hidden=True)
        stored = _measure(out, info, mp4, limits)
        out.seek(0)
        stack.pop_all()
    # Read from its start, a file begins with its first picture, whatever guess its packets have.
    start_s = max(0.0, first.first_s - info.start_s) if sought else 0.0
    # Of pictures far apart the MP4 can state too late an end: it adds steps of decoding to times of showing.
    duration_s = min(stored.duration_s, info.duration_s - start_s)
    held = ClipSpan(start_s=start_s, end_s=start_s + duration_s)
    stored = replace(stored, duration_s=duration_s, fps=stored.num_frames / duration_s)
    stored = replace(stored, container=container.name, audio_codec=info.audio_codec if sound else "")
    return Remuxed(file=out, span=held, info=stored, ext=container.ext)


def _measure(out: IO[bytes], info: VideoInfo, mp4: bool, limits: FfmpegLimits) -> VideoInfo:
    """What the written file holds, by its own bytes."""
    measured: dict[str, float | int] = {}
    if mp4:
        track = read_video_track(out)
        if track:
            measured = {"start_s": track.start_s, "duration_s": track.duration_s}
            measured |= {"num_packets": track.num_packets, "num_frames": track.num_frames}
    else:
        times = list_packets(out, 0, limits)
        measured = {"start_s": times.first_s, "duration_s": times.end_s - times.first_s}
        measured |= {"num_packets": times.num_packets, "num_frames": times.num_frames}
    if not measured or not measured["num_frames"] or not measured["duration_s"] > 0:
        raise BadVideo("corrupt", "the copied packets make no file in which a frame is shown")
    return replace(
        info,
        stream=0,
        is_first=True,
        fps=measured["num_frames"] / measured["duration_s"],
        **measured,  # type: ignore[arg-type]
    )


def _mp4_unit_hz(info: VideoInfo) -> int:
    """Times a second that the MP4 can tell apart: those of the source, or a multiple of them."""
    hz = info.unit_hz
    if not 0 < hz <= _MOST_MP4_HZ:
        return _USUAL_MP4_HZ
    while hz < _LEAST_MP4_HZ:
        hz *= 2
    return hz


def _end_words(info: VideoInfo, end_s: float, unit_hz: int, mp4: bool, sought: bool, whole: bool) -> list[str]:
    """Output options that end a copy at the timestamp `end_s`, and not before all frames up to there are in.

    The filters see times in the unit of the output; what they are told of it is the unit of the input.
    """
    end = round(end_s * unit_hz)
    stop = round((end_s - TOLERANCE_S) * unit_hz)
    # Register 0: the end was reached; 1: the latest begin so far. A packet that begins at the end or later is the first to
    # be left out, unless frames between may still come: it then leaps over them, and they follow.
    together = f"*gt(pts\\,ld(1))*gte(gte(ld(1)\\,{stop})+gte(ld(1)+1.5*duration\\,pts)\\,1)" if info.reorders else ""
    reached = f"max(ld(0)\\,gte(pts\\,{stop}){together})"
    # Frames shown before the keyframe that was found cannot be decoded without the one before it.
    leads = sought or info.num_packets > info.num_frames
    early = "lt(pts\\,startpts)*gt(pts\\,-1e18)" if leads else "0"
    video = f"noise=drop=max({early}\\,st(0\\,{reached})+0*st(1\\,max(ld(1)\\,pts)))"
    audio_hz = info.audio_hz if mp4 else _MATROSKA_HZ
    sound = ["-bsf:a", f"noise=drop=gte(pts\\,{round(end_s * audio_hz)})"] if audio_hz else []
    margin_s = 1.0 + _MOST_REORDERED / info.fps
    # The last picture stays to the end; one that begins after it, for the time of a frame.
    last = f"max(1\\,{end}-STARTPTS-DTS+STARTDTS)"
    # One tick is what ffmpeg states of many packets that were copied or stored out of order.
    usual = max(1, round(unit_hz / info.fps))
    frame = (
        f"if(gt(DURATION\\,{unit_hz / info.unit_hz if info.unit_hz else 1:.9g})\\,min(DURATION\\,{usual})\\,{usual})"
    )
    rest = f"if(gte(PTS\\,{stop})\\,{frame}\\,if(gt(abs(NEXT_DTS)\\,1e17)+isnan(NEXT_DTS)\\,{last}\\,{end}-PTS))"
    lasts = f"setts=pts=PTS:dts=DTS:duration={rest}"
    if whole:
        return ["-bsf:v", lasts]
    return ["-t", f"{end_s + margin_s:.9f}", "-bsf:v", f"{video},{lasts}", *sound]

"""One video to its clips: planned, cut out, scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import IO

from pipeline.analysis import Analyzer
from pipeline.clips import plan_clips
from pipeline.cut import Cut, CutSettings, too_short
from pipeline.errors import BadVideo, ConfigError
from pipeline.internal import as_bad_video
from pipeline.probe import VideoInfo, least_reach
from pipeline.quality import Scores, failed_threshold
from pipeline.remux import remux_span
from pipeline.schema import ClipSpan
from pipeline.scoring import Watch, watch_file
from pipeline.shots import encode_shots
from pipeline.transcode import transcode_span

_EXTENSIONS = {"mov": "mp4", "matroska": "mkv", "mpegts": "ts", "mpeg": "mpg"}


def cut_video(
    file: IO[bytes], info: VideoInfo, spans: Sequence[ClipSpan] | None, settings: CutSettings
) -> Iterator[Cut]:
    """One `Cut` for each planned clip, in order of their starts; a clip that fails costs itself alone.

    In mode shots with storage transcode, a video that breaks off while it is decoded gives one failed `Cut` for what is
    left of it: nobody knows how many shots that was.

    Args:
        file: the video, open and seekable; its descriptor is what ffmpeg reads.
        info: its probe. Where `needs_check` says so, `require_decodable` is the caller's to call before.
        spans: those of the manifest; None plans by `settings.clips`.

    Raises:
        BadVideo: the video fails as a whole, before any clip is known (shots).
    """
    check_storage(settings)
    for cut in _cut(file, info, spans, settings):
        try:
            yield cut
        finally:
            if cut.clip:
                cut.clip.close()


def needs_check(spans: Sequence[ClipSpan] | None, settings: CutSettings) -> bool:
    """Whether `cut_video` would not notice a video that was cut off. It does where it decodes a whole video to one clip."""
    decodes = settings.storage == "transcode" or settings.quality.score
    return spans is not None or settings.clips.mode not in ("whole", "manifest") or not decodes


def check_storage(settings: CutSettings) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: naming them.
    """
    if settings.storage not in ("copy", "remux", "transcode"):
        raise ConfigError(f"storage = {settings.storage!r}: allowed are copy, remux, transcode")
    if settings.storage == "copy" and settings.clips.mode != "whole":
        raise ConfigError(
            f"storage = copy keeps whole videos; clips.mode = {settings.clips.mode} needs storage = remux or transcode"
        )


def _cut(file: IO[bytes], info: VideoInfo, spans: Sequence[ClipSpan] | None, settings: CutSettings) -> Iterator[Cut]:
    if spans is None and settings.clips.mode == "shots":
        if settings.storage == "transcode":
            for shot in encode_shots(file, info, settings):
                yield _keep(replace(shot, filtered=too_short(shot.span, settings)), settings)
            return
        watched = watch_file(file, info, settings.clips.cut_threshold, settings.limits, settings.display)
        duration_s, frame_s = watched.num_frames / watched.rate_hz, 1 / watched.rate_hz
        spans = plan_clips(duration_s, settings.clips, watched.cuts_s, frame_s)
    else:
        watched = None
        last_stays_s = min(1 / info.fps, info.duration_s - info.last_s)
        planned = plan_clips(info.duration_s, settings.clips, frame_s=last_stays_s) if spans is None else spans
        spans = sorted(planned, key=_start)
    for span in spans:
        yield _cut_span(file, info, span, settings, watched)


def _cut_span(file: IO[bytes], info: VideoInfo, span: ClipSpan, settings: CutSettings, watched: Analyzer | None) -> Cut:
    cut = Cut(planned=span, span=span)
    try:
        if span.start_s >= info.duration_s:
            raise BadVideo(
                "corrupt",
                f"[{span.start_s:g}, {span.end_s:g}) s is beyond the end of the video, {info.duration_s:.3f} s",
            )
        if not watched:  # shots end where the frames do, which may be after the stated end
            cut = replace(cut, span=replace(span, end_s=min(span.end_s, info.duration_s)))
        if filtered := too_short(cut.span, settings):
            return replace(cut, filtered=filtered)
        if watched and settings.quality.score:
            cut = replace(cut, scores=watched.scores(span))
            if failed_threshold(cut.scores or {}, settings.quality.keep):
                return _keep(cut, settings)
        make = {"copy": _copy, "remux": _remux, "transcode": _transcode}[settings.storage]
        made = make(file, info, cut, settings)
        return _keep(made, settings)
    except Exception as error:
        return replace(cut, error=as_bad_video(error))


def _copy(file: IO[bytes], info: VideoInfo, cut: Cut, settings: CutSettings) -> Cut:
    if not info.is_first:
        # Whoever decodes the clip takes the first video stream: a copy would show another.
        return _remux(file, info, cut, settings, with_sound=True)
    scores = _score(file, info, cut, settings) if settings.quality.score else None
    file.seek(0)
    return replace(cut, info=info, ext=extension(info.container), scores=scores)


def _remux(file: IO[bytes], info: VideoInfo, cut: Cut, settings: CutSettings, with_sound: bool = False) -> Cut:
    made = remux_span(file, info, cut.span, settings.limits, file.seek(0, 2), with_sound or settings.audio)
    scores = cut.scores
    if settings.quality.score and scores is None:
        scores = _score(made.file, made.info, replace(cut, span=made.span), settings, info)
    made.file.seek(0)
    return replace(cut, span=made.span, clip=made.file, info=made.info, ext=made.ext, scores=scores)


def _transcode(file: IO[bytes], info: VideoInfo, cut: Cut, settings: CutSettings) -> Cut:
    span = cut.span
    watch, display = None, settings.display
    if settings.quality.score:
        watch = Watch(info, span.duration_s, settings.clips.cut_threshold, display=display)
    clip, stored = transcode_span(file, info, span, settings.transcode, settings.limits, settings.audio, watch, display)
    scores = watch.scores() if watch else None
    if _is_whole(span, info):
        _require_reach(stored.last_s + 1 / (settings.transcode.fps or info.fps), info)
    return replace(cut, clip=clip, info=stored, ext="mp4", scores=scores)


def _score(
    file: IO[bytes], info: VideoInfo, cut: Cut, settings: CutSettings, source: VideoInfo | None = None
) -> Scores:
    """Scores of a stored file, in a pass of its own, which checks a whole video (`source`) on the way."""
    part = replace(info, duration_s=cut.span.duration_s)
    watched = watch_file(file, part, settings.clips.cut_threshold, settings.limits, settings.display)
    end_s = watched.num_frames / watched.rate_hz
    if _is_whole(cut.planned, source or info):
        _require_reach(end_s, source or info)
    return watched.scores(ClipSpan(start_s=0.0, end_s=end_s))


def _is_whole(span: ClipSpan, info: VideoInfo) -> bool:
    return span.start_s <= 0 and span.end_s >= info.duration_s


def _require_reach(end_s: float, info: VideoInfo) -> None:
    # Not by the stated duration: the last picture may stay on screen for long.
    if end_s <= least_reach(info.last_s + 1 / info.fps, info.fps):
        raise BadVideo(
            "corrupt", f"states {info.duration_s:.3f} s, but its frames end at {end_s:.3f} s: cut off or damaged"
        )


def _keep(cut: Cut, settings: CutSettings) -> Cut:
    """The cut, without its file where it is filtered, or where a threshold filters it."""
    if cut.error:
        return cut
    filtered = cut.filtered
    if not filtered and cut.scores is not None:
        filtered = failed_threshold(cut.scores, settings.quality.keep)
    if not filtered:
        return cut
    if cut.clip:
        cut.clip.close()
    return replace(cut, clip=None, info=None, ext="", filtered=filtered)


def extension(container: str) -> str:
    """The file extension of a container, by ffprobe's name for it."""
    first = container.split(",")[0]
    return _EXTENSIONS.get(first, first)


def _start(span: ClipSpan) -> tuple[float, float]:
    return span.start_s, span.end_s

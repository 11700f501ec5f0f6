"""Videos of numbered frames for the matrix of containers, modes and properties: what can be made, and how ffmpeg makes it.

The truth about each video follows from how it was made: `Axis` says which frame is on screen at which instant, counted from
the first picture that a player shows.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.numbered import draw

DISPLAYED_PX = (128, 96)
"""Width and height as a player shows them, whatever the rotation and the shape of the pixels."""
FRAME_S = 0.04
"""A whole number of ticks of every container here, of which MP4 with a timescale of 25 and milliseconds are the coarsest."""
_NUM_FRAMES = 60
_GOP_FRAMES = 12
_HELD_FRAME, _HELD_S = 29, 1.0
_TRIMMED_FRAMES = 7
"""Not a keyframe: an edit list hides what comes before."""
_LATE_S = 0.8

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "container": ("mp4-600", "mp4-25", "mp4-1000", "mp4-90000", "mov", "mkv", "webm", "ts", "mpg", "avi", "flv", "ogv"),
    "rotation": ("0", "90", "180", "270"),
    "pixels": ("1:1", "2:1"),
    "timing": ("constant", "held", "trimmed", "late"),
    "sound": ("none", "equal", "leads", "outlasts"),
    "coding": ("plain", "b-frames", "open-gop"),
    "colour": ("601-tv", "709-tv", "2020-tv", "601-pc", "709-pc"),
    "depth": ("8", "10"),
    "scan": ("progressive", "interlaced"),
}
"""Property to its values; the first one is the plain one, which every container can have."""

_MP4 = ("mp4-600", "mp4-25", "mp4-1000", "mp4-90000")
_H264 = (*_MP4, "mov", "mkv", "ts", "flv")
_NOT_ROTATED = ("90", "180", "270")


def _all_but(*containers: str) -> tuple[str, ...]:
    return tuple(one for one in DIMENSIONS["container"] if one not in containers)


IMPOSSIBLE: tuple[tuple[str, dict[str, tuple[str, ...]]], ...] = (
    ("ffmpeg writes a rotation to MP4 and MOV alone", {"container": _all_but(*_MP4, "mov"), "rotation": _NOT_ROTATED}),
    ("only MP4 and MOV have edit lists", {"container": _all_but(*_MP4, "mov"), "timing": ("trimmed",)}),
    ("AVI, MPEG-PS and Ogg from ffmpeg have a constant rate", {"container": ("avi", "mpg", "ogv"), "timing": ("held",)}),
    ("AVI has no times, so no late start", {"container": ("avi",), "timing": ("late",)}),
    ("AVI has no times, so nothing leads", {"container": ("avi",), "sound": ("leads",)}),
    ("VP9 and Theora have no such frames", {"container": ("webm", "ogv"), "coding": ("b-frames", "open-gop")}),
    ("VP9 and Theora have no fields", {"container": ("webm", "ogv"), "scan": ("interlaced",)}),
    ("MPEG-4 part 2 and Theora state no matrix", {"container": ("avi", "ogv"), "colour": DIMENSIONS["colour"][1:]}),
    ("MPEG-2 has no full range", {"container": ("mpg",), "colour": ("601-pc", "709-pc")}),
    ("MPEG-2, MPEG-4 part 2 and Theora have 8 bit", {"container": ("mpg", "avi", "ogv"), "depth": ("10",)}),
    ("late is a start without sound before it; leads is the one with it", {"timing": ("late",), "sound": ("equal", "leads", "outlasts")}),
    ("the trimmed file is cut from one that begins together", {"timing": ("trimmed",), "sound": ("leads",)}),
)  # fmt: skip
"""(why, property to the values that do not go together)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSpec:
    """One value of each property of DIMENSIONS; the defaults are the plain ones."""

    container: str = "mp4-600"
    rotation: str = "0"
    pixels: str = "1:1"
    timing: str = "constant"
    sound: str = "none"
    coding: str = "plain"
    colour: str = "601-tv"
    depth: str = "8"
    scan: str = "progressive"

    def __str__(self) -> str:
        changed = [getattr(self, name) for name in list(DIMENSIONS)[1:] if getattr(self, name) != DIMENSIONS[name][0]]
        return " ".join([self.container, *(changed or ["plain"])])


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """Frame `numbers[i]` is on screen in [edges_s[i], edges_s[i + 1]); edges_s[0] is 0."""

    numbers: tuple[int, ...]
    edges_s: tuple[float, ...]

    @property
    def duration_s(self) -> float:
        return self.edges_s[-1]

    def at(self, instant_s: float) -> int:
        """The frame on screen at an instant; the last one beyond the end."""
        place = bisect.bisect_right(self.edges_s, instant_s) - 1
        return self.numbers[min(max(place, 0), len(self.numbers) - 1)]

    def within(self, start_s: float, end_s: float, slack_s: float) -> list[tuple[int, float]]:
        """(number, where it begins) of each frame on screen for more than `slack_s` in a span, from its start on."""
        spans = zip(self.numbers, itertools.pairwise(self.edges_s), strict=True)
        found = [(number, max(a, start_s), min(b, end_s)) for number, (a, b) in spans]
        return [(number, a) for number, a, b in found if b - a > slack_s]


def impossible(values: dict[str, str]) -> str:
    """Why ffmpeg, or the container, cannot have these values together; "" where they can. Not all need be given."""
    for why, group in IMPOSSIBLE:
        if all(values.get(name) in wanted for name, wanted in group.items()):
            return why
    return ""


def axis_of(spec: VideoSpec) -> Axis:
    first = _TRIMMED_FRAMES if spec.timing == "trimmed" else 0
    numbers = tuple(range(first, _NUM_FRAMES))
    begins = [
        FRAME_S * n + (_HELD_S if spec.timing == "held" and n > _HELD_FRAME else 0.0) for n in (*numbers, _NUM_FRAMES)
    ]
    return Axis(numbers=numbers, edges_s=tuple(begin - begins[0] for begin in begins))


def make_video(spec: VideoSpec, folder: Path) -> Path:
    """Encode the numbered frames as `spec` says."""
    extension = spec.container.partition("-")[0]
    path = folder / f"{str(spec).replace(' ', '_').replace(':', '')}.{extension}"
    if path.exists():
        return path
    lasts_s = _NUM_FRAMES * FRAME_S + _HELD_S * (spec.timing == "held")
    offset_s = _LATE_S if spec.timing == "late" or spec.sound == "leads" else 0.0
    width, height = DISPLAYED_PX
    command = [
        "-itsoffset",
        str(offset_s),
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{width}x{height}",
        "-r",
        "25",
        "-i",
        "-",
    ]
    if spec.sound != "none":
        seconds = lasts_s + offset_s + 0.7 * (spec.sound == "outlasts")
        command += ["-f", "lavfi", "-i", f"sine=sample_rate=44100:duration={seconds}", "-map", "0:v", "-map", "1:a"]
        command += [
            "-c:a",
            {"webm": "libopus", "ogv": "libvorbis", "mpg": "mp2", "avi": "mp2"}.get(spec.container, "aac"),
        ]
    command += ["-vf", ",".join(_filters(spec)), "-fps_mode", "vfr", "-threads", "1", *_codec_words(spec)]
    command += _timescale(spec)
    # ffmpeg cuts by an edit list, and notes a rotation, only where it copies.
    copied = spec.timing == "trimmed" or spec.rotation != "0"
    whole = path.with_name(f"whole-{path.name}") if copied else path
    _ffmpeg([*command, str(whole)], _frames())
    if copied:
        command = ["-ss", f"{_TRIMMED_FRAMES * FRAME_S:.3f}"] if spec.timing == "trimmed" else []
        command += ["-i", str(whole), "-map", "0", "-c", "copy", "-metadata:s:v:0", f"rotate={spec.rotation}"]
        # Copied packets last one tick in some timescales, and with them the last frame.
        lasts = ["-bsf:v", f"setts=pts=PTS:dts=DTS:duration={round(FRAME_S * int(_timescale(spec)[1]))}"]
        _ffmpeg([*command, *_timescale(spec), *lasts, str(path)])
        whole.unlink()
    return path


def _timescale(spec: VideoSpec) -> list[str]:
    ticks = {"mov": 600, **{container: int(container.partition("-")[2]) for container in _MP4}}.get(spec.container)
    return ["-video_track_timescale", str(ticks)] if ticks else []


def _filters(spec: VideoSpec) -> list[str]:
    """From frames as they are shown to frames as they are coded."""
    filters = {"0": [], "90": ["transpose=clock"], "180": ["hflip", "vflip"], "270": ["transpose=cclock"]}[
        spec.rotation
    ]
    matrix, _, levels = spec.colour.partition("-")
    narrow = "iw/2" if spec.pixels == "2:1" else "iw"
    filters = [
        *filters,
        f"scale={narrow}:ih:out_color_matrix=bt{matrix}:out_range={levels}:flags=area+accurate_rnd+full_chroma_inp",
    ]
    filters += [f"format=yuv420p{'10le' if spec.depth == '10' else ''}", f"setsar={spec.pixels.replace(':', '/')}"]
    if spec.timing == "held":
        filters.append(f"setpts=PTS+if(gt(N\\,{_HELD_FRAME})\\,{_HELD_S}/TB\\,0)")
    if spec.scan == "interlaced":
        filters.append("setfield=tff")
    return filters


def _codec_words(spec: VideoSpec) -> list[str]:
    matrix, _, levels = spec.colour.partition("-")
    tags = {"601": "smpte170m", "709": "bt709", "2020": "bt2020nc"}
    words = ["-g", str(_GOP_FRAMES), "-colorspace", tags[matrix], "-color_range", levels]
    b_frames = {"plain": "0", "b-frames": "2", "open-gop": "2"}[spec.coding]
    fields = ["-flags", "+ildct+ilme"] if spec.scan == "interlaced" else []
    if spec.container in _H264:
        options = f"open-gop={int(spec.coding == 'open-gop')}:scenecut=0:keyint={_GOP_FRAMES}:min-keyint={_GOP_FRAMES}"
        options += ":tff=1" if fields else ""
        return [
            *words,
            *fields,
            "-c:v",
            "libx264",
            "-preset",
            "ultrafast",
            "-crf",
            "16",
            "-bf",
            b_frames,
            "-x264-params",
            options,
        ]
    if spec.container in ("mpg", "avi"):
        words += ["-c:v", "mpeg2video" if spec.container == "mpg" else "mpeg4", "-q:v", "2", "-bf", b_frames]
        closed = "+cgop" if spec.coding == "b-frames" else ""
        return [*words, "-sc_threshold", "1000000000", "-flags", f"{'+ildct+ilme' if fields else ''}{closed}" or "0"]
    if spec.container == "webm":
        return [*words, "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "0", "-crf", "16"]
    return [*words, "-c:v", "libtheora", "-q:v", "9"]


@functools.cache
def _frames() -> bytes:
    return np.stack([draw(number, *DISPLAYED_PX) for number in range(_NUM_FRAMES)]).tobytes()


def _ffmpeg(words: list[str], data: bytes = b"") -> None:
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", "-fflags", "+bitexact", *words]
    if data:
        command.remove("-nostdin")
    done = subprocess.run(command, input=data, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, (command, done.stderr.decode()[-2000:])

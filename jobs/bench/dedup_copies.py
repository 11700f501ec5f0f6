"""Copies of real videos that ought to be found: encoded anew, scaled, cropped, shifted, letterboxed, brightened."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError

ORIGINAL = "original"


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyKind:
    """How a copy is made: an ffmpeg filter, and options of the encoder. `start_s` of the original are left out at its start."""

    picture: str = ""
    code: tuple[str, ...] = ("-c:v", "libx264", "-crf", "26")
    start_s: float = 0.0


_LOW_RATE = ("-c:v", "libx264", "-crf", "36")
_OLD_CODEC = ("-c:v", "mpeg4", "-q:v", "8")
COPY_KINDS = {
    ORIGINAL: CopyKind(code=("-c:v", "libx264", "-crf", "18")),
    "low-rate": CopyKind(code=_LOW_RATE),
    "half-size": CopyKind(picture="scale=trunc(iw/4)*2:trunc(ih/4)*2", code=_OLD_CODEC),
    "crop-5": CopyKind(picture="crop=iw*0.9:ih*0.9"),
    "crop-10": CopyKind(picture="crop=iw*0.8:ih*0.8"),
    "crop-15": CopyKind(picture="crop=iw*0.7:ih*0.7"),
    "shift": CopyKind(start_s=2.6),
    "letterbox": CopyKind(picture="pad=iw:ceil(ih*0.6)*2:-1:-1"),
    "brighter": CopyKind(picture="eq=brightness=0.06:contrast=1.1"),
    "mixed": CopyKind(picture="crop=iw*0.85:ih*0.85:iw*0.1:ih*0.05", code=_LOW_RATE, start_s=1.7),
}
"""Name to kind. crop-N takes N % off each side; mixed crops off centre, shifts and encodes at a low rate."""

_SHORT_SIDE_PX = 240


def make_copies(videos: Path, out: Path, max_s: float) -> list[Path]:
    """Write `VIDEO.KIND.mp4` into `out` for every kind and every video below the folder `videos`, and return the originals.

    A video's name is its path with `+` for `/`. Each is decoded once; its copies start from `_SHORT_SIDE_PX` lines.

    Args:
        max_s: seconds of each video that are used, from its start.

    Raises:
        ConfigError: there is no video, or ffmpeg cannot read one.
    """
    files = sorted(path for path in videos.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise ConfigError(f"videos = {videos}: no file there; give a folder of videos")
    out.mkdir(parents=True, exist_ok=True)
    names = ["+".join(path.relative_to(videos).with_suffix("").parts) for path in files]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda file, name: _copy_one(file, out, name, max_s), files, names))
    return [out / f"{name}.{ORIGINAL}.mp4" for name in names]


def _copy_one(video: Path, out: Path, name: str, max_s: float) -> None:
    side = f"'if(lt(iw,ih),{_SHORT_SIDE_PX},-2)':'if(lt(iw,ih),-2,{_SHORT_SIDE_PX})'"
    outputs = "".join(f"[from{n}]" for n in range(len(COPY_KINDS)))
    graph = [f"[0:V:0]trim=end={max_s},scale={side},format=yuv420p,split={len(COPY_KINDS)}{outputs}"]
    words: list[str] = []
    for n, (kind, how) in enumerate(COPY_KINDS.items()):
        steps = [f"trim=start={how.start_s},setpts=PTS-STARTPTS", how.picture, "scale=trunc(iw/2)*2:trunc(ih/2)*2"]
        graph.append(f"[from{n}]{','.join(filter(None, steps))}[to{n}]")
        words += ["-map", f"[to{n}]", *how.code, *(["-preset", "veryfast"] if "libx264" in how.code else [])]
        words += ["-threads", "1", str(out / f"{name}.{kind}.mp4")]
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-nostdin",
        "-y",
        "-i",
        f"file:{video}",
        "-filter_complex",
        ";".join(graph),
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{video}: ffmpeg cannot make copies of it: {done.stderr[-300:]}")

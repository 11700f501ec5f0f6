"""The cells of the matrix (a video, a way to store it, a rate of frames), and whether what comes out is what a player shows.

What is stored is read by plain ffmpeg from the bytes in the tars, what is tokenized by the product's decoder; neither is
asked when which frame is due.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.clips import ClipConfig
from pipeline.decode import FrameConfig
from pipeline.schema import Reject, VideoRef
from pipeline.sharding import ShardSettings, write_clip_shard
from pipeline.shards import read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clip
from pipeline.transcode import TranscodeConfig
from tests.numbered import read
from tests.pipeline.axis_inputs import (
    DIMENSIONS,
    DISPLAYED_PX,
    FRAME_S,
    Axis,
    VideoSpec,
    axis_of,
    impossible,
    make_video,
)

_SPAN_S = (0.53, 1.37)
"""Of a manifest; neither end is where a frame begins or ends."""
_CLIPS = {
    "whole": ClipConfig(),
    "window": ClipConfig(mode="window", window_s=1.6),
    # The changing bits of the numbers would be cuts.
    "shots": ClipConfig(mode="shots", cut_threshold=0.95, max_s=1.6),
    "manifest": ClipConfig(mode="manifest"),
}
MODES = ("copy whole", *(f"{storage} {clips}" for storage in ("remux", "transcode") for clips in _CLIPS))
"""Storage and clips; copy keeps whole videos alone."""
RATES_HZ = ("4", "7", "12.5")
"""Of the frames for tokenize."""
_ALL = {**DIMENSIONS, "mode": MODES, "rate_hz": RATES_HZ}
_ROUNDING_S = 0.0015
"""What containers round times to (1 ms), and a little."""
_MAX_COLOUR_ERROR = 14
"""In 0..255. Coding costs up to 10 here; a wrong matrix 20 and more, a wrong range as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One cell of the matrix: how a video was made, how it is stored, how many frames a second are tokenized."""

    video: VideoSpec
    mode: str
    rate_hz: str

    def __str__(self) -> str:
        return f"{self.video}, {self.mode}, {self.rate_hz} Hz"


def single_cells(containers: Iterable[str], modes: Iterable[str]) -> Iterator[Cell]:
    """Every value of every property alone, in each of these containers that can have it, in each of these modes."""
    rates = itertools.cycle(RATES_HZ)
    for container, mode in itertools.product(containers, modes):
        plain = {name: values[0] for name, values in DIMENSIONS.items()} | {"container": container}
        yield _cell({**plain, "mode": mode, "rate_hz": next(rates)})
        for name, values in list(DIMENSIONS.items())[1:]:
            for value in values[1:]:
                if not impossible({**plain, name: value}):
                    yield _cell({**plain, name: value, "mode": mode, "rate_hz": next(rates)})


def pair_cells() -> list[Cell]:
    """Few cells in which every two values of two properties, of containers, modes and rates, that can meet do meet.

    Greedy, and the same in every run: the first pair that is still due begins a cell, and each other property gets the value
    that meets most pairs that are due.
    """
    order = list(_ALL)
    due = {
        ((a, x), (b, y)): None
        for a, b in itertools.combinations(order, 2)
        for x in _ALL[a]
        for y in _ALL[b]
        if _container_for({a: x, b: y})
    }
    cells = []
    while due:
        values = dict(next(iter(due)))
        for name in sorted(set(order) - set(values), key=order.index):  # the container first
            possible = [value for value in _ALL[name] if _container_for({**values, name: value})]
            values[name] = max(
                possible, key=lambda value: sum(pair in due for pair in _pairs(values, name, value, order))
            )
        for pair in itertools.combinations(((name, values[name]) for name in order), 2):
            due.pop(pair, None)
        cells.append(_cell(values))
    return cells


def draw_cell(draw: random.Random) -> Cell:
    """Any cell that can be made; the container is drawn first, each other property from what goes with those before it."""
    values: dict[str, str] = {}
    for name, choices in _ALL.items():
        values[name] = draw.choice([one for one in choices if _container_for({**values, name: one})])
    return _cell(values)


def _pairs(values: dict[str, str], name: str, value: str, order: list[str]) -> Iterator[Any]:
    for other, chosen in values.items():
        yield tuple(sorted([(name, value), (other, chosen)], key=lambda one: order.index(one[0])))


def _container_for(values: dict[str, str]) -> bool:
    """Whether some container can have these values (the others plain)."""
    plain = {name: choices[0] for name, choices in DIMENSIONS.items()} | values
    containers = [values["container"]] if "container" in values else DIMENSIONS["container"]
    return any(not impossible({**plain, "container": one}) for one in containers)


def _cell(values: dict[str, str]) -> Cell:
    video = VideoSpec(**{name: values[name] for name in DIMENSIONS})
    return Cell(video=video, mode=values["mode"], rate_hz=values["rate_hz"])


def check_cell(cell: Cell, videos: Path, out: Path) -> list[str]:
    """What is wrong with the clips that the cell's video becomes, a line each; none is how it should be."""
    storage, _, clips = cell.mode.partition(" ")
    path, axis = make_video(cell.video, videos), axis_of(cell.video)
    settings = ShardSettings(
        storage=storage,  # type: ignore[arg-type]
        clips=_CLIPS[clips],
        transcode=TranscodeConfig(short_side_px=96, crf=16),
        val_fraction=0,
    )
    span = dict(zip(("start_s", "end_s"), _SPAN_S, strict=True)) if clips == "manifest" else {}
    ref = VideoRef(path=path.name, size_bytes=path.stat().st_size, **span)
    write_clip_shard(Store.at(out), "f" * 32, 0, Store.at(videos), [ref], settings)
    rejects = [one for file in out.glob("rejects/*.parquet") for one in pq.read_table(file).to_pylist()]
    # The times of MPEG-PS do not survive a copy of a part.
    refused = storage == "remux" and clips != "whole" and cell.video.container == "mpg"
    found = [
        f"rejected as {one['reject_class']}: {one['reason']}"
        for one in rejects
        if not (refused and one["reject_class"] == "unsupported" and "MPEG-PS" in one["reason"])
    ]
    rows = sorted(read_shard_rows(Store.at(out), 0), key=lambda row: row["start_s"])
    if refused:
        starts_s = [row["start_s"] for row in rows]
        found += [] if starts_s == [0] * (clips != "manifest") and rejects else [f"clips from {starts_s} s are kept"]
    else:
        found += _check_spans(rows, axis, storage, clips)
    for row in rows:
        wrong = [*_check_stored(row, _payload(out, row), axis), *_check_tokenized(row, out, axis, float(cell.rate_hz))]
        found += [f"[{row['start_s']:.3f}, {row['end_s']:.3f}): {one}" for one in wrong]
    return found


def _payload(out: Path, row: dict[str, Any]) -> bytes:
    for file in sorted(out.glob("shards/*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name == f"{row['key']}.{row['ext']}" and (data := tar.extractfile(member)):
                    return data.read()
    raise AssertionError(f"no tar holds {row['key']}.{row['ext']}")


def _check_spans(rows: list[dict[str, Any]], axis: Axis, storage: str, clips: str) -> Iterator[str]:
    """The spans cover what was asked for: all of the video without a gap, or the span of a manifest."""
    spans = [(row["start_s"], row["end_s"]) for row in rows]
    said = ", ".join(f"[{a:.3f}, {b:.3f})" for a, b in spans)
    if clips == "manifest":
        wanted = [_SPAN_S]
    elif clips == "whole":
        wanted = [(0.0, axis.duration_s)]
    else:
        edges = [
            *(edge for edge in (0.0, 1.6) if edge < axis.duration_s - FRAME_S),
            *((3.2,) if axis.duration_s > 3.2 + FRAME_S else ()),
            axis.duration_s,
        ]
        wanted = list(itertools.pairwise(edges))
    if len(spans) != len(wanted):
        yield f"clips {said or 'none'} where {len(wanted)} are due"
        return
    for (start_s, end_s), (first_s, last_s) in zip(spans, wanted, strict=True):
        early = (
            storage == "remux"
        )  # from the keyframe before, and to the end of a frame, or of those stored out of order
        if not (start_s <= first_s + _ROUNDING_S if early else abs(start_s - first_s) < _ROUNDING_S):
            yield f"clips {said}: one starts at {start_s:.3f} s, due is {first_s:.3f} s"
        if not (end_s >= last_s - FRAME_S / 2 if early else abs(end_s - last_s) < FRAME_S / 2 + _ROUNDING_S):
            yield f"clips {said}: one ends at {end_s:.3f} s, due is {last_s:.3f} s"


def _check_stored(row: dict[str, Any], data: bytes, axis: Axis) -> Iterator[str]:
    """What plain ffmpeg shows of the stored bytes is what the source shows in that span, and the index says so."""
    with tempfile.NamedTemporaryFile(suffix=f".{row['ext']}") as clip:
        clip.write(data)
        clip.flush()
        try:
            times_s, frames, num_packets = _look(Path(clip.name))
        except subprocess.CalledProcessError as error:
            yield f"plain ffmpeg refuses the clip: {error.stderr.decode(errors='replace').strip()[-300:]}"
            return
    if not times_s:
        yield "plain ffmpeg shows no frame"
        return
    seen = [read(frame) for frame in frames]
    numbers = [number for number, _ in seen]
    shown = [(number, row["start_s"] + time_s) for number, time_s in zip(numbers, times_s, strict=True)]
    shown = [shown[0], *(now for before, now in itertools.pairwise(shown) if now[0] != before[0])]
    wanted = axis.within(row["start_s"], row["end_s"], 2 * _ROUNDING_S)
    if [number for number, _ in shown] != [number for number, _ in wanted]:
        yield f"shows {_brief([number for number, _ in shown])}, due are {_brief([number for number, _ in wanted])}"
    else:
        late = [(number, at_s - due_s) for (number, at_s), (_, due_s) in zip(shown, wanted, strict=True)]
        if off := [one for one in late if abs(one[1]) > _ROUNDING_S]:
            yield f"{len(off)} frames at another time, frame {off[0][0]} by {off[0][1]:+.4f} s"
    if row["num_frames"] != len(frames):
        yield f"the index says {row['num_frames']} frames, plain ffmpeg shows {len(frames)}"
    if "num_packets" in row and row["num_packets"] != num_packets:
        yield f"the index says {row['num_packets']} packets, ffprobe counts {num_packets}"
    if (row["width"], row["height"]) != DISPLAYED_PX:
        yield f"the index says {row['width']} x {row['height']}, a player shows {DISPLAYED_PX[0]} x {DISPLAYED_PX[1]}"
    if (error := max(error for _, error in seen)) > _MAX_COLOUR_ERROR:
        yield f"colours are off by {error:.0f}"


def _check_tokenized(row: dict[str, Any], out: Path, axis: Axis, rate_hz: float) -> Iterator[str]:
    """Frame k is the last one that begins by start + k / rate + 1 ms, for every k with k / rate < duration."""
    settings = TokenizeSettings(frames=FrameConfig(fps=rate_hz, size_px=96))
    frames = decode_clip(Store.at(out), row, settings)
    if isinstance(frames, Reject):
        yield f"tokenize rejects it as {frames.reject_class}: {frames.reason}"
        return
    seen = [read(frame) for frame in frames]
    duration_s = row["end_s"] - row["start_s"]
    num_due = max(1, sum(k / rate_hz < duration_s - 1e-6 for k in range(1000)))
    due = [axis.at(row["start_s"] + k / rate_hz + 1e-3) for k in range(num_due)]
    if [number for number, _ in seen] != due:
        yield f"at {rate_hz:g} Hz {[number for number, _ in seen]}, due are {due}"
    if (error := max(error for _, error in seen)) > _MAX_COLOUR_ERROR:
        yield f"at {rate_hz:g} Hz colours are off by {error:.0f}"


def _look(path: Path) -> tuple[list[float], np.ndarray, int]:
    """What plain ffmpeg shows of a video: the seconds at which each frame comes after the first one, the frames (t h w c) as a
    player shows them, and ffprobe's count of the packets."""
    width, height = DISPLAYED_PX
    filters = f"[0:V:0]split[a][b];[a]scale=16:16[times];[b]scale=trunc(iw*sar/2)*2:ih,setsar=1,scale={width}:{height}[pictures]"
    with tempfile.NamedTemporaryFile() as times:
        command = ["ffmpeg", "-v", "error", "-nostdin", "-y", "-i", str(path), "-filter_complex", filters]
        command += ["-map", "[times]", "-fps_mode", "passthrough", "-enc_time_base", "-1", "-f", "framecrc", times.name]
        command += ["-map", "[pictures]", "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
        raw = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
        lines = Path(times.name).read_text().splitlines()
    (base,) = [line.partition(": ")[2] for line in lines if line.startswith("#tb 0")] or ["1/1"]
    over, under = (int(part) for part in base.split("/"))
    ticks = [int(line.split(",")[2]) for line in lines if line and line[0] != "#"]
    probe = [
        "ffprobe",
        "-v",
        "error",
        "-select_streams",
        "V:0",
        "-count_packets",
        "-show_entries",
        "stream=nb_read_packets",
        "-of",
        "json",
        str(path),
    ]
    streams = json.loads(subprocess.run(probe, capture_output=True, timeout=60, check=True).stdout)["streams"]
    frames = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    return [(tick - ticks[0]) * over / under for tick in ticks], frames, int(streams[0]["nb_read_packets"])


def _brief(numbers: list[int | None]) -> str:
    """1-5 8 for 1 2 3 4 5 8."""
    parts: list[list[int | None]] = []
    for number in numbers:
        if parts and number is not None and parts[-1][-1] is not None and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return " ".join("-".join("?" if one is None else str(one) for one in part) for part in parts)

"""Video files to frames."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import ffmpeg as ffmpeg_python
import numpy as np

from pipeline import ffmpeg
from pipeline.display import PLAIN, DisplayConfig, Picture, deinterlacing, tone_mapping
from pipeline.errors import BadVideo, ConfigError
from pipeline.ffmpeg import FfmpegLimits, Pipe, Process
from pipeline.packets import CopiedPackets
from pipeline.probe import VideoInfo, least_reach
from pipeline.sampling import PICKS, num_shown, sampling_filters
from pipeline.scoring import SCALE_FLAGS
from pipeline.views import Crop

_DECODING: dict[str, list[str]] = {"exact": [], "fast": ["-skip_frame", "noref", "-skip_loop_filter", "all"]}
# Passed through: at a constant rate ffmpeg would put copies before a first frame that does not begin at 0.
_RAW_RGB = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-threads", "1")
# Along the longer side; a square frame counts as upright.
_PLACES = {
    "start": ":if(gt(iw\\,ih)\\,0\\,(iw-ow)/2):if(gt(iw\\,ih)\\,(ih-oh)/2\\,0)",
    "center": "",
    "end": ":if(gt(iw\\,ih)\\,iw-ow\\,(iw-ow)/2):if(gt(iw\\,ih)\\,(ih-oh)/2\\,ih-oh)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameConfig:
    """Which frames a model sees: `fps` -> shorter side to `size_px` -> centre crop."""

    fps: float = 2.0
    """Frames per second."""
    start_s: float = 0.0
    """Seconds of the clip before the first frame: the phase of the frames."""
    pick: Literal["shown", "nearest"] = "shown"
    """Which picture frame k is. shown: the one on screen at start_s + k / fps. nearest: the one that ffmpeg's own rounding
    gives, as most published code decodes; it may begin up to half an interval later."""
    size_px: int = 128
    """Side of the square crop in pixels; the shorter side of the video is scaled to it."""
    decode: Literal["exact", "fast"] = "exact"
    """exact: every frame as the codec defines it. fast: frames that no other frame needs are left out, and the loop
    filter with them: quicker, a little off, and another dataset. `tokenreel bench decode` measures both."""

    display: DisplayConfig = field(default_factory=DisplayConfig)
    """Of clips that were copied or remuxed; a transcoded clip is as the shard job's display has made it."""

    def __post_init__(self) -> None:
        if not 0 < self.fps < math.inf:
            raise ConfigError(f"frames.fps = {self.fps}: must be more than 0, and finite")
        if not 0 <= self.start_s < math.inf:
            raise ConfigError(f"frames.start_s = {self.start_s}: must be 0 or more, and finite")
        if self.pick not in PICKS:
            raise ConfigError(f"frames.pick = {self.pick!r}: allowed are {', '.join(PICKS)}")
        if self.size_px < 8 or self.size_px % 8:
            raise ConfigError(f"frames.size_px = {self.size_px}: must be a multiple of 8 px")
        if self.decode not in ("exact", "fast"):
            raise ConfigError(f"frames.decode = {self.decode!r}: allowed are exact, fast")


def decode_frames(
    source: IO[bytes], duration_s: float, config: FrameConfig, limits: FfmpegLimits, picture: Picture = PLAIN
) -> np.ndarray:
    """Frames of a whole clip as uint8 RGB (t h w c), at `config.fps` from `config.start_s` on; see `iter_frames`."""
    crop = Crop(size_px=config.size_px, scaled_px=config.size_px)
    ((frames,),) = iter_frames(source, duration_s, config, [crop], limits, picture=picture)
    return frames


def iter_frames(
    source: IO[bytes],
    duration_s: float,
    config: FrameConfig,
    crops: Sequence[Crop],
    limits: FfmpegLimits,
    max_frames: int | None = None,
    picture: Picture = PLAIN,
) -> Iterator[list[np.ndarray]]:
    """Several crops of the frames of a clip from one decode, at `config.fps` from `config.start_s` on.

    A crop's pixels do not depend on which others are asked for.

    Args:
        duration_s: what the probe said; more than about this many frames is refused as `too-large`.
        max_frames: frames that are held and yielded at a time; None: all at once.
        picture: what the index says of the stored pictures.

    Yields:
        uint8 RGB (t h w c), one array for each of `crops` with the same t: `max_frames`, and at the end the rest.

    Raises:
        BadVideo: the clip cannot be decoded, or holds no frame; frames may have been yielded before.
    """
    # Rates are rarely exact, so a second's worth of slack stands between an honest file and an endless one.
    most_frames = math.ceil((duration_s + 1.0) * config.fps) + 1
    most_shown = num_shown(duration_s, config.start_s, config.fps) if config.pick == "shown" else 0
    frame_bytes = [crop.size_px**2 * 3 for crop in crops]
    # Many times over by a change of size, which has a message of its own.
    pipes = [Pipe((100 * most_shown or most_frames) * size) for size in frame_bytes]
    place_of = {pipe: place for place, pipe in enumerate(pipes)}
    held = [bytearray() for _ in crops]  # they grow in place, so that frames are held once
    num_frames = 0

    def take(count: int) -> list[np.ndarray]:
        nonlocal num_frames
        num_frames += count
        taken = []
        for place, (crop, size) in enumerate(zip(crops, frame_bytes, strict=True)):
            whole, held[place] = held[place], held[place][count * size :]
            del whole[count * size :]
            taken.append(np.frombuffer(whole, np.uint8).reshape(count, crop.size_px, crop.size_px, 3))
        return taken

    command = _crops_command(source, duration_s, config, crops, pipes, picture, limits)
    with Process(command, [source], limits, pipes=pipes) as process:
        for pipe, chunk in process.read():
            place = place_of[pipe]
            held[place] += chunk
            if most_shown and num_frames + len(held[place]) // frame_bytes[place] > most_shown:
                # ffmpeg makes its filters anew for pictures of another size, and they begin from 0 again.
                raise BadVideo("unsupported", f"the size of its pictures changes midway: {ffmpeg.SPLIT_FIRST}")
            while max_frames and all(
                len(data) >= max_frames * size for data, size in zip(held, frame_bytes, strict=True)
            ):
                yield take(max_frames)
        process.finish()
    if rest := min(len(data) // size for data, size in zip(held, frame_bytes, strict=True)):
        yield take(rest)
    if not num_frames:
        raise BadVideo("corrupt", "not one frame could be decoded")


def _crops_command(
    source: IO[bytes],
    duration_s: float,
    config: FrameConfig,
    crops: Sequence[Crop],
    pipes: Sequence[Pipe],
    picture: Picture,
    limits: FfmpegLimits,
) -> list[str]:
    short = (duration_s - config.start_s) * config.fps < 1
    sizes = list(dict.fromkeys(crop.scaled_px for crop in crops))
    sampling = sampling_filters(config.fps, config.start_s, config.pick, short, duration_s=duration_s)
    first = ",".join([sampling, *deinterlacing(picture, config.display)])
    tone = "".join(f"{word}," for word in tone_mapping(picture, config.display, "gbrp"))
    graph = [f"[0:V:0]{first},{_split('size', len(sizes))}"]
    outputs: list[str] = []
    for number, size in enumerate(sizes):
        mine = [(crop, pipe) for crop, pipe in zip(crops, pipes, strict=True) if crop.scaled_px == size]
        # The shorter side, of square pixels; rounded as force_original_aspect_ratio=increase does.
        wide, high = f"max({size}\\,round({size}*iw*sar/ih))", f"max({size}\\,round({size}*ih/(iw*sar)))"
        scale = f"scale={wide}:{high}:flags={SCALE_FLAGS}"
        graph.append(f"[size{number}]{scale},{tone}{_split(f'crop{number}_', len(mine))}")
        for place, (crop, pipe) in enumerate(mine):
            label = f"crop{number}_{place}"
            graph.append(f"[{label}]crop={crop.size_px}:{crop.size_px}{_PLACES[crop.place]}[{label}_]")
            outputs += ["-map", f"[{label}_]", *_RAW_RGB, pipe.url]
    words = [*ffmpeg.command(), *ffmpeg.input_words(limits), *_DECODING[config.decode]]
    return [*words, "-i", ffmpeg.source_url(source), "-filter_complex", ";".join(graph), *outputs]


def _split(label: str, count: int) -> str:
    return f"split={count}" + "".join(f"[{label}{number}]" for number in range(count))


def require_decodable(source: IO[bytes], info: VideoInfo, limits: FfmpegLimits) -> None:
    """Check that the video goes on to nine tenths of its stated duration, or two frames before its end.

    Finds files that were cut off, or whose data is not what the header says, not single frames that are damaged: for that
    all would have to be decoded, which scoring and transcoding do. A duration overstated by less than a
    tenth, which is common, passes. Costs nothing where the probe has decoded a keyframe that late, else a seek: the keyframe there is decoded, and the
    packets after it are listed.
    Only a file that fails this (some codecs cannot start between keyframes that their container does not mark) is
    decoded from its start.

    Raises:
        BadVideo: `corrupt`, or a limit was exceeded.
    """
    start_s = least_reach(info.duration_s, info.fps)
    if info.decoded_at_s >= start_s:
        return
    try:
        if _reaches(source, info, start_s, limits):
            return
    except BadVideo as bad:
        if bad.reject_class != "corrupt":
            raise
    if not _has_frame(_open(source, info.stream, limits), start_s + info.start_s, source, limits):
        raise BadVideo(
            "corrupt",
            f"states {info.duration_s:.3f} s, but holds no frame from {start_s:.3f} s on: cut off or damaged",
        )


def _reaches(source: IO[bytes], info: VideoInfo, start_s: float, limits: FfmpegLimits) -> bool:
    """Whether the last keyframe before `start_s` decodes, and a packet of that time or later is there."""
    # Frames in between are not decoded: there may be hundreds, and to trust each of them all would have to be.
    at_s, video = start_s + info.start_s, f"0:{info.stream}"
    seek = ["-skip_frame", "nokey", "-noaccurate_seek", "-ss", f"{at_s - info.container_start_s:.9f}", "-copyts"]
    times, picture = CopiedPackets((info.duration_s + 1) * info.fps * 4), Pipe(16 * 16)
    pixels = ["-frames:v", "1", "-vf", "scale=16:16", "-f", "rawvideo", "-pix_fmt", "gray", picture.url]
    command = [*ffmpeg.command(), *ffmpeg.input_words(limits), *seek, "-i", ffmpeg.source_url(source)]
    command += ["-map", video, *pixels, "-map", video, *times.output()]
    with Process(command, [source], limits, pipes=[picture, times.pipe]) as process:
        for pipe, chunk in process.read():
            if pipe is times.pipe:
                times.take(chunk)
            if picture.size and times.num_packets and times.end_s > at_s:
                return True
        process.finish()
    return False


def open_bytes(data: bytes) -> IO[bytes]:
    """`data` as an open file that ffmpeg can seek in; it has no name and goes away with its descriptor."""
    file = ffmpeg.open_unnamed(len(data))
    file.write(data)
    file.flush()
    return file


def _has_frame(stream: Any, start_s: float, source: IO[bytes], limits: FfmpegLimits) -> bool:
    stream = stream.filter("trim", start=start_s).filter("scale", 16, 16)
    command = stream.output("pipe:", format="rawvideo", pix_fmt="gray", vframes=1, **{"threads": 1}).compile()
    return bool(ffmpeg.run(_quiet(command), source, limits, max_output_bytes=16 * 16))


def _open(source: IO[bytes], stream: int, limits: FfmpegLimits) -> Any:
    return ffmpeg_python.input(ffmpeg.source_url(source), copyts=None, **ffmpeg.input_options(limits))[str(stream)]


def _quiet(command: list[str]) -> list[str]:
    return [*ffmpeg.command(), *command[1:]]

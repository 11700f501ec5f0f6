"""From stored pictures to pictures as displayed: progressive, of standard dynamic range, in their own tagged colours.

(Turning is ffmpeg's own work, and pixels are made square where a video is scaled.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.errors import ConfigError

_HDR = {"smpte2084": "pq", "arib-std-b67": "hlg"}
_FLAGGING_CODECS = ("dnxhd", "dvvideo", "ffv1", "h264", "hevc", "mpeg2video", "mpeg4", "prores", "vc1", "wmv3")
"""Codecs whose every picture says whether it is interlaced: some of a stream are, others not."""
_MATRICES = ("gbr", "bt709", "fcc", "bt470bg", "smpte170m", "smpte240m", "ycgco", "bt2020nc", "bt2020c", "ictcp")
_PRIMARIES = (
    "bt709",
    "bt470m",
    "bt470bg",
    "smpte170m",
    "smpte240m",
    "film",
    "bt2020",
    "smpte428",
    "smpte431",
    "smpte432",
)
_TRANSFERS = (
    *("bt709", "bt470m", "bt470bg", "smpte170m", "smpte240m", "linear", "log100", "log316", "iec61966-2-4", "bt1361e"),
    *("iec61966-2-1", "bt2020-10", "bt2020-12", "smpte2084", "smpte428", "arib-std-b67"),
)
_RGB = ("rgb", "bgr", "gbr", "0rgb", "0bgr", "argb", "abgr", "pal8", "x2rgb", "x2bgr")

WHITE_NITS = 203.0
"""What becomes white of standard dynamic range, but for the room that highlights need: the reference white of BT.2408."""
PEAK_NITS = 1000.0
"""What becomes the brightest white; all above it does too."""
KNEE = 0.7
"""Share of the range of linear light below which nothing is compressed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DisplayConfig:
    """What is done with pictures that a common screen cannot show as they are stored."""

    interlaced: Literal["deinterlace", "keep"] = "deinterlace"
    """deinterlace: pictures that are flagged as interlaced become progressive, each made of its first field. keep: both
    fields stay in one picture, with combs where something moves."""
    hdr: Literal["tone-map", "keep"] = "tone-map"
    """tone-map: video of high dynamic range (PQ, HLG) becomes BT.709: light up to 142 cd/m2 keeps its brightness, the rest up
    to 1,000 is compressed. keep: its values are taken as they are, which looks flat and grey."""

    def __post_init__(self) -> None:
        if self.interlaced not in ("deinterlace", "keep"):
            raise ConfigError(f"display.interlaced = {self.interlaced!r}: allowed are deinterlace, keep")
        if self.hdr not in ("tone-map", "keep"):
            raise ConfigError(f"display.hdr = {self.hdr!r}: allowed are tone-map, keep")


AS_DISPLAYED = DisplayConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """What a stream states of its pictures.

    scan: progressive; interlaced, as each picture's flag has it; or by the container alone interlaced-tff or
        interlaced-bff, the top or the bottom field first.
    matrix, primaries, transfer: by ffmpeg's names, "unknown" where nothing is stated; matrix is gbr for RGB.
    color_range: tv, pc or unknown.
    is_square: whether pixels are as wide as they are high.
    is_turned: whether the container turns or mirrors them.
    """

    scan: str = "progressive"
    matrix: str = "unknown"
    primaries: str = "unknown"
    transfer: str = "unknown"
    color_range: str = "unknown"
    is_square: bool = True
    is_turned: bool = False

    @property
    def color(self) -> str:
        """The index's text: matrix/primaries/transfer/range."""
        return f"{self.matrix}/{self.primaries}/{self.transfer}/{self.color_range}"

    @property
    def dynamic_range(self) -> str:
        """sdr, pq or hlg."""
        return _HDR.get(self.transfer, "sdr")


PLAIN = Picture()


def read_picture(stream: dict[str, Any]) -> Picture:
    """What ffprobe's entry of a stream says of its pictures."""
    order = str(stream.get("field_order", "unknown"))
    scan = "progressive"
    if order in ("tt", "bt", "bb", "tb"):  # as coded, then as displayed
        flagged = stream.get("codec_name") in _FLAGGING_CODECS
        scan = "interlaced" if flagged else f"interlaced-{'tff' if order[1] == 't' else 'bff'}"
    is_rgb = str(stream.get("pix_fmt", "")).startswith(_RGB)
    return Picture(
        scan=scan,
        matrix="gbr" if is_rgb else _known(stream.get("color_space"), _MATRICES),
        primaries=_known(stream.get("color_primaries"), _PRIMARIES),
        transfer=_known(stream.get("color_transfer"), _TRANSFERS),
        color_range=_known(stream.get("color_range"), ("tv", "pc")),
        is_square=pixel_aspect(stream) == 1,
        is_turned=_is_turned(stream),
    )


def stored_picture(scan: str | None, color: str | None) -> Picture:
    """What the index says of the pictures of a clip: `scan` and `color`, null in datasets of format 3."""
    matrix, primaries, transfer, color_range = ((color or "").split("/") + ["unknown"] * 4)[:4]
    return Picture(
        scan=scan or "progressive", matrix=matrix, primaries=primaries, transfer=transfer, color_range=color_range
    )


def shown_size(stream: dict[str, Any]) -> tuple[int, int]:
    """Width and height in square pixels, upright, of what ffprobe calls a stream: the width makes up for the pixels' shape."""
    width, height = int(stream.get("width", 0)), int(stream.get("height", 0))
    width = round(width * pixel_aspect(stream))
    rotation = next((int(float(d["rotation"])) for d in stream.get("side_data_list", []) if "rotation" in d), 0)
    # As ffmpeg, which turns by other angles within the same frame.
    return (height, width) if abs(rotation % 180 - 90) <= 1 else (width, height)


def pixel_aspect(stream: dict[str, Any]) -> float:
    """Width over height of a pixel; 1 where a stream states nothing."""
    numerator, _, denominator = str(stream.get("sample_aspect_ratio", "")).partition(":")
    try:
        aspect = int(numerator) / int(denominator)
    except (ValueError, ZeroDivisionError):
        return 1.0
    return aspect if 0 < aspect < math.inf else 1.0


def deinterlacing(picture: Picture, config: DisplayConfig) -> list[str]:
    """The filters for frames that are not scaled yet; none for what is progressive.

    Each frame is made of its own first field alone, so that it may be picked before, and does not depend on where a clip
    begins.
    """
    if picture.scan == "progressive" or config.interlaced == "keep":
        return []
    if picture.scan == "interlaced":
        return ["estdif=mode=frame:deint=interlaced"]
    return [f"estdif=mode=frame:parity={picture.scan.removeprefix('interlaced-')}"]


def tone_mapping(picture: Picture, config: DisplayConfig, pixel_format: str) -> list[str]:
    """The filters for scaled frames, to 8-bit `pixel_format` in BT.709 (for RGB: with its primaries); none for SDR."""
    if picture.dynamic_range == "sdr" or config.hdr == "keep":
        return []
    # All stated: what a stream leaves out is what nearly all video of its kind has, and zscale guesses nothing.
    matrix = picture.matrix if picture.matrix not in ("unknown", "smpte240m") else "bt2020nc"  # zscale lacks that one
    primaries = picture.primaries if picture.primaries != "unknown" else "bt2020"
    levels = "pc" if picture.color_range == "pc" or matrix == "gbr" else "tv"
    read = f"zscale=min={matrix}:pin={primaries}:tin={picture.transfer}:rin={levels}"
    to_linear = f"{read}:m=gbr:p=bt709:t=linear:r=pc:npl={WHITE_NITS:g}:agamma=0"
    curve = f"tonemap=mobius:param={KNEE}:peak={PEAK_NITS / WHITE_NITS:.9f}:desat=0"
    is_rgb = pixel_format.startswith("gbr")
    to_video = f"zscale=t=bt709:m={'gbr' if is_rgb else 'bt709'}:r={'pc' if is_rgb else 'tv'}:agamma=0"
    # Not subsampled: a scaled frame may have an odd side.
    return ["format=yuv444p16|gbrp16", to_linear, "format=gbrpf32", curve, to_video, f"format={pixel_format}"]


def color_conversion(picture: Picture) -> str:
    """Options of the filter `scale` that make RGB BT.709, and full range limited; "" for other colours, which stay."""
    if picture.matrix == "gbr":
        return ":out_color_matrix=bt709:out_range=tv"
    return ":out_range=tv" if picture.color_range == "pc" else ""


def tagging(picture: Picture) -> list[str]:
    """The filter that states a picture's colours, as far as they are known, for the encoder to write."""
    stated = {"colorspace": picture.matrix, "color_primaries": picture.primaries, "color_trc": picture.transfer}
    return ["setparams=range=tv" + "".join(f":{name}={value}" for name, value in stated.items() if value != "unknown")]


def transcoded(picture: Picture, config: DisplayConfig, codec: str) -> Picture:
    """What the pictures of a transcoded clip state: progressive, of limited range, and SDR unless HDR is kept."""
    if picture.matrix == "gbr" or tone_mapping(picture, config, "yuv420p"):
        return Picture(matrix="bt709", primaries="bt709", transfer="bt709", color_range="tv")
    # In H.264 no range is written where nothing else is stated.
    is_stated = codec != "h264" or {picture.matrix, picture.primaries, picture.transfer} != {"unknown"}
    colors = replace(picture, color_range="tv" if is_stated else "unknown")
    return replace(colors, scan="progressive", is_square=True, is_turned=False)


def describe_changes(picture: Picture, config: DisplayConfig) -> str:
    """What the index says was done to a source's pictures: "", deinterlaced, tone-mapped, or both with a comma."""
    done = [
        "deinterlaced" if deinterlacing(picture, config) else "",
        "tone-mapped" if tone_mapping(picture, config, "yuv420p") else "",
    ]
    return ",".join(word for word in done if word)


def _is_turned(stream: dict[str, Any]) -> bool:
    """Whether the display matrix does more than show what is stored: its first two rows are not a positive diagonal."""
    for side_data in stream.get("side_data_list", []):
        rows = [
            line.split(":")[1].split() for line in str(side_data.get("displaymatrix", "")).splitlines() if ":" in line
        ]
        if len(rows) >= 2:
            (right, down), (left, up) = (tuple(map(int, row[:2])) for row in rows[:2])
            return right <= 0 or up <= 0 or down != 0 or left != 0
    return False


def _known(value: Any, names: tuple[str, ...]) -> str:
    return str(value) if value in names else "unknown"

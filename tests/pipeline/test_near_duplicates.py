"""Near-duplicates from codes alone: copies are found, other scenes are not, and every dropped sample has a reason that stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.alignment import Match, match
from pipeline.code_vectors import NUM_DIMS, learn_code_vectors
from pipeline.errors import ConfigError
from pipeline.near_duplicates import NearDuplicateConfig, Sketcher, choose_kept, find_candidates, stride_of
from tests.pipeline.scenes import CODEBOOK_SIZE, FPS, make_codes

CONFIG = NearDuplicateConfig()
COPIES = {
    "noise": {"noise": 0.02},
    "crop": {"crop": 0.1},
    "shift": {"start_s": 2.6},
    "brighter": {"brighter": 0.05},
    "mixed": {"noise": 0.02, "crop": 0.07, "start_s": 1.7},
}
SCENES = [make_codes(scene) for scene in range(12)]
STILL = np.repeat(make_codes(0)[:1], 32, axis=0)


@pytest.fixture(scope="module")
def sketcher() -> Sketcher:
    return learn(SCENES, CODEBOOK_SIZE)


def learn(samples: list[np.ndarray], codebook_size: int, num_bands: int = CONFIG.num_bands) -> Sketcher:
    return Sketcher.learn([(codes, FPS) for codes in samples], codebook_size, num_bands)


def compare(sketcher: Sketcher, one: np.ndarray, other: np.ndarray, min_overlap: float = 0.5) -> Match:
    return match(sketcher.film(one, FPS), sketcher.film(other, FPS), min_overlap, sketcher.floor)


class TestCopies:
    @pytest.mark.parametrize("kind", COPIES)
    def test_a_copy_shares_keys_and_matches(self, sketcher: Sketcher, kind: str) -> None:
        scores, shared = [], []
        for scene, codes in enumerate(SCENES):
            copy = make_codes(scene, **COPIES[kind])  # type: ignore[arg-type]
            found = compare(sketcher, codes, copy)
            scores.append(found.score)
            shared.append(len(np.intersect1d(sketcher.keys(codes, FPS), sketcher.keys(copy, FPS))))
            assert abs(found.offset / FPS - COPIES[kind].get("start_s", 0)) <= 0.25
        assert min(scores) >= CONFIG.min_score
        assert (
            np.mean(np.array(shared) >= CONFIG.min_shared_keys) >= 0.75
        )  # blobs leave the picture; real videos do better

    def test_most_codes_of_a_copy_differ(self) -> None:
        """So counting equal codes would not do."""
        equal = np.mean([SCENES[n] == make_codes(n, crop=0.1) for n in range(12)])
        assert equal < 0.4

    def test_scenes_that_are_not_copies(self, sketcher: Sketcher) -> None:
        others = [make_codes(scene, start_s=60) for scene in range(12)]
        scores = [
            compare(sketcher, one, other).score for n, one in enumerate(SCENES) for other in [*SCENES[:n], others[n]]
        ]
        assert max(scores) < CONFIG.min_score

    def test_two_moments_of_a_quiet_room(self, sketcher: Sketcher) -> None:
        """They look alike, but move each in its own way; and with noise each is still a copy of itself."""
        room, later = make_codes(5, movers=2), make_codes(5, movers=2, start_s=40)
        assert np.mean(room == later) > 0.6
        assert compare(sketcher, room, later).score < CONFIG.min_score
        assert compare(sketcher, room, make_codes(5, movers=2, noise=0.02)).score >= CONFIG.min_score

    def test_one_event_is_not_enough(self, sketcher: Sketcher) -> None:
        """The same menu opens in two still shots of one screen."""
        shots = [make_codes(5, movers=0, noise=0.01, start_s=start_s) for start_s in (0, 40)]
        for shot in shots:
            shot[16:, 2:14, 2:14] = SCENES[7][0, 2:14, 2:14]
        assert compare(sketcher, *shots).score < CONFIG.min_score

    def test_what_stands_still_is_nobodys_duplicate(self, sketcher: Sketcher) -> None:
        assert not len(sketcher.keys(STILL, FPS))
        assert compare(sketcher, STILL, STILL).score < 0.01

    def test_names_of_codes_and_size_of_the_codebook_do_not_matter(self, sketcher: Sketcher) -> None:
        names = np.random.default_rng(0).choice(2048, CODEBOOK_SIZE, replace=False).astype(np.uint16)
        renamed = learn([names[codes] for codes in SCENES], 2048)
        for scene in range(3):
            copy = make_codes(scene, crop=0.1)
            expected = compare(sketcher, SCENES[scene], copy)
            assert compare(renamed, names[SCENES[scene]], names[copy]).score == pytest.approx(expected.score, abs=0.1)

    def test_samples_of_any_length_and_grid(self, sketcher: Sketcher) -> None:
        for num_frames in (1, 2, 4):
            short = SCENES[0][:num_frames]
            assert not len(sketcher.keys(short, FPS))
            assert 0 <= compare(sketcher, short, SCENES[1]).score <= 1
        assert compare(sketcher, SCENES[0][10:22], SCENES[0]) == pytest.approx((1.0, -10), abs=0.02)
        wide = SCENES[0][:, 2:14]
        assert compare(sketcher, wide, wide).score == pytest.approx(1.0, abs=0.02)

    def test_high_frame_rates_are_thinned(self, sketcher: Sketcher) -> None:
        assert [stride_of(fps) for fps in (0.5, 2.0, 4.0, 5.9, 16.0)] == [1, 1, 1, 1, 4]
        fast = np.repeat(SCENES[0], 4, axis=0)
        np.testing.assert_array_equal(sketcher.keys(fast, 16.0), sketcher.keys(SCENES[0], FPS))
        assert len(sketcher.film(fast, 16.0).maps[0]) == 32

    def test_min_overlap(self, sketcher: Sketcher) -> None:
        codes = make_codes(3, num_frames=52)
        one, other = codes[:32], codes[20:]  # 12 of 32 in common
        assert compare(sketcher, one, other, 0.3) == pytest.approx((1.0, 20), abs=0.02)
        assert compare(sketcher, one, other, 0.5).score < CONFIG.min_score

    def test_bands(self, sketcher: Sketcher) -> None:
        few = learn(SCENES, CODEBOOK_SIZE, num_bands=4)
        assert len(few.keys(SCENES[0], FPS)) < len(sketcher.keys(SCENES[0], FPS)) / 4


class TestCodeVectors:
    def test_codes_that_take_turns_are_alike(self) -> None:
        """Codes 0 and 1 flicker in one half of the picture, 2 and 3 in the other; the halves hardly meet."""
        left, right = np.random.default_rng(0).integers(0, 2, (2, 40, 8, 8))
        vectors = learn_code_vectors([np.concatenate([left, right + 2], axis=2).astype(np.uint16)], 6)
        assert vectors.shape == (6, NUM_DIMS) and vectors.dtype == np.float32
        apart = np.linalg.norm(vectors[:4, None] - vectors[:4], axis=2)
        assert max(apart[0, 1], apart[2, 3]) < min(apart[0, 2], apart[1, 3]) / 3

    def test_they_are_centred_and_the_same_each_time(self) -> None:
        vectors = learn_code_vectors(SCENES, CODEBOOK_SIZE)
        uses = np.bincount(np.concatenate(SCENES).ravel(), minlength=CODEBOOK_SIZE)
        np.testing.assert_allclose(uses @ vectors / uses.sum(), 0, atol=1e-5)
        np.testing.assert_array_equal(vectors, learn_code_vectors(SCENES, CODEBOOK_SIZE))


class TestCandidates:
    def find(self, keys: list[list[int]], folder: Path, **changes: int) -> tuple[list[tuple[int, ...]], int]:
        arrays = [np.array(own, np.uint64) for own in keys]
        found = find_candidates(arrays, folder / "keys", replace(CONFIG, **changes))
        return [tuple(pair) for pair in found.pairs.tolist()], found.num_crowded

    def test_pairs_that_share_keys(self, tmp_path: Path) -> None:
        keys = [[1, 2, 2**63], [2], [], [1, 2, 2**64 - 1], [2**63, 5]]
        assert self.find(keys, tmp_path, min_shared_keys=1) == ([(0, 1), (0, 3), (0, 4), (1, 3)], 0)
        assert self.find(keys, tmp_path) == ([(0, 3)], 0)
        assert not any((tmp_path / "keys").iterdir())

    def test_a_crowded_key_costs_nothing(self, tmp_path: Path) -> None:
        keys = [[7, sample] for sample in range(100, 165)] + [[100]]
        assert self.find(keys, tmp_path, min_shared_keys=1) == ([(0, 65)], 1)
        assert len(self.find(keys, tmp_path, min_shared_keys=1, max_bucket=65)[0]) == 65 * 64 // 2 + 1

    def test_no_keys(self, tmp_path: Path) -> None:
        assert self.find([[], []], tmp_path) == ([], 0)


class TestChoice:
    def choose(
        self, pairs: list[tuple[int, int]], lengths: str, val: str = "", scores: list[float] | None = None
    ) -> list[int]:
        is_val = np.array([str(n) in val for n in range(len(lengths))])
        found = np.array(scores or [0.9] * len(pairs))
        keys = [f"{n:04d}" for n in range(len(lengths))]
        choice = choose_kept(np.array(pairs).reshape(-1, 2), found, is_val, np.array([int(n) for n in lengths]), keys)
        return choice.duplicate_of.tolist()

    def test_the_longest_stays_then_the_smallest_key(self) -> None:
        assert self.choose([(0, 1), (0, 2), (1, 2)], "575") == [1, -1, 1]
        assert self.choose([(0, 1), (0, 2), (1, 2)], "555") == [-1, 0, 0]
        assert self.choose([], "55") == [-1, -1]

    def test_the_best_match_is_named(self) -> None:
        assert self.choose([(0, 2), (1, 2)], "555", scores=[0.7, 0.8]) == [-1, -1, 1]

    def test_windows_that_overlap_the_next_do_not_chain(self) -> None:
        assert self.choose([(0, 1), (1, 2), (2, 3), (3, 4)], "55555") == [-1, 0, -1, 2, -1]

    def test_training_gives_way_to_validation(self) -> None:
        assert self.choose([(0, 1)], "95", val="1") == [1, -1]
        # Sample 1 of the validation split goes for 0, and takes 2 with it all the same.
        assert self.choose([(0, 1), (1, 2)], "555", val="01") == [-1, 0, 1]

    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_what_is_dropped_matches_what_stays(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(2, 12))
        every = [(one, other) for one in range(count) for other in range(one + 1, count)]
        pairs = np.array(data.draw(st.lists(st.sampled_from(every), unique=True))).reshape(-1, 2)
        is_val = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        scores = np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(pairs), max_size=len(pairs))))
        lengths = np.array(data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)))
        choice = choose_kept(pairs, scores, is_val, lengths, [f"{n:02d}" for n in range(count)])
        near = {frozenset(pair) for pair in pairs.tolist()}
        stays = choice.duplicate_of < 0
        for sample in range(count):
            if stays[sample]:
                assert choice.leader[sample] == sample
                assert not any(stays[n] and frozenset((n, sample)) in near for n in range(count) if n != sample)
                assert is_val[sample] or not any(is_val[n] and frozenset((n, sample)) in near for n in range(count))
            else:
                reason = choice.duplicate_of[sample]
                assert set(pairs[choice.match[sample]]) == {sample, reason}
                assert stays[reason] or (is_val[reason] and not is_val[sample])
                assert is_val[reason] or not is_val[sample]
                assert stays[choice.leader[sample]]


@pytest.mark.parametrize(
    "wrong",
    [{"min_score": 0}, {"min_score": 1.1}, {"min_overlap": 0}, {"num_bands": 0}, {"min_shared_keys": 0}, {"max_bucket": 1}, {"learn_samples": 0}],
)  # fmt: skip
def test_bad_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} = {next(iter(wrong.values()))}"):
        NearDuplicateConfig(**wrong)  # type: ignore[arg-type]

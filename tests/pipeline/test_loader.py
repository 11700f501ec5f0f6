"""Token batches: the right windows of the right samples, for any number of workers, from any step."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import shard_files as shard_files_module
from pipeline.dataset import create_or_resume, finish
from pipeline.errors import ConfigError, DatasetError
from pipeline.ledger import Ledger
from pipeline.loader import LoaderConfig, TokenLoader, WindowReader
from tests.pipeline.datasets import (
    GRID,
    PAD,
    add_codes,
    describe,
    make_row,
    make_token_dataset,
    open_writer,
    shard_path,
)

T = 4
LENGTHS = [[9, 2, 4], [5, 30], [1, 12, 7, 4], [6, 6, 6]]
NUM_SAMPLES = sum(map(len, LENGTHS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_token_dataset(tmp_path_factory.mktemp("loader") / "tokens", LENGTHS)


def open_loader(folder: Path, rank: int = 0, world_size: int = 1, num_views: int = 2, **config: Any) -> TokenLoader:
    return TokenLoader(
        folder,
        LoaderConfig(**{"batch_size": 4, **config}),
        window=(T, *GRID),
        num_views=num_views,
        pad=PAD,
        rank=rank,
        world_size=world_size,
    )


def equal(a: Any, b: Any) -> bool:
    return a["keys"] == b["keys"] and torch.equal(a["tokens"], b["tokens"]) and torch.equal(a["seeds"], b["seeds"])


def starts_of(tokens: torch.Tensor) -> list[list[int]]:
    """(b, v) first frame of each window; the made codes carry their frame's number."""
    return tokens[:, :, 0, 0, 1].tolist()


class TestBatches:
    def test_contract(self, folder: Path) -> None:
        batch = open_loader(folder).batch(0)
        assert batch["tokens"].shape == (4, 2, T, *GRID) and batch["tokens"].dtype == torch.int64
        assert batch["seeds"].shape == (4, 2) and batch["seeds"].dtype == torch.int64
        assert len(batch["keys"]) == 4
        assert len(open_loader(folder)) == NUM_SAMPLES
        assert open_loader(folder).units_per_step == 4 * 2 * T * GRID[0] * GRID[1]

    def test_windows_are_whole_and_their_own(self, folder: Path) -> None:
        """Each window holds consecutive frames of the sample that its key names, and PAD after a short one."""
        lengths = [n for shard in LENGTHS for n in shard]
        loader = open_loader(folder)
        for step in range(20):
            batch = loader.batch(step)
            for key, views in zip(batch["keys"], batch["tokens"], strict=True):
                length = lengths[int(key)]
                for view in views:
                    real = min(T, length)
                    start = int(view[0, 0, 1])
                    assert 0 <= start <= max(0, length - T)
                    assert view[:real, 0, 0].tolist() == [int(key)] * real
                    assert view[:real, 0, 1].tolist() == list(range(start, start + real))
                    assert (view[:real].flatten(1)[:, 2:] == 7).all()
                    assert (view[real:] == PAD).all()

    def test_every_start_is_drawn(self, folder: Path) -> None:
        """Sample 0 has 9 frames, so 6 starts; 200 epochs of two views miss one of them once in 10**31 times."""
        loader = open_loader(folder, batch_size=NUM_SAMPLES)
        seen = [0] * 6
        for step in range(200):
            batch = loader.batch(step)
            for start in starts_of(batch["tokens"])[batch["keys"].index("00000")]:
                seen[start] += 1
        assert min(seen) > 30 and max(seen) < 110  # 67 each, give or take

    def test_views_are_independent(self, folder: Path) -> None:
        """The pairs of starts fill the square, equal ones among them: neither view knows of the other."""
        loader = open_loader(folder, batch_size=NUM_SAMPLES)
        batches = [loader.batch(step) for step in range(400)]
        pairs = {tuple(starts_of(b["tokens"])[b["keys"].index("00000")]) for b in batches}
        assert len(pairs) == 36

    def test_more_views_leave_the_first_as_they_were(self, folder: Path) -> None:
        one, three = (open_loader(folder, num_views=n).batch(3) for n in (1, 3))
        assert torch.equal(one["tokens"], three["tokens"][:, :1])
        assert torch.equal(one["seeds"], three["seeds"][:, :1])

    def test_distance_bounds_the_views(self, folder: Path) -> None:
        """Sample 4 has 30 frames, so 27 starts: every difference up to the distance comes, and none beyond it."""
        anywhere, near, same = (
            open_loader(folder, batch_size=NUM_SAMPLES, num_views=3, distance=distance) for distance in (None, 3, 0)
        )

        def differences(loader: TokenLoader) -> set[int]:
            batches = [loader.batch(step) for step in range(150)]
            starts = [starts_of(b["tokens"])[b["keys"].index("00004")] for b in batches]
            assert {start for views in starts for start in views} <= set(range(27))
            return {other - first for first, *others in starts for other in others}

        assert differences(near) == set(range(-3, 4)) and differences(same) == {0}
        assert max(differences(anywhere)) > 20
        one, other = anywhere.batch(0), near.batch(0)
        assert torch.equal(one["tokens"][:, 0], other["tokens"][:, 0]), "the first view does not know of the distance"
        assert torch.equal(one["seeds"], other["seeds"])

    def test_a_distance_beyond_every_video_is_none(self, folder: Path) -> None:
        for step in range(5):
            assert equal(open_loader(folder).batch(step), open_loader(folder, distance=100).batch(step))

    def test_seeds_differ_per_view_epoch_and_sample(self, folder: Path) -> None:
        loader = open_loader(folder, batch_size=NUM_SAMPLES)
        seeds = torch.cat([loader.batch(step)["seeds"] for step in range(5)])
        assert len(seeds.unique()) == NUM_SAMPLES * 2 * 5


@functools.cache
def shared_dataset(folder: Path, shape: tuple[int, ...]) -> Path:
    lengths = iter(range(1, 1000))
    return make_token_dataset(
        folder / "-".join(map(str, shape)), [[next(lengths) % 11 + 1 for _ in range(n)] for n in shape]
    )


class TestWorkers:
    @settings(deadline=None, max_examples=25)
    @given(
        shape=st.sampled_from([(8,), (3, 5, 1), (2, 0, 9, 4)]),
        batch=st.sampled_from([4, 8]),
        world=st.sampled_from([1, 2, 4]),
        step=st.integers(0, 50),
        seed=st.integers(0, 3),
    )
    def test_ranks_are_the_parts_of_one_batch(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        shape: tuple[int, ...],
        batch: int,
        world: int,
        step: int,
        seed: int,
    ) -> None:
        folder = shared_dataset(tmp_path_factory.getbasetemp() / "shared", shape)
        whole = open_loader(folder, batch_size=batch, seed=seed).batch(step)
        parts = [open_loader(folder, r, world, batch_size=batch, seed=seed).batch(step) for r in range(world)]
        assert whole["keys"] == [key for part in parts for key in part["keys"]]
        for name in ("tokens", "seeds"):
            assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))  # type: ignore[literal-required]

    def test_an_epoch_visits_every_sample_once(self, folder: Path) -> None:
        loader = open_loader(folder)
        assert NUM_SAMPLES % 4 == 0
        for epoch in range(2):
            keys = [
                k for step in range(NUM_SAMPLES // 4) for k in loader.batch(epoch * NUM_SAMPLES // 4 + step)["keys"]
            ]
            assert sorted(keys) == [f"{n:05d}" for n in range(NUM_SAMPLES)]

    def test_resume(self, folder: Path) -> None:
        used = open_loader(folder)
        batches = [used.batch(step) for step in range(9)]
        assert all(equal(open_loader(folder).batch(step), batches[step]) for step in (8, 0, 5))

    def test_a_far_step_costs_nothing(self, folder: Path) -> None:
        assert open_loader(folder).batch(10**9)["tokens"].shape[0] == 4


class TestConfig:
    def test_batch_size(self, folder: Path) -> None:
        assert len(open_loader(folder, batch_size=6).batch(0)["keys"]) == 6

    def test_seed(self, folder: Path) -> None:
        one, two = (
            open_loader(folder, seed=1, batch_size=12).batch(0),
            open_loader(folder, seed=2, batch_size=12).batch(0),
        )
        assert one["keys"] != two["keys"]
        assert not set(one["seeds"].flatten().tolist()) & set(two["seeds"].flatten().tolist())

    def test_fingerprint(self, folder: Path, tmp_path: Path) -> None:
        other = make_token_dataset(tmp_path / "other", LENGTHS, fingerprint="e" * 32)
        assert open_loader(other, batch_size=12).batch(0)["keys"] != open_loader(folder, batch_size=12).batch(0)["keys"]

    def test_split(self, tmp_path: Path) -> None:
        splits = ["val" if n % 3 == 0 else "train" for n in range(NUM_SAMPLES)]
        folder = make_token_dataset(tmp_path / "split", LENGTHS, splits=splits)
        for split, expected in (("train", 8), ("val", 4)):
            loader = open_loader(folder, split=split)
            assert len(loader) == expected
            keys = {key for step in range(expected // 4) for key in loader.batch(step)["keys"]}
            assert keys == {f"{n:05d}" for n in range(NUM_SAMPLES) if splits[n] == split}
        assert len(WindowReader(folder, "all", (T, *GRID), PAD)) == NUM_SAMPLES

    def test_shards_per_block(self, tmp_path: Path) -> None:
        """With one shard a block, the samples of a shard follow each other; with many they mix."""
        folder = make_token_dataset(tmp_path / "blocks", [[1] * 8] * 8)

        def switches(shards_per_block: int) -> int:
            loader = open_loader(folder, batch_size=64, shards_per_block=shards_per_block)
            shards = [int(key) // 8 for key in loader.batch(0)["keys"]]
            return int(np.count_nonzero(np.diff(shards)))

        assert switches(1) == 7 and switches(8) > 30

    @pytest.mark.parametrize("name", ["batch_size", "shards_per_block"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_bad_values(self, name: str, value: int) -> None:
        with pytest.raises(ConfigError, match=f"{name} = {value}"):
            LoaderConfig(**{name: value})  # type: ignore[arg-type]

    def test_bad_distance(self) -> None:
        with pytest.raises(ConfigError, match="distance = -1: must be 0 frames or more"):
            LoaderConfig(distance=-1)

    def test_what_does_not_fit(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="4 does not divide by the 3 workers"):
            open_loader(folder, world_size=3)
        with pytest.raises(ConfigError, match="16 exceeds the 12 samples of split train"):
            open_loader(folder, batch_size=16)
        with pytest.raises(ConfigError, match="0 samples of split val"):
            open_loader(folder, split="val")
        with pytest.raises(ConfigError, match="0 samples of split test"):
            open_loader(folder, split="test")
        with pytest.raises(ConfigError, match=r"grids of \[\(2, 3\)\] tokens; the model takes \(3, 2\)"):
            WindowReader(folder, "all", (T, 3, 2), PAD)
        with pytest.raises(ConfigError, match="not a dataset"):
            open_loader(tmp_path)
        create_or_resume(tmp_path / "unfinished", describe())
        with pytest.raises(ConfigError, match="unfinished"):
            open_loader(tmp_path / "unfinished")
        create_or_resume(tmp_path / "clips", describe("clips"))
        with pytest.raises(ConfigError, match="holds clips; tokens were expected"):
            open_loader(tmp_path / "clips")


class TestWindowReader:
    def read(self, folder: Path, sample: int, start: int, stride: int = 1) -> list[int]:
        """Frame numbers of a window, -1 for PAD."""
        reader = WindowReader(folder, "all", (T, *GRID), PAD)
        window = reader.read(np.array([sample]), np.array([start]), stride)[0]
        assert window.shape == (T, *GRID) and window.dtype == np.uint16
        return [-1 if frame[0, 0] == PAD else int(frame[0, 1]) for frame in window]

    @pytest.mark.parametrize(
        ("sample", "start", "stride", "expected"),
        [
            (0, 0, 1, [0, 1, 2, 3]),
            (0, 5, 1, [5, 6, 7, 8]),
            (0, 7, 1, [7, 8, -1, -1]),  # stops at the sample's end: the next one's frames are not its own
            (0, 0, 2, [0, 2, 4, 6]),
            (0, 1, 3, [1, 4, 7, -1]),
            (4, 3, 8, [3, 11, 19, 27]),
            (5, 0, 1, [0, -1, -1, -1]),
            (1, 0, 2, [0, -1, -1, -1]),
        ],
    )
    def test_stride_and_padding(
        self, folder: Path, sample: int, start: int, stride: int, expected: Sequence[int]
    ) -> None:
        assert self.read(folder, sample, start, stride) == expected

    def test_num_starts(self, folder: Path) -> None:
        reader = WindowReader(folder, "all", (T, *GRID), PAD)
        assert reader.num_starts(np.arange(6)).tolist() == [6, 1, 1, 2, 27, 1]

    def test_more_shards_than_open_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = make_token_dataset(tmp_path / "many", [[2]] * 12)
        everything = np.arange(12)
        expected = WindowReader(folder, "all", (2, *GRID), PAD).read(everything, everything * 0)
        monkeypatch.setattr(shard_files_module, "_MAX_OPEN_TARS", 3)
        reader = WindowReader(folder, "all", (2, *GRID), PAD)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for _ in range(2):
            for samples in (everything, everything[::-1]):
                np.testing.assert_array_equal(reader.read(samples, samples * 0), expected[samples])
        assert len(os.listdir("/proc/self/fd")) - before == 3  # noqa: PTH208

    def test_cut_off_shard(self, tmp_path: Path) -> None:
        folder = make_token_dataset(tmp_path / "cut", [[30]])
        os.truncate(shard_path(folder, 0), 700)
        with pytest.raises(DatasetError, match="00000 is cut off; run `tokenreel verify"):
            self.read(folder, 0, 26)


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, each in two views of the model's size and one of twice that."""
    folder = tmp_path_factory.mktemp("views")
    meta = create_or_resume(folder, describe())
    writer = open_writer(folder)
    for clip in range(3):
        for view, scale in (("16c", 1), ("16cf", 1), ("32c", 2)):
            grid = (GRID[0] * scale, GRID[1] * scale)
            row = make_row(f"{clip:05d}-{view}", 5, clip_key=f"{clip:05d}", view=view, height=grid[0], width=grid[1])
            add_codes(writer, row, np.full((5, *grid), clip, np.uint16))
    writer.commit(9, [])
    finish(folder, meta, Ledger())
    return folder


class TestViews:
    @pytest.mark.parametrize(
        ("grid", "names", "expected"),
        [(GRID, (), ["16c", "16cf"]), (GRID, ("16cf",), ["16cf"]), ((GRID[0] * 2, GRID[1] * 2), (), ["32c"])],
    )
    def test_of_the_right_size_and_name(
        self, views: Path, grid: tuple[int, int], names: tuple[str, ...], expected: list[str]
    ) -> None:
        config = LoaderConfig(batch_size=3, views=names)
        loader = TokenLoader(views, config, window=(T, *grid), num_views=1, pad=PAD, rank=0, world_size=1)
        assert len(loader) == 3 * len(expected)
        epoch = [loader.batch(step) for step in range(len(expected))]
        keys = [key for batch in epoch for key in batch["keys"]]
        assert sorted(keys) == [f"{clip:05d}-{view}" for clip in range(3) for view in expected]
        for batch in epoch:
            assert [int(key[:5]) for key in batch["keys"]] == batch["tokens"][:, 0, 0, 0, 0].tolist()
            assert batch["tokens"].shape[2:] == (T, *grid)

    def test_a_size_that_is_not_there(self, views: Path) -> None:
        with pytest.raises(ConfigError, match="holds grids of"):
            WindowReader(views, "train", (T, 3, 3), PAD)

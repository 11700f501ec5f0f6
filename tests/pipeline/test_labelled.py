"""Labelled clips: labels and splits, views, frame rates, and a batch that is a function of its step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.dataset import create_or_resume, finish
from pipeline.errors import ConfigError
from pipeline.labelled import LabelledBatches, LabelledClips, LabelledConfig
from pipeline.ledger import Ledger
from pipeline.loader import CacheConfig
from pipeline.views import ViewChoice
from tests.pipeline.datasets import GRID, PAD, add_codes, describe, make_codes, make_row, open_writer

VIEWS = ("16c", "16cf", "16of20s")
WINDOW = (3, *GRID)


def make_labelled(folder: Path, clips: list[tuple[str | None, str, int]], views: tuple[str, ...] = VIEWS) -> Path:
    """Two shards of clips (label, split, frames), each in all `views`; sample s of the dataset, in the order of keys, has codes
    that say s, as `make_codes` does. 16 fps."""
    meta = create_or_resume(folder, describe(num_shards=2, config={"frames": {"fps": 16.0}}))
    half = -(-len(clips) // 2)
    for shard in (0, 1):
        part = range(shard * half, min((shard + 1) * half, len(clips)))
        writer = open_writer(folder, shard)
        for clip in part:
            label, split, num_frames = clips[clip]
            for place, view in enumerate(views):
                row = make_row(
                    f"{clip:05x}-{view}" if view else f"{clip:05x}",
                    num_frames,
                    label=label,
                    split=split,
                    clip_key=f"{clip:05x}",
                    view=view,
                    fps=16.0,
                    source=f"clip{clip}.mp4",
                )
                add_codes(writer, row, make_codes(clip * len(views) + place, num_frames))
        writer.commit(len(part) * len(views), [])
    finish(folder, meta, Ledger())
    return folder


CLIPS: list[tuple[str | None, str, int]] = [
    ("run", "train", 40),
    ("sit", "train", 20),
    ("run", "val", 40),
    ("run", "train", 5),
    ("sit", "test", 40),
    ("sit", "train", 30),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_labelled(tmp_path_factory.mktemp("labelled") / "tokens", CLIPS)


def open_clips(folder: Path, **changes: Any) -> LabelledClips:
    return LabelledClips(folder, LabelledConfig(**{"batch_size": 4, "fps": 4.0, **changes}), WINDOW, PAD)


def read_steps(folder: Path, steps: int, rank: int = 0, world_size: int = 1, **changes: Any) -> list[Any]:
    config = LabelledConfig(**{"batch_size": 4, "fps": 4.0, **changes})
    clips = LabelledClips(folder, config, WINDOW, PAD)
    batches = LabelledBatches(clips, config, rank=rank, world_size=world_size)
    return [batches.read(step) for step in range(steps)]


def test_clips_are_counted_once_whatever_their_views(folder: Path) -> None:
    clips = open_clips(folder)
    assert len(clips) == 6 and clips.shards.tolist() == [0, 0, 0, 1, 1, 1]
    assert clips.keys.tolist() == [f"{n:05x}" for n in range(6)]
    assert clips.of_split("train").tolist() == [0, 1, 3, 5] and clips.of_split("test").tolist() == [4]
    assert clips.classes() == ("run", "sit")
    assert clips.class_numbers(np.arange(6), ("run", "sit")).tolist() == [0, 1, 0, 0, 1, 1]


def test_a_window_takes_every_nth_frame(folder: Path) -> None:
    clips = open_clips(folder)
    assert clips.stride == 4
    first, rows = clips.rows_of(ViewChoice())
    assert first.tolist() == [0, 3, 6, 9, 12, 15, 18] and rows.tolist() == list(range(18))
    windows = clips.read(np.array([0, 10]), np.array([2, 1]))
    assert windows[0, :, 0, 1].tolist() == [2, 6, 10] and (windows[0, :, 0, 0] == 0).all()
    assert windows[1, 0, 0].tolist() == [10, 1, 7] and (windows[1, 1, 0, 0], windows[1, 2, 0, 0]) == (PAD, PAD)
    assert clips.num_starts(np.array([0, 3, 10])).tolist() == [32, 12, 1]
    assert open_clips(folder, fps=None).stride == 1
    for fps in (5.0, 32.0):
        with pytest.raises(ConfigError, match=rf"loader.fps = {fps}: .* has tokens at \[16.0\] fps"):
            open_clips(folder, fps=fps)


def test_uniform_windows_of_the_chosen_views(folder: Path) -> None:
    clips = open_clips(folder)
    test = np.array([4, 1])
    place, rows, starts = clips.spread(test, ViewChoice(flip=False), 3)
    assert place.tolist() == [0] * 6 + [1] * 6
    assert rows.tolist() == [12] * 3 + [14] * 3 + [3] * 3 + [5] * 3
    assert starts.tolist() == [0, 16, 31] * 2 + [0, 6, 11] * 2
    place, rows, starts = clips.spread(test, ViewChoice(flip=False, resized=False), 1)
    assert (place.tolist(), rows.tolist(), starts.tolist()) == ([0, 1], [12, 3], [16, 6])
    with pytest.raises(
        ConfigError, match=r"sample 00000 \(clip0.mp4\) of split train has no view of .*; there are 16c, 16cf"
    ):
        clips.spread(test, ViewChoice(crops=("end",)), 1)


def test_a_batch_is_the_same_for_any_number_of_workers(folder: Path) -> None:
    whole = read_steps(folder, 3)
    parts = [read_steps(folder, 3, rank, 2) for rank in (0, 1)]
    for step, (windows, labels, keys) in enumerate(whole):
        assert (windows == np.concatenate([part[step][0] for part in parts])).all()
        assert labels.tolist() == [*parts[0][step][1], *parts[1][step][1]]
        assert keys == [*parts[0][step][2], *parts[1][step][2]]
        assert windows.shape == (4, *WINDOW)
    with pytest.raises(ConfigError, match="batch_size = 4 does not divide by the 3 workers"):
        read_steps(folder, 1, 0, 3)


def test_an_epoch_has_each_training_clip_once_in_a_view_of_its_own(folder: Path) -> None:
    seen: Counter[str] = Counter()
    starts = set()
    for windows, labels, keys in read_steps(folder, 60):
        assert sorted(key.partition("-")[0] for key in keys) == ["00000", "00001", "00003", "00005"]
        assert labels.tolist() == [int(key[:5] in ("00001", "00005")) for key in keys]
        seen.update(keys)
        starts |= {int(window[0, 0, 1]) for window, key in zip(windows, keys, strict=True) if key.startswith("00000")}
    assert len(seen) == 12 and min(seen.values()) > 5  # 4 clips in 3 views, 20 times each on average
    assert {0 <= start < 32 for start in starts} == {True} and len(starts) > 20


def test_what_the_draws_depend_on(folder: Path) -> None:
    keys = [row[2] for row in read_steps(folder, 4)]
    assert keys == [row[2] for row in read_steps(folder, 4)]
    assert keys != [row[2] for row in read_steps(folder, 4, seed=1)]
    assert keys != [row[2] for row in read_steps(folder, 4, shards_per_block=1)]
    plain = ViewChoice(flip=False, resized=False)
    assert {key.partition("-")[2] for row in read_steps(folder, 4, views=plain) for key in row[2]} == {"16c"}
    assert len(read_steps(folder, 1, batch_size=2)[0][2]) == 2


def test_a_missing_or_unknown_label_is_named_with_its_sample(tmp_path: Path) -> None:
    unlabelled = make_labelled(tmp_path / "a", [("run", "train", 9), (None, "train", 9)], ("",))
    with pytest.raises(ConfigError, match=r"sample 00001 \(clip1.mp4\) of split train has no label"):
        open_clips(unlabelled).classes()
    clips = open_clips(
        make_labelled(tmp_path / "b", [("run", "train", 9), ("sit", "train", 9), ("fly", "test", 9)], ("",))
    )
    with pytest.raises(
        ConfigError, match=r"sample 00002 \(clip2.mp4\) of split test has the label 'fly', which no training"
    ):
        clips.class_numbers(clips.of_split("test"), clips.classes())
    with pytest.raises(ConfigError, match=r"1 labels \('run',\); two or more"):
        open_clips(make_labelled(tmp_path / "c", [("run", "train", 9), ("sit", "val", 9)], ("",))).classes()


def test_a_manifest_gives_other_splits(folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "two.csv"
    manifest.write_text("video,label,split\nclip4.mp4,sit,train\nclip0.mp4,walk,train\nclip2.mp4,walk,test\n")
    clips = open_clips(folder, splits=manifest)
    assert clips.of_split("train").tolist() == [0, 4] and clips.of_split("test").tolist() == [2]
    assert not len(clips.of_split("val")) and clips.classes() == ("sit", "walk")
    manifest.write_text("video,label,split\nother.mp4,sit,train\n")
    with pytest.raises(ConfigError, match=r"names no training video .* such as clip0.mp4"):
        open_clips(folder, splits=manifest)
    manifest.write_text("video,label,split\na.mp4,sit,train\na.mp4,sit,test\n")
    with pytest.raises(ConfigError, match=r"a.mp4 stands there twice"):
        open_clips(folder, splits=manifest)
    manifest.write_text("video,label,split\nclip0.mp4,sit,train\nclip1.mp4,sit,validation\n")
    with pytest.raises(ConfigError, match=r"two.csv: row 2 has another split than train, val or test"):
        open_clips(folder, splits=manifest)


def test_the_cache_is_the_nodes(folder: Path, tmp_path: Path) -> None:
    open_clips(folder, cache=CacheConfig(folder=tmp_path / "cache"))
    assert any((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"shards_per_block": 0}, {"fps": 0.0}])
def test_bad_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="loader: "):
        replace(LabelledConfig(), **wrong)

"""Labelled data sets as their authors publish them, read as one list of videos: where each is, its label and its split.

A data set is a folder of the user's: videos in any subfolder, and the official split files. Nothing is downloaded. Each
reader says what it needs; a file that is missing is an error that says who hands it out.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from pipeline.errors import ConfigError
from pipeline.schema import Split, draw_split

_VIDEOS = (".avi", ".mp4", ".webm", ".mkv", ".mov")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledVideo:
    """A video that a split file lists.

    stem: its file's name without the extension. group: videos that stand on one side of any split of ours, as they were cut
    from one recording. folder: the parent folder that is meant where several files have this name; "" for any.
    """

    stem: str
    label: str
    split: Split
    group: str
    folder: str = ""
    caption: str = ""


class VideoFolder:
    """Where the videos below a folder lie, by the stem of their names."""

    def __init__(self, root: Path) -> None:
        self._paths: dict[str, list[PurePosixPath]] = {}
        for folder, subfolders, names in os.walk(root):
            subfolders.sort()
            for name in sorted(names):
                if Path(name).suffix.lower() in _VIDEOS:
                    path = PurePosixPath(Path(folder).relative_to(root).as_posix()) / name
                    self._paths.setdefault(path.stem, []).append(path)

    def find(self, video: LabelledVideo) -> str | None:
        """The path of a video, relative to the root; None where there is none.

        Raises:
            ConfigError: several files have its name, and its folder does not tell which is meant.
        """
        found = self._paths.get(video.stem, [])
        if len(found) > 1:
            found = [path for path in found if path.parent.name == video.folder] or found
        if len(found) > 1:
            raise ConfigError(f"{video.stem}: both {found[0]} and {found[1]} have this name; leave one in the folder")
        return str(found[0]) if found else None


Reader = Callable[[Path, int], Iterator[LabelledVideo]]


def read_ucf101(root: Path, split_number: int) -> Iterator[LabelledVideo]:
    """`[ucfTrainTestlist/]classInd.txt`, `trainlistNN.txt` and `testlistNN.txt`; `Class/v_Class_gGG_cCC.avi`."""
    source = "the page of UCF101 at the Center for Research in Computer Vision, University of Central Florida: the train/test splits for action recognition"
    for split, name in (("train", f"trainlist{split_number:02d}.txt"), ("test", f"testlist{split_number:02d}.txt")):
        classes = {words[-1] for words in _lines(root, ["ucfTrainTestlist", ""], ["classInd.txt"], source)}
        for words in _lines(root, ["ucfTrainTestlist", ""], [name], source):
            path = PurePosixPath(words[0])
            if path.parent.name not in classes:
                raise ConfigError(f"{name}: {path} is of class {path.parent.name!r}, which classInd.txt does not have")
            yield LabelledVideo(
                stem=path.stem,
                label=path.parent.name,
                split="train" if split == "train" else "test",
                group=path.stem.rpartition("_c")[0],
                folder=path.parent.name,
            )


def read_hmdb51(root: Path, split_number: int) -> Iterator[LabelledVideo]:
    """`[testTrainMulti_7030_splits/]CLASS_test_splitN.txt`, a line a video: 1 trains, 2 tests, 0 is in neither."""
    source = "the page of HMDB at the Serre Lab, Brown University: the archive test_train_splits"
    ending = f"_test_split{split_number}.txt"
    files = sorted([*root.glob(f"testTrainMulti_7030_splits/*{ending}"), *root.glob(f"*{ending}")])
    if not files:
        raise _missing(root, f"testTrainMulti_7030_splits/CLASS{ending}", source)
    for file in files:
        label = file.name.removesuffix(ending)
        for line in file.read_text().splitlines():
            name, _, number = line.strip().rpartition(" ")
            if number in ("1", "2"):
                stem = PurePosixPath(name.strip()).stem
                # A name is: recording, class, properties. Clips of one recording look alike.
                group = stem.partition(f"_{label}_")[0]
                split: Split = "train" if number == "1" else "test"
                yield LabelledVideo(stem=stem, label=label, split=split, group=group, folder=label)


def read_ssv2(root: Path, split_number: int) -> Iterator[LabelledVideo]:
    """`[labels/]labels.json`, `train.json`, `validation.json` and, where it is there, `test.json` with `test-answers.csv`;
    `ID.webm`. The label is the template, the caption what it says with its objects."""
    source = "the page of Something-Something V2 at Qualcomm's developer network: the package of labels"

    def names(name: str) -> list[str]:
        return [f"{name}.json", f"something-something-v2-{name}.json"]  # of the newer and of the older package

    folders = ["labels", ""]
    classes = _json(root, folders, names("labels"), source)
    for name, split in (("train", "train"), ("validation", "val")):
        for row in _json(root, folders, names(name), source):
            label = row["template"].replace("[", "").replace("]", "")
            if label not in classes:
                raise ConfigError(
                    f"{name}.json: {row['id']} has the template {label!r}, which labels.json does not have"
                )
            yield LabelledVideo(
                stem=str(row["id"]),
                label=label,
                split="train" if split == "train" else "val",
                group=str(row["id"]),
                caption=row["label"],
            )
    if (answers := _find(root, folders, ["test-answers.csv"])) is not None:
        for words in csv.reader(answers.read_text().splitlines(), delimiter=";"):
            if words[1] not in classes:
                raise ConfigError(f"{answers}: {words[0]} has the label {words[1]!r}, which labels.json does not have")
            yield LabelledVideo(stem=words[0], label=words[1], split="test", group=words[0])


def read_diving48(root: Path, split_number: int) -> Iterator[LabelledVideo]:
    """`Diving48_vocab.json`, `Diving48_V2_train.json` and `Diving48_V2_test.json`; `rgb/ID.mp4`. The label is the dive in words."""
    source = "the page of the RESOUND project at the SVCL, UC San Diego: the V2 annotations of Diving48"
    folders = ["", "annotations"]
    words = _json(root, folders, ["Diving48_vocab.json"], source)
    for split, name in (("train", "Diving48_V2_train.json"), ("test", "Diving48_V2_test.json")):
        for row in _json(root, folders, [name], source):
            yield LabelledVideo(
                stem=row["vid_name"],
                label=" ".join(words[row["label"]]),
                split="train" if split == "train" else "test",
                group=row["vid_name"].rpartition("_")[0],
                folder="rgb",
            )


def read_k400(root: Path, split_number: int) -> Iterator[LabelledVideo]:
    """`[annotations/]train.csv`, `val.csv` (or `validate.csv`) and, where it is there, `test.csv`; videos
    `ID_START_END.mp4`, seconds in six digits, in folders by class or not."""
    source = "the repository kinetics-dataset of the CVD Foundation, or Google DeepMind's page of Kinetics: the annotations of Kinetics-400"
    folders = ["annotations", ""]
    files: list[tuple[Split, list[str]]] = [
        ("train", ["train.csv"]),
        ("val", ["val.csv", "validate.csv"]),
        ("test", ["test.csv"]),
    ]
    for split, names in files:
        path = _find(root, folders, names)
        if path is None and split == "test":
            return
        if path is None:
            raise _missing(root, f"annotations/{names[0]}", source)
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if not row.get("label"):
                    raise ConfigError(
                        f"{path}: {row.get('youtube_id')} has no label; take the file with labels, from {source}"
                    )
                start, end = int(float(row["time_start"])), int(float(row["time_end"]))
                yield LabelledVideo(
                    stem=f"{row['youtube_id']}_{start:06d}_{end:06d}",
                    label=row["label"],
                    split=split,
                    group=row["youtube_id"],
                    folder=row["label"],
                )


READERS: MappingProxyType[str, Reader] = MappingProxyType(
    {
        "ssv2": read_ssv2,
        "diving48": read_diving48,
        "ucf101": read_ucf101,
        "hmdb51": read_hmdb51,
        "k400": read_k400,
    }
)
SEVERAL_SPLITS = ("ucf101", "hmdb51")
"""Data sets with three official splits."""


def with_validation(
    videos: list[LabelledVideo], val_fraction: float, *, val_is_test: bool
) -> Iterator[tuple[LabelledVideo, Split]]:
    """Each video and its split, where training gives a share of its groups to validation if there is no such split.

    The share is drawn by a hash of the group, so no recording stands on both sides.

    Args:
        val_is_test: the official validation split counts as the test split, and an official test split is left out.
    """
    has_val = any(video.split == "val" for video in videos) and not val_is_test
    for video in videos:
        split: Split = video.split
        if val_is_test and split == "test":
            continue
        if val_is_test and split == "val":
            split = "test"
        elif split == "train" and not has_val:
            split = draw_split(video.group, val_fraction)
        yield video, split


def _find(root: Path, folders: list[str], names: list[str]) -> Path | None:
    candidates = (root / folder / name for folder in folders for name in names)
    return next((path for path in candidates if path.is_file()), None)


def _missing(root: Path, name: str, source: str) -> ConfigError:
    return ConfigError(f"{root} has no {name}; get it from {source}, and put it there")


def _read(root: Path, folders: list[str], names: list[str], source: str) -> str:
    path = _find(root, folders, names)
    if path is None:
        raise _missing(root, f"{folders[0]}/{names[0]}".lstrip("/"), source)
    return path.read_text()


def _lines(root: Path, folders: list[str], names: list[str], source: str) -> list[list[str]]:
    return [line.split() for line in _read(root, folders, names, source).splitlines() if line.strip()]


def _json(root: Path, folders: list[str], names: list[str], source: str) -> Any:
    try:
        return json.loads(_read(root, folders, names, source))
    except ValueError as error:
        raise ConfigError(f"{root}: {names[0]} is no JSON: {error}; get it anew from {source}") from error

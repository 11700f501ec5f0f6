"""Labelled data sets as their authors publish them, read as one list of videos: where each is, its label and its split.

A data set is a folder of the user's: videos in any subfolder, and the official split files. Nothing is downloaded. Each
reader says what it needs; a file that is missing is an error that says who hands it out.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from pipeline.errors import ConfigError
from pipeline.schema import Split, draw_split

log = logging.getLogger(__name__)

_VIDEOS = (".avi", ".mp4", ".webm", ".mkv", ".mov")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledVideo:
    """A video that a split file lists.

    stem: its file's name without the extension. group: videos that stand on one side of any split of ours, as they were cut
    from one recording. where: the file and the place in it that list it. folder: the parent folder that is meant where several
    files have this name; "" for any. Texts are in Unicode's form NFC, whatever the lists and the file system have.
    """

    stem: str
    label: str
    split: Split
    group: str
    where: str
    folder: str = ""
    caption: str = ""

    def __post_init__(self) -> None:
        for name in ("stem", "label", "group", "folder", "caption"):
            object.__setattr__(self, name, _composed(getattr(self, name)))


class VideoFolder:
    """Where the videos below a folder lie, by the stem of their names."""

    def __init__(self, root: Path) -> None:
        self._paths: dict[str, list[PurePosixPath]] = {}
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(names):
                # Hidden ones are no videos: macOS puts a `._NAME` beside each file on disks of others.
                if Path(name).suffix.lower() in _VIDEOS and not name.startswith("."):
                    path = PurePosixPath(Path(folder).relative_to(root).as_posix()) / name
                    self._paths.setdefault(_composed(path.stem), []).append(path)

    def find(self, video: LabelledVideo) -> str | None:
        """The path of a video, relative to the root; None where there is none.

        Raises:
            ConfigError: several files have its name, and its folder does not tell which is meant; or its path is not UTF-8.
        """
        found = self._paths.get(video.stem, [])
        if len(found) > 1:
            found = [path for path in found if _composed(path.parent.name) == video.folder] or found
        if len(found) > 1:
            raise ConfigError(
                f"{video.where}: both {_shown(found[0])} and {_shown(found[1])} are named {video.stem}; leave one in the folder"
            )
        if found and _shown(found[0]) != str(found[0]):
            raise ConfigError(f"{video.where}: the path {_shown(found[0])} of {video.stem} is not UTF-8; rename it")
        return str(found[0]) if found else None


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _shown(path: PurePosixPath) -> str:
    return str(path).encode(errors="backslashreplace").decode()


Reader = Callable[[Path, int], Iterator[LabelledVideo]]


def read_ucf101(root: Path, split_number: int) -> Iterator[LabelledVideo]:
    """`[ucfTrainTestlist/]classInd.txt`, `trainlistNN.txt` and `testlistNN.txt`; `Class/v_Class_gGG_cCC.avi`."""
    source = "the page of UCF101 at the Center for Research in Computer Vision, University of Central Florida: the train/test splits for action recognition"
    folders = ["ucfTrainTestlist", ""]
    numbers = {}
    for where, words in _lines(root, folders, "classInd.txt", source):
        with _published(where):
            numbers[words[1]] = words[0]
    for split, name in (("train", f"trainlist{split_number:02d}.txt"), ("test", f"testlist{split_number:02d}.txt")):
        for where, words in _lines(root, folders, name, source):
            path = PurePosixPath(words[0])
            if path.parent.name not in numbers:
                raise ConfigError(f"{where}: {path} is of class {path.parent.name!r}, which classInd.txt does not have")
            if len(words) > 1 and words[1] != numbers[path.parent.name]:
                raise ConfigError(
                    f"{where}: {path} has the number {words[1]}; classInd.txt has {numbers[path.parent.name]} for its class"
                )
            yield LabelledVideo(
                stem=path.stem,
                label=path.parent.name,
                split="train" if split == "train" else "test",
                group=path.stem.rpartition("_c")[0],
                where=where,
                folder=path.parent.name,
            )


def read_hmdb51(root: Path, split_number: int) -> Iterator[LabelledVideo]:
    """`[testTrainMulti_7030_splits/]CLASS_test_splitN.txt`, a line a video: 1 trains, 2 tests, 0 is in neither."""
    source = "the page of HMDB at the Serre Lab, Brown University: the archive test_train_splits"
    ending = f"_test_split{split_number}.txt"
    found = [*root.glob(f"testTrainMulti_7030_splits/*{ending}"), *root.glob(f"*{ending}")]
    files = sorted(path for path in found if not path.name.startswith("."))
    if not files:
        raise _missing(root, f"testTrainMulti_7030_splits/CLASS{ending}", source)
    for file in files:
        label = file.name.removesuffix(ending)
        for where, line in _numbered(file, source):
            name, _, number = line.rpartition(" ")
            if number not in ("0", "1", "2") or not name:
                raise ConfigError(
                    f"{where}: {line!r} is no name with 0, 1 or 2 behind it; get the file anew from {source}"
                )
            if number != "0":
                stem = PurePosixPath(name.strip()).stem
                # A name is: recording, class, properties. Clips of one recording look alike.
                group = stem.partition(f"_{label}_")[0]
                split: Split = "train" if number == "1" else "test"
                yield LabelledVideo(stem=stem, label=label, split=split, group=group, where=where, folder=label)


def read_ssv2(root: Path, split_number: int) -> Iterator[LabelledVideo]:
    """`[labels/]labels.json`, `train.json`, `validation.json` and, where it is there, `test.json` with `test-answers.csv`;
    `ID.webm`. The label is the template, the caption what it says with its objects."""
    source = "the page of Something-Something V2 at Qualcomm's developer network: the package of labels"

    def names(name: str) -> list[str]:
        return [f"{name}.json", f"something-something-v2-{name}.json"]  # of the newer and of the older package

    folders = ["labels", ""]
    classes = _json(root, folders, names("labels"), source)
    for name, split in (("train", "train"), ("validation", "val")):
        for where, row in _entries(root, folders, names(name), source):
            with _published(where):
                label = row["template"].replace("[", "").replace("]", "")
                video = LabelledVideo(
                    stem=str(row["id"]),
                    label=label,
                    split="train" if split == "train" else "val",
                    group=str(row["id"]),
                    where=where,
                    caption=row["label"],
                )
            if label not in classes:
                raise ConfigError(f"{where}: {video.stem} has the template {label!r}, which labels.json does not have")
            yield video
    if (answers := _find(root, folders, ["test-answers.csv"])) is not None:
        for where, line in _numbered(answers, source):
            with _published(where):
                stem, label = next(csv.reader([line], delimiter=";"))[:2]
            if label not in classes:
                raise ConfigError(f"{where}: {stem} has the label {label!r}, which labels.json does not have")
            yield LabelledVideo(stem=stem, label=label, split="test", group=stem, where=where)


def read_diving48(root: Path, split_number: int) -> Iterator[LabelledVideo]:
    """`Diving48_vocab.json`, `Diving48_V2_train.json` and `Diving48_V2_test.json`; `rgb/ID.mp4`. The label is the dive in words."""
    source = "the page of the RESOUND project at the SVCL, UC San Diego: the V2 annotations of Diving48"
    folders = ["", "annotations"]
    words = _json(root, folders, ["Diving48_vocab.json"], source)
    for split, name in (("train", "Diving48_V2_train.json"), ("test", "Diving48_V2_test.json")):
        for where, row in _entries(root, folders, [name], source):
            with _published(where):
                if not 0 <= row["label"] < len(words):  # -1 would be the last class
                    raise ConfigError(
                        f"{where}: {row['vid_name']} has the label {row['label']}; Diving48_vocab.json has 0 to {len(words) - 1}"
                    )
                video = LabelledVideo(
                    stem=row["vid_name"],
                    label=" ".join(words[row["label"]]),
                    split="train" if split == "train" else "test",
                    group=row["vid_name"].rpartition("_")[0],
                    where=where,
                    folder="rgb",
                )
            yield video


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
        lines = _numbered(path, source)
        header = next(csv.reader([next(lines, ("", ""))[1]]), [])
        for where, line in lines:
            with _published(where):
                row = dict(zip(header, next(csv.reader([line])), strict=False))
                if not row.get("label"):
                    raise ConfigError(
                        f"{where}: {row.get('youtube_id')} has no label; take the file with labels, from {source}"
                    )
                start, end = int(float(row["time_start"])), int(float(row["time_end"]))
                video = LabelledVideo(
                    stem=f"{row['youtube_id']}_{start:06d}_{end:06d}",
                    label=row["label"],
                    split=split,
                    group=row["youtube_id"],
                    where=where,
                    folder=row["label"],
                )
            yield video


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


def list_once(videos: Iterator[LabelledVideo]) -> Iterator[LabelledVideo]:
    """`videos`, each once: one that is listed again with the same label in the same split is left out, with a warning.

    Raises:
        ConfigError: a video is listed with two labels, or in two splits; it names both places.
    """
    first: dict[str, LabelledVideo] = {}
    for video in videos:
        known = first.setdefault(video.stem, video)
        if known is video:
            yield video
        elif (known.label, known.split) == (video.label, video.split):
            log.warning("%s lists %s again; it is left out, as %s has it", video.where, video.stem, known.where)
        else:
            raise ConfigError(
                f"{video.where} lists {video.stem} as {video.label!r} in split {video.split}; {known.where} lists it as "
                f"{known.label!r} in {known.split}; leave one of them"
            )


def _find(root: Path, folders: list[str], names: list[str]) -> Path | None:
    candidates = (root / folder / name for folder in folders for name in names)
    return next((path for path in candidates if path.is_file()), None)


def _missing(root: Path, name: str, source: str) -> ConfigError:
    return ConfigError(f"{root} has no {name}; get it from {source}, and put it there")


def _read(root: Path, folders: list[str], names: list[str], source: str) -> tuple[Path, str]:
    path = _find(root, folders, names)
    if path is None:
        raise _missing(root, f"{folders[0]}/{names[0]}".lstrip("/"), source)
    return path, _text(path, source)


def _text(path: Path, source: str) -> str:
    """A file's text in form NFC, without a byte-order mark."""
    try:
        return _composed(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error}); save it so, or get it anew from {source}") from error


def _numbered(path: Path, source: str) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not blank, each with what to call it."""
    for number, line in enumerate(_text(path, source).splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _lines(root: Path, folders: list[str], name: str, source: str) -> Iterator[tuple[str, list[str]]]:
    path, _ = _read(root, folders, [name], source)
    for where, line in _numbered(path, source):
        yield where, line.split()


def _json(root: Path, folders: list[str], names: list[str], source: str) -> Any:
    path, text = _read(root, folders, names, source)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}; get it anew from {source}") from error


def _entries(root: Path, folders: list[str], names: list[str], source: str) -> Iterator[tuple[str, Any]]:
    """The entries of a list in a JSON file, each with what to call it."""
    path = _find(root, folders, names)
    for number, entry in enumerate(_json(root, folders, names, source), 1):
        yield f"{path}, entry {number}", entry


@contextmanager
def _published(where: str) -> Iterator[None]:
    """Names the place whose layout the body does not know."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{where}: not laid out as published ({type(error).__name__}: {error}); get the file anew"
        ) from error

"""Labelled data sets in their published layouts, as small trees, to manifests that sharding reads."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest

from jobs.manifest import ManifestConfig, run
from pipeline.errors import ConfigError
from pipeline.labelled_sets import READERS
from pipeline.manifest import read_manifest
from pipeline.storage import Store

Row = dict[str, str]


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def put_ucf101(root: Path) -> Path:
    """Two classes of 12 groups of two videos; the last two groups test, in split 2 the first two."""
    names = [f"{c}/v_{c}_g{g:02d}_c{n:02d}.avi" for c in ("Archery", "YoYo") for g in range(1, 13) for n in (1, 2)]
    files = {f"UCF-101/{name}": "" for name in names}
    lists = "ucfTrainTestlist"
    files[f"{lists}/classInd.txt"] = "1 Archery\n2 YoYo\n"
    for number, tested in ((1, ("g11", "g12")), (2, ("g01", "g02"))):
        test = [name for name in names if any(f"_{group}_" in name for group in tested)]
        files[f"{lists}/testlist{number:02d}.txt"] = "\r\n".join(test) + "\r\n"
        train = [f"{name} {1 if name.startswith('A') else 2}" for name in names if name not in test]
        files[f"{lists}/trainlist{number:02d}.txt"] = "\n".join(train) + "\n"
    return put(root, files)


def put_hmdb51(root: Path) -> Path:
    videos = {f"(Rad)Schlag!_cartwheel_f_cm_np1_le_med_{n}": "1" for n in range(3)}
    videos |= {"Film_cartwheel_f_nm_np1_fr_bad_0": "2", "Other_cartwheel_u_nm_np1_fr_bad_0": "0"}
    files = {f"hmdb51_org/cartwheel/{name}.avi": "" for name in videos} | {"hmdb51_org/walk/A_walk_f_1.avi": ""}
    folder = "testTrainMulti_7030_splits"
    files[f"{folder}/cartwheel_test_split1.txt"] = "".join(f"{name}.avi {number} \n" for name, number in videos.items())
    files[f"{folder}/walk_test_split1.txt"] = "A_walk_f_1.avi 1 \n"
    return put(root, files)


def put_ssv2(root: Path, prefix: str = "labels/") -> Path:
    def rows(*ids: int) -> str:
        template = {"template": "Holding [something] next to [something]", "label": "holding a cup next to a box"}
        return json.dumps([{"id": str(one), **template, "placeholders": ["a cup", "a box"]} for one in ids])

    labels = {"Holding something next to something": "0", "Pouring [x]": "1", "Pouring something": "2"}
    files = {f"20bn-something-something-v2/{n}.webm": "" for n in range(1, 41)}
    files |= {
        f"{prefix}labels.json": json.dumps(labels),
        f"{prefix}train.json": rows(*range(1, 31)),
        f"{prefix}validation.json": rows(31, 32),
        f"{prefix}test.json": json.dumps([{"id": "33"}]),
    }
    return put(root, files)


def put_diving48(root: Path) -> Path:
    def rows(*names: str, label: int) -> str:
        return json.dumps([{"vid_name": name, "label": label, "start_frame": 0, "end_frame": 9} for name in names])

    names = [f"_8Vy-{n:02d}_{clip:05d}" for n in range(20) for clip in (0, 1)]
    files = {f"{kind}/{name}.mp4": "" for name in names for kind in ("rgb", "flow")}
    vocab = [["Back", "15som", "05Twis", "FREE"], ["Forward", "25som", "NoTwis", "PIKE"]]
    files |= {
        "Diving48_vocab.json": json.dumps(vocab),
        "Diving48_V2_train.json": rows(*names[:36], label=0),
        "Diving48_V2_test.json": rows(*names[36:], label=1),
    }
    return put(root, files)


def put_k400(root: Path, folders: bool = True) -> Path:
    def rows(split: str, *ids: str) -> str:
        lines = [f'"playing, loudly",{one},{place},{place + 10},{split}' for place, one in enumerate(ids)]
        return "label,youtube_id,time_start,time_end,split\n" + "\n".join(lines) + "\n"

    train = [f"-id_{n}" for n in range(30)]
    files = {f"annotations/{name}.csv": rows(name, *ids) for name, ids in (("train", train), ("val", ["v0", "v1"]))}
    place = "videos/playing, loudly" if folders else "videos"
    files |= {
        f"{place}/{one}_{n:06d}_{n + 10:06d}.mp4": "" for ids in (train, ["v0", "v1"]) for n, one in enumerate(ids)
    }
    return put(root, files)


PUT: dict[str, Callable[[Path], Path]] = {
    "ucf101": put_ucf101,
    "hmdb51": put_hmdb51,
    "ssv2": put_ssv2,
    "diving48": put_diving48,
    "k400": put_k400,
}


def convert(dataset: str, root: Path, **options: Any) -> tuple[dict[str, Any], list[Row]]:
    """The result's figures with its books, and the manifest's rows; each names a file of the tree."""
    out = root.parent / "out" / "manifest.csv"
    result = run(ManifestConfig(dataset=dataset, root=root, out=out, **options))  # type: ignore[arg-type]
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert all((root / row["video"]).is_file() for row in rows)
    assert result.planned == result.committed + result.rejected and result.committed == len(rows)
    # What sharding makes of it.
    for table in read_manifest(Store.at(out.parent), out.name):
        assert not any(table["reject_class"].to_pylist()) and table["label"].to_pylist() == [
            row["label"] for row in rows
        ]
    return result.figures | {"planned": result.planned, "rejected": result.rejected}, rows


def groups_of(rows: list[Row], split: str) -> set[tuple[str, str]]:
    return {(row["label"], row["group"]) for row in rows if row["split"] == split}


def test_ucf101(tmp_path: Path) -> None:
    root = put_ucf101(tmp_path / "ucf")
    figures, rows = convert("ucf101", root, val_fraction=0.25)
    assert figures["classes"] == 2 and figures["videos_by_split"]["test"] == 8 and figures["planned"] == 48
    assert rows[0] | {"split": ""} == {
        "video": "UCF-101/Archery/v_Archery_g01_c01.avi",
        "label": "Archery",
        "split": "",
        "caption": "",
        "group": "v_Archery_g01",
    }
    train, val, test = (groups_of(rows, split) for split in ("train", "val", "test"))
    assert train and val and not train & val and not test & (train | val)
    assert test == {(c, f"v_{c}_g{g}") for c in ("Archery", "YoYo") for g in (11, 12)}
    _, second = convert("ucf101", root, split_number=2, val_fraction=0)
    assert groups_of(second, "test") == {(c, f"v_{c}_g{g}") for c in ("Archery", "YoYo") for g in ("01", "02")}
    assert not groups_of(second, "val")


def test_hmdb51(tmp_path: Path) -> None:
    figures, rows = convert("hmdb51", put_hmdb51(tmp_path / "hmdb"), val_fraction=0)
    assert figures["videos_by_split"] == {"train": 4, "test": 1} and figures["classes"] == 2
    assert not any("Other" in row["video"] for row in rows)  # in neither list
    assert groups_of(rows, "train") == {("cartwheel", "(Rad)Schlag!"), ("walk", "A")}


@pytest.mark.parametrize("prefix", ["labels/", "something-something-v2-"])
def test_ssv2(tmp_path: Path, prefix: str) -> None:
    root = put_ssv2(tmp_path / "ssv2", prefix)
    figures, rows = convert("ssv2", root)
    assert figures["videos_by_split"] == {"train": 30, "val": 2}
    assert rows[0]["label"] == "Holding something next to something"
    assert rows[0]["caption"] == "holding a cup next to a box"
    put(root, {"labels/test-answers.csv": "33;Pouring something\n"})
    figures, rows = convert("ssv2", root)
    assert rows[-1]["split"] == "test" and rows[-1]["label"] == "Pouring something"
    figures, rows = convert("ssv2", root, val_is_test=True, val_fraction=0.3)
    assert figures["videos_by_split"]["test"] == 2 and 0 < figures["videos_by_split"]["val"] < 30
    assert figures["planned"] == 32  # official test videos are left out


def test_diving48(tmp_path: Path) -> None:
    figures, rows = convert("diving48", put_diving48(tmp_path / "diving"), val_fraction=0.3)
    assert {row["label"] for row in rows} == {"Back 15som 05Twis FREE", "Forward 25som NoTwis PIKE"}
    assert all(row["video"].startswith("rgb/") for row in rows) and figures["videos_by_split"]["test"] == 4
    train, val = groups_of(rows, "train"), groups_of(rows, "val")
    assert train and val and not train & val and all(group.startswith("_8Vy-") for _, group in train)


@pytest.mark.parametrize("folders", [True, False])
def test_k400(tmp_path: Path, folders: bool) -> None:
    root = put_k400(tmp_path / "k400", folders)
    figures, rows = convert("k400", root)
    assert figures["videos_by_split"] == {"train": 30, "val": 2} and rows[0]["label"] == "playing, loudly"
    (root / "annotations/val.csv").rename(root / "annotations/validate.csv")
    put(root, {"annotations/test.csv": "label,youtube_id,time_start,time_end,split\nrunning,t0,3,13,test\n"})
    figures, _ = convert("k400", root)
    assert figures["missing_by_split"] == {"test": 1}
    put(root, {"annotations/test.csv": "youtube_id,time_start,time_end,split\nt0,3,13,test\n"})
    with pytest.raises(ConfigError, match="t0 has no label"):
        convert("k400", root)


def test_missing_videos_are_listed_and_counted(tmp_path: Path) -> None:
    root = put_ucf101(tmp_path / "ucf")
    gone = root / "UCF-101/YoYo/v_YoYo_g12_c02.avi"
    gone.rename(tmp_path / "elsewhere.avi")
    figures, rows = convert("ucf101", root)
    assert (figures["rejected"], figures["missing_by_split"], len(rows)) == (1, {"test": 1}, 47)
    report = Path(figures["missing"])
    assert list(csv.DictReader(report.read_text().splitlines())) == [
        {"name": "v_YoYo_g12_c02", "label": "YoYo", "split": "test"}
    ]
    (tmp_path / "elsewhere.avi").rename(gone)
    figures, _ = convert("ucf101", root)
    assert "missing" not in figures and not report.exists()


@pytest.mark.parametrize(
    ("dataset", "file", "source"),
    [
        ("ucf101", "ucfTrainTestlist/classInd.txt", "University of Central Florida"),
        ("ucf101", "ucfTrainTestlist/testlist01.txt", "University of Central Florida"),
        ("hmdb51", "testTrainMulti_7030_splits/*_test_split1.txt", "Serre Lab, Brown University"),
        ("ssv2", "labels/train.json", "Qualcomm"),
        ("ssv2", "labels/labels.json", "Qualcomm"),
        ("diving48", "Diving48_vocab.json", "SVCL, UC San Diego"),
        ("diving48", "Diving48_V2_test.json", "SVCL, UC San Diego"),
        ("k400", "annotations/val.csv", "CVD Foundation"),
    ],
)
def test_a_missing_split_file_says_who_has_it(tmp_path: Path, dataset: str, file: str, source: str) -> None:
    root = PUT[dataset](tmp_path / "data")
    for path in root.glob(file):
        path.unlink()
    with pytest.raises(ConfigError, match=f"has no .*; get it from .*{source}"):
        convert(dataset, root)


@pytest.mark.parametrize("dataset", READERS)
def test_a_folder_without_the_videos_is_refused(tmp_path: Path, dataset: str) -> None:
    root = PUT[dataset](tmp_path / "data")
    for path in [*root.rglob("*.avi"), *root.rglob("*.mp4"), *root.rglob("*.webm")]:
        path.unlink()
    with pytest.raises(ConfigError, match=r"none of the .* videos that the split files name is there"):
        convert(dataset, root)


def test_damaged_files_and_ambiguous_names_are_refused(tmp_path: Path) -> None:
    root = put_diving48(tmp_path / "diving")
    put(root, {"other/rgb/_8Vy-00_00000.mp4": ""})
    with pytest.raises(ConfigError, match="leave one in the folder"):
        convert("diving48", root)
    put(root, {"Diving48_vocab.json": "[["})
    with pytest.raises(ConfigError, match=r"Diving48_vocab.json is no JSON"):
        convert("diving48", root)
    put(root, {"Diving48_vocab.json": "{}"})
    with pytest.raises(ConfigError, match=r"train.json, entry 1: _8Vy-00_00000 has the label 0"):
        convert("diving48", root)
    put(root, {"Diving48_vocab.json": "[[1]]"})
    with pytest.raises(ConfigError, match=r"train.json, entry 1: not laid out as published \(TypeError"):
        convert("diving48", root)
    root = put_ucf101(tmp_path / "ucf")
    put(root, {"ucfTrainTestlist/classInd.txt": "1 Archery\n"})
    with pytest.raises(ConfigError, match=r"of class 'YoYo', which classInd.txt does not have"):
        convert("ucf101", root)
    root = put_ssv2(tmp_path / "ssv2")
    put(root, {"labels/labels.json": "{}"})
    with pytest.raises(ConfigError, match=r"which labels.json does not have"):
        convert("ssv2", root)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"out": Path("list.txt")}, "is a .csv file"),
        ({"val_fraction": 1.0}, r"must be in \[0, 1\)"),
        ({"dataset": "k400", "split_number": 2}, "k400 has one official split"),
        ({"val_is_test": True}, "ucf101 has no official validation split"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ManifestConfig(**{"dataset": "ucf101", "root": tmp_path, "out": tmp_path / "list.csv", **wrong})


@pytest.mark.parametrize("dataset", READERS)
def test_marks_blank_lines_and_files_of_macos_change_nothing(tmp_path: Path, dataset: str) -> None:
    """A byte-order mark, a blank last line, `._` files beside all others, and names in the other Unicode form."""
    plain = PUT[dataset](tmp_path / "plain" / "data")
    expected = convert(dataset, plain)
    other = PUT[dataset](tmp_path / "other" / "data")
    for path in [path for path in other.rglob("*") if path.is_file()]:
        if path.suffix in (".txt", ".csv", ".json"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n \r\n\n")
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert convert(dataset, other) == expected


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_the_other_unicode_form(tmp_path: Path, listed: str, stored: str) -> None:
    root = put_k400(tmp_path / "data")
    name, label = "ünï_000001_000011", "playing café"
    row = f"{label},ünï,1,11,train\n"
    train = root / "annotations/train.csv"
    train.write_text(train.read_text() + normalize(listed, row))
    put(root, {normalize(stored, f"videos/{label}/{name}.mp4"): "", "videos/other/x_000001_000011.mp4": ""})
    _, rows = convert("k400", root)
    (found,) = [row for row in rows if row["label"] == label]
    assert found["video"] == normalize(stored, f"videos/{label}/{name}.mp4")


@pytest.mark.parametrize(
    ("dataset", "file", "text", "message"),
    [
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "YoYo/v_YoYo_g11_c01.avi 2\n", r"testlist01.txt, line 5 lists v_YoYo_g11_c01 as 'YoYo' in split test; .*trainlist01.txt, line 41"),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "YoYo/v_YoYo_g01_c09.avi 1\n", r"trainlist01.txt, line 41: .* has the number 1; classInd.txt has 2"),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "YoYo/v_YoYo_g01_c09.avi -1\n", r"line 41: .* has the number -1"),
        ("hmdb51", "testTrainMulti_7030_splits/walk_test_split1.txt", "B_walk_f_1.avi -1\n", r"split1.txt, line 2: .* is no name with 0, 1 or 2"),
        ("hmdb51", "testTrainMulti_7030_splits/walk_test_split1.txt", "A_walk_f_1.avi 2\n", r"line 2 lists A_walk_f_1 as 'walk' in split test; .*line 1"),
        ("k400", "annotations/val.csv", '"playing, loudly",-id_3,3,13,val\n', r"val.csv, line 4 lists -id_3_000003_000013 .* in split val; .*train.csv, line 5"),
        ("k400", "annotations/val.csv", "dancing,v0,0,10,val\n", r"val.csv, line 4 lists v0_000000_000010 as 'dancing'"),
        ("k400", "annotations/val.csv", "dancing,v9,,10,val\n", r"val.csv, line 4: not laid out as published \(ValueError"),
        ("k400", "annotations/val.csv", "dancing\n", r"val.csv, line 4: not laid out as published \(KeyError"),
    ],
)  # fmt: skip
def test_lists_that_contradict_themselves_are_refused_by_file_and_line(
    tmp_path: Path, dataset: str, file: str, text: str, message: str
) -> None:
    root = PUT[dataset](tmp_path / "data")
    (root / file).write_text((root / file).read_text() + text)
    with pytest.raises(ConfigError, match=message):
        convert(dataset, root)


@pytest.mark.parametrize(
    ("label", "message"), [(-1, "has the label -1; .* has 0 to 1"), (2, "has the label 2"), ("0", "laid")]
)
def test_labels_beyond_the_vocabulary_are_refused(tmp_path: Path, label: Any, message: str) -> None:
    """-1 would be the last class."""
    root = put_diving48(tmp_path / "data")
    rows = json.loads((root / "Diving48_V2_test.json").read_text())
    rows[2]["label"] = label
    put(root, {"Diving48_V2_test.json": json.dumps(rows)})
    with pytest.raises(ConfigError, match=f"V2_test.json, entry 3: .*{message}"):
        convert("diving48", root)


def test_a_video_that_is_listed_again_is_there_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = put_ucf101(tmp_path / "data")
    before, rows = convert("ucf101", root)
    path = root / "ucfTrainTestlist/trainlist01.txt"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    assert convert("ucf101", root) == (before, rows)
    assert "trainlist01.txt, line 41 lists v_Archery_g01_c01 again" in caplog.text


def test_lists_in_another_encoding_are_refused(tmp_path: Path) -> None:
    root = put_ucf101(tmp_path / "data")
    path = root / "ucfTrainTestlist/trainlist01.txt"
    path.write_text(path.read_text(), encoding="utf-16")
    with pytest.raises(ConfigError, match=r"trainlist01.txt is not UTF-8"):
        convert("ucf101", root)


def test_a_path_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    root = put_k400(tmp_path / "data")
    (root / "videos/playing, loudly").rename(root / "videos" / os.fsdecode(b"playing \xff"))
    with pytest.raises(
        ConfigError, match=r"train.csv, line 2: the path videos/playing \\udcff/.* is not UTF-8; rename it"
    ):
        convert("k400", root)

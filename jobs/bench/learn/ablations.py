"""`tokenreel bench learn ablations`: the paper's ablations on the labelled benchmark, as one table and one plot."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from jobs.bench.learn.arms import BASE, NONE, Arm, make_arms
from jobs.bench.learn.prepare import LearnPrepareConfig, tokens_folder
from jobs.bench.learn.report import collect, wins, write_plot, write_table
from jobs.bench.learn.tasks import NUM_FRAMES
from jobs.bench.learn.train import RESULT_NAME, SETTINGS_NAME, ArmRun, Budget, run_arm, settings_of
from jobs.config import from_plain, to_plain
from jobs.folder import lock_folder
from jobs.result import JobResult
from jobs.tracking import DatasetInput, Tracker
from models.vimpac import VimpacConfig, VimpacObjectiveConfig
from pipeline.dataset import read_meta
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)
_PARENT_WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnAblationsConfig:
    """Pre-train small models in every way of the paper's ablations, and measure each on all tasks of the benchmark.

    Run the same command again after a crash, or with more arms or seeds: what is done stays.
    """

    benchmark: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BENCHMARK")]
    """Folder that `tokenreel bench learn prepare` made."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for runs, table and plot."""
    arms: tuple[str, ...] = ()
    """Arms to run; none given: all."""
    finetune_arms: tuple[str, ...] = (NONE, BASE)
    """Arms that are fine-tuned as well."""
    seeds: int = 3
    """Seeds 0 to this, of weights, order, masks and labels."""
    workers: int = 2
    """Arms at a time, each in a process with one thread; 1: in this one."""
    layers: int = 2
    """Layers of the base arm's network."""
    hidden: int = 96
    """Its width."""
    frames: int = 8
    """Frames of a window in pre-training; 16, of which a clip has as many, must be a multiple."""
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        if min(self.seeds, self.workers, self.layers) < 1 or self.hidden < 8 or self.hidden % 8:
            raise ConfigError(
                f"seeds = {self.seeds}, workers = {self.workers}, layers = {self.layers} must be 1 or more, and hidden = "
                f"{self.hidden} a multiple of 8"
            )
        if self.frames < 1 or NUM_FRAMES % self.frames:
            raise ConfigError(f"frames = {self.frames}: must divide the {NUM_FRAMES} frames of a clip")


def run(config: LearnAblationsConfig) -> JobResult:
    started_s = time.monotonic()
    benchmark = _read_benchmark(config.benchmark)
    runs = plan_runs(config)
    with lock_folder(config.out), _parent_run(config) as (parent, parent_id):
        todo = [run for run in runs if not _is_done(run)]
        log.info(f"bench learn ablations: {len(runs)} runs, {len(runs) - len(todo)} of them done already")
        _run_all(todo, config, parent_id)
        results = [json.loads((run.folder / RESULT_NAME).read_text()) for run in runs]
        table, plot = config.out / "results.md", config.out / "results.png"
        write_table(table, benchmark, results)
        share = max(config.budget.shares)
        write_plot(plot, benchmark, results, share)
        estimates = collect(results)
        won = {name: wins(estimates, name, "linear", share) for name in sorted({run.arm.name for run in runs} - {NONE})}
        parent.finish("FINISHED", {f"wins_{name}": len(tasks) for name, tasks in won.items()}, [table, plot])
        parent.close()
    return JobResult(
        job="bench learn ablations",
        out=str(config.out),
        planned=len(runs),
        committed=len(runs),
        mlflow_run_id=parent_id,
        elapsed_s=time.monotonic() - started_s,
        figures={"table": str(table), "plot": str(plot), "above_no_pretraining": won},
    )


def plan_runs(config: LearnAblationsConfig) -> list[ArmRun]:
    """Every run that the config asks for, seed by seed, so that a run that is broken off has whole comparisons.

    Raises:
        ConfigError: an arm or a task to fine-tune on that there is not.
    """
    prepared = _prepared(config.benchmark)
    arms = _arms(config, prepared)
    for name, wanted, allowed in (
        ("arms", config.arms, list(arms)),
        ("finetune_arms", config.finetune_arms, list(arms)),
        ("budget.finetune_tasks", config.budget.finetune_tasks, [path.stem for path in _manifests(config.benchmark)]),
    ):
        if unknown := set(wanted) - set(allowed):
            raise ConfigError(f"{name}: {sorted(unknown)} are not there; allowed: {', '.join(allowed)}")
    chosen = [arm for name, arm in arms.items() if not config.arms or name in config.arms]
    return [
        ArmRun(
            arm=arm,
            seed=seed,
            tokens=tokens_folder(config.benchmark, prepared.tokenizer_steps[arm.tokenizer]),
            manifests=tuple(_manifests(config.benchmark)),
            folder=config.out / "runs" / f"{arm.name.replace('/', '-')}-seed{seed}",
            finetune=arm.name in config.finetune_arms,
            budget=config.budget,
        )
        for seed in range(config.seeds)
        for arm in chosen
    ]


def _arms(config: LearnAblationsConfig, prepared: LearnPrepareConfig) -> dict[str, Arm]:
    side = prepared.size_px // prepared.patch
    backbone = VimpacConfig(
        layers=config.layers,
        hidden=config.hidden,
        heads=4,
        head_dim=config.hidden // 4,
        mlp=4 * config.hidden,
        num_frames=config.frames,
        grid_height=side,
        grid_width=side,
        codebook_size=prepared.codebook_size,
        dropout=0.0,
    )
    objective = VimpacObjectiveConfig(head_hidden=256, head_out=64)
    return make_arms(backbone, objective, len(prepared.tokenizer_steps))


def _manifests(benchmark: Path) -> list[Path]:
    return sorted((benchmark / "tasks").glob("*.csv"))


def _read_benchmark(folder: Path) -> dict[str, Any]:
    path = folder / "benchmark.json"
    if not path.exists():
        raise ConfigError(f"{folder} holds no finished benchmark; run: tokenreel bench learn prepare {folder}")
    page: dict[str, Any] = json.loads(path.read_text())
    return page


def _prepared(folder: Path) -> LearnPrepareConfig:
    return from_plain(
        json.loads((folder / "prepare.json").read_text()), LearnPrepareConfig, str(folder / "prepare.json")
    )


def _is_done(run: ArmRun) -> bool:
    path = run.folder / SETTINGS_NAME
    if path.exists() and json.loads(path.read_text()) != settings_of(run):
        raise ConfigError(
            f"{run.folder} was begun with other settings; choose another output folder, or delete this one"
        )
    return (run.folder / RESULT_NAME).exists()


def _run_all(todo: Sequence[ArmRun], config: LearnAblationsConfig, parent_id: str) -> None:
    if not todo:
        return
    finished = map(_run_here, todo) if config.workers == 1 else _run_beside(todo, config.workers)
    for number, run in enumerate(finished, 1):
        _track(run, parent_id)
        log.info(f"bench learn ablations: {run.folder.name} done ({number} of {len(todo)})")


def _run_here(run: ArmRun) -> ArmRun:
    run_arm(run)
    return run


def _run_beside(todo: Sequence[ArmRun], workers: int) -> Iterator[ArmRun]:
    # Fresh processes: one that was forked from a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
        waiting = [pool.submit(_run_here, run) for run in todo]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BaseException:  # Ctrl-C too: arms that wait are not begun
            pool.shutdown(cancel_futures=True)
            raise


def _track(run: ArmRun, parent_id: str) -> None:
    """The run as one of MLflow's under the parent: its curve and its figures."""
    result = json.loads((run.folder / RESULT_NAME).read_text())
    tags = {"mlflow.parentRunId": parent_id} if parent_id else {}
    summary = {f"{row['task']}_{row['method']}_{row['share']:g}": row["accuracy"] for row in result["rows"]}
    settings = json.loads((run.folder / SETTINGS_NAME).read_text())
    params = {name: settings[name] for name in ("arm", "seed", "budget")}
    with Tracker.open(
        run.folder,
        job="bench learn ablations",
        name=run.folder.name,
        params=params,
        tags=tags,
        inputs=[_input(run.tokens)],
        sample_system=False,
    ) as tracker:
        tracker.finish("FINISHED", summary, [run.folder / RESULT_NAME])


def _input(tokens: Path) -> DatasetInput:
    meta = read_meta(tokens)
    return DatasetInput(name=tokens.name, fingerprint=meta.fingerprint, uri=str(tokens.resolve()), content=meta.content)


@contextmanager
def _parent_run(config: LearnAblationsConfig) -> Iterator[tuple[Tracker, str]]:
    """The run that stands above those of the arms, and its id; "" where MLflow does not answer."""
    with Tracker.open(
        config.out,
        job="bench learn ablations",
        name=f"ablations {config.out.name}",
        params=to_plain(config),
        sample_system=False,
    ) as tracker:
        deadline_s = time.monotonic() + _PARENT_WAIT_S
        while tracker.run_id is None and time.monotonic() < deadline_s:
            time.sleep(0.1)
        if tracker.run_id is None:
            log.warning("MLflow does not answer, so the arms' runs will stand there without a parent")
        yield tracker, tracker.run_id or ""

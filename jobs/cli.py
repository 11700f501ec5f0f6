"""The command `tokenreel`: one subcommand a job, its options made from the job's config dataclass.

For scripts: logs and progress go to stderr; the last line of stdout is one JSON object; the exit code is 0 done,
1 failed, 2 bad usage or config, 3 more rejects than allowed: stopped early, unless all was done by then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstring_parser
import tyro

from jobs import stopping
from jobs.cluster import end_children, prepare_environment
from jobs.paths import absolute_paths
from jobs.result import JobResult
from pipeline.errors import ConfigError, TokenreelError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    module: str
    config: str
    summary: str


# Names only: a job's module, and with it torch, Ray or MLflow, is imported when that job runs.
_JOBS = {
    "doctor": _Job(module="jobs.doctor", config="DoctorConfig", summary="check this machine, and say what to do"),
    "demo": _Job(module="jobs.demo", config="DemoConfig", summary="run every stage on real videos, here"),
    "manifest": _Job(
        module="jobs.manifest", config="ManifestConfig", summary="UCF101, HMDB51, SSV2, Diving48, Kinetics -> manifest"
    ),
    "plan": _Job(module="jobs.plan", config="PlanConfig", summary="what a corpus will become, take and cost"),
    "shard": _Job(module="jobs.shard", config="ShardConfig", summary="videos -> clip dataset"),
    "train-tokenizer": _Job(
        module="jobs.train_tokenizer", config="TrainTokenizerConfig", summary="clips -> VQ-VAE tokenizer"
    ),
    "import-dvae": _Job(
        module="jobs.import_dvae", config="ImportDvaeConfig", summary="published DALL-E dVAE -> tokenizer"
    ),
    "tokenize": _Job(module="jobs.tokenize", config="TokenizeConfig", summary="clips + tokenizer -> token dataset"),
    "dedup": _Job(
        module="jobs.dedup", config="DedupConfig", summary="near-duplicates in tokens -> a list of samples to keep"
    ),
    "pretrain": _Job(module="jobs.pretrain", config="PretrainConfig", summary="tokens -> pre-trained model, by recipe"),
    "finetune": _Job(
        module="jobs.finetune", config="FinetuneConfig", summary="labelled tokens -> action classifier, by recipe"
    ),
    "embed": _Job(
        module="jobs.embed", config="EmbedConfig", summary="tokens + model -> embeddings, a row a clip or a window"
    ),
    "evaluate": _Job(module="jobs.evaluate", config="EvaluateConfig", summary="model -> numbers and a contact sheet"),
    "verify": _Job(module="jobs.verify", config="VerifyConfig", summary="check every byte of a dataset"),
    "inspect": _Job(
        module="jobs.inspect",
        config="InspectConfig",
        summary="a page about a dataset: scores or codes, frames, rejects",
    ),
    "bench plan": _Job(
        module="jobs.bench.plan", config="BenchPlanConfig", summary="plan a manifest of 10 million rows"
    ),
    "bench shard": _Job(
        module="jobs.bench.shard", config="BenchShardConfig", summary="sharding against copying and bare ffmpeg"
    ),
    "bench tokenize": _Job(
        module="jobs.bench.tokenize",
        config="BenchTokenizeConfig",
        summary="encoding by precision and resolution, and the codes it changes",
    ),
    "bench tokenize-stage": _Job(
        module="jobs.bench.tokenize_stage",
        config="BenchTokenizeStageConfig",
        summary="the whole stage against decoding and encoding alone",
    ),
    "bench decode": _Job(
        module="jobs.bench.decode", config="BenchDecodeConfig", summary="decoding against bare ffmpeg, exact and fast"
    ),
    "bench loop": _Job(
        module="jobs.bench.loop", config="BenchLoopConfig", summary="what tracking and checkpoints cost a step"
    ),
    "bench layout": _Job(
        module="jobs.bench.layout",
        config="BenchLayoutConfig",
        summary="smaller layouts of tokens, and windows read from them",
    ),
    "bench dedup": _Job(
        module="jobs.bench.dedup",
        config="BenchDedupConfig",
        summary="near-duplicates found among copies of real videos",
    ),
    "bench train": _Job(
        module="jobs.bench.train", config="BenchTrainConfig", summary="a training step against a straightforward one"
    ),
    "bench loader": _Job(
        module="jobs.bench.loader", config="BenchLoaderConfig", summary="clip pairs a second against other loaders"
    ),
    "bench learn prepare": _Job(
        module="jobs.bench.learn.prepare",
        config="LearnPrepareConfig",
        summary="a labelled benchmark from packages of the Python index",
    ),
    "bench learn ablations": _Job(
        module="jobs.bench.learn.ablations",
        config="LearnAblationsConfig",
        summary="the paper's ablations on it: a table and a plot",
    ),
    "submit": _Job(
        module="jobs.submit", config="SubmitConfig", summary="run a job on a cluster: submit JOB --address URL"
    ),
    "status": _Job(module="jobs.status", config="StatusConfig", summary="how every job of a project's folder stands"),
    "ui": _Job(module="jobs.ui", config="UiConfig", summary="open MLflow on this folder's runs"),
}
_ONLY_HERE = ("demo", "submit", "status", "ui")

_RECIPES = {
    "PretrainConfig": ("jobs.recipes", "--tokens TOKENS --out RUN"),
    "FinetuneConfig": ("jobs.finetune_recipes", "TOKENS OUT [--from-run RUN]"),
}
"""Configs that begin as a recipe: the module that has them, and what a command names besides."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with the job's code. SIGTERM and SIGHUP end a job as Ctrl-C does: in order, with its JSON
    line and code 1."""
    words = sys.argv[1:] if argv is None else argv
    stopping.catch_signals(lambda stop: _say(_take_name(words)[0], stop))
    code = run(words)
    if stopping.was_stopped():
        end_children()
        os._exit(code)  # Ray's exit handlers would wait for what is gone, or abort
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run the command line; prints the result's JSON line and returns the exit code."""
    logging.basicConfig(
        level=os.environ.get("TOKENREEL_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    prepare_environment()
    name, rest = _take_name(argv)
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    try:
        if name not in _JOBS:
            raise ConfigError(f"no job {name!r}; allowed: {', '.join(_JOBS)}. See tokenreel --help")
        _check_names(rest)
        result = _run_job(name, rest)
        stopping.begin_ending()
    except BaseException as error:
        stop = stopping.begin_ending()
        if isinstance(error, BrokenPipeError):  # `tokenreel shard --help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if isinstance(error, SystemExit) and stop is None:  # --help has no code
            return int(bool(error.code))
        result = _explain(name, stop or error)
    sys.stderr.flush()
    print(result.to_json(), flush=True)
    return result.exit_code


def _explain(name: str, error: BaseException) -> JobResult:
    """The result of a job that `error` ended, logged in one line, or with its traceback where nobody expected it."""
    if isinstance(error, KeyboardInterrupt):
        by = error.signal_name if isinstance(error, stopping.Stopped) else "Ctrl-C"
        return _failure(name, "failed", f"stopped by {by}; run the same command again to resume")
    if isinstance(error, ConfigError):
        return _failure(name, "usage", str(error))
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return _failure(name, "usage", _name_trouble(error))
    if isinstance(error, TokenreelError | FileNotFoundError | PermissionError):
        return _failure(name, "failed", str(error))
    log.error("%s failed", name, exc_info=error)
    return _failure(name, "failed", f"{type(error).__name__}: {error}")


def _check_names(words: list[str]) -> None:
    """Refuse a name that is no text here: Arrow, Ray and MLflow cannot write it down."""
    try:
        for word in (str(Path.cwd()), *words):
            word.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(_name_trouble(error)) from error


def _name_trouble(error: UnicodeEncodeError) -> str:
    if (encoding := sys.getfilesystemencoding()) == "utf-8":
        return f"{error.object!a}: not a name in UTF-8; rename it"
    return (
        f"{error.object!a}: here Python reads names as {encoding}; set PYTHONUTF8=1, or a locale such as "
        "LC_ALL=C.UTF-8, and run the same command again"
    )


def _say(name: str, stop: stopping.Stopped) -> None:
    print(_explain(name, stop).to_json(), flush=True)


def _take_name(argv: list[str]) -> tuple[str, list[str]]:
    """The job's name, which may be two or three words (bench plan, bench learn prepare), and what stands behind it."""
    if argv[:1] != ["bench"]:
        return (argv[0] if argv else "--help"), argv[1:]
    for length in (3, 2):
        if " ".join(argv[:length]) in _JOBS:
            return " ".join(argv[:length]), argv[length:]
    is_named = len(argv) > 1 and not argv[1].startswith("-")
    return (f"bench {argv[1]}", argv[2:]) if is_named else ("--help", [])


def _run_job(name: str, argv: list[str]) -> JobResult:
    with stopping.deferred_signals():
        module = importlib.import_module(_JOBS[name].module)
    result: JobResult = module.run(absolute_paths(parse_options(name, argv)))
    return result


def parse_job(words: list[str]) -> tuple[str, Any]:
    """The job that `words` name, for a job server, and its config.

    Raises:
        ConfigError: no job that a cluster runs, or wrong options.
    """
    name = words[0] if words else ""
    allowed = [job for job in _JOBS if job not in _ONLY_HERE and " " not in job]
    if name not in allowed:
        raise ConfigError(f"tokenreel submit: the job comes first; allowed: {', '.join(allowed)}")
    return name, parse_options(name, words[1:])


def parse_options(name: str, argv: list[str]) -> Any:
    job = _JOBS[name]
    return _parse(f"tokenreel {name}", getattr(importlib.import_module(job.module), job.config), argv)


def _parse(program: str, kind: type[Any], argv: list[str]) -> Any:
    default = None
    if kind.__name__ == "SubmitConfig":
        return _parse_submit(program, kind, argv)
    saved, argv = _take_option(argv, "--config")
    if kind.__name__ in _RECIPES:
        module, words = _RECIPES[kind.__name__]
        recipes = importlib.import_module(module)
        if saved is not None:  # it says which recipe it began as; one that is named again must be the same
            default = _load_saved(saved, kind)
            if argv and argv[0] in recipes.RECIPES:
                if argv[0] != default.recipe:
                    raise ConfigError(
                        f"{program}: {saved} is of recipe {default.recipe}, not {argv[0]}; leave one of them out"
                    )
                argv = argv[1:]
            return _tyro(program, kind, argv, {"default": default})
        if not argv or argv[0].startswith("-"):
            if argv and argv[0] in ("-h", "--help"):
                print(f"usage: {program} RECIPE {words} [options]\n\nrecipes:")
                lines = {name: (make.__doc__ or "").splitlines()[0] for name, make in recipes.RECIPES.items()}
                print("\n".join(f"  {name:<26} {line}" for name, line in lines.items()))
                print(f"\n{program} RECIPE --help lists the options with that recipe's values.")
                raise SystemExit(0)
            raise ConfigError(f"{program}: the recipe comes first; allowed: {', '.join(recipes.RECIPES)}")
        default, program, argv = recipes.find_recipe(argv[0]), f"{program} {argv[0]}", argv[1:]
    elif saved is not None:
        default = _load_saved(saved, kind)
    return _tyro(program, kind, argv, {} if default is None else {"default": default})


def _load_saved(path: str, kind: type[Any]) -> Any:
    from jobs.config import load_config

    return load_config(Path(path), kind)


def _parse_submit(program: str, kind: type[Any], argv: list[str]) -> Any:
    """Submit's own options, wherever they stand behind the job's name; all others are the job's."""
    if argv[:1] in (["-h"], ["--help"]):
        _tyro(f"{program} JOB [options of JOB]", kind, ["--help"], {})
    submit, rest = _tyro(program, kind, argv[1:], {"return_unknown_args": True})
    return dataclasses.replace(submit, words=(*argv[:1], *rest))


def _tyro(program: str, kind: type[Any], argv: list[str], options: dict[str, Any]) -> Any:
    explained = io.StringIO()
    try:
        with contextlib.redirect_stderr(explained), _paragraphs_for_help():
            return tyro.cli(kind, prog=program, args=argv, **options)
    except ValueError as error:  # a model's config says what is wrong with a value in these
        raise ConfigError(str(error)) from error
    except SystemExit as stop:
        if stop.code not in (0, None):
            sys.stderr.write(explained.getvalue())
            raise ConfigError(_plain(explained.getvalue())) from None
        raise


@contextlib.contextmanager
def _paragraphs_for_help() -> Iterator[None]:
    """Joins the lines of options' docstrings: their indents are our source's, and tyro 1.0 ends a line of help before each."""
    parse = docstring_parser.parse_from_object

    def parse_joined(thing: object) -> docstring_parser.Docstring:
        docstring = parse(thing)
        for option in docstring.params:
            if option.description:
                option.description = re.sub(r"(?<!\n)\n *(?!\n)", " ", option.description)
        return docstring

    docstring_parser.parse_from_object = parse_joined  # type: ignore[assignment]  # it is called with one argument
    try:
        yield
    finally:
        docstring_parser.parse_from_object = parse


def _plain(text: str) -> str:
    """tyro's framed message as one line for the JSON."""
    return " ".join(re.sub(r"[^\x20-\x7e]+|\x1b\[[0-9;]*m", " ", text.replace("\n", " ")).split())


def _take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    for place, word in enumerate(argv):
        if word == name and place + 1 < len(argv):
            return argv[place + 1], argv[:place] + argv[place + 2 :]
        if word.startswith(f"{name}="):
            return word.partition("=")[2], argv[:place] + argv[place + 1 :]
    return None, argv


def _failure(job: str, status: str, error: str) -> JobResult:
    log.error("%s: %s", job, error)
    return JobResult(job=job, out="", status="usage" if status == "usage" else "failed", figures={"error": error})


def _usage() -> str:
    rows = "\n".join(f"  {name:<16} {job.summary}" for name, job in _JOBS.items())
    return (
        "usage: tokenreel JOB [options]\n\nRaw video to shards, to VQ-VAE tokens, to pre-trained video models, on Ray.\n\n"
        f"jobs:\n{rows}\n\n"
        "tokenreel JOB --help lists a job's options. --config FILE runs a saved config.json again.\n"
        "The last line of stdout is one JSON object. Exit codes: 0 done, 1 failed, 2 bad usage or config,\n"
        "3 more rejects than --max-reject-fraction: stopped early, unless all was done by then."
    )

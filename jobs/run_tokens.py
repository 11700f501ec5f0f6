"""Whether tokens fit a trained run: codes of two tokenizers mean different things, even with codebooks of one size."""

from __future__ import annotations

from pathlib import Path

from jobs.mirror import TOKENIZER_KEY
from jobs.training import read_marker
from pipeline.dataset import DatasetMeta, Place, read_meta
from pipeline.errors import ConfigError, DatasetError
from pipeline.storage import Store


def tokenizer_of_run(run: Path, trained_on: str) -> str:
    """The fingerprint of the tokenizer whose codes `run` was trained on.

    A run of an earlier release did not note it; then it is that of `trained_on`, the tokens as its config names them, where
    these have the fingerprint that the run was trained on.

    Raises:
        ConfigError: it cannot be told; says how to have it noted.
        DamagedRun: the run's `run.json` is damaged.
    """
    marker = read_marker(run)
    if noted := str(marker.get(TOKENIZER_KEY, "")):
        return noted
    way_out = (
        f"{run} is of a release that did not note its tokenizer. Run the command that trained it again, in the folder where it was "
        "run then: it trains nothing, and notes the tokenizer"
    )
    try:
        meta = read_meta(trained_on, kind="tokens")
    except (ConfigError, DatasetError) as error:
        raise ConfigError(f"{way_out}. The tokens that its config names cannot be asked either: {error}") from error
    if not is_trained_on(marker, meta):
        raise ConfigError(f"{way_out}. {Store.at(trained_on)}, which its config names, holds other tokens today")
    return str(meta.extra["tokenizer"]["fingerprint"])


def is_trained_on(marker: dict[str, object], meta: DatasetMeta) -> bool:
    """Whether `meta` is of the tokens of the run whose `run.json` is `marker`. Retried rejects change their content alone."""
    inputs = marker["inputs"]
    return isinstance(inputs, list) and bool(inputs) and str(inputs[0]).partition(" ")[0] == meta.fingerprint


def check_tokenizer(run: Path, trained_on: str, tokens: Place) -> None:
    """Raise `ConfigError` where `tokens` has codes of another tokenizer than `run` was trained on."""
    require_tokenizer(run, tokenizer_of_run(run, trained_on), tokens)


def require_tokenizer(run: Path, wanted: str, tokens: Place) -> None:
    """Raise `ConfigError` unless `tokens` has codes of the tokenizer `wanted`, which `run` was trained on."""
    found = read_meta(tokens, kind="tokens").extra["tokenizer"]["fingerprint"]
    if found != wanted:
        raise ConfigError(
            f"{Store.at(tokens)}: {run} was trained on other codes: tokenizer {wanted} (here {found}); tokenize the clips with "
            "the tokenizer that the run was trained on"
        )


def find_tokens(run: Path, trained_on: str, given: str | None) -> Store:
    """The tokens to measure `run` on: `given`, or else those that it was trained on, which its config names as `trained_on`.

    Raises:
        ConfigError: they are of another tokenizer; or none are given, and what lies at `trained_on` is not what the run was
            trained on.
        DamagedRun: the run's `run.json` is damaged.
    """
    if given is not None:
        check_tokenizer(run, trained_on, given)
        return Store.at(given)
    store = Store.at(trained_on)
    hint = (
        ""
        if "://" in trained_on or Path(trained_on).is_absolute()
        else f" ({trained_on}, relative, in {run}/config.json)"
    )
    try:
        meta = read_meta(store, kind="tokens")
    except ConfigError as error:
        raise ConfigError(f"{error}{hint}. {run} was trained on tokens there; give --tokens") from error
    if not is_trained_on(read_marker(run), meta):
        raise ConfigError(
            f"{store}{hint} has fingerprint {meta.fingerprint}, and is not what {run} was trained on; give --tokens to measure on "
            "other tokens of the same tokenizer"
        )
    return store

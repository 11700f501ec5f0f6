"""How many fault runs there are, which seeds they have, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.cases import ALWAYS, MODES, TOKEN_MODES, files_of, make_corpus, make_tokenizer
from tests.faults.command import run

KINDS = {
    ("shard", "driver"): 40,
    ("shard", "worker"): 52,
    ("shard", "raylet"): 6,
    ("shard", "head"): 2,
    ("tokenize", "driver"): 30,
    ("tokenize", "encoder"): 30,
    ("tokenize", "decoder"): 30,
    ("tokenize", "raylet"): 10,
    ("pretrain", "driver"): 12,
    ("pretrain", "worker"): 18,
}
"""Of a hundred kill runs of a data stage, and thirty of training, how many kill what; 130 kill a worker."""
_QUICK = {("shard", "driver"): 1, ("shard", "worker"): 1, ("tokenize", "decoder"): 1}  # the rest: make faults


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test of a fault its seeds: `--fault-seed` is the first run's of each kind, so it repeats that run."""
    first, runs = metafunc.config.getoption("--fault-seed"), metafunc.config.getoption("--fault-runs")
    if "kill" in metafunc.fixturenames:
        numbers = {kind: -(-share * runs // 100) for kind, share in KINDS.items()} if runs else _QUICK
        # Spread over the runs, so that the first half of them is half of each kind.
        spread = sorted(
            ((number + 0.5) / count, kind, number) for kind, count in numbers.items() for number in range(count)
        )
        cases = [(*kind, first + number) for _, kind, number in spread]
        metafunc.parametrize("kill", cases, ids=[f"{stage}-{kind}-seed{seed}" for stage, kind, seed in cases])
    if "damaged" in metafunc.fixturenames:
        number = (
            125 if runs else 10
        )  # of videos at a time; of a hundred runs, 2,000 by remux, and 250 in each other way
        shares = {mode: 20 * runs if mode == "remux" else 5 * runs // 2 for mode in MODES}
        damaged = [
            (mode, start, number) for mode in MODES for start in range(first, first + max(1, shares[mode]), number)
        ]
        metafunc.parametrize("damaged", damaged, ids=[f"{mode}-seed{start}" for mode, start, _ in damaged])
    if "seed" in metafunc.fixturenames:
        seeds = range(first, first + max(1, runs // 10))
        metafunc.parametrize("seed", seeds, ids=[f"seed{seed}" for seed in seeds])


@pytest.fixture(scope="session")
def only_in_make_faults(request: pytest.FixtureRequest) -> None:
    """To be a test's first argument: skips it, before anything is made for it, where only the quick share is wanted."""
    if not request.config.getoption("--fault-runs"):
        pytest.skip("takes minutes: make faults")


@pytest.fixture(scope="session")
def fault_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("faults") / "corpus")


class Unbroken:
    """What runs without a fault leave, by mode; each is made when it is first asked for.

    Each dataset lies in a folder of its own beside those of the tests, as tokens say by a relative path where their clips are.
    """

    def __init__(self, corpus: Path, make_folder: Callable[[str], Path], address: str) -> None:
        self._corpus, self._make_folder, self._address = corpus, make_folder, address
        self._folders: dict[str, Path] = {}
        self._tokenizer: Path | None = None

    def __getitem__(self, mode: str) -> dict[str, bytes]:
        return files_of(self._folder(mode))

    def words(self, mode: str, out: Path) -> tuple[object, ...]:
        """The command that makes the dataset of a mode at `out`."""
        if mode in MODES:
            return ("shard", self._corpus, out, *MODES[mode], *ALWAYS)
        clips, options = TOKEN_MODES[mode]
        if self._tokenizer is None:
            self._tokenizer = make_tokenizer(self._make_folder("tokenizer"))
        return ("tokenize", self._folder(clips), out, "--tokenizer", self._tokenizer, *options, *ALWAYS)

    def _folder(self, mode: str) -> Path:
        if mode not in self._folders:
            folder = self._make_folder(mode)
            result = run(*self.words(mode, folder / "out"), cwd=folder / "logs", address=self._address)
            assert result["committed"] > 5 and result["rejected"] == (3 if mode in MODES else 0), result
            self._folders[mode] = folder / "out"
        return self._folders[mode]


@pytest.fixture(scope="session")
def unbroken(fault_corpus: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return Unbroken(fault_corpus, tmp_path_factory.mktemp, cluster)

"""How many fault runs there are, which seeds they have, and what they share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.cases import ALWAYS, MODES, files_of, make_corpus
from tests.faults.command import run

KINDS = {"driver": 56, "worker": 36, "raylet": 6, "head": 2}
"""Of a hundred kill runs, how many kill what."""
_QUICK = {"driver": 1, "worker": 1, "raylet": 0, "head": 0}  # those two need clusters of their own: make faults


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test of a fault its seeds: `--fault-seed` is the first run's of each kind, so it repeats that run."""
    first, runs = metafunc.config.getoption("--fault-seed"), metafunc.config.getoption("--fault-runs")
    if "kill" in metafunc.fixturenames:
        numbers = {kind: -(-share * runs // 100) for kind, share in KINDS.items()} if runs else _QUICK
        # Spread over the runs, so that the first half of them is half of each kind.
        spread = sorted(
            ((number + 0.5) / numbers[kind], kind, number) for kind in KINDS for number in range(numbers[kind])
        )
        cases = [(kind, first + number) for _, kind, number in spread]
        metafunc.parametrize("kill", cases, ids=[f"{kind}-seed{seed}" for kind, seed in cases])
    if "damaged" in metafunc.fixturenames:
        number = 125 if runs else 10  # of videos at a time; of a hundred runs' 2,000, a quarter is sharded in each mode
        starts = range(first, first + max(1, 5 * runs), number)
        damaged = [(mode, start, number) for start in starts for mode in MODES]
        metafunc.parametrize("damaged", damaged, ids=[f"{mode}-seed{start}" for mode, start, _ in damaged])
    if "seed" in metafunc.fixturenames:
        seeds = range(first, first + max(1, runs // 10))
        metafunc.parametrize("seed", seeds, ids=[f"seed{seed}" for seed in seeds])


@pytest.fixture(scope="session")
def fault_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("faults") / "corpus")


class Unbroken:
    """What runs without a fault leave, by mode; each is made when it is first asked for."""

    def __init__(self, corpus: Path, folder: Path, address: str) -> None:
        self._corpus, self._folder, self._address = corpus, folder, address
        self._files: dict[str, dict[str, bytes]] = {}

    def __getitem__(self, mode: str) -> dict[str, bytes]:
        if mode not in self._files:
            out = self._folder / mode
            words = ("shard", self._corpus, out, *MODES[mode], *ALWAYS)
            result = run(*words, cwd=self._folder / f"{mode}-logs", address=self._address)
            assert result["committed"] > 5 and result["rejected"] == 3
            self._files[mode] = files_of(out)
        return self._files[mode]


@pytest.fixture(scope="session")
def unbroken(fault_corpus: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return Unbroken(fault_corpus, tmp_path_factory.mktemp("unbroken"), cluster)

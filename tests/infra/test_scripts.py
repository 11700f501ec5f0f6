from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.versions import INFRA, ray_start_options

SCRIPTS = sorted(path for path in INFRA.rglob("*") if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_clean(path: Path) -> None:
    shell = "sh" if path.read_text().startswith("#!/bin/sh") else "bash"
    subprocess.run([shell, "-n", path], check=True)
    checker = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([checker, f"--shell={shell}", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_slurms_options_are_before_the_first_command() -> None:
    lines = (INFRA / "slurm" / "tokenreel.sbatch").read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert options and max(options) < min(commands), "Slurm reads no option behind a command"
    assert {"--requeue", "--signal=B:USR1@180"} <= {lines[number].split()[1] for number in options}


def test_the_scripts_options_of_ray_start_exist() -> None:
    used = {
        word
        for path in SCRIPTS
        for line in path.read_text().splitlines()
        if "ray start" in line
        for word in re.findall(r"--[\w-]+", line)
    }
    assert used and used <= ray_start_options(), used

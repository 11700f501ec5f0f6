"""Who may import whom, read from the source: a rule that only a review enforces is broken within a month."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "models", "jobs")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@cache
def imports_of(module: str) -> frozenset[str]:
    """Dotted names that `module` imports anywhere in its source, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; this test could not see what"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return frozenset(found)


def packages_of(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(module)}


def our_modules(module: str) -> set[str]:
    """The modules of ours that importing `module` runs: those it names, and the packages around them."""
    found = set()
    for name in imports_of(module):
        parts = name.split(".")
        found |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return found & MODULES.keys()


def reachable(module: str) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += our_modules(current)
    return seen


def test_the_walk_sees_the_tree() -> None:
    """The tests below hold for an empty tree too, so this one says that it is not empty."""
    assert {"pipeline.stages", "models.vimpac", "models.tokenizers.base", "jobs.cli"} <= MODULES.keys()
    assert "ray" in packages_of("pipeline.stages")
    assert "pipeline.errors" in our_modules("pipeline.clips")
    assert {"jobs.journal", "models.optim", "models"} <= reachable("jobs.loop")


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("pipeline")])
def test_pipeline(module: str) -> None:
    found = packages_of(module)
    assert not found & {"models", "jobs", "mlflow", "tyro"}
    assert "ray" not in found or module == "pipeline.stages"
    assert "torch" not in found or module in ("pipeline.loader", "pipeline.frames")
    assert not found & {"subprocess", "multiprocessing", "pty"} or module == "pipeline.ffmpeg"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("models")])
def test_models(module: str) -> None:
    """A bare GPU machine has these packages and no others."""
    allowed = {"models", "torch", "einops", "numpy", "safetensors"} | sys.stdlib_module_names
    assert packages_of(module) <= allowed
    assert "subprocess" not in packages_of(module)


@pytest.mark.parametrize("module", MODULES)
def test_only_jobs_know_mlflow_and_the_command_line(module: str) -> None:
    assert not packages_of(module) & {"mlflow", "tyro"} or module.startswith("jobs.")


@pytest.mark.parametrize("module", ["jobs.loop", "jobs.step", "jobs.checkpoint", "jobs.journal"])
def test_the_loop_runs_without_ray_and_mlflow(module: str) -> None:
    """A bare GPU machine runs them, so nothing that they reach within our packages may need more."""
    for found in reachable(module):
        assert not packages_of(found) & {"ray", "mlflow"}, f"{module} reaches {found}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_pickled(module: str) -> None:
    """A pickle from outside runs code; one of our own breaks with the next version of a class."""
    assert not packages_of(module) & PICKLERS
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in ("torch.load", "torch.save", "torch.jit.load", "pd.read_pickle"), f"line {node.lineno}"
        for keyword in node.keywords:
            allows = keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
            assert not allows, f"line {node.lineno}: allow_pickle"


@pytest.mark.parametrize("module", ["jobs.cli", "pipeline.sharding", "pipeline.tokenizing"])
def test_importing_is_light(module: str) -> None:
    """`tokenreel --help` answers at once, and a worker that only decodes does not load torch."""
    program = f"import sys, {module}; print(sorted({{'torch', 'ray', 'mlflow'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

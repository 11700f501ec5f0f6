from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from jobs.pack import list_files, pack_folder
from pipeline.errors import ConfigError


def make_tree(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_code_and_manifests_go_along_data_and_secrets_do_not(tmp_path: Path) -> None:
    stays = [".env", ".env.local", "prod.env", "key.pem", ".ssh/config", "deploy/id_ed25519", "aws-credentials.json"]
    stays += ["videos/a.mp4", "shards.tar", "model.safetensors", "mlflow.db", ".venv/bin/python", ".git/config"]
    stays += ["clips/dataset.json", "clips/index/0.parquet", "run/run.json", "run/metrics.jsonl"]
    make_tree(tmp_path, "train.py", "videos.csv", "configs/a.json", "tokenizer.py", *stays)
    assert list_files(tmp_path) == ["configs/a.json", "tokenizer.py", "train.py", "videos.csv"]


def test_gitignores_count_as_git_reads_them(tmp_path: Path) -> None:
    make_tree(
        tmp_path, "repo/.git/HEAD", "repo/work/a.txt", "repo/work/b.log", "repo/work/keep.log", "repo/work/out/c.txt"
    )
    make_tree(tmp_path, "repo/work/sub/d.tmp", "repo/work/sub/e.txt", "repo/work/notes.md")
    (tmp_path / ".gitignore").write_text("*\n")  # of no repository that the folder belongs to
    (tmp_path / "repo" / ".gitignore").write_text("*.log\n/work/notes.md\n")
    (tmp_path / "repo" / "work" / ".gitignore").write_text("out/\n!keep.log\n")
    (tmp_path / "repo" / "work" / "sub" / ".gitignore").write_text("*.tmp\n!.env\n")
    make_tree(tmp_path, "repo/work/sub/.env")
    names = list_files(tmp_path / "repo" / "work")
    assert names == [".gitignore", "a.txt", "keep.log", "sub/.gitignore", "sub/e.txt"]
    assert list_files(tmp_path / "repo" / "work", ["sub/", "a.*"]) == [".gitignore", "keep.log"]


def test_links_lead_nowhere(tmp_path: Path) -> None:
    make_tree(tmp_path, "home/secret.txt", "work/a.py")
    (tmp_path / "work" / "file").symlink_to(tmp_path / "home" / "secret.txt")
    (tmp_path / "work" / "folder").symlink_to(tmp_path / "home")
    assert list_files(tmp_path / "work") == ["a.py"]


def test_equal_files_give_equal_bytes(tmp_path: Path) -> None:
    archives = []
    for name in ("first", "second"):
        make_tree(tmp_path / name, "b.py", "a/c.sh")
        (tmp_path / name / "a" / "c.sh").chmod(0o755)
        pack_folder(tmp_path / name, tmp_path / f"{name}.zip", max_bytes=1000)
        archives.append((tmp_path / f"{name}.zip").read_bytes())
    assert archives[0] == archives[1]
    with zipfile.ZipFile(tmp_path / "first.zip") as archive:
        assert archive.namelist() == ["a/c.sh", "b.py"]
        assert archive.getinfo("a/c.sh").external_attr >> 16 & 0o777 == 0o755
        assert archive.getinfo("b.py").external_attr >> 16 & 0o777 == 0o644


def test_too_much_is_refused_and_the_largest_named(tmp_path: Path) -> None:
    make_tree(tmp_path, "small.py")
    (tmp_path / "weights.bin").write_bytes(bytes(2_000_000))
    with pytest.raises(ConfigError, match=r"2 files of 2\.0 MB.*max_pack_mb = 1.*weights\.bin \(2\.0 MB\), small\.py"):
        pack_folder(tmp_path, tmp_path / "pack.zip", max_bytes=1_000_000)
    assert pack_folder(tmp_path, tmp_path.parent / "pack.zip", excludes=["*.bin"], max_bytes=1_000_000) == ["small.py"]


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        list_files(tmp_path / "nowhere")

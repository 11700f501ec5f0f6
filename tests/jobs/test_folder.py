from __future__ import annotations

from pathlib import Path

import pytest

from jobs.folder import lock_folder
from pipeline.errors import ConfigError


def test_a_folder_takes_one_job_at_a_time(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "out"), pytest.raises(ConfigError, match="another job"), lock_folder(tmp_path / "out"):
        pass
    with lock_folder(tmp_path / "out"):
        pass

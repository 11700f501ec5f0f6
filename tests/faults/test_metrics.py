"""A real Prometheus scrapes a real cluster while jobs run, and has every metric that the dashboard shows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import small_pretrain_config
from tests.faults.cases import ALWAYS, make_tokenizer
from tests.faults.command import run
from tests.faults.ray_head import free_port, started_head
from tests.infra.test_monitoring import MONITORING, dashboard_metrics

_ONLY_WITH_A_KNOWN_PEAK = {"ray_tokenreel_mfu"}


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus: apt-get install prometheus")
def test_prometheus_has_what_the_dashboard_shows(only_in_make_faults: None, fault_corpus: Path, tmp_path: Path) -> None:
    from jobs.config import save_config

    soon = {"RAY_metrics_report_interval_ms": "1000"}  # by default every 10 s, and these jobs are short
    with started_head(env=soon) as head, pytest.MonkeyPatch.context() as patch:
        for name, value in {**soon, "RAY_TMPDIR": str(head.folder)}.items():
            patch.setenv(name, value)
        with scraping(f"127.0.0.1:{head.metrics_port}", tmp_path / "prometheus") as query:
            tokenizer, clips, tokens = make_tokenizer(tmp_path / "tokenizer"), tmp_path / "clips", tmp_path / "tokens"
            shard = ("shard", fault_corpus, clips, "--videos-per-shard", "1", *ALWAYS)
            run(*shard, cwd=tmp_path / "a", address=head.gcs)
            small = ("--frames.fps", "8", "--frames.size-px", "64", "--batch-frames", "8")
            run(
                "tokenize",
                clips,
                tokens,
                "--tokenizer",
                tokenizer,
                *small,
                *ALWAYS,
                cwd=tmp_path / "b",
                address=head.gcs,
            )
            config = small_pretrain_config(tokens, tmp_path / "model")
            path = save_config(tmp_path / "config", config)
            long = ("--loop.steps", "300", "--loop.save-every-steps", "300", "--loop.picture-every-steps", "0")
            run("pretrain", "debug", "--config", path, *long, cwd=tmp_path / "c", address=head.gcs)
            deadline = time.monotonic() + 20
            wanted = dashboard_metrics() - _ONLY_WITH_A_KNOWN_PEAK
            while missing := wanted - set(query("label/__name__/values")):
                assert time.monotonic() < deadline, f"never scraped: {sorted(missing)}"
                time.sleep(1)
            runs = set(query("label/run/values"))
            assert {"clips", "tokens", "model"} <= runs, runs
            rejects = query("query?query=max_over_time(ray_tokenreel_rejected%5B10m%5D)")["result"]
            by_class = {one["metric"]["class"]: one["value"][1] for one in rejects if one["metric"]["run"] == "clips"}
            assert by_class and all(int(value) >= 1 for value in by_class.values()), by_class


class scraping:
    """A Prometheus that scrapes `target` every second for the body; gives a function that asks its API."""

    def __init__(self, target: str, folder: Path) -> None:
        self._port, self._folder = free_port(), folder
        folder.mkdir()
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"]["scrape_interval"] = "1s"
        config["scrape_configs"][0].pop("file_sd_configs")
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))

    def __enter__(self) -> Any:
        words = [f"--config.file={self._folder}/prometheus.yml", f"--storage.tsdb.path={self._folder}/data"]
        words += [f"--web.listen-address=127.0.0.1:{self._port}"]
        with (self._folder / "log").open("w") as log:
            self._process = subprocess.Popen(["prometheus", *words], stdout=log, stderr=log, env=dict(os.environ))
        return self._query

    def _query(self, path: str) -> Any:
        deadline = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/api/v1/{path}", timeout=10) as response:
                    return json.load(response)["data"]
            except OSError:
                said = (self._folder / "log").read_text()
                assert self._process.poll() is None and time.monotonic() < deadline, said[-3000:]
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)

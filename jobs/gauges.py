"""Numbers of a running job as Ray metrics: Prometheus scrapes them from the cluster's nodes, under `ray_` and these names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

GAUGES = {
    "tokenreel_shards_done": "Shards of a data job that are committed.",
    "tokenreel_shards_planned": "Shards of a data job in all.",
    "tokenreel_videos_per_s": "Source videos a second since the job's start, of all its workers.",
    "tokenreel_frames_per_s": "Frames a second since the job's start, of all its workers.",
    "tokenreel_gb_per_s": "Gigabytes read a second since the job's start, of all its workers.",
    "tokenreel_rejected": "Samples that a data job rejected, by class.",
    "tokenreel_step": "Optimiser steps of a training run that are done.",
    "tokenreel_loss": "Loss of the newest step.",
    "tokenreel_step_s": "Seconds of a step.",
    "tokenreel_clips_per_s": "Training clips a second, of all workers.",
    "tokenreel_tokens_per_s": "Tokens a second, of all workers.",
    "tokenreel_data_wait_share": "Share of a step's time in which the first worker waited for its batch.",
    "tokenreel_mfu": "Share of the devices' peak speed that a step reached; where the peak is known.",
    "tokenreel_peak_memory_bytes": "The most memory that the first worker had allocated on its device.",
    "tokenreel_num_workers": "Workers that train.",
}
"""Name to description. `pipeline/stages.py` has those of the encoders."""
_TAGS = ("job", "run", "class")


class JobMetrics:
    """The gauges of one job, made as their first values come; needs a connection to Ray. They never end a job: what Ray does
    not take is left out, with one warning.

    Args:
        job: "shard", "pretrain", ...
        run: what it writes to, as a person names it.
    """

    def __init__(self, job: str, run: str) -> None:
        # Ray takes ASCII alone in the value of a tag; other letters keep a form that names the run.
        self._tags = {"job": job, "run": run.encode("ascii", "backslashreplace").decode(), "class": ""}
        self._gauges: dict[str, Any] = {}
        self._is_refused = False

    def set(self, figures: Mapping[str, float]) -> None:
        """Export those of `figures` that `GAUGES` knows, by their names without the prefix; `rejected/CLASS` are rejects
        of a class."""
        if self._is_refused:
            return
        try:
            self._set(figures)
        except Exception as error:
            self._is_refused = True
            log.warning("no figures for Prometheus from here on; the job goes on without: %r", error)

    def _set(self, figures: Mapping[str, float]) -> None:
        for figure, value in figures.items():
            name, _, kind = f"tokenreel_{figure}".partition("/")
            if name not in GAUGES or (name == "tokenreel_rejected" and not kind):
                continue
            if name not in self._gauges:
                from ray.util.metrics import Gauge

                self._gauges[name] = Gauge(name, description=GAUGES[name], tag_keys=_TAGS)
            self._gauges[name].set(float(value), tags={**self._tags, "class": kind})

"""Hours by hand: who waits for whom; and what the warnings are about."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.planning.estimate import Estimate
from jobs.planning.fit import find_misfits
from jobs.planning.prediction import (
    Devices,
    StagePrediction,
    compare,
    predict_shard,
    predict_tokenize,
    read_prediction,
    to_plain,
)
from jobs.planning.probe import Made, Probed, Sample
from jobs.planning.spec import ClusterSpec, Nodes
from pipeline.errors import ConfigError
from pipeline.ledger import Ledger

SHARDS = 6
NODES = Nodes(name="n", cpus=2)


def made(seconds: float, committed: int, member_bytes: int, frames: int, **lost: int) -> Made:
    books = Ledger(planned=committed + sum(lost.values()), committed=committed, rejected=Counter(lost))
    return Made(seconds=seconds, books=books, member_bytes=member_bytes, frames=frames)


def sample(**changes: Any) -> tuple[Estimate, Sample]:
    """12 videos of one size in 6 shards; half of them were measured: 4 of 2 clips, 2 that are corrupt."""
    good = Probed(clips=made(3.0, 2, 10_000, 200), tokens=made(1.0, 2, 5_000, 40), num_tokens=40 * 64)
    bad = Probed(clips=made(0.5, 0, 0, 0, corrupt=1))
    probed = {0: good, 2: good, 4: good, 6: good, 8: bad, 10: bad}
    estimate = Estimate(np.ones(12), np.arange(12) // 2, np.array(sorted(probed)), np.full(6, 0.5))
    found = {"probed": probed, "batch_s": {64: 2.0}, "cpus": {"c": 2}}
    return estimate, Sample(**{**found, "connect_s": 5.0, "worker_s": 2.0, "encoder_s": 3.0, **changes})


def tokenize(devices: Devices, sizes_px: tuple[int, ...] = (64,)) -> StagePrediction:
    return predict_tokenize("f", *sample(), devices, sizes_px=list(sizes_px), batch_frames=32)


def test_shard_takes_what_its_shards_take() -> None:
    refused = Ledger(planned=3, rejected=Counter(duplicate=3))
    found = predict_shard("f", *sample(), refused, Devices(num_cpus=2, cpu_slowness=2.0))
    assert (found.planned, found.committed, found.rejected) == (23, 16, {"corrupt": 4, "duplicate": 3})
    assert (found.frames, found.num_shards) == (1600, SHARDS)
    assert found.cpu_hours * 3600 == pytest.approx(2 * 2 * 13)
    by_shard = [2 * (own + 13 / 6) for own in (3, 3, 3, 3, 0.5, 0.5)]
    assert found.wall_s == pytest.approx(5 + 2 + sum(by_shard[:5:2]))
    assert found.tar_bytes % 10_240 == 0 and found.tar_bytes > 80_000 and found.bound_by == "cpus"


def test_one_shard_that_takes_longest_is_named() -> None:
    found = predict_shard("f", *sample(), Ledger(), Devices(num_cpus=100, cpu_slowness=1.0))
    assert found.bound_by == "last shard" and found.wall_s == pytest.approx(7 + 3 + 13 / 6)


def test_without_gpus_cpus_decode_and_encode() -> None:
    found = tokenize(Devices(num_cpus=2, cpu_slowness=1.0, batch_s={64: 2.0}))
    assert (found.frames, found.tokens, found.committed) == (320, 320 * 64, 16)
    # Shards of 40 + 160/6 frames are 3 batches, the two without a good video of 26.7 are 1.
    assert found.cpu_hours * 3600 == pytest.approx(8 + 2 * (4 * 3 + 2 * 1))
    assert found.wall_s == pytest.approx(5 + 2 + 3 + 36 / 2) and found.gpu_hours == 0 and found.bound_by == "cpus"


def test_gpus_wait_for_decoding_or_decoding_for_them() -> None:
    slow = tokenize(Devices(num_cpus=8, cpu_slowness=1.0, num_gpus=1, batch_s={64: 2.0}))
    assert slow.bound_by == "gpus" and slow.wall_s == pytest.approx(10 + 28)
    assert slow.gpu_hours * 3600 == pytest.approx(28) and slow.cpu_hours * 3600 == pytest.approx(8)
    fast = tokenize(Devices(num_cpus=1, cpu_slowness=1.0, num_gpus=1, batch_s={64: 0.01}))
    assert fast.bound_by == "cpus" and fast.wall_s == pytest.approx(10 + 8)
    many = tokenize(Devices(num_cpus=8, cpu_slowness=1.0, num_gpus=50, batch_s={64: 2.0}))
    assert many.bound_by == "last shard" and many.wall_s == pytest.approx(10 + 6)


def test_each_size_has_batches_of_its_own() -> None:
    """Frames are counted over views: half as many are of each size."""
    found = tokenize(Devices(num_cpus=1, cpu_slowness=1.0, batch_s={64: 2.0, 128: 10.0}), (64, 128))
    assert found.cpu_hours * 3600 == pytest.approx(8 + (2.0 + 10.0) * (4 * 2 + 2 * 1))


def test_a_plan_is_read_for_its_own_dataset_only(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    shard = predict_shard("f", *sample(), Ledger(), Devices(num_cpus=2, cpu_slowness=1.0))
    path.write_text(json.dumps(to_plain({"shard": shard})))
    assert read_prediction(path, "shard", "f") == shard
    with pytest.raises(ConfigError, match="is of another dataset, f; this command makes g"):
        read_prediction(path, "shard", "g")
    with pytest.raises(ConfigError, match="says nothing of tokenize, only of shard; plan with --tokenizer"):
        read_prediction(path, "tokenize", "f")
    for text in ("{", "[]", '{"format": 99, "stages": {}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="cannot be read"):
            read_prediction(path, "shard", "f")


def test_predicted_over_actual() -> None:
    shard = predict_shard("f", *sample(), Ledger(), Devices(num_cpus=2, cpu_slowness=1.0))
    actual = {"committed": 20, "rejected": 8, "frames": 0, "perplexity": 3}
    assert compare(shard, actual) == {"committed": 0.8, "rejected": 0.5}


def misfits(shard: dict[str, Any], tokens: dict[str, Any] | None = None, recipe: str = "", **nodes: Any) -> list[str]:
    base = predict_shard("f", *sample(), Ledger(), Devices(num_cpus=2, cpu_slowness=1.0))
    base = replace(
        base, num_shards=1000, bound_by="cpus", rejected={}, relative_error={}, frames=10**6, committed=10**6
    )
    stages = {"shard": replace(base, **shard)}
    if tokens is not None:
        stages["tokenize"] = replace(base, **tokens)
    spec = ClusterSpec(nodes=(replace(NODES, **nodes),))
    return find_misfits(stages, spec, recipe, batch_frames=32, val_fraction=0.5)


GPU = {"gpus": 1, "gpu": "g"}


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("1 shards for 2 CPUs: .* 1 of them", {"shard": {"num_shards": 1}}),
        ("most CPUs wait for the last shards", {"shard": {"bound_by": "last shard"}}),
        ("1 shards for 1 GPUs, which work on two each", {"tokens": {"num_shards": 1}, **GPU}),
        ("2 shards of up to 30 GB .* need 60 GB .*disk_gb = 50", {"shard": {"largest_shard_bytes": 30 * 10**9}, "disk_gb": 50}),
        ("300000 of .* would be rejected, and 10% ends", {"shard": {"planned": 10**6, "rejected": {"corrupt": 300_000}}}),
        ("tar_bytes is known to ± 40%", {"shard": {"relative_error": {"tar_bytes": 0.4}}}),
        ("GPUs wait 75% .* plan 8 CPUs", {"tokens": {"bound_by": "cpus", "cpu_hours": 8, "gpu_hours": 1}, **GPU}),
        ("a shard has 40 frames, so the padding .* about 29%", {"tokens": {"frames": 40_000}}),
        ("vimpac-small: a batch is 1024 videos, and about 500", {"tokens": {"committed": 1000}, "recipe": "vimpac-small"}),
        ("max-bytes is 68.7 GB", {"tokens": {"largest_shard_bytes": 2 * 10**9}, "recipe": "vimpac-small"}),
        ("disk_gb of nodes n is 100 GB", {"tokens": {"largest_shard_bytes": 2 * 10**9}, "recipe": "vimpac-small", "disk_gb": 100}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_what_to_change(words: str, arguments: dict[str, Any]) -> None:
    found = misfits(**{"shard": {}, **arguments})
    assert any(re.search(words, line) for line in found), found


def test_what_fits_is_not_mentioned() -> None:
    assert misfits({}, {"bound_by": "gpus"}, "vimpac-small", disk_gb=100, **GPU) == []

"""What the tokenize job refuses, and what damaged clips cost it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import tokenize, verify
from jobs.data_job import RejectPolicy
from jobs.verify import VerifyConfig
from models.tokenizers.base import load_tokenizer
from models.tokenizers.vqvae import Vqvae
from pipeline.dataset import read_index, read_rejects
from pipeline.errors import ConfigError
from pipeline.verify import verify as find_problems
from pipeline.views import ViewConfig
from tests.conftest import Stages, small_tokenize_config
from tests.faults.cases import files_of
from tests.pipeline.datasets import shard_path


def test_damaged_clip_shards_cost_exactly_their_samples(stages: Stages, tmp_path: Path) -> None:
    """One shard with a flipped byte, one that was cut off, one without its tar; the fourth is sound."""
    clips, out = Path(shutil.copytree(stages.clips, tmp_path / "clips")), tmp_path / "tokens"
    shards: list[list[dict]] = [[] for _ in range(4)]
    for row in read_index(clips).to_pylist():
        shards[row["shard"]].append(row)
    flipped = shards[0][-1]
    tar = bytearray(shard_path(clips, 0).read_bytes())
    tar[flipped["offset"] + flipped["size"] // 3] ^= 0x10
    shard_path(clips, 0).write_bytes(tar)
    by_offset = sorted(shards[1], key=lambda row: row["offset"])
    cut = by_offset[len(by_offset) // 2]
    os.truncate(shard_path(clips, 1), cut["offset"] + cut["size"] // 2)
    shard_path(clips, 2).unlink()
    lost = {
        flipped["key"]: ("corrupt", "not the ones that were committed"),
        cut["key"]: ("corrupt", f"ends after {cut['size'] // 2} of {cut['size']} bytes"),
        **{row["key"]: ("corrupt", "ends after 0 of") for row in by_offset if row["offset"] > cut["offset"]},
        **{row["key"]: ("unreadable", "No such file") for row in shards[2]},
    }

    config = replace(small_tokenize_config(clips, out, stages.tokenizer), rejects=RejectPolicy(max_reject_fraction=1.0))
    result = tokenize.run(config)
    planned = stages.results["tokenize"].planned
    assert (result.planned, result.rejected, result.committed) == (planned, len(lost), planned - len(lost))
    rejects = {reject.key: reject for reject in read_rejects(out)}
    assert rejects.keys() == lost.keys()
    for key, (reject_class, words) in lost.items():
        reject = rejects[key]
        assert (reject.stage, reject.reject_class) == ("tokenize", reject_class)
        assert words in reject.reason, reject.reason
    unbroken = {row["key"]: row["sha256"] for row in read_index(stages.tokens).to_pylist()}
    found = {row["key"]: row["sha256"] for row in read_index(out).to_pylist()}
    assert found == {key: digest for key, digest in unbroken.items() if key not in lost}
    assert list(find_problems(out, clips)) == []


def test_views_are_samples_of_their_own_and_stand_the_audit(stages: Stages, tmp_path: Path) -> None:
    """Two sizes, each also mirrored: the plain view's codes are those of a dataset without views, and all encode again."""
    config = small_tokenize_config(stages.clips, tmp_path / "tokens", stages.tokenizer)
    views = ViewConfig(more_sizes_px=(32,), flip=True)
    result = tokenize.run(replace(config, settings=replace(config.settings, views=views)))
    assert result.planned == result.committed == 4 * stages.results["tokenize"].committed
    assert result.filtered == result.rejected == 0
    plain = {row["key"]: row["sha256"] for row in read_index(stages.tokens).to_pylist()}
    by_view: dict[str, dict[str, str]] = {}
    for row in read_index(tmp_path / "tokens").to_pylist():
        by_view.setdefault(row["view"], {})[row["clip_key"]] = row["sha256"]
    assert by_view.keys() == {"64c", "64cf", "32c", "32cf"}
    assert by_view["64c"] == plain
    audited = verify.run(VerifyConfig(dataset=str(tmp_path / "tokens"), re_encode=0.5))
    assert audited.status == "done" and audited.figures["samples_re_encoded"] == result.committed // 2
    assert audited.figures["codes_different"] == 0


def test_a_tokenizer_that_changed_is_refused_by_name(stages: Stages, tmp_path: Path) -> None:
    before = files_of(stages.tokens)
    old = load_tokenizer(stages.tokens / "tokenizer")
    new = Vqvae(old.config)
    new.save(tmp_path / "tokenizer")
    config = small_tokenize_config(stages.clips, stages.tokens, tmp_path / "tokenizer")
    with pytest.raises(ConfigError) as refusal:
        tokenize.run(config)
    words = f"made with other setting tokenizer = '{old.fingerprint()}' (now '{new.fingerprint()}')"
    assert words in str(refusal.value)
    assert "Choose another output folder" in str(refusal.value)
    assert files_of(stages.tokens) == before

"""Pre-training on tokens in an object store is pre-training on the folder that they were copied from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jobs import pretrain
from jobs.journal import JOURNAL_NAME, read_journal
from jobs.token_origin import load_kept_tokenizer
from models.tokenizers.base import load_tokenizer
from pipeline.loader import CacheConfig
from tests.conftest import Stages, small_pretrain_config
from tests.object_server import serve_objects


def test_the_same_run(stages: Stages, tmp_path: Path) -> None:
    with serve_objects() as server:
        server.make_bucket("bucket")
        for path in stages.tokens.rglob("*"):
            if path.is_file():
                name = str(path.relative_to(stages.tokens))
                server.client.put_object(Bucket="bucket", Key=f"tokens/{name}", Body=path.read_bytes())
        url = server.url("bucket/tokens")
        config = small_pretrain_config(stages.tokens, tmp_path / "model")
        loader = replace(config.loader, cache=CacheConfig(folder=tmp_path / "cache"))
        result = pretrain.run(replace(config, tokens=url, loader=loader, register_as=""))
        local, remote = (load_tokenizer(stages.tokens / "tokenizer"), load_kept_tokenizer(url))
    assert result.figures["keys_digest"] == stages.results["pretrain"].figures["keys_digest"]
    losses = [
        [row["loss"] for row in read_journal(out / JOURNAL_NAME) if "loss" in row]
        for out in (tmp_path / "model", stages.model)
    ]
    assert losses[0] == losses[1]
    assert list((tmp_path / "model/pictures").glob("predictions_*.png"))
    assert remote.fingerprint() == local.fingerprint()

"""`tokenreel verify --re-encode`: real tokens are their clips', and wrong ones are found and made again."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tyro

from jobs import verify
from jobs.frame_encoder import FrameEncoder
from jobs.verify import VerifyConfig
from models.tokenizers.vqvae import Vqvae, VqvaeConfig
from pipeline.audit import draw_samples
from pipeline.dataset import finish, listed_shards, read_index, read_meta, write_meta
from pipeline.decode import FrameConfig
from pipeline.encoding import Piece
from pipeline.errors import ConfigError, DatasetError
from pipeline.ledger import Ledger
from pipeline.shards import read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clip, write_token_shard
from tests.conftest import Stages
from tests.faults.cases import files_of
from tests.object_server import serve_objects


@pytest.mark.parametrize(("text", "share"), [("0.1%", 0.001), ("0.001", 0.001), ("100%", 1.0), ("1", 1.0), ("0", 0.0)])
def test_a_share_is_a_number_or_a_percentage(text: str, share: float) -> None:
    config = tyro.cli(VerifyConfig, args=["tokens", "--re-encode", text, "--re-encode-tolerance", text])
    assert config == VerifyConfig(dataset="tokens", re_encode=share, re_encode_tolerance=share)


@pytest.mark.parametrize("text", ["2", "101%", "-1", "nan", "some", "%", ""])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(ValueError):
        verify.parse_share(text)


@pytest.mark.parametrize("wrong", [{"re_encode": 1.5}, {"re_encode_tolerance": -0.1}, {"re_encode_seed": -1}])
def test_bad_values(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name} = "):
        VerifyConfig(dataset="tokens", **wrong)  # type: ignore[arg-type]


def copy_tokens(stages: Stages, folder: Path) -> Path:
    """The tokens in a folder of their own, which know where their clips are."""
    copy = Path(shutil.copytree(stages.tokens, folder / "tokens"))
    meta = read_meta(copy)
    clips = os.path.relpath(stages.clips.resolve(), copy.resolve())
    write_meta(copy, replace(meta, extra={**meta.extra, "clips": clips}))
    return copy


def test_real_tokens_are_those_of_their_clips(stages: Stages) -> None:
    rows = read_index(stages.tokens).to_pylist()
    result = verify.run(VerifyConfig(dataset=str(stages.tokens), re_encode=1.0))
    assert result.status == "done", result.figures["problems"]
    figures = {name: result.figures[name] for name in ("samples_re_encoded", "codes_compared", "codes_different")}
    codes = sum(row["size"] // 2 for row in rows)
    assert figures == {"samples_re_encoded": len(rows), "codes_compared": codes, "codes_different": 0}
    assert "samples_re_encoded" not in verify.run(VerifyConfig(dataset=str(stages.tokens))).figures


@pytest.mark.parametrize("seed", [0, 1])
def test_a_share_is_drawn(seed: int, stages: Stages) -> None:
    result = verify.run(VerifyConfig(dataset=str(stages.tokens), re_encode=0.1, re_encode_seed=seed))
    tokens = Store.at(stages.tokens)
    drawn = draw_samples(tokens, listed_shards(tokens), 0.1, seed)
    rows = [read_shard_rows(tokens, shard)[place] for shard, places in drawn.items() for place in places]
    assert result.figures["samples_re_encoded"] == len(rows) == round(0.1 * result.planned)
    assert result.figures["codes_compared"] == sum(row["size"] // 2 for row in rows)


def test_a_shifted_sample_is_found_and_made_again(stages: Stages, tmp_path: Path) -> None:
    tokens = copy_tokens(stages, tmp_path)
    before, clips, meta = files_of(tokens), Store.at(stages.clips), read_meta(tokens)
    settings = TokenizeSettings(frames=FrameConfig(fps=4.0, size_px=64))
    decoded = [decode_clip(clips, row, settings) for row in read_shard_rows(clips, 1)]
    (first, *rest) = decoded
    assert isinstance(first, np.ndarray)
    wrong = [np.concatenate([first[1:], first[-1:]]), *(one for one in rest if isinstance(one, np.ndarray))]
    encode = FrameEncoder(tokens / "tokenizer", "cpu", "fp32")
    rows, pieces = read_shard_rows(clips, 1), [Piece([frames], True) for frames in wrong]
    write_token_shard(clips, Store.at(tokens), meta.fingerprint, 1, rows, pieces, encode, settings)

    store = Store.at(tokens)
    finish(store, meta, Ledger())  # as if they had been made so
    seed = next(n for n in itertools.count() if 0 in draw_samples(store, listed_shards(store), 0.1, n).get(1, []))
    config = VerifyConfig(dataset=str(tokens), re_encode=0.1, re_encode_seed=seed)
    assert verify.run(replace(config, re_encode=0.0)).status == "done"  # all hashes are right
    result = verify.run(config)
    row = read_shard_rows(clips, 1)[0]
    (problem,) = result.figures["problems"]
    assert result.status == "failed" and result.figures["codes_different"] > 0
    assert f"sample {row['key']} of {row['source']}" in problem
    assert "shifted: its frame t holds the codes of frame t + 1" in problem
    share = result.figures["codes_different"] / read_shard_rows(Store.at(tokens), 1)[0]["size"] * 2
    assert verify.run(replace(config, re_encode_tolerance=share)).status == "done"
    result = verify.run(replace(config, repair=True))
    assert (result.status, result.figures["repaired_shards"]) == ("done", [1])
    assert result.figures["codes_different"] == 0
    after = files_of(tokens)
    assert {name for name in before if before[name] != after[name]} <= {"dataset.json"}  # says where the clips are


def test_limits_are_those_of_the_last_command(stages: Stages, tmp_path: Path) -> None:
    """They are no part of a dataset's identity, and a clip that took long to decode takes long again."""
    tokens = copy_tokens(stages, tmp_path)
    plain = json.loads((tokens / "config.json").read_text())
    plain["settings"]["limits"]["timeout_s"] = 0.001
    (tokens / "config.json").write_text(json.dumps(plain))
    (problem,) = verify.run(VerifyConfig(dataset=str(tokens), re_encode=0.01)).figures["problems"]
    assert "its clip cannot be decoded again: timeout" in problem
    (tokens / "config.json").unlink()
    assert verify.run(VerifyConfig(dataset=str(tokens), re_encode=0.01)).status == "done"


def test_a_tokenizer_in_an_object_store(stages: Stages) -> None:
    settings = TokenizeSettings(frames=FrameConfig(fps=4.0, size_px=64))
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    with serve_objects() as server:
        bucket = server.make_bucket("verify")
        for path in (stages.tokens / "tokenizer").iterdir():
            server.client.put_object(Bucket=bucket, Key=f"tokens/tokenizer/{path.name}", Body=path.read_bytes())
        codes = []
        for place in (stages.tokens, server.url(f"{bucket}/tokens")):
            encode = verify._encode_of(Store.at(place), read_meta(stages.tokens), settings)
            codes.append(encode(frames))
    np.testing.assert_array_equal(*codes)


def test_nothing_is_deleted_that_cannot_be_made(stages: Stages, tmp_path: Path) -> None:
    """The clips are not at hand: one bad byte must not cost its shard."""
    tokens = copy_tokens(stages, tmp_path)
    plain = json.loads((tokens / "config.json").read_text())
    (tokens / "config.json").write_text(json.dumps({**plain, "clips": str(tmp_path / "gone")}))
    tar = tokens / read_index(tokens)["tar"][0].as_py()
    data = bytearray(tar.read_bytes())
    data[read_index(tokens)["offset"][0].as_py()] ^= 1
    tar.write_bytes(data)
    before = files_of(tokens)
    with pytest.raises(ConfigError, match="gone is not a dataset"):
        verify.run(VerifyConfig(dataset=str(tokens), repair=True))
    assert files_of(tokens) == before
    (tokens / "config.json").write_text(json.dumps({**plain, "clips": str(stages.clips)}))
    result = verify.run(VerifyConfig(dataset=str(tokens), repair=True))
    assert (result.status, result.figures["repaired_shards"]) == ("done", [0])
    assert tar.read_bytes() == (stages.tokens / tar.relative_to(tokens)).read_bytes()


class TestWhatItNeeds:
    def test_tokens(self, stages: Stages) -> None:
        with pytest.raises(ConfigError, match="holds clips; only tokens can be encoded again"):
            verify.run(VerifyConfig(dataset=str(stages.clips), re_encode=0.5))

    def test_their_clips(self, stages: Stages, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        copy = shutil.copytree(stages.tokens, tmp_path / "tokens")  # alone
        result = verify.run(VerifyConfig(dataset=str(copy)))
        assert (result.status, result.figures["parent_checked"]) == ("done", 0)
        assert f"{copy}: whether its shards are stale was left out" in caplog.text and "--parent" in caplog.text
        result = verify.run(VerifyConfig(dataset=str(copy), parent=str(stages.clips)))
        assert (result.status, result.figures["parent_checked"]) == ("done", 1)
        with pytest.raises(ConfigError, match="holds tokens; clips were expected"):
            verify.run(VerifyConfig(dataset=str(copy), parent=str(stages.tokens)))
        with pytest.raises(ConfigError, match=f"needs the clips .* dataset {read_meta(stages.clips).fingerprint}"):
            verify.run(VerifyConfig(dataset=str(copy), re_encode=0.5))

    @pytest.mark.parametrize("tokenizer", ["gone", "damaged", "another"])
    def test_their_tokenizer(self, tokenizer: str, stages: Stages, tmp_path: Path) -> None:
        tokens = copy_tokens(stages, tmp_path)
        shutil.rmtree(tokens / "tokenizer")
        if tokenizer != "gone":
            Vqvae(VqvaeConfig(channels=32, codebook_size=64)).save(tokens / "tokenizer")
        if tokenizer == "damaged":
            (tokens / "tokenizer" / "model.safetensors").write_bytes(b"no")
        words = {
            "another": f"the tokens were made by {read_meta(tokens).config['tokenizer']}",
            "gone": "is missing",
            "damaged": "cannot be loaded",
        }
        with pytest.raises(DatasetError, match=words[tokenizer]):
            verify.run(VerifyConfig(dataset=str(tokens), re_encode=0.5))

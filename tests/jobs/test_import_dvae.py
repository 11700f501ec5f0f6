from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from jobs import cli
from jobs.import_dvae import ImportDvaeConfig, run
from jobs.tokenize import find_tokenizer
from models.tokenizers.base import load_tokenizer
from models.tokenizers.import_dvae import build_published
from pipeline.errors import ConfigError
from tests.models.tokenizers.published_dvae import SMALL, make_weights, save_pair
from tests.models.tokenizers.test_vqvae import make_frames


@pytest.mark.parametrize("legacy", [False, True])
def test_the_published_pair_becomes_a_tokenizer(
    legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, decoder = save_pair(tmp_path, monkeypatch, _use_new_zipfile_serialization=not legacy)
    out = tmp_path / "dvae"
    assert cli.run(["import-dvae", str(encoder), str(decoder), str(out)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = build_published(*make_weights())
    assert printed["status"] == "done" and printed["fingerprint"] == expected.fingerprint()
    assert printed["tokenizer"] == {"hidden": 8, "blocks_per_group": 2, "codebook_size": 24, "decoder_init": 12}
    loaded = load_tokenizer(find_tokenizer(out))
    assert loaded.config == SMALL and loaded.fingerprint() == expected.fingerprint()
    assert torch.equal(loaded.encode(make_frames()), expected.encode(make_frames()))
    assert {path.name for path in (out / "model").iterdir()} == {"config.json", "model.safetensors"}


def test_again_is_confirmed_and_others_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, decoder = save_pair(tmp_path, monkeypatch)
    config = ImportDvaeConfig(encoder=encoder, decoder=decoder, out=tmp_path / "dvae")
    weights = tmp_path / "dvae" / "model" / "model.safetensors"
    first = run(config)
    before = weights.stat().st_mtime_ns
    assert run(config).fingerprint == first.fingerprint and weights.stat().st_mtime_ns == before
    save_pair(tmp_path, monkeypatch, seed=1)
    with pytest.raises(ConfigError, match="choose another folder"):
        run(config)
    assert load_tokenizer(weights.parent).fingerprint() == first.fingerprint
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="is damaged; remove it and run again"):
        run(config)


def test_what_is_wrong_is_a_config_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, decoder = save_pair(tmp_path, monkeypatch)
    out, page, marker = tmp_path / "dvae", tmp_path / "page.pkl", tmp_path / "marker"
    page.write_text("<html>not found</html>")
    hostile = tmp_path / "hostile.pkl"

    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {marker}",)

    with zipfile.ZipFile(hostile, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(), 2))
    state = tmp_path / "state.pkl"
    weights = make_weights()[0]
    del weights["blocks.output.conv.b"]
    torch.save(weights, state)
    for pair, message in (
        ((tmp_path / "nothing.pkl", decoder), "nothing.pkl is not a file"),
        ((page, decoder), "page.pkl is refused: it is not a file of torch.save"),
        ((decoder, encoder), "Give the encoder first"),
        ((hostile, decoder), r"hostile.pkl is refused: its pickle names '(posix|nt)\.system'"),
        ((encoder, hostile), r"hostile.pkl is refused: its pickle names '(posix|nt)\.system'"),
        ((state, decoder), r"1 tensors are missing \(blocks.output.conv.b\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(ImportDvaeConfig(encoder=pair[0], decoder=pair[1], out=out))
    assert not out.exists() and not marker.exists()
    assert cli.run(["import-dvae", str(page), str(decoder), str(out)]) == 2

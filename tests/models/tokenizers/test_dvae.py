"""dVAE: the network against a second one written from its description, and its published files against hostile ones."""

from __future__ import annotations

import functools
import io
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.tokenizers import published
from models.tokenizers.base import Precision, load_tokenizer
from models.tokenizers.dvae import Dvae, DvaeConfig
from models.tokenizers.import_dvae import build_published
from models.tokenizers.inert_pickle import Machine, Refused
from models.tokenizers.published import PublishedFileError, read_published
from tests.models.tokenizers.published_dvae import SMALL, define_package, make_module, make_weights, save_pair
from tests.models.tokenizers.test_vqvae import make_frames

LEGACY: dict[str, Any] = {"_use_new_zipfile_serialization": False}


def conv(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = weights[f"{name}.w"]
    return F.conv2d(x, weight, weights[f"{name}.b"], padding=(weight.shape[-1] - 1) // 2)


def residual(weights: dict[str, Tensor], name: str, x: Tensor, num_layers: int) -> Tensor:
    skip = conv(weights, f"{name}.id_path", x) if f"{name}.id_path.w" in weights else x
    for place in range(1, 5):
        x = conv(weights, f"{name}.res_path.conv_{place}", x.clamp(min=0))
    return skip + x / num_layers**2


def reference_logits(weights: dict[str, Tensor], frames: Tensor, per_group: int) -> Tensor:
    x = conv(weights, "blocks.input", frames.permute(0, 3, 1, 2).float() / 255 * 0.8 + 0.1)
    for group in range(1, 5):
        for block in range(1, per_group + 1):
            x = residual(weights, f"blocks.group_{group}.block_{block}", x, 4 * per_group)
        if group < 4:
            x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
    return conv(weights, "blocks.output.conv", x.clamp(min=0))


def reference_stats(weights: dict[str, Tensor], codes: Tensor, per_group: int) -> Tensor:
    one_hot = F.one_hot(codes.long(), weights["blocks.input.w"].shape[1]).permute(0, 3, 1, 2).float()
    x = conv(weights, "blocks.input", one_hot)
    for group in range(1, 5):
        for block in range(1, per_group + 1):
            x = residual(weights, f"blocks.group_{group}.block_{block}", x, 4 * per_group)
        if group < 4:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return conv(weights, "blocks.output.conv", x.clamp(min=0))


CONFIGS = [
    SMALL,
    replace(SMALL, blocks_per_group=1, hidden=4, codebook_size=7, decoder_init=32),  # first decoder block: no skip
    replace(SMALL, blocks_per_group=3, decoder_init=1),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_equals_the_description(config: DvaeConfig) -> None:
    encoder, decoder = make_weights(config)
    tokenizer = build_published(encoder, decoder)
    assert tokenizer.config == config and not tokenizer.training
    frames = make_frames(3, side=48)[:, :32]
    expected = reference_logits(encoder, frames, config.blocks_per_group)
    torch.testing.assert_close(tokenizer.encoder(tokenizer.normalize(frames)), expected, atol=1e-4, rtol=1e-4)
    codes = tokenizer.encode(frames)
    assert codes.dtype == torch.uint16 and codes.shape == (3, 4, 6)
    assert torch.equal(codes.long(), expected.argmax(1)) and len(codes.unique()) > 2
    stats = reference_stats(decoder, codes, config.blocks_per_group)
    torch.testing.assert_close(tokenizer.decoder(codes.long()), stats[:, :3], atol=1e-4, rtol=1e-4)
    pixels = ((stats[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1).permute(0, 2, 3, 1) * 255
    pictures = tokenizer.decode(codes)
    assert pictures.dtype == torch.uint8 and pictures.shape == frames.shape
    assert (pictures.float() - pixels).abs().max() <= 0.51
    assert torch.equal(pictures, tokenizer.decode(codes.int()))


def test_sizes_of_the_published_weights() -> None:
    with torch.device("meta"):
        tokenizer = Dvae(DvaeConfig())
    # 53.8 M is what others report for the encoder; the decoder's first bias is part of its codes here.
    assert sum(value.numel() for value in tokenizer.encoder.parameters()) == 53_786_240
    assert sum(value.numel() for value in tokenizer.decoder.parameters()) == 43_829_766 - 128
    assert tokenizer.patch == 8 and tokenizer.codebook_size == 8192


def test_pictures_cover_the_range() -> None:
    encoder, decoder = make_weights()
    decoder["blocks.output.conv.w"] *= 1000
    pictures = build_published(encoder, decoder).decode(torch.arange(24).view(1, 4, 6))
    assert pictures.min() == 0 and pictures.max() == 255


def test_padding_of_a_batch_changes_no_code() -> None:
    tokenizer, frames = build_published(*make_weights()), make_frames(5)
    padded = torch.cat([frames[:3], frames[2:3].expand(5, -1, -1, -1)])
    assert torch.equal(tokenizer.encode(padded)[:3], tokenizer.encode(frames)[:3])
    codes = tokenizer.encode(padded)
    assert torch.equal(codes[2:3].expand(6, -1, -1).long(), codes[2:].long())


def test_the_head_stays_in_float32_under_autocast() -> None:
    tokenizer = build_published(*make_weights())
    frames = make_frames()
    exact = tokenizer.encoder(tokenizer.normalize(frames))
    with torch.autocast("cpu", torch.bfloat16):
        logits = tokenizer.encoder(tokenizer.normalize(frames))
        assert tokenizer.encode(frames).dtype == torch.uint16 and tokenizer.decode(tokenizer.encode(frames)).shape
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision(precision: Precision, tmp_path: Path) -> None:
    """Only what the gain scales down is rounded, so the logits move by much less than in half precision throughout."""
    tokenizer, frames = build_published(*make_weights()), make_frames(3)
    tokenizer.save(tmp_path)
    half = load_tokenizer(tmp_path, precision=precision)
    assert isinstance(half, Dvae) and half.fingerprint() == tokenizer.fingerprint()
    exact, found = (one.encoder(one.normalize(frames)) for one in (tokenizer, half))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    with torch.autocast("cpu", dtype):
        throughout = tokenizer.encoder(tokenizer.normalize(frames))
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.5 * (throughout - exact).abs().max()
    assert (half.encode(frames).long() != tokenizer.encode(frames).long()).float().mean() < 0.05
    codes = tokenizer.encode(frames)
    assert torch.equal(half.decode(codes), tokenizer.decode(codes))
    with pytest.raises(ValueError, match=f"save: the weights are cast to {precision}"):
        half.save(tmp_path)


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = build_published(*make_weights())
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, Dvae) and loaded.fingerprint() == tokenizer.fingerprint()
    assert torch.equal(loaded.encode(make_frames()), tokenizer.encode(make_frames()))
    assert build_published(*make_weights(seed=1)).fingerprint() != tokenizer.fingerprint()
    with torch.no_grad():
        loaded.decoder.blocks[0].convs[0].bias[0] += 1e-3
    assert loaded.fingerprint() != tokenizer.fingerprint()


def test_every_weight_learns() -> None:
    tokenizer = Dvae(SMALL)
    tokenizer.encoder(tokenizer.normalize(make_frames())).square().sum().backward()
    tokenizer.decoder(torch.arange(24).view(1, 4, 6)).sum().backward()
    assert all(value.grad is not None for value in tokenizer.parameters())


def test_wrong_frames_are_named() -> None:
    tokenizer = Dvae(SMALL)
    with pytest.raises(ValueError, match="dvae: frames are 12x8 px; allowed: multiples of 8 px"):
        tokenizer.encode(torch.zeros(1, 12, 8, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    "setting",
    [{"hidden": 0}, {"hidden": 6}, {"blocks_per_group": 0}, {"codebook_size": 1}, {"codebook_size": 65532}, {"decoder_init": 0}],
)  # fmt: skip
def test_bad_settings_are_named(setting: dict[str, int]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"DvaeConfig: {name} is {value}; allowed"):
        replace(SMALL, **setting)


@pytest.mark.parametrize("options", [{}, LEGACY, {"pickle_protocol": 4}, {"pickle_protocol": 5, **LEGACY}])
def test_published_files(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = save_pair(tmp_path, monkeypatch, **options)
    sides = [read_published(path) for path in paths]
    for found, expected in zip(sides, make_weights(), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert build_published(*sides).fingerprint() == build_published(*make_weights()).fingerprint()


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_state_dicts_views_and_half_precision(options: dict[str, Any], tmp_path: Path) -> None:
    whole = torch.arange(24.0).half()
    state = OrderedDict(a=whole.view(4, 6).T, b=whole[3:7], c=torch.tensor(2.5, dtype=torch.float64))
    torch.save(state, tmp_path / "state.pkl", **options)
    found = read_published(tmp_path / "state.pkl")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items())
    found["a"].zero_()
    assert torch.equal(found["b"], whole[3:7])
    network = nn.Conv2d(1, 1, 1).state_dict()  # an OrderedDict with an attribute
    torch.save(network, tmp_path / "network.pkl", **options)
    assert read_published(tmp_path / "network.pkl").keys() == {"weight", "bias"}


def refused(path: Path, message: str) -> None:
    with pytest.raises(PublishedFileError, match=message) as caught:
        read_published(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600 + len(str(path))


def write_zip(path: Path, program: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in members.items():
            archive.writestr(f"archive/data/{name}", data)
    return path


def write_legacy(path: Path, program: bytes) -> Path:
    preface = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(preface) + program)
    return path


class Evil:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments, state) if state else (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def evil_calls(marker: Path) -> dict[str, Evil]:
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    return {
        r"(posix|nt)\.system": Evil(os.system, touch),
        r"builtins\.eval|__builtin__\.eval": Evil(eval, code),
        r"(builtins|__builtin__)\.exec": Evil(exec, code),
        r"(builtins|__builtin__)\.getattr": Evil(getattr, "os", "system"),
        r"torch\.serialization\.load": Evil(torch.load, str(marker)),
        r"torch\.storage\._load_from_bytes": Evil(torch.storage._load_from_bytes, pickle.dumps(Evil(os.system, touch))),
        r"functools\.partial": Evil(functools.partial, os.system, touch),
        r"calls collections\.OrderedDict with arguments|names 'posix": Evil(OrderedDict, Evil(os.system, touch)),
        r"torch\.nn\.modules\.conv\.Conv2d": Evil(nn.Conv2d, 1, 1, 1),
    }


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_hostile_calls_do_nothing(write: Callable[[Path, bytes], Path], protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for message, evil in evil_calls(marker).items():
        program = pickle.dumps({"blocks": evil} if protocol % 2 else evil, protocol)
        if protocol == 0:
            message = f"{message}|instruction PUT|instruction UNICODE"
        refused(write(tmp_path / "evil.pkl", program), message)
    assert not marker.exists()
    # The same call does harm where a pickle is loaded, so the test above tests something.
    pickle.loads(pickle.dumps(Evil(os.system, f"touch {marker}")))  # noqa: S301
    assert marker.exists()


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_call_inside_a_real_module(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    with monkeypatch.context() as patch:
        define_package(patch)
        module: Any = make_module(make_weights()[0])
        module.blocks.input.device = Evil(os.system, f"touch {marker}")
        torch.save(module, tmp_path / "encoder.pkl", **options)
    refused(tmp_path / "encoder.pkl", r"names '(posix|nt)\.system', which no dVAE needs")
    assert not marker.exists()


def name(text: str) -> bytes:
    module, _, last = text.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    """The instructions that declare a tensor."""
    storage = b"(" + text("storage") + name("torch.FloatStorage") + text(key) + text("cpu") + number(numel) + b"tQ"
    shape = b"".join(b"(" + b"".join(map(number, counts)) + b"t" for counts in (size, stride))
    return name("torch._utils._rebuild_tensor_v2") + b"(" + storage + number(offset) + shape + b"\x89}tR"


def state(*tensors: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(f"w{i}") + one for i, one in enumerate(tensors)) + b"u."


def test_hand_made_programs_are_read(tmp_path: Path) -> None:
    """The hostile ones below differ from this in one thing each."""
    path = write_zip(tmp_path / "x", state(tensor(4, 1, (3,), (1,))), **{"0": torch.arange(4.0).numpy().tobytes()})
    assert torch.equal(read_published(path)["w0"], torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (state(tensor(2**40, 0, (2**40,), (1,))), "would take 4398046511104 bytes, the file has"),
        (state(tensor(2**1000, 0, (2**1000,), (1,))), "would take .* bytes, the file has"),
        (state(tensor(4, 0, (2**20,), (0,))), "shape that does not fit its storage"),
        (state(tensor(4, 0, (4, 4, 4, 4), (0, 0, 0, 1))), "empty or reaches outside its storage"),
        (state(tensor(4, 2, (3,), (1,))), "empty or reaches outside its storage"),
        (state(tensor(4, 0, (2, 2), (3, 1))), "empty or reaches outside its storage"),
        (state(tensor(4, -1, (3,), (1,))), "shape that does not fit its storage"),
        (state(tensor(4, 0, (0,), (1,))), "empty or reaches outside its storage"),
        (state(tensor(4, 0, (3,), (1, 1))), "without a shape"),
        (state(*[tensor(4, 0, (4,), (1,))] * 1025), "over 1024 tensors"),
        (state(tensor(4, 0, (4,), (1,)), tensor(3, 0, (3,), (1,))), "declared twice, differently"),
        (state(tensor(4, 0, (4,), (1,), key="../../etc/passwd")), "'archive/data/../../etc/passwd' is missing"),
        (b"\x80\x02" + name("torch.device") + b")R)R.", "calls a device or a set; allowed"),
        (b"\x80\x02" + name("collections.OrderedDict") + b")R)R.", "calls something of type dict; allowed"),
        (b"\x80\x02" + name("dall_e.utils.Conv2d") + b")R.", r"calls dall_e\.utils\.Conv2d; allowed"),
        (b"\x80\x02" + name("collections.OrderedDict") + b")\x81.", r"makes collections\.OrderedDict; allowed"),
        (b"\x80\x02" + name("dall_e.utils.Conv2d") + b"K\x01\x85\x81.", r"makes dall_e\.utils\.Conv2d; allowed"),
        (b"\x80\x02cdall_e.utils\nos.system\n.", r"names 'dall_e\.utils\.os\.system'"),
        (b"\x80\x04" + text("os") + text("system") + b"\x93.", r"names 'os\.system'"),
        (b"\x80\x04K\x01K\x02\x93.", "makes a name of something that is no text"),
        (b"\x80\x02(ios\nsystem\n.", "instruction INST 'os system'"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x04)\x92.", "instruction NEWOBJ_EX"),
        (b"\x80\x02" + name("torch.device") + b"}b.", r"sets attributes of torch\.device"),
        (b"\x80\x02](" + b"K\x01K\x02u.", "sets items of something of type list"),
        (b"\x80\x02}(" + b")K\x02u.", "the key something of type tuple"),
        (b"\x80\x02}K\x01a.", "appends to something of type dict"),
        (b"\x80\x02K\x01Q.", "something that is no storage"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "holds no weights"),  # a memo of 2^31 places would be 16 GB
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "damaged"),
        (b"\x80\x02" + b"(" * 1000 + b"u.", "sets items of something of type Mark"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02}", "damaged|has no end"),
        (b"", "damaged|has no end"),
        (b"\x80\x02)" + b"\x85" * 500_000 + b".", "holds something of type tuple"),  # 500 000 deep
        (b"\x80\x02" + b"}" * 500_000 + b".", "holds no weights"),
        (b"\x80\x02K\x01.", "holds something of type int"),
        (state(b"K\x01"), "is something of type int; allowed: a tensor"),
    ],
)  # fmt: skip
def test_hostile_programs_are_refused(program: bytes, message: str, tmp_path: Path) -> None:
    """In time and memory that grow with the program alone."""
    numbers = torch.arange(4.0).numpy().tobytes()
    path = write_zip(tmp_path / "hostile.pkl", program, **{"0": numbers})
    refused(path, message)
    if program and "archive" not in message and "would take" not in message and "twice" not in message:
        refused(write_legacy(tmp_path / "legacy.pkl", program), message)


def test_modules_that_hold_themselves_or_each_other_end() -> None:
    make = name("torch.nn.modules.container.Sequential") + b")\x81"

    def with_children(children: bytes) -> bytes:
        return b"}(" + text("_parameters") + b"}" + text("_modules") + b"}(" + children + b"uub"

    ring = b"\x80\x02" + make + b"q\x00" + with_children(text("a") + b"h\x00") + b"."
    tree = make + b"q\x00" + with_children(text("a") + make + with_children(b""))
    for level in range(1, 60):  # two of the one before: 2^60 modules in 5 kB
        one = b"h" + bytes([level - 1])
        tree += make + b"q" + bytes([level]) + with_children(text("a") + one + text("b") + one)
    for program in (ring, b"\x80\x02" + tree + b"."):
        with pytest.raises(Refused, match="over 4096 modules"):
            published._find_weights(Machine().run(io.BytesIO(program)))


def test_zip_files_that_are_not_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.pkl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    refused(path, "compressed or encrypted")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/readme", b"")
    refused(path, "0 members NAME/data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/byteorder", b"big")
    refused(path, "big-endian")
    write_zip(path, state(tensor(4, 0, (4,), (1,))), **{"0": bytes(12)})
    refused(path, "has 12 bytes, its pickle says 16")
    write_zip(path, state(tensor(4, 0, (4,), (1,))), **{"0": bytes(20)})
    refused(path, "has 20 bytes; allowed: 16")
    write_zip(path, state(tensor(4, 0, (4,), (1,))), **{"0": bytes(16)})
    damaged = path.read_bytes().replace(bytes(16), b"\x01" + bytes(15), 1)
    path.write_bytes(damaged)
    refused(path, "damaged zip file")
    monkeypatch.setattr(published, "_MAX_DIRECTORY_BYTES", 4000)
    write_zip(path, b"", **{str(place): b"" for place in range(100)})
    refused(path, "zip directory has over 4000 bytes")
    monkeypatch.setattr(published, "_MAX_FILE_BYTES", 100)
    refused(path, "bytes; allowed: 100")


def test_files_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pkl"
    for content, message in (
        (b"", "is not a file of torch.save"),
        (b"<html>404</html>", "is not a file of torch.save"),
        (pickle.dumps({"a": 1}, 2), "magic number is missing"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1000, 2), "another version"),
    ):
        path.write_bytes(content)
        refused(path, message)
    with pytest.raises(FileNotFoundError, match="give the downloaded"):
        read_published(tmp_path / "nothing.pkl")


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_damage_anywhere_is_refused(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut or changed at random, a file is refused or read; nothing else happens."""
    config = replace(SMALL, hidden=4, blocks_per_group=1, codebook_size=4)
    whole = save_pair(tmp_path, monkeypatch, config, **options)[0].read_bytes()
    draws, path = random.Random(0), tmp_path / "damaged.pkl"
    for length in [*draws.sample(range(len(whole)), 60), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, "is refused")
    start = whole.index(b"dall_e")  # the pickle: where damage can mean anything
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draws.randint(1, 4)):
            data[draws.randrange(start, min(start + 12_000, len(data)))] = draws.randrange(256)
        path.write_bytes(data)
        try:
            read_published(path)
        except PublishedFileError:
            continue


def changed(
    change: Callable[[dict[str, Tensor], dict[str, Tensor]], Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    encoder, decoder = make_weights()
    change(encoder, decoder)
    return encoder, decoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, d: e.pop("blocks.group_2.block_1.id_path.w"), r"encoder.pkl: 1 tensors are missing \(blocks.group_2.block_1.id_path.w\)"),
        (lambda e, d: d.pop("blocks.input.b"), r"decoder.pkl: 1 tensors are missing \(blocks.input.b\)"),
        (lambda e, d: d.pop("blocks.input.w"), "decoder.pkl: blocks.input.w has shape None"),
        (lambda e, d: e.update(extra=torch.zeros(1)), r"1 are unknown \(extra\)"),
        (lambda e, d: e.pop("blocks.group_1.block_2.res_path.conv_1.w"), "1 blocks a group"),
        (lambda e, d: e.update({"blocks.output.conv.w": torch.zeros(5, 64, 1, 1)}), r"has shape \(5, 64, 1, 1\); allowed: \(24, 64, 1, 1\)"),
        (lambda e, d: d.update({"blocks.input.b": torch.zeros(3)}), r"its bias \(3,\); allowed"),
        (lambda e, d: e["blocks.input.b"].fill_(float("nan")), "blocks.input.b has numbers that are not finite"),
        (lambda e, d: e.update({"blocks.input.w": torch.zeros(6, 3, 7, 7)}), "are no dVAE: DvaeConfig: hidden is 6"),
        (lambda e, d: e.update({"blocks.input.w": torch.zeros(2**22, 1, 7, 7).expand(-1, 3, -1, -1)[:4, :, :, :1]}), "a convolution of 7x7"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(change: Callable[..., Any], message: str) -> None:
    with pytest.raises(PublishedFileError, match=message):
        build_published(*changed(change))


def test_swapped_files_are_named() -> None:
    encoder, decoder = make_weights()
    with pytest.raises(PublishedFileError, match="Give the encoder first, then the decoder"):
        build_published(decoder, encoder)

"""The published files of the DALL-E dVAE, read without running anything in them.

They are whole modules saved by `torch.save`: a pickle beside raw storages. A pickle is a program, and unpickling it
calls whatever it names, so nothing is unpickled here. `_Machine` steps through its instructions and knows a few names;
to it each is a word, not an object that could be called. What comes out are the weights, by name.

Source: the instructions are described by the standard library's `pickletools`; names from the package DALL-E 0.1.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models.tokenizers.dvae import NUM_GROUPS, Dvae, DvaeConfig

_MAX_FILE_BYTES = 1 << 30  # the published encoder has 215 MB
_MAX_PROGRAM_BYTES = 1 << 20  # a full-size encoder has 30 kB, or 57 with source text
_MAX_DIRECTORY_BYTES = 1 << 20
_MAX_MODULES = 4096
_MAX_TENSORS = 1024

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_MODULES = frozenset(
    {
        "dall_e.encoder.Encoder",
        "dall_e.encoder.EncoderBlock",
        "dall_e.decoder.Decoder",
        "dall_e.decoder.DecoderBlock",
        "dall_e.utils.Conv2d",
        "torch.nn.modules.activation.ReLU",
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.linear.Identity",
        "torch.nn.modules.pooling.MaxPool2d",
        "torch.nn.modules.upsampling.Upsample",
    }
)
_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
}
_BUILDERS = frozenset(
    {
        "__builtin__.set",
        "builtins.set",
        "collections.OrderedDict",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch.device",
    }
)
_KNOWN = _MODULES | _BUILDERS | _STORAGES.keys()


class PublishedFileError(ValueError):
    """A file is not what it should be. The text says which, what was found, and what was allowed."""


class _Refused(Exception):
    """Why a file is refused; `read_published` puts the file's name before it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Name:
    """A global that the pickle names: a word of `_KNOWN`, never the object."""

    name: str


@dataclass(slots=True, eq=False)
class _Module:
    """What a module left in the pickle: the name of its class, and its attributes once they came."""

    name: str
    state: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class _Strided:
    """A tensor that was declared: a view of a storage that has not been read."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    """What MARK leaves on the stack."""


_MARK = _Mark()
_INERT = _Name("a device or a set")  # stands for devices, sets and source files, which nothing reads


class _Machine:
    """Runs a pickle's instructions on inert values. Memory is bounded by the length of the program."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: BinaryIO) -> Any:
        """The value that `program` leaves; its position is then behind the pickle."""
        try:
            for instruction, argument, _ in pickletools.genops(program):
                if instruction.name == "STOP":
                    return self.stack.pop()
                step = _STEPS.get(instruction.name)
                if step is None:
                    raise _Refused(
                        f"its pickle has the instruction {instruction.name}{_quote(argument)}, which torch.save does not write"
                    )
                step(self, argument)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise _Refused(f"its pickle is damaged ({type(error).__name__}: {_clip(str(error))})") from error
        raise _Refused("its pickle has no end")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        above: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            above.append(value)
        return above[::-1]

    def pop_tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise _Refused("its pickle takes more from the stack than there is")
        at = len(self.stack) - length
        self.stack[at:] = [tuple(self.stack[at:])]

    def name(self, module_and_name: str) -> None:
        """GLOBAL: its argument is "module name"."""
        name = module_and_name.replace(" ", ".")
        if name not in _KNOWN:
            raise _Refused(f"its pickle names {_clip(name)!r}, which no dVAE needs; a pickle that does can run code")
        self.push(_Name(name))

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise _Refused("its pickle makes a name of something that is no text")
        self.name(f"{module} {name}")

    def call(self) -> None:
        """REDUCE: of a known name and its arguments, the inert value that stands for the result."""
        arguments, builder = self.stack.pop(), self.stack.pop()
        if not isinstance(builder, _Name) or builder.name not in _BUILDERS or not isinstance(arguments, tuple):
            raise _Refused(f"its pickle calls {_describe(builder)}; allowed: {', '.join(sorted(_BUILDERS))}")
        match builder.name.rpartition(".")[2], arguments:
            case "OrderedDict", ():
                self.push({})
            case "_rebuild_tensor_v2", (_Storage() as storage, offset, size, stride, *_):
                self.push(_view(storage, offset, size, stride))
            case "_rebuild_parameter", (_Strided() as tensor, *_):
                self.push(tensor)
            case (("device" | "set"), _):
                self.push(_INERT)
            case _:
                raise _Refused(f"its pickle calls {builder.name} with arguments that torch.save does not write")

    def make(self) -> None:
        """NEWOBJ: an empty module of a known class."""
        arguments, made = self.stack.pop(), self.stack.pop()
        if not isinstance(made, _Name) or made.name not in _MODULES or arguments != ():
            raise _Refused(f"its pickle makes {_describe(made)}; allowed: modules of the dVAE, without arguments")
        self.push(_Module(made.name, {}))

    def build(self) -> None:
        """BUILD: the attributes of a module; those of a dict (metadata of a state dict) are dropped."""
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, _Module | dict) or not isinstance(state, dict):
            raise _Refused(f"its pickle sets attributes of {_describe(target)}; allowed: modules")
        if isinstance(target, _Module):
            target.state = state

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise _Refused(f"its pickle sets items of {_describe(target)}; allowed: dicts")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):  # the hash of a nested tuple can take for ever
                raise _Refused(f"its pickle has a dict with the key {_describe(key)}; allowed: text and numbers")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise _Refused(f"its pickle appends to {_describe(target)}; allowed: lists")
        target.extend(values)

    def storage(self) -> None:
        """BINPERSID: what torch.save wrote outside the pickle."""
        match self.stack.pop():
            case "storage", _Name(name), str(key), str(), int(numel), *_ if name in _STORAGES and numel >= 0:
                self.push(_Storage(_STORAGES[name], key, numel))
            case "module", _Name() as made, str() | None, str() | None:  # legacy: the class beside its source text
                self.push(made)
            case _:
                raise _Refused(
                    f"its pickle refers to something that is no storage; allowed: storages of {', '.join(_STORAGES)}"
                )


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": lambda m, _: m.push(_MARK),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), _Machine.push
    ),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_SET": lambda m, _: m.push([]),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.pop_tuple(1),
    "TUPLE2": lambda m, _: m.pop_tuple(2),
    "TUPLE3": lambda m, _: m.pop_tuple(3),
    "APPEND": lambda m, _: m.append([m.stack.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_to_mark()),
    "ADDITEMS": lambda m, _: m.append(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    **{name: lambda m, at: m.memo.__setitem__(at, m.stack[-1]) for name in ("BINPUT", "LONG_BINPUT")},
    **{name: lambda m, at: m.push(m.memo[at]) for name in ("BINGET", "LONG_BINGET")},
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": lambda m, _: m.stack_name(),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.make(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.storage(),
}


def _view(storage: _Storage, offset: Any, size: Any, stride: Any) -> _Strided:
    """The declared tensor, checked to lie within its storage and to be no larger than that."""
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 8):
        raise _Refused("its pickle declares a tensor without a shape")
    # No count of a whole tensor, its strides among them, is above its storage's length; the end is checked below.
    if not all(isinstance(n, int) and 0 <= n <= storage.numel for n in (offset, *size, *stride)):
        raise _Refused("its pickle declares a tensor with a shape that does not fit its storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not 1 <= math.prod(size) <= storage.numel or last >= storage.numel:
        raise _Refused(
            f"its pickle declares a tensor that is empty or reaches outside its storage of {storage.numel} numbers"
        )
    return _Strided(storage, offset, size, stride)


def _clip(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "..."


def _quote(argument: Any) -> str:
    return f" {_clip(argument)!r}" if isinstance(argument, str) else ""


def _describe(value: Any) -> str:
    return value.name if isinstance(value, _Name | _Module) else f"something of type {type(value).__name__.strip('_')}"


def read_published(path: str | Path) -> dict[str, Tensor]:
    """Weights in `encoder.pkl` or `decoder.pkl`, by name ("blocks.group_1.block_1.res_path.conv_1.w"), on the CPU.

    Reads whole modules and state dicts, in torch's zip format and in the one before it. Nothing in the file is called
    or imported; a file that asks for it is refused before a weight is read. Tensors have memory of their own.

    Errors: FileNotFoundError; PublishedFileError naming the file and what was refused.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_published: {path} is not a file; give the downloaded encoder.pkl or decoder.pkl")
    try:
        with path.open("rb") as file:
            num_bytes = file.seek(0, io.SEEK_END)
            if num_bytes > _MAX_FILE_BYTES:
                raise _Refused(f"it has {num_bytes} bytes; allowed: {_MAX_FILE_BYTES}")
            file.seek(0)
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _read_zip(file, num_bytes) if is_zip else _read_legacy(file, num_bytes)
    except _Refused as why:
        raise PublishedFileError(f"read_published: {path} is refused: {why}") from why


class _Modest(io.BufferedIOBase):
    """A file that gives at most `most_bytes` at a time, for the zip directory is read at once, however long it claims to be."""

    def __init__(self, file: BinaryIO, most_bytes: int) -> None:
        self.file, self.most_bytes = file, most_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        data = self.file.read(self.most_bytes + 1 if size is None or size < 0 else min(size, self.most_bytes + 1))
        if len(data) > self.most_bytes:
            raise _Refused(f"a part of its zip directory has over {self.most_bytes} bytes")
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def seekable(self) -> bool:
        return True


def _read_zip(file: BinaryIO, num_bytes: int) -> dict[str, Tensor]:
    modest = _Modest(file, _MAX_DIRECTORY_BYTES)
    try:
        with zipfile.ZipFile(modest) as archive:
            modest.most_bytes = _MAX_FILE_BYTES
            programs = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
            if len(programs) != 1:
                raise _Refused(
                    f"it is a zip file with {len(programs)} members NAME/data.pkl; one that torch.save wrote has 1"
                )
            folder = programs[0].removesuffix("/data.pkl")
            if f"{folder}/byteorder" in archive.namelist() and _member(archive, f"{folder}/byteorder", 16) != b"little":
                raise _Refused("its numbers are big-endian; allowed: little")
            views = _find_weights(_Machine().run(io.BytesIO(_member(archive, programs[0], _MAX_PROGRAM_BYTES))))
            storages = _declared(views, num_bytes)
            data = {
                key: _numbers(storage, _member(archive, f"{folder}/data/{key}", _num_bytes(storage)))
                for key, storage in storages.items()
            }
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, struct.error) as error:
        raise _Refused(f"it is a damaged zip file ({error}); download it again") from error
    return _materialise(views, data)


def _member(archive: zipfile.ZipFile, name: str, most_bytes: int) -> bytes:
    """A member that torch.save wrote: stored, not compressed, so that it cannot be larger than the file."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise _Refused(f"its member {_clip(name)!r} is missing; download it again") from None
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise _Refused(f"its member {_clip(name)!r} is compressed or encrypted; torch.save only stores")
    if max(info.file_size, info.compress_size) > most_bytes:
        raise _Refused(f"its member {_clip(name)!r} has {info.file_size} bytes; allowed: {most_bytes}")
    return archive.read(info)


def _read_legacy(file: BinaryIO, num_bytes: int) -> dict[str, Tensor]:
    """The format before torch 1.6: magic number, version, a word on the machine, the pickle, storage keys, storages."""
    head = io.BytesIO(file.read(_MAX_PROGRAM_BYTES))
    try:
        magic = _Machine().run(head)
    except _Refused as why:
        raise _Refused(f"it is not a file of torch.save ({why})") from why
    if not isinstance(magic, int) or magic != _LEGACY_MAGIC:
        raise _Refused("it is not a file of torch.save: the magic number is missing")
    if _Machine().run(head) != _LEGACY_PROTOCOL:
        raise _Refused(f"its format has another version than {_LEGACY_PROTOCOL}")
    machine = _Machine().run(head)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise _Refused("its numbers are big-endian; allowed: little")
    views = _find_weights(_Machine().run(head))
    storages = _declared(views, num_bytes)
    keys = _Machine().run(head)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _Refused("its list of storages is damaged; download it again")
    file.seek(head.tell())
    data: dict[str, Tensor] = {}
    for key in keys:
        if key not in storages or key in data:
            raise _Refused(f"its storage {_clip(key)!r} belongs to no weight, or comes twice")
        length = file.read(8)
        if len(length) < 8 or struct.unpack("<q", length)[0] != storages[key].numel:
            raise _Refused(f"its storage {_clip(key)!r} has another length than its pickle says; download it again")
        data[key] = _numbers(storages[key], file.read(_num_bytes(storages[key])))
    if missing := storages.keys() - data.keys():
        raise _Refused(f"its storages {_some(sorted(missing))} are missing; download it again")
    return _materialise(views, data)


def _find_weights(root: Any) -> dict[str, _Strided]:
    """Declared tensors of a module and the modules in it, or of a state dict."""
    if not isinstance(root, _Module | dict):
        raise _Refused(f"it holds {_describe(root)}; allowed: a module or a state dict")
    if isinstance(root, dict):
        root = _Module("state dict", {"_parameters": root, "_modules": {}})
    views: dict[str, _Strided] = {}
    waiting, num_modules = [("", root)], 0
    while waiting:
        prefix, module = waiting.pop()
        num_modules += 1
        if num_modules > _MAX_MODULES or prefix.count(".") > 16:
            raise _Refused(f"it has over {_MAX_MODULES} modules, or modules that hold themselves")
        children, tensors = module.state.get("_modules"), module.state.get("_parameters")
        if not isinstance(children, dict) or not isinstance(tensors, dict):
            raise _Refused(f"its {module.name} {prefix!r} has no parameters and modules")
        for name, child in islice(children.items(), _MAX_MODULES):
            if not isinstance(child, _Module):
                raise _Refused(f"its {_clip(prefix + str(name))!r} is {_describe(child)}; allowed: a module")
            waiting.append((f"{prefix}{_clip(str(name))}.", child))
        for name, view in islice(tensors.items(), _MAX_TENSORS + 1):
            if not isinstance(view, _Strided):
                raise _Refused(f"its {_clip(prefix + str(name))!r} is {_describe(view)}; allowed: a tensor")
            views[f"{prefix}{_clip(str(name))}"] = view
            if len(views) > _MAX_TENSORS:
                raise _Refused(f"it has over {_MAX_TENSORS} tensors")
    if not views:
        raise _Refused("it holds no weights")
    return views


def _declared(views: dict[str, _Strided], num_bytes: int) -> dict[str, _Storage]:
    """The storages behind weights, by key; together they fit into the file."""
    storages: dict[str, _Storage] = {}
    for view in views.values():
        known = storages.setdefault(view.storage.key, view.storage)
        if (known.dtype, known.numel) != (view.storage.dtype, view.storage.numel):
            raise _Refused(f"its storage {_clip(known.key)!r} is declared twice, differently")
    total = sum(map(_num_bytes, storages.values()))
    tensors = sum(math.prod(view.size) * view.storage.dtype.itemsize for view in views.values())
    if max(total, tensors) > num_bytes:
        raise _Refused(
            f"its weights would take {_clip(str(max(total, tensors)))} bytes, the file has {num_bytes}; download it again"
        )
    return storages


def _num_bytes(storage: _Storage) -> int:
    return storage.numel * storage.dtype.itemsize


def _numbers(storage: _Storage, raw: bytes) -> Tensor:
    """The storage as a flat tensor."""
    if len(raw) != _num_bytes(storage):
        raise _Refused(
            f"its storage {_clip(storage.key)!r} has {len(raw)} bytes, its pickle says {_num_bytes(storage)}; "
            "download it again"
        )
    return torch.frombuffer(bytearray(raw), dtype=storage.dtype)


def _materialise(views: dict[str, _Strided], data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: data[view.storage.key]
        .as_strided(view.size, view.stride, view.offset)
        .clone(memory_format=torch.contiguous_format)
        for name, view in views.items()
    }


def build_published(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> Dvae:
    """The tokenizer of published weights, in float32 and eval mode; its sizes are read from their shapes.

    Args:
        encoder, decoder: what `read_published` read from encoder.pkl and decoder.pkl.
    Errors: PublishedFileError naming the file and the tensor that is missing, unknown, of another shape or not finite.
    """
    config = _infer_config(encoder, decoder)
    with torch.device("meta"):  # shapes only: a file with mad shapes costs no memory
        tokenizer = Dvae(config)
    expected = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for which, given, names in (
        ("encoder.pkl", encoder, _encoder_names(config)),
        ("decoder.pkl", decoder, _decoder_names(config)),
    ):
        missing, unknown = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
        if missing or unknown:
            raise PublishedFileError(
                f"{which}: {len(missing)} tensors are missing ({_some(missing)}) and {len(unknown)} are unknown "
                f"({_some(unknown)}); a dVAE of {config.blocks_per_group} blocks a group has {len(names)}"
            )
        for published, ours in names.items():
            value = given[published].float()
            if ours == "decoder.codes.weight":
                bias = given["blocks.input.b"].float()
                if value.ndim != 4 or bias.shape != value.shape[:1]:
                    raise PublishedFileError(
                        f"{which}: {published} has shape {tuple(value.shape)}, its bias {tuple(bias.shape)}; "
                        "allowed: a 1x1 convolution and its bias"
                    )
                value = value.flatten(1).T + bias
            elif not ours:
                continue
            if tuple(value.shape) != expected[ours]:
                raise PublishedFileError(
                    f"{which}: {published} has shape {tuple(value.shape)}; allowed: {expected[ours]}"
                )
            if not value.isfinite().all():
                raise PublishedFileError(
                    f"{which}: {published} has numbers that are not finite; download the file again"
                )
            weights[ours] = value.contiguous()
    tokenizer.load_state_dict(weights, assign=True)
    return tokenizer.requires_grad_(False).eval()


def _infer_config(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> DvaeConfig:
    for which, given, kernel in (("encoder.pkl", encoder, 7), ("decoder.pkl", decoder, 1)):
        shape = tuple(given["blocks.input.w"].shape) if "blocks.input.w" in given else None
        if shape is None or len(shape) != 4 or shape[2:] != (kernel, kernel):
            raise PublishedFileError(
                f"{which}: blocks.input.w has shape {shape}; allowed: a convolution of {kernel}x{kernel}. "
                "Give the encoder first, then the decoder"
            )
    pattern = re.compile(r"blocks\.group_1\.block_\d+\.res_path\.conv_1\.w")
    try:
        return DvaeConfig(
            hidden=encoder["blocks.input.w"].shape[0],
            blocks_per_group=sum(bool(pattern.fullmatch(name)) for name in encoder),
            codebook_size=decoder["blocks.input.w"].shape[1],
            decoder_init=decoder["blocks.input.w"].shape[0],
        )
    except ValueError as error:
        raise PublishedFileError(f"encoder.pkl and decoder.pkl are no dVAE: {error}") from error


def _encoder_names(config: DvaeConfig) -> dict[str, str]:
    """Published name -> ours."""
    names = {
        **_conv_names("blocks.input", "encoder.stem"),
        **_conv_names("blocks.output.conv", "encoder.head"),
    }
    for group in range(NUM_GROUPS):
        for block in range(config.blocks_per_group):
            names |= _block_names("encoder", group, block, config, block == 0 and group > 0)
    return names


def _decoder_names(config: DvaeConfig) -> dict[str, str]:
    """Published name -> ours; the bias of the first layer is added to the codes and has no name of its own."""
    names = {
        "blocks.input.w": "decoder.codes.weight",
        "blocks.input.b": "",
        **_conv_names("blocks.output.conv", "decoder.head"),
    }
    for group in range(NUM_GROUPS):
        for block in range(config.blocks_per_group):
            changes = group > 0 or config.decoder_init != 8 * config.hidden
            names |= _block_names("decoder", group, block, config, block == 0 and changes)
    return names


def _block_names(side: str, group: int, block: int, config: DvaeConfig, has_skip: bool) -> dict[str, str]:
    published = f"blocks.group_{group + 1}.block_{block + 1}"
    ours = f"{side}.blocks.{group * config.blocks_per_group + block}"
    names: dict[str, str] = {}
    for place in range(4):
        names |= _conv_names(f"{published}.res_path.conv_{place + 1}", f"{ours}.convs.{place}")
    return names | (_conv_names(f"{published}.id_path", f"{ours}.skip") if has_skip else {})


def _conv_names(published: str, ours: str) -> dict[str, str]:
    return {f"{published}.w": f"{ours}.weight", f"{published}.b": f"{ours}.bias"}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"

"""The published files of the DALL-E dVAE, read without running anything in them.

They are whole modules saved by `torch.save`: a pickle beside raw storages, in torch's zip format or the one before it.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models.tokenizers.inert_pickle import Machine, Module, Refused, Storage, Strided, clip, describe, some_of

_MAX_FILE_BYTES = 1 << 30  # the published encoder has 215 MB
_MAX_PROGRAM_BYTES = 1 << 20  # a full-size encoder has 30 kB, or 57 with source text
_MAX_DIRECTORY_BYTES = 1 << 20
_MAX_MODULES = 4096
_MAX_TENSORS = 1024
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class PublishedFileError(ValueError):
    """A file is not what it should be. The text says which, what was found, and what was allowed."""


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
                raise Refused(f"it has {num_bytes} bytes; allowed: {_MAX_FILE_BYTES}")
            file.seek(0)
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _read_zip(file, num_bytes) if is_zip else _read_legacy(file, num_bytes)
    except Refused as why:
        raise PublishedFileError(f"read_published: {path} is refused: {why}") from why


class _Modest(io.BufferedIOBase):
    """A file that gives at most `most_bytes` at a time, for the zip directory is read at once, however long it claims to be."""

    def __init__(self, file: BinaryIO, most_bytes: int) -> None:
        self.file, self.most_bytes = file, most_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        data = self.file.read(self.most_bytes + 1 if size is None or size < 0 else min(size, self.most_bytes + 1))
        if len(data) > self.most_bytes:
            raise Refused(f"a part of its zip directory has over {self.most_bytes} bytes")
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
                raise Refused(
                    f"it is a zip file with {len(programs)} members NAME/data.pkl; one that torch.save wrote has 1"
                )
            folder = programs[0].removesuffix("/data.pkl")
            if f"{folder}/byteorder" in archive.namelist() and _member(archive, f"{folder}/byteorder", 16) != b"little":
                raise Refused("its numbers are big-endian; allowed: little")
            views = _find_weights(Machine().run(io.BytesIO(_member(archive, programs[0], _MAX_PROGRAM_BYTES))))
            storages = _declared(views, num_bytes)
            data = {
                key: _numbers(storage, _member(archive, f"{folder}/data/{key}", _num_bytes(storage)))
                for key, storage in storages.items()
            }
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, struct.error) as error:
        raise Refused(f"it is a damaged zip file ({error}); download it again") from error
    return _materialise(views, data)


def _member(archive: zipfile.ZipFile, name: str, most_bytes: int) -> bytes:
    """A member that torch.save wrote: stored, not compressed, so that it cannot be larger than the file."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise Refused(f"its member {clip(name)!r} is missing; download it again") from None
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise Refused(f"its member {clip(name)!r} is compressed or encrypted; torch.save only stores")
    if max(info.file_size, info.compress_size) > most_bytes:
        raise Refused(f"its member {clip(name)!r} has {info.file_size} bytes; allowed: {most_bytes}")
    return archive.read(info)


def _read_legacy(file: BinaryIO, num_bytes: int) -> dict[str, Tensor]:
    """The format before torch 1.6: magic number, version, a word on the machine, the pickle, storage keys, storages."""
    head = io.BytesIO(file.read(_MAX_PROGRAM_BYTES))
    try:
        magic = Machine().run(head)
    except Refused as why:
        raise Refused(f"it is not a file of torch.save ({why})") from why
    if not isinstance(magic, int) or magic != _LEGACY_MAGIC:
        raise Refused("it is not a file of torch.save: the magic number is missing")
    if Machine().run(head) != _LEGACY_PROTOCOL:
        raise Refused(f"its format has another version than {_LEGACY_PROTOCOL}")
    machine = Machine().run(head)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Refused("its numbers are big-endian; allowed: little")
    views = _find_weights(Machine().run(head))
    storages = _declared(views, num_bytes)
    keys = Machine().run(head)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Refused("its list of storages is damaged; download it again")
    file.seek(head.tell())
    data: dict[str, Tensor] = {}
    for key in keys:
        if key not in storages or key in data:
            raise Refused(f"its storage {clip(key)!r} belongs to no weight, or comes twice")
        length = file.read(8)
        if len(length) < 8 or struct.unpack("<q", length)[0] != storages[key].numel:
            raise Refused(f"its storage {clip(key)!r} has another length than its pickle says; download it again")
        data[key] = _numbers(storages[key], file.read(_num_bytes(storages[key])))
    if missing := storages.keys() - data.keys():
        raise Refused(f"its storages {some_of(sorted(missing))} are missing; download it again")
    return _materialise(views, data)


def _find_weights(root: Any) -> dict[str, Strided]:
    """Declared tensors of a module and the modules in it, or of a state dict."""
    if not isinstance(root, Module | dict):
        raise Refused(f"it holds {describe(root)}; allowed: a module or a state dict")
    if isinstance(root, dict):
        root = Module("state dict", {"_parameters": root, "_modules": {}})
    views: dict[str, Strided] = {}
    waiting, num_modules = [("", root)], 0
    while waiting:
        prefix, module = waiting.pop()
        num_modules += 1
        if num_modules > _MAX_MODULES or prefix.count(".") > 16:
            raise Refused(f"it has over {_MAX_MODULES} modules, or modules that hold themselves")
        children, tensors = module.state.get("_modules"), module.state.get("_parameters")
        if not isinstance(children, dict) or not isinstance(tensors, dict):
            raise Refused(f"its {module.name} {prefix!r} has no parameters and modules")
        for name, child in islice(children.items(), _MAX_MODULES):
            if not isinstance(child, Module):
                raise Refused(f"its {clip(prefix + str(name))!r} is {describe(child)}; allowed: a module")
            waiting.append((f"{prefix}{clip(str(name))}.", child))
        for name, view in islice(tensors.items(), _MAX_TENSORS + 1):
            if not isinstance(view, Strided):
                raise Refused(f"its {clip(prefix + str(name))!r} is {describe(view)}; allowed: a tensor")
            views[f"{prefix}{clip(str(name))}"] = view
            if len(views) > _MAX_TENSORS:
                raise Refused(f"it has over {_MAX_TENSORS} tensors")
    if not views:
        raise Refused("it holds no weights")
    return views


def _declared(views: dict[str, Strided], num_bytes: int) -> dict[str, Storage]:
    """The storages behind weights, by key; together they fit into the file."""
    storages: dict[str, Storage] = {}
    for view in views.values():
        known = storages.setdefault(view.storage.key, view.storage)
        if (known.dtype, known.numel) != (view.storage.dtype, view.storage.numel):
            raise Refused(f"its storage {clip(known.key)!r} is declared twice, differently")
    total = sum(map(_num_bytes, storages.values()))
    tensors = sum(math.prod(view.size) * view.storage.dtype.itemsize for view in views.values())
    if max(total, tensors) > num_bytes:
        raise Refused(
            f"its weights would take {clip(str(max(total, tensors)))} bytes, the file has {num_bytes}; download it again"
        )
    return storages


def _num_bytes(storage: Storage) -> int:
    return storage.numel * storage.dtype.itemsize


def _numbers(storage: Storage, raw: bytes) -> Tensor:
    """The storage as a flat tensor."""
    if len(raw) != _num_bytes(storage):
        raise Refused(
            f"its storage {clip(storage.key)!r} has {len(raw)} bytes, its pickle says {_num_bytes(storage)}; "
            "download it again"
        )
    return torch.frombuffer(bytearray(raw), dtype=storage.dtype)


def _materialise(views: dict[str, Strided], data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: data[view.storage.key]
        .as_strided(view.size, view.stride, view.offset)
        .clone(memory_format=torch.contiguous_format)
        for name, view in views.items()
    }

"""A pickle stepped through without running it: what comes out are shells of modules and views of storages.

A pickle is a program, and unpickling it calls whatever it names. `Machine` knows the instructions and a few names; to it
each is a word, not an object that could be called.

Source: the instructions are described by the standard library's `pickletools`; names from the package DALL-E 0.1.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

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


class Refused(Exception):
    """Why a file is refused; `read_published` puts the file's name before it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Name:
    """A global that the pickle names: a word of `_KNOWN`, never the object."""

    name: str


@dataclass(slots=True, eq=False)
class Module:
    """What a module left in the pickle: the name of its class, and its attributes once they came."""

    name: str
    state: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class Strided:
    """A tensor that was declared: a view of a storage that has not been read."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    """What MARK leaves on the stack."""


_MARK = _Mark()
_INERT = _Name("a device or a set")  # stands for devices, sets and source files, which nothing reads


class Machine:
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
                    raise Refused(
                        f"its pickle has the instruction {instruction.name}{_quote(argument)}, which torch.save does not write"
                    )
                step(self, argument)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise Refused(f"its pickle is damaged ({type(error).__name__}: {clip(str(error))})") from error
        raise Refused("its pickle has no end")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        above: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            above.append(value)
        return above[::-1]

    def pop_tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise Refused("its pickle takes more from the stack than there is")
        at = len(self.stack) - length
        self.stack[at:] = [tuple(self.stack[at:])]

    def name(self, module_and_name: str) -> None:
        """GLOBAL: its argument is "module name"."""
        name = module_and_name.replace(" ", ".")
        if name not in _KNOWN:
            raise Refused(f"its pickle names {clip(name)!r}, which no dVAE needs; a pickle that does can run code")
        self.push(_Name(name))

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise Refused("its pickle makes a name of something that is no text")
        self.name(f"{module} {name}")

    def call(self) -> None:
        """REDUCE: of a known name and its arguments, the inert value that stands for the result."""
        arguments, builder = self.stack.pop(), self.stack.pop()
        if not isinstance(builder, _Name) or builder.name not in _BUILDERS or not isinstance(arguments, tuple):
            raise Refused(f"its pickle calls {describe(builder)}; allowed: {', '.join(sorted(_BUILDERS))}")
        match builder.name.rpartition(".")[2], arguments:
            case "OrderedDict", ():
                self.push({})
            case "_rebuild_tensor_v2", (Storage() as storage, offset, size, stride, *_):
                self.push(_view(storage, offset, size, stride))
            case "_rebuild_parameter", (Strided() as tensor, *_):
                self.push(tensor)
            case (("device" | "set"), _):
                self.push(_INERT)
            case _:
                raise Refused(f"its pickle calls {builder.name} with arguments that torch.save does not write")

    def make(self) -> None:
        """NEWOBJ: an empty module of a known class."""
        arguments, made = self.stack.pop(), self.stack.pop()
        if not isinstance(made, _Name) or made.name not in _MODULES or arguments != ():
            raise Refused(f"its pickle makes {describe(made)}; allowed: modules of the dVAE, without arguments")
        self.push(Module(made.name, {}))

    def build(self) -> None:
        """BUILD: the attributes of a module; those of a dict (metadata of a state dict) are dropped."""
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Module | dict) or not isinstance(state, dict):
            raise Refused(f"its pickle sets attributes of {describe(target)}; allowed: modules")
        if isinstance(target, Module):
            target.state = state

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise Refused(f"its pickle sets items of {describe(target)}; allowed: dicts")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):  # the hash of a nested tuple can take for ever
                raise Refused(f"its pickle has a dict with the key {describe(key)}; allowed: text and numbers")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise Refused(f"its pickle appends to {describe(target)}; allowed: lists")
        target.extend(values)

    def storage(self) -> None:
        """BINPERSID: what torch.save wrote outside the pickle."""
        match self.stack.pop():
            case "storage", _Name(name), str(key), str(), int(numel), *_ if name in _STORAGES and numel >= 0:
                self.push(Storage(_STORAGES[name], key, numel))
            case "module", _Name() as made, str() | None, str() | None:  # legacy: the class beside its source text
                self.push(made)
            case _:
                raise Refused(
                    f"its pickle refers to something that is no storage; allowed: storages of {', '.join(_STORAGES)}"
                )


_STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": lambda m, _: m.push(_MARK),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), Machine.push
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
    "GLOBAL": Machine.name,
    "STACK_GLOBAL": lambda m, _: m.stack_name(),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.make(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.storage(),
}


def _view(storage: Storage, offset: Any, size: Any, stride: Any) -> Strided:
    """The declared tensor, checked to lie within its storage and to be no larger than that."""
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 8):
        raise Refused("its pickle declares a tensor without a shape")
    # No count of a whole tensor, its strides among them, is above its storage's length; the end is checked below.
    if not all(isinstance(n, int) and 0 <= n <= storage.numel for n in (offset, *size, *stride)):
        raise Refused("its pickle declares a tensor with a shape that does not fit its storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not 1 <= math.prod(size) <= storage.numel or last >= storage.numel:
        raise Refused(
            f"its pickle declares a tensor that is empty or reaches outside its storage of {storage.numel} numbers"
        )
    return Strided(storage, offset, size, stride)


def clip(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "..."


def _quote(argument: Any) -> str:
    return f" {clip(argument)!r}" if isinstance(argument, str) else ""


def describe(value: Any) -> str:
    return value.name if isinstance(value, _Name | Module) else f"something of type {type(value).__name__.strip('_')}"


def some_of(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"

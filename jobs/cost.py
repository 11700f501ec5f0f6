"""Speeds of CPUs and GPUs as they were measured, kept in a file that `tokenreel plan --speeds` predicts from.

The file is JSON, `Measured.to_json`; `tokenreel bench decode --save` and `bench tokenize --save` write into it, each on the
machines that it speaks of. It needs the standard library alone, so a bare GPU machine can add its figures.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ConfigError
from pipeline.files import write_atomic

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSpeed:
    """Of one CPU, while all others decode too, for videos of one resolution at any output size and rate.

    short_side_px: of the video. frames_per_s: frames of the video, not of the output, for a decoder goes through all of them.
    """

    short_side_px: int
    frames_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeSpeed:
    """Of one GPU, or of `num_threads` CPUs.

    tokenizer: `repr` of its config, which says kind and size. size_px: side of the frames. num_threads: of no meaning for a GPU.
    """

    tokenizer: str
    size_px: int
    precision: str
    frames_per_s: float
    num_threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Speeds by device: the name of a GPU, or of a CPU (`cpu_name`).

    start_s: by CPU, what a clip costs before its first frame is decoded; most of it is the start of ffmpeg.
    """

    decode: dict[str, list[DecodeSpeed]] = field(default_factory=dict)
    encode: dict[str, list[EncodeSpeed]] = field(default_factory=dict)
    start_s: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def load(cls, path: Path) -> Measured:
        """What stands in a file; nothing where there is none.

        Raises:
            ConfigError: another kind of file.
        """
        try:
            plain = json.loads(path.read_text())
            return cls(
                decode={name: [DecodeSpeed(**one) for one in rows] for name, rows in plain["decode"].items()},
                encode={name: [EncodeSpeed(**one) for one in rows] for name, rows in plain["encode"].items()},
                start_s=dict(plain["start_s"]),
            )
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} holds no measured speeds: {error}; name a new file, or one that bench wrote"
            ) from error

    def merged(self, newer: Measured) -> Measured:
        """These speeds and `newer` ones, which take the place of those of the same device, resolution and tokenizer."""
        return Measured(
            decode=_merge(self.decode, newer.decode, lambda one: one.short_side_px),
            encode=_merge(self.encode, newer.encode, lambda one: (one.tokenizer, one.size_px, one.precision)),
            start_s={**self.start_s, **newer.start_s},
        )


def _merge(
    old: Mapping[str, Sequence[T]], new: Mapping[str, Sequence[T]], key: Callable[[T], Any]
) -> dict[str, list[T]]:
    merged = {}
    for name in sorted({*old, *new}):
        rows = {key(one): one for one in (*old.get(name, ()), *new.get(name, ()))}
        merged[name] = [rows[place] for place in sorted(rows)]
    return merged


def save(path: Path, newer: Measured) -> None:
    """Merge `newer` into the file at `path`."""
    text = Measured.load(path).merged(newer).to_json()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())


def cpu_name() -> str:
    """The CPU's model as Linux names it; "CPU" where it names none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "") or "CPU"


def encode_frame_s(measured: Measured, device: str, *, tokenizer: str, precision: str, size_px: int) -> float:
    """Seconds that one `device` encodes a frame in.

    They grow linearly with its pixels, that is with the square of the side, between two measured sizes; beyond the smallest or
    largest they are in proportion to the pixels.

    Args:
        tokenizer, precision: as in `EncodeSpeed`.

    Raises:
        ConfigError: nothing was measured for the device and the tokenizer; says what, and by which command.
    """
    seconds = {
        one.size_px: 1 / one.frames_per_s
        for one in measured.encode.get(device, [])
        if (one.tokenizer, one.precision) == (tokenizer, precision)
    }
    if not seconds:
        raise ConfigError(
            f"no encoding speed of {tokenizer} in {precision} on {device!r}, only on {sorted(measured.encode)}; run "
            "`tokenreel bench tokenize --tokenizer TOKENIZER --save FILE` on such a machine, and give the file as --speeds"
        )
    return _seconds_a_frame(seconds, size_px)


def cpu_slowness(measured: Measured, cpu: str, reference: str) -> float:
    """How many times as long `cpu` takes as `reference`: the median over what was measured on both, the start of a clip and
    decoding at each resolution.

    Raises:
        ConfigError: nothing was measured on both.
    """
    if cpu == reference:
        return 1.0
    times = [_times(measured, name) for name in (cpu, reference)]
    if not (both := times[0].keys() & times[1].keys()):
        raise ConfigError(
            f"no decoding speed of both {cpu!r} and {reference!r}, only of {sorted(measured.decode)}; run "
            "`tokenreel bench decode --save FILE` on such machines, with the same --lines, and give the file as --speeds"
        )
    return statistics.median(times[0][name] / times[1][name] for name in both)


def _times(measured: Measured, cpu: str) -> dict[int, float]:
    """Seconds a frame by its shorter side; under 0 those of a start."""
    times = {one.short_side_px: 1 / one.frames_per_s for one in measured.decode.get(cpu, [])}
    return {**times, 0: measured.start_s[cpu]} if cpu in measured.start_s else times


def _seconds_a_frame(measured: Mapping[int, float], side_px: int) -> float:
    """Of a frame of `side_px`, from seconds by side; see `encode_frame_s` for the rules."""
    sides = sorted(measured)
    if not sides[0] < side_px < sides[-1]:
        nearest = sides[0] if side_px <= sides[0] else sides[-1]
        return measured[nearest] * (side_px / nearest) ** 2
    upper = next(place for place, side in enumerate(sides) if side >= side_px)
    low, high = sides[upper - 1], sides[upper]
    share = (side_px**2 - low**2) / (high**2 - low**2)
    return measured[low] + share * (measured[high] - measured[low])

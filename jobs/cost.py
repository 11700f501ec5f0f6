"""What tokenizing a corpus will take: measured speeds, kept in a file, and a prediction from them.

The file is JSON, `Measured.to_json`; `tokenreel bench decode --save` and `bench tokenize --save` write into it, each on the
machines that it speaks of. It needs the standard library alone, so a bare GPU machine can add its figures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ConfigError

T = TypeVar("T")
SAMPLE_BYTES = 2300
"""Of a token sample beside its codes: tar headers, padding, KEY.json and its index row (2,250 on the demo's clips)."""


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
    """Merge `newer` into the file at `path`, by rename."""
    text = Measured.load(path).merged(newer).to_json()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def cpu_name() -> str:
    """The CPU's model as Linux names it; "CPU" where it names none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "") or "CPU"


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Totals of the clips to tokenize. source_frames: frames at the clips' own rates, by the shorter side in pixels."""

    clips: int
    seconds: float
    source_frames: Mapping[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Where it will run: CPUs by `cpu_name`, and encoders: GPUs by their name, or none, where the CPUs encode too."""

    cpu: str
    num_cpus: int
    gpu: str = ""
    num_gpus: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """decode_cpu_hours: of one CPU; encode_device_hours: of one GPU, or of one CPU without any. tokenize_hours: of wall-clock
    time on the cluster. bytes: of the token dataset."""

    frames: int
    tokens: int
    decode_cpu_hours: float
    encode_device_hours: float
    tokenize_hours: float
    bytes: int


def predict(
    corpus: Corpus,
    measured: Measured,
    cluster: Cluster,
    *,
    fps: float,
    sizes_px: Sequence[int],
    patch: int,
    tokenizer: str,
    precision: str = "fp32",
) -> Prediction:
    """Hours and bytes of tokenizing `corpus` at `fps` in views of `sizes_px`.

    Seconds a frame grow linearly with its pixels, that is with the square of the side, between two measured sizes; beyond
    the smallest or largest they are in proportion to the pixels. GPUs encode while CPUs decode, so the slower of the two counts;
    without GPUs the CPUs share their time. Ray's start (10 to 20 s), a network slower than the decoders and stages other than
    tokenize are not in it; videos of a codec harder than those measured take longer.

    Args:
        sizes_px: side of the crop of each view of a clip: (128,) for one view, (128, 128) with mirrored frames.
        patch: pixels along a side of the square that a token stands for.
        tokenizer, precision: as in `EncodeSpeed`.

    Raises:
        ConfigError: nothing was measured for the CPU, the GPU or the tokenizer; says what, and by which command.
    """
    decoding = {one.short_side_px: 1 / one.frames_per_s for one in measured.decode.get(cluster.cpu, [])}
    if not decoding:
        raise ConfigError(
            f"predict: no decoding speed of {cluster.cpu!r}, only of {sorted(measured.decode)}; "
            "run `tokenreel bench decode --save FILE` on such a machine"
        )
    device = cluster.gpu if cluster.num_gpus else cluster.cpu
    encoding = {
        one.size_px: (1 if cluster.num_gpus else one.num_threads) / one.frames_per_s
        for one in measured.encode.get(device, [])
        if (one.tokenizer, one.precision) == (tokenizer, precision)
    }
    if not encoding:
        raise ConfigError(
            f"predict: no encoding speed of {tokenizer} in {precision} on {device!r}; "
            "run `tokenreel bench tokenize TOKENIZER --save FILE` on such a machine"
        )
    frames = round(corpus.seconds * fps)
    tokens = sum(frames * (size_px // patch) ** 2 for size_px in sizes_px)
    decode_s = corpus.clips * measured.start_s.get(cluster.cpu, 0.0)
    decode_s += sum(count * _seconds_a_frame(decoding, side) for side, count in corpus.source_frames.items())
    encode_s = sum(frames * _seconds_a_frame(encoding, size_px) for size_px in sizes_px)
    if cluster.num_gpus:
        tokenize_s = max(decode_s / cluster.num_cpus, encode_s / cluster.num_gpus)
    else:
        tokenize_s = (decode_s + encode_s) / cluster.num_cpus
    return Prediction(
        frames=frames * len(sizes_px),
        tokens=tokens,
        decode_cpu_hours=decode_s / 3600,
        encode_device_hours=encode_s / 3600,
        tokenize_hours=tokenize_s / 3600,
        bytes=2 * tokens + SAMPLE_BYTES * corpus.clips * len(sizes_px),
    )


def _seconds_a_frame(measured: Mapping[int, float], side_px: int) -> float:
    """Of a frame of `side_px`, from seconds by side; see `predict` for the rules."""
    sides = sorted(measured)
    if not sides[0] < side_px < sides[-1]:
        nearest = sides[0] if side_px <= sides[0] else sides[-1]
        return measured[nearest] * (side_px / nearest) ** 2
    upper = next(place for place, side in enumerate(sides) if side >= side_px)
    low, high = sides[upper - 1], sides[upper]
    share = (side_px**2 - low**2) / (high**2 - low**2)
    return measured[low] + share * (measured[high] - measured[low])

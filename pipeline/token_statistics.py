"""How codes are used: counts that add up over clips, shards and sources, from tokens alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.errors import DatasetError
from pipeline.storage import Store
from pipeline.untrusted import open_member

REST = "(the rest)"
"""Name of all sources beyond the largest."""
_CHUNK = 2**18  # tokens counted at a time: the copy that counting makes stays in the CPU's cache


@dataclass(kw_only=True, slots=True)
class TokenStatistics:
    """Counts of some tokens, which grow in place.

    uses: (k,) int64, how often each code stands there.
    num_clips, num_frames: what the tokens are of.
    num_pairs: tokens that have one before them at the same place of their clip, and num_same, those that equal it.
    """

    uses: np.ndarray
    num_clips: int = 0
    num_frames: int = 0
    num_pairs: int = 0
    num_same: int = 0

    @classmethod
    def empty(cls, codebook_size: int) -> TokenStatistics:
        """Of no tokens."""
        return cls(uses=np.zeros(codebook_size, np.int64))

    def add_clip(self, codes: np.ndarray) -> float:
        """Count a clip, whole or not at all, and return its static share (NaN for one frame).

        Args:
            codes: (t h w) of an unsigned integer dtype, each below the codebook's size.

        Raises:
            ValueError: a code is not in the codebook.
        """
        self.uses += _count(codes.reshape(-1), len(self.uses))
        num_pairs, num_same = codes[1:].size, int(np.count_nonzero(codes[1:] == codes[:-1]))
        self.num_clips, self.num_frames = self.num_clips + 1, self.num_frames + len(codes)
        self.num_pairs, self.num_same = self.num_pairs + num_pairs, self.num_same + num_same
        return num_same / num_pairs if num_pairs else float("nan")

    def __add__(self, other: TokenStatistics) -> TokenStatistics:
        """The counts of both."""
        return TokenStatistics(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    @property
    def num_tokens(self) -> int:
        return int(self.uses.sum())

    @property
    def entropy_bits(self) -> float:
        """Bits a token that a code for single tokens needs at least: the entropy of code use, 0 to log2(k)."""
        share = self.uses[self.uses > 0] / max(1, self.num_tokens)
        return float(-np.sum(share * np.log2(share))) + 0.0  # no -0.0 for a single code

    @property
    def perplexity(self) -> float:
        """2 to the entropy: as many codes, used evenly, would be as hard to guess. 1 to k."""
        return float(2.0**self.entropy_bits)

    @property
    def used_share(self) -> float:
        """Share of the k codes that occur."""
        return float(np.count_nonzero(self.uses) / len(self.uses))

    @property
    def static_share(self) -> float:
        """Share of tokens that equal the one before them at the same place; NaN where no clip has two frames."""
        return self.num_same / self.num_pairs if self.num_pairs else float("nan")

    def summary(self) -> dict[str, float | int]:
        """The figures, rounded, as plain JSON."""
        return {
            "clips": self.num_clips,
            "frames": self.num_frames,
            "tokens": self.num_tokens,
            "perplexity": round(self.perplexity, 2),
            "entropy_bits": round(self.entropy_bits, 4),
            "codes_used": int(np.count_nonzero(self.uses)),
            "codes_used_share": round(self.used_share, 6),
            "static_share": round(self.static_share, 6),
        }


class Scan(NamedTuple):
    """What reading some shards of a token dataset found.

    by_source: the largest sources in the order of their size, then REST where there are more.
    rows: places in the index of the clips that were read; static_share: (len(rows),) of each, NaN for one frame.
    """

    total: TokenStatistics
    by_source: dict[str, TokenStatistics]
    rows: np.ndarray
    static_share: np.ndarray


def source_group(source: str) -> str:
    """The folder of a source file, or the file itself where it lies in none."""
    folder = source.rpartition("/")[0]
    return f"{folder}/" if folder else source


def sample_shards(index: pa.Table, max_tokens: int, seed: int = 0) -> list[int]:
    """Shards that hold `max_tokens` tokens between them, drawn at random, at least one; all where that is no more.

    Args:
        index: of a token dataset, with the columns `shard` and `size`.
    """
    shards, places = np.unique(index["shard"].to_numpy(), return_inverse=True)
    tokens = np.bincount(places, weights=index["size"].to_numpy()) / 2
    order = np.random.default_rng(seed).permutation(len(shards))
    # One more than fit, so that a dataset of one large shard has one.
    fitting = int(np.searchsorted(np.cumsum(tokens[order]), max_tokens)) + 1
    return sorted(int(shard) for shard in shards[order[:fitting]])


def scan_tokens(store: Store, index: pa.Table, codebook_size: int, *, shards: list[int], num_sources: int = 20) -> Scan:
    """Statistics of all clips in `shards`, in one pass: each clip is read once, nothing else is.

    Memory is that of one clip and of `num_sources` histograms, however large the dataset.

    Args:
        index: of the whole dataset: shard, tar, source, offset, size, num_frames, height, width.
        num_sources: sources (see `source_group`) that are counted on their own: those with the most frames in the index.

    Raises:
        DatasetError: a shard is shorter than its index says, or holds codes beyond the codebook.
    """
    groups = [source_group(source) for source in index["source"].to_pylist()]
    frames: Counter[str] = Counter()
    for group, num_frames in zip(groups, index["num_frames"].to_pylist(), strict=True):
        frames[group] += num_frames
    named = [group for group, _ in sorted(frames.items(), key=lambda item: (-item[1], item[0]))[:num_sources]]
    counted = {group: TokenStatistics.empty(codebook_size) for group in [*named, REST]}
    shard_of = index["shard"].to_numpy()
    offsets, sizes = index["offset"].to_numpy(), index["size"].to_numpy()
    shapes = np.stack([index[name].to_numpy() for name in ("num_frames", "height", "width")], axis=1)
    found: list[int] = []
    static: list[float] = []
    tar_of = index["tar"].to_numpy()
    tars = [tar for shard in shards for tar in np.unique(tar_of[shard_of == shard])]
    for tar in tars:
        places = np.flatnonzero(tar_of == tar)
        with open_member(store, tar) as file:
            for place in places[np.argsort(offsets[places])].tolist():
                file.seek(offsets[place])
                data = file.read(sizes[place])
                try:
                    codes = np.frombuffer(data, np.uint16).reshape(shapes[place])
                    static.append(counted.get(groups[place], counted[REST]).add_clip(codes))
                except ValueError as error:
                    raise DatasetError(
                        f"{store.where(tar)}: the tokens at byte {offsets[place]} are not what the index says: "
                        f"{error}; run `tokenreel verify {store}`"
                    ) from error
                found.append(place)
    total = sum(counted.values(), TokenStatistics.empty(codebook_size))
    by_source = {group: counts for group, counts in counted.items() if counts.num_clips}
    return Scan(total, by_source, np.array(found, np.int64), np.array(static))


def _count(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """(k,) how often each code stands in the flat `codes`."""
    uses = np.zeros(codebook_size, np.int64)
    for start in range(0, len(codes), _CHUNK):
        counts = np.bincount(codes[start : start + _CHUNK], minlength=codebook_size)
        if len(counts) > codebook_size:
            raise ValueError(f"code {len(counts) - 1} of a codebook of {codebook_size}")
        uses += counts
    return uses

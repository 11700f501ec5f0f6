"""Tokens against their clips: some samples are decoded and encoded again, and must have the codes that are stored.

Hashes only say that a shard is as it was committed. This finds what was wrong before: codes of another clip, of another
frame, of another picture.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.encoding import Encode, Piece, encode_pieces
from pipeline.errors import DatasetError, TransientIO
from pipeline.schema import Reject
from pipeline.shards import read_payload, read_shard_info, read_shard_rows
from pipeline.storage import Store
from pipeline.tokenizing import TokenizeSettings, decode_clip
from pipeline.verify import Problem

_SAME = ("video_id", "source", "start_s", "end_s", "caption", "label", "split", "extra")
"""Columns that a sample has from its clip."""
_MAX_SHIFT_FRAMES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Audited:
    """One sample beside its clip. Without codes to compare, both counts are 0 and `problem` says why; where their shape is
    another than the clip's, all of them differ."""

    codes_compared: int = 0
    codes_different: int = 0
    problem: Problem | None = None


def draw_samples(tokens: Store, shards: Sequence[int], share: float, seed: int) -> dict[int, list[int]]:
    """A random `share` of the samples in `shards`, as places in the index of each; the same for the same seed.

    At least one sample where `share` is more than 0 and there is any; the number is otherwise rounded.
    """
    infos = [read_shard_info(tokens, shard) for shard in shards]
    ends = np.cumsum([0 if info is None else info.ledger.committed for info in infos])
    total = int(ends[-1]) if len(ends) else 0
    number = min(total, max(1, round(share * total))) if share > 0 else 0
    drawn: dict[int, list[int]] = {}
    for sample in np.sort(np.random.default_rng(seed).choice(total, number, replace=False)) if number else ():
        place = int(np.searchsorted(ends, sample, side="right"))
        drawn.setdefault(shards[place], []).append(int(sample - (ends[place - 1] if place else 0)))
    return drawn


def audit(
    tokens: Store,
    clips: Store,
    drawn: Mapping[int, Sequence[int]],
    settings: TokenizeSettings,
    encode: Encode,
    tolerance: float = 0.0,
) -> Iterator[Audited]:
    """Decode and encode the samples `drawn` again, and compare; one result each, in no particular order.

    Frames of many samples share a batch, always of the size that made the tokens. Memory: a clip and a batch.

    Args:
        drawn: shard to places in its index, see `draw_samples`; shards that `verify` finds sound.
        clips: the dataset that `tokens` was made from.
        settings: those that `tokens` was made with.
        tolerance: share of the codes of a sample that may differ.

    Raises:
        TransientIO: the storage of the clips failed, which says nothing about the tokens.
    """
    failed: list[Audited] = []
    encoding: deque[dict[str, Any]] = deque()

    def frames_of_good_clips() -> Iterator[Piece]:
        for shard, places in drawn.items():
            rows = read_shard_rows(tokens, shard)
            parents = _rows_by_key(clips, shard)
            for row in (rows[place] for place in places):
                outcome = _decode(tokens, row, clips, parents, settings)
                if isinstance(outcome, Problem):
                    failed.append(Audited(problem=outcome))
                else:
                    encoding.append(row)
                    yield Piece([outcome], True)

    for encoded in encode_pieces(frames_of_good_clips(), encode, settings.batch_frames):
        assert not isinstance(encoded, Reject)
        yield _compare(tokens, encoding.popleft(), encoded[0], tolerance)
    yield from failed


def _rows_by_key(clips: Store, shard: int) -> dict[str, dict[str, Any]] | None:
    try:
        return {row["key"]: row for row in read_shard_rows(clips, shard)}
    except (FileNotFoundError, DatasetError):
        return None


def _decode(
    tokens: Store,
    row: dict[str, Any],
    clips: Store,
    parents: Mapping[str, dict[str, Any]] | None,
    settings: TokenizeSettings,
) -> np.ndarray | Problem:
    """The frames of a sample's clip, or why there is nothing to compare it with."""
    sample = _name(tokens, row)
    if parents is None:
        return Problem(f"{sample}: its clip is gone, the index of its shard in {clips} cannot be read")
    clip = parents.get(row["clip_key"])
    if clip is None:
        return Problem(f"{sample}: {clips} has no such clip in that shard", row["shard"])
    if clip["sha256"] != row["clip_sha256"]:
        return Problem(
            f"{sample}: made from a clip with SHA-256 {row['clip_sha256']}, but clip {row['clip_key']} of {clips} has "
            f"{clip['sha256']}: another clip's tokens",
            row["shard"],
        )
    if other := [f"{name} = {row[name]!r} ({clip[name]!r})" for name in _SAME if row[name] != clip[name]]:
        return Problem(f"{sample}: not what its clip says: {', '.join(other)}", row["shard"])
    view = settings.view(row["view"])
    if view is None or view.key(row["clip_key"]) != row["key"]:
        return Problem(
            f"{sample}: view {row['view']!r} of clip {row['clip_key']} is not a sample of this name", row["shard"]
        )
    outcome = decode_clip(clips, clip, settings, view)
    if isinstance(outcome, np.ndarray):
        return outcome
    assert isinstance(outcome, Reject)
    if outcome.outcome == "filtered":
        return Problem(f"{sample}: its clip has no place in this dataset: {outcome.reason}", row["shard"])
    if outcome.reject_class == "storage":
        raise TransientIO(outcome.reason)
    # The clip is at fault, or this machine: making the tokens again would only lose them.
    return Problem(f"{sample}: its clip cannot be decoded again: {outcome.reject_class}: {outcome.reason}")


def _compare(tokens: Store, row: dict[str, Any], fresh: np.ndarray, tolerance: float) -> Audited:
    stored = np.frombuffer(read_payload(tokens, row), "<u2").reshape(row["num_frames"], row["height"], row["width"])
    is_alike = stored.shape == fresh.shape
    differs = stored != fresh if is_alike else np.ones(stored.shape, bool)
    count, problem = int(differs.sum()), None
    if not is_alike or count > tolerance * stored.size:
        if is_alike:
            first = int(np.flatnonzero(differs.any(axis=(1, 2)))[0])
            what = f"{count / stored.size:.2%} of {stored.size} codes differ, first in frame {first} of {len(stored)}"
        else:
            what = f"{_shape(stored)}; its clip gives {_shape(fresh)}"
        shift = _explain_shift(stored, fresh, tolerance)
        problem = Problem(f"{_name(tokens, row)}: not its clip's tokens: {what}{shift}", row["shard"])
    return Audited(codes_compared=stored.size, codes_different=count, problem=problem)


def _explain_shift(stored: np.ndarray, fresh: np.ndarray, tolerance: float) -> str:
    """What to say where at least half of the frames hold the codes of the frame some places on or back; "" else."""
    if stored.shape[1:] != fresh.shape[1:]:
        return ""
    length = min(len(stored), len(fresh))
    for distance in range(1, min(_MAX_SHIFT_FRAMES, length // 2) + 1):
        for shift in (distance, -distance):
            ours, theirs = stored[max(0, -shift) :], fresh[max(0, shift) :]
            overlap = min(len(ours), len(theirs))
            if (ours[:overlap] != theirs[:overlap]).mean() <= tolerance:
                return f"; shifted: its frame t holds the codes of frame t {'+' if shift > 0 else '-'} {distance}"
    return ""


def _shape(codes: np.ndarray) -> str:
    return f"{len(codes)} frames of {codes.shape[1]}x{codes.shape[2]} codes"


def _name(tokens: Store, row: dict[str, Any]) -> str:
    return f"{tokens.where(row['tar'])}: sample {row['key']} of {row['source']}"

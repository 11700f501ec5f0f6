"""The global order: a function of (seed, epoch, fingerprint), cut into steps and ranks that lose and repeat nothing."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import GlobalOrder, draw_seeds, hash_keys

shard_lists = st.lists(st.integers(0, 9), min_size=1, max_size=80).map(lambda shards: np.array(sorted(shards)))


def make_order(shards: np.ndarray, seed: int = 0, fingerprint: str = "f", shards_per_block: int = 4) -> GlobalOrder:
    return GlobalOrder(shards, seed, fingerprint, shards_per_block)


@settings(deadline=None)
@given(shards=shard_lists, batch=st.integers(1, 40).map(lambda n: 4 * n), world=st.sampled_from([1, 2, 4]))
def test_ranks_partition_every_batch(shards: np.ndarray, batch: int, world: int) -> None:
    """The union of all ranks is the single worker's batch, in order; batches may span epochs."""
    single = make_order(shards)
    ranks = [make_order(shards) for _ in range(world)]
    share = batch // world
    for step in range(4):
        start = step * batch
        expected = np.stack(single.samples(start, start + batch))
        parts = [np.stack(o.samples(start + r * share, start + (r + 1) * share)) for r, o in enumerate(ranks)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


@settings(deadline=None)
@given(shards=shard_lists, per_block=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_each_epoch_is_a_permutation(shards: np.ndarray, per_block: int, seed: int) -> None:
    order = make_order(shards, seed, shards_per_block=per_block)
    n = len(order)
    for epoch in range(3):
        epochs, samples = order.samples(epoch * n, (epoch + 1) * n)
        assert set(epochs) == {epoch}
        assert sorted(samples) == list(range(n))


@settings(deadline=None)
@given(shards=shard_lists, per_block=st.integers(1, 12))
def test_blocks_hold_few_shards(shards: np.ndarray, per_block: int) -> None:
    """Samples of a shard stand within one block, and a block has at most `shards_per_block` shards."""
    order = make_order(shards, shards_per_block=per_block)
    sequence = shards[order.samples(0, len(order))[1]]
    seen: list[set[int]] = [set()]
    remaining = {shard: int((shards == shard).sum()) for shard in set(shards.tolist())}
    for shard in sequence.tolist():
        if not any(remaining[s] for s in seen[-1]):
            seen.append(set())
        seen[-1].add(shard)
        remaining[shard] -= 1
    assert all(len(block) <= per_block for block in seen)


@settings(deadline=None)
@given(shards=shard_lists, start=st.integers(0, 500), length=st.integers(0, 100))
def test_resume_needs_no_past(shards: np.ndarray, start: int, length: int) -> None:
    used = make_order(shards)
    for position in range(0, start, 50):
        used.samples(position, position + 50)
    for before, after in zip(
        used.samples(start, start + length), make_order(shards).samples(start, start + length), strict=True
    ):
        np.testing.assert_array_equal(before, after)


@settings(deadline=None)
@given(shards=shard_lists, start=st.integers(0, 500), per_block=st.integers(1, 12), num_blocks=st.integers(1, 3))
def test_shards_ahead(shards: np.ndarray, start: int, per_block: int, num_blocks: int) -> None:
    """Block by block, the shards in the order in which the sequence comes to them."""
    order = make_order(shards, shards_per_block=per_block)
    ahead = order.shards_ahead(start, num_blocks)
    assert len(ahead) == num_blocks
    for block in ahead:
        stop = start
        while order.block_of(stop) == order.block_of(start):
            stop += 1
        assert block == list(dict.fromkeys(shards[order.samples(start, stop)[1]].tolist()))
        start = stop


def test_what_the_order_depends_on() -> None:
    shards = np.repeat(np.arange(10), 10)

    def sequence(epoch: int = 0, **changes: object) -> list[int]:
        return make_order(shards, **changes).samples(epoch * 100, epoch * 100 + 100)[1].tolist()  # type: ignore[arg-type]

    others = [sequence(epoch=1), sequence(seed=1), sequence(fingerprint="g"), sequence(shards_per_block=10)]
    assert sequence() == sequence()
    assert all(other != sequence() for other in others)
    assert sequence(seed=1, fingerprint="2") != sequence(seed=12, fingerprint="")


def test_the_order_is_fixed_for_good() -> None:
    """A resumed run may meet a newer numpy; if its generator changed, the order would, and this says so. Who changes the
    order on purpose raises ORDER_VERSION."""
    order = make_order(np.repeat(np.arange(3), 3), seed=7, fingerprint="abc", shards_per_block=2)
    np.testing.assert_array_equal(order.samples(0, 9)[1], [4, 5, 8, 6, 7, 3, 1, 2, 0])


@pytest.mark.parametrize(("epoch", "digest"), [(0, "a789e814322ba1e8"), (3, "ee2abd442fa2120d")])
def test_a_larger_order_is_fixed_for_good(epoch: int, digest: str) -> None:
    """Blocks of several shards of unequal sizes, numbers left out: what a run in progress has seen already."""
    shards = np.repeat([2, 3, 5, 8, 9, 11, 12], [40, 1, 77, 13, 60, 9, 100])
    samples = make_order(shards, seed=3, fingerprint="abc", shards_per_block=3).samples(epoch * 300, epoch * 300 + 300)
    assert hashlib.sha256(samples[1].astype("<i8").tobytes()).hexdigest()[:16] == digest


class TestSeeds:
    def test_fresh_for_every_seed_epoch_key_and_stream(self) -> None:
        hashes = hash_keys([f"key-{n}" for n in range(50)])
        seeds = [
            draw_seeds(seed, np.full(50, epoch), hashes, stream)
            for seed in (0, 1, 2**31)
            for epoch in range(5)
            for stream in range(4)
        ]
        assert len(np.unique(np.concatenate(seeds))) == 50 * 3 * 5 * 4

    def test_do_not_depend_on_the_company(self) -> None:
        hashes = hash_keys(["a", "b", "c"])
        together = draw_seeds(3, np.array([0, 1, 2]), hashes, 1)
        alone = [draw_seeds(3, np.array([n]), hashes[n : n + 1], 1)[0] for n in range(3)]
        assert together.dtype == np.uint64 and together.tolist() == alone

    def test_even(self) -> None:
        """As uniform as chance: 16 bins of 10 000 draws over consecutive epochs of one key."""
        draws = draw_seeds(0, np.arange(10_000), np.repeat(hash_keys(["a"]), 10_000), 0)
        for bits in (draws % np.uint64(16), draws >> np.uint64(60)):
            counts = np.bincount(bits.astype(int), minlength=16)
            assert ((counts - 625) ** 2 / 625).sum() < 45  # chi-squared, 15 degrees of freedom: 1 in 10 000

    def test_hash_keys(self) -> None:
        expected = int.from_bytes(hashlib.sha256(b"key").digest()[:8], "little")
        assert hash_keys(["key"]).tolist() == [expected]

    @pytest.mark.filterwarnings("error")
    def test_wrapping_is_silent(self) -> None:
        draw_seeds(2**63, np.array([2**40]), np.array([2**64 - 1], np.uint64), 1000)

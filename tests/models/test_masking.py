"""Masks: the paper's shares, and the guarantee that a mask depends on its seed and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.masking import block_masks, iid_masks, uniforms

SHARES = {  # % of positions: (frames, tokens a side) -> 4, 5, 6, 7, 8 blocks
    (5, 16): (11.9, 14.5, 17.0, 19.4, 21.7),
    (5, 32): (10.6, 13.1, 15.2, 17.5, 19.5),
    (10, 16): (10.4, 12.8, 15.0, 17.1, 19.2),
    (10, 32): (9.3, 11.4, 13.4, 15.4, 17.2),
}


def block_shares(shape: tuple[int, int, int], num_blocks: int, draws: int = 20_000) -> torch.Tensor:
    seeds = torch.arange(draws)
    return torch.cat([block_masks(part, shape, num_blocks).flatten(1).float().mean(1) for part in seeds.split(1000)])


@pytest.mark.parametrize("grid", SHARES)
def test_masked_shares_of_the_paper(grid: tuple[int, int]) -> None:
    found = [block_shares((grid[0], grid[1], grid[1]), blocks).mean().item() * 100 for blocks in range(4, 9)]
    assert found == pytest.approx(SHARES[grid], abs=0.2)


def test_spread_of_the_masked_share() -> None:
    shares = block_shares((5, 16, 16), 5) * 100
    low, high = np.percentile(shares.numpy(), [5, 95])
    assert (shares.std().item(), low, high) == pytest.approx((5.5, 6.3, 24.4), abs=0.2)


def test_uniforms_match_splitmix64_in_uint64() -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    counters = np.arange(1, 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = (mix(mix(seeds.numpy().view(np.uint64))[:, None] + counters) >> np.uint64(11)).astype(np.float64) / 2**53
    np.testing.assert_array_equal(uniforms(seeds, 7).numpy(), expected)


def test_uniforms_are_uniform_and_uncorrelated_between_neighbours() -> None:
    draws = uniforms(torch.arange(20_000), 4)
    assert draws.min() >= 0 and draws.max() < 1
    assert draws.mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.01)
    assert np.abs(np.corrcoef(draws.T.numpy()) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=40)
def test_a_mask_depends_on_its_own_seed_alone(seeds: list[int], num_blocks: int, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)))
    together = block_masks(torch.tensor(seeds), shape, num_blocks)
    alone = torch.cat([block_masks(torch.tensor([seed]), shape, num_blocks) for seed in seeds])
    assert torch.equal(together, alone)
    assert together.flatten(1).any(1).all()
    first = block_masks(torch.tensor(seeds), shape, 1)
    assert not (first & ~together).any()  # more blocks only add
    for mask in first:  # one block is a full box within the allowed size
        where = mask.nonzero()
        extent = where.max(0).values - where.min(0).values + 1
        assert len(where) == extent.prod()
        limits = (max(1, 2 * shape[0] // 3), max(1, shape[1] // 2), max(1, shape[2] // 2))
        assert all(size <= limit for size, limit in zip(extent.tolist(), limits, strict=True))


def test_iid_share() -> None:
    mask = iid_masks(torch.arange(500), (5, 16, 16), 0.145)
    assert mask.shape == (500, 5, 16, 16)
    assert mask.float().mean().item() == pytest.approx(0.145, abs=0.002)
    assert not iid_masks(torch.arange(3), (2, 2, 2), 0.0).any() and iid_masks(torch.arange(3), (2, 2, 2), 1.0).all()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"int32 of shape \(2,\); allowed: int64"):
        uniforms(torch.zeros(2, dtype=torch.int32), 1)
    with pytest.raises(ValueError, match=r"shape is \(0, 4, 4\)"):
        block_masks(torch.zeros(1, dtype=torch.int64), (0, 4, 4), 1)
    with pytest.raises(ValueError, match="num_blocks is 0"):
        block_masks(torch.zeros(1, dtype=torch.int64), (1, 4, 4), 0)
    with pytest.raises(ValueError, match=r"fraction is 1\.5"):
        iid_masks(torch.zeros(1, dtype=torch.int64), (1, 4, 4), 1.5)

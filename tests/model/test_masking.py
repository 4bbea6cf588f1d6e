"""Masks: equal to their loop-written twins, exact count, unbiased, clustered, keyed by position."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model.masking import THROWS, cluster_masks, dropped_count, masked_count, split_patches, ssast_masks
from tests.reference import masks as reference

GRIDS = st.tuples(st.integers(2, 9), st.integers(2, 20))
DROPS = ("random", "cluster", "time", "frequency")
SIDES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def masks(clips: int, count: int = 400, grid=(8, 64), sides=(3, 4, 5)) -> torch.Tensor:
    index = cluster_masks(0, "mask.spec", torch.arange(clips), grid, count, sides)
    return torch.zeros(clips, grid[0] * grid[1], dtype=torch.bool).scatter_(1, index, True)


@pytest.mark.parametrize(("count", "grid"), [(400, (8, 64)), (1, (8, 64)), (512, (8, 64)), (81, (8, 13)), (5, (2, 3))])
def test_exactly_k_patches(count, grid):
    assert (masks(20, count, grid).sum(dim=1) == count).all()


def test_every_patch_is_masked_equally_often():
    """4000 clips: the rate of each patch is binomial around K / N = .78125, deviation .0065."""
    rate = masks(4000).float().mean(dim=0)
    assert (rate - 400 / 512).abs().max() < 5 * 0.0065


def test_masks_are_clustered():
    """A masked patch's right neighbour is masked more often than an independent draw would have it."""
    chosen = masks(200, count=128).view(200, 8, 64)
    both = (chosen[:, :, 1:] & chosen[:, :, :-1]).float().mean()
    assert both > 2 * 0.25**2


def test_a_clips_mask_depends_on_its_position_alone():
    whole = cluster_masks(3, "mask.spec", torch.arange(12), (8, 64), 400, (3, 4, 5))
    part = cluster_masks(3, "mask.spec", torch.tensor([7, 2]), (8, 64), 400, (3, 4, 5))
    assert torch.equal(part, whole[[7, 2]])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, cluster_masks(4, "mask.spec", torch.arange(12), (8, 64), 400, (3, 4, 5)))
    assert not torch.equal(whole, cluster_masks(3, "mask.wav", torch.arange(12), (8, 64), 400, (3, 4, 5)))


def test_count_is_scaled_to_smaller_grids():
    assert masked_count(400, (8, 64)) == 400
    assert masked_count(400, (8, 13)) == round(400 * 104 / 512)


def test_impossible_count_is_refused():
    with pytest.raises(ValueError, match="513 masked patches, but 1 to 512 are possible"):
        masks(1, 513)


@given(grid=GRIDS, sides=SIDES, share=st.floats(0, 1), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_cluster_masks_equal_their_twin_and_count_exactly(grid, sides, share, seed):
    total = grid[0] * grid[1]
    count = max(1, round(share * total))
    found = cluster_masks(seed, "mask.spec", torch.tensor([3, 1]), grid, count, sides)
    assert found.shape == (2, count)
    assert found.tolist() == reference.clusters(seed, "mask.spec", [3, 1], grid, count, sides)


@given(grid=GRIDS, sides=SIDES, share=st.floats(0, 1), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_compatible_masks_equal_ssasts_loop(grid, sides, share, seed):
    count = max(1, round(share * (grid[0] * grid[1] - 2)))
    found = ssast_masks(seed, "mask.spec", torch.tensor([3, 1]), grid, count, sides)
    assert found.tolist() == reference.ssast(seed, "mask.spec", [3, 1], grid, count, sides, THROWS)


def test_compatible_masks_have_ssasts_biases():
    """The first and last patch are never masked; the rates of the 8 rows span .41 to .89."""
    index = ssast_masks(0, "mask.spec", torch.arange(1000), (8, 64), 400, (3, 4, 5))
    rate = torch.zeros(1000, 512).scatter_(1, index, 1.0).mean(dim=0)
    assert rate[0] == rate[511] == 0
    rows = rate.view(8, 64).mean(dim=1)
    assert 0.35 < rows.min() < 0.5
    assert rows.max() > 0.85


@given(grid=GRIDS, sides=SIDES, share=st.floats(0.1, 0.9))
@settings(max_examples=10, deadline=None)
def test_no_position_is_favoured(grid, sides, share):
    """1500 clips: each patch's rate lies within five binomial deviations of K / N."""
    total = grid[0] * grid[1]
    count = max(1, round(share * total))
    index = cluster_masks(7, "mask.spec", torch.arange(1500), grid, count, sides)
    rate = torch.zeros(1500, total).scatter_(1, index, 1.0).mean(dim=0)
    nominal = count / total
    assert (rate - nominal).abs().max() < 5 * (nominal * (1 - nominal) / 1500) ** 0.5 + 1e-6


def test_what_is_kept_is_rounded_down():
    """As in MAE and AudioMosaic, whose int(n (1 - ratio)) counts what stays; but not where floats fall short of it."""
    kept = {(kind, ratio): units - dropped for kind, ratio in (("time", 0.6), ("frequency", 0.4), ("random", 0.8))
            for units, dropped in [dropped_count(kind, ratio, (8, 64))]}  # fmt: skip
    assert kept == {("time", 0.6): 25, ("frequency", 0.4): 4, ("random", 0.8): 102}
    assert dropped_count("time", 0.8, (8, 10)) == (10, 8)  # 10 (1 - .8) is 1.9999999999999996


@given(grid=GRIDS, kind=st.sampled_from(DROPS), share=st.floats(0.05, 0.95), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_splits_equal_their_twin(grid, kind, share, seed):
    units, count = dropped_count(kind, share, grid)
    if not 0 < count < units:
        with pytest.raises(ValueError, match="masked patches, but 1 to"):
            split_patches(seed, "drop", torch.tensor([3, 1]), grid, kind, share, (1, 2))
        return
    found = split_patches(seed, "drop", torch.tensor([3, 1]), grid, kind, share, (1, 2))
    pairs = list(zip(found.visible.tolist(), found.masked.tolist(), strict=True))
    assert pairs == reference.split(seed, "drop", [3, 1], grid, kind, share, (1, 2))


@pytest.mark.parametrize("kind", DROPS)
def test_every_patch_is_dropped_equally_often(kind):
    """4000 clips: of 512 patches, 64 columns or 8 rows, the rate of each is binomial around the exact share."""
    units, count = dropped_count(kind, 0.6, (8, 64))
    masked = split_patches(0, "drop", torch.arange(4000), (8, 64), kind, 0.6, (3, 4, 5)).masked
    rate = torch.zeros(4000, 512).scatter_(1, masked, 1.0).mean(dim=0)
    assert (rate - count / units).abs().max() < 5 * (0.24 / 4000) ** 0.5


@pytest.mark.parametrize("kind", DROPS)
def test_a_clips_split_depends_on_its_position_alone(kind):
    whole = split_patches(3, "drop", torch.arange(12), (8, 64), kind, 0.8, (3, 4, 5))
    part = split_patches(3, "drop", torch.tensor([7, 2]), (8, 64), kind, 0.8, (3, 4, 5))
    for all_clips, two in zip(whole, part, strict=True):
        assert torch.equal(two, all_clips[[7, 2]])
    assert not torch.equal(whole.visible[0], whole.visible[1])

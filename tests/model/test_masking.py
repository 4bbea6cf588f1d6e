"""Masks: exact count, unbiased, clustered, keyed by position."""

import pytest
import torch

from pipeline.model.masking import cluster_masks, masked_count


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
    with pytest.raises(ValueError, match="513 masked patches of 512"):
        masks(1, 513)

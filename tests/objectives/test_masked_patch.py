"""Masked-patch losses against the equations written out, in value and gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model.embed import patchify
from pipeline.model.masking import gather_patches
from pipeline.objectives.masked_patch import masked_patch_loss, normalise_patches
from tests.reference import mspm

EXACT = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize("softmax", ["paper", "ssast"])
@given(clips=st.integers(1, 3), count=st.integers(1, 6), pixels=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_losses_and_gradients_equal_the_equations(softmax, clips, count, pixels, seed):
    generator = torch.Generator().manual_seed(seed)
    predicted, reconstructed, target = torch.randn(
        3, clips, count, pixels, generator=generator, dtype=torch.float64
    ).requires_grad_()
    loss = masked_patch_loss(predicted, reconstructed, target, softmax)
    nce, mse = mspm.info_nce(predicted, target.detach(), softmax), mspm.mse(reconstructed, target.detach())
    torch.testing.assert_close(loss.nce, nce, **EXACT)
    torch.testing.assert_close(loss.mse, mse, **EXACT)
    assert float(loss.accuracy) == pytest.approx(mspm.accuracy(predicted, target.detach(), softmax))
    fast = torch.autograd.grad(loss.nce + 10 * loss.mse, [predicted, reconstructed])
    slow = torch.autograd.grad(nce + 10 * mse, [predicted, reconstructed])
    torch.testing.assert_close(fast, slow, **EXACT)


def test_the_two_softmax_directions_differ():
    predicted, target = torch.randn(2, 1, 5, 4, generator=torch.Generator().manual_seed(1))
    paper, ssast = (masked_patch_loss(predicted, predicted, target, kind).nce for kind in ("paper", "ssast"))
    assert abs(paper - ssast) > 0.01


def test_two_passes_have_targets_of_their_own():
    predicted, reconstructed, target, second = torch.randn(4, 2, 5, 4, dtype=torch.float64).unbind()
    loss = masked_patch_loss(predicted, reconstructed, target, second=second)
    torch.testing.assert_close(loss.nce, mspm.info_nce(predicted, target, "paper"), **EXACT)
    torch.testing.assert_close(loss.mse, mspm.mse(reconstructed, second), **EXACT)


def test_no_gradient_reaches_the_target():
    target = torch.randn(1, 3, 4, requires_grad=True)
    predicted = torch.randn(1, 3, 4, requires_grad=True)
    loss = masked_patch_loss(predicted, predicted, target)
    (loss.nce + loss.mse).backward()
    assert predicted.grad is not None
    assert target.grad is None


def test_half_precision_is_lifted_to_float32():
    predicted, target = torch.randn(2, 2, 6, 8).bfloat16()
    loss = masked_patch_loss(predicted, predicted, target)
    exact = masked_patch_loss(predicted.float(), predicted.float(), target.float())
    assert loss.nce.dtype == loss.mse.dtype == torch.float32
    assert torch.equal(loss.nce, exact.nce)


def test_autocast_rounds_no_logits():
    predicted, target = torch.randn(2, 2, 40, 64).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        under = masked_patch_loss(predicted, predicted, target)
    exact = masked_patch_loss(predicted, predicted, target)
    assert torch.equal(under.nce, exact.nce)
    assert under.nce.dtype == torch.float32


def test_targets_are_the_patches_pixels():
    maps = torch.randn(2, 8, 12, dtype=torch.float64)
    assert torch.equal(patchify(maps, 4), mspm.patches(maps, 4))


def test_gather_takes_the_named_rows():
    tokens = torch.arange(24.0).view(2, 4, 3)
    picked = gather_patches(tokens, torch.tensor([[0, 2], [1, 3]]))
    assert torch.equal(picked, torch.stack([tokens[0, [0, 2]], tokens[1, [1, 3]]]))


def test_normalised_patches_do_not_see_scale():
    patches = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        normalise_patches(patches), normalise_patches(1000 * patches + 5), rtol=1e-3, atol=1e-3
    )

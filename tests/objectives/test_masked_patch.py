"""Masked-patch losses against a loop over clips and patches."""

import pytest
import torch

from pipeline.objectives.masked_patch import gather_patches, masked_patch_loss, normalise_patches


@pytest.mark.parametrize("softmax", ["paper", "ssast"])
def test_losses_equal_the_equations(softmax):
    generator = torch.Generator().manual_seed(0)
    predicted, reconstructed, target = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64)
    nce, mse, hits = 0.0, 0.0, 0
    for c, r, x in zip(predicted, reconstructed, target, strict=True):
        for i in range(5):
            others = [c[i] @ x[j] if softmax == "paper" else c[j] @ x[i] for j in range(5)]
            nce -= (others[i] - torch.logsumexp(torch.stack(others), 0)) / 10
            mse += ((r[i] - x[i]) ** 2).mean() / 10
            hits += int(torch.stack(others).argmax() == i)
    loss = masked_patch_loss(predicted, reconstructed, target, softmax)
    torch.testing.assert_close(loss.nce, nce.float())
    torch.testing.assert_close(loss.mse, mse.float())
    assert loss.accuracy == pytest.approx(hits / 10)


def test_no_gradient_reaches_the_target():
    target = torch.randn(1, 3, 4, requires_grad=True)
    predicted = torch.randn(1, 3, 4, requires_grad=True)
    loss = masked_patch_loss(predicted, predicted, target)
    (loss.nce + loss.mse).backward()
    assert predicted.grad is not None
    assert target.grad is None


def test_gather_takes_the_named_rows():
    tokens = torch.arange(24.0).view(2, 4, 3)
    picked = gather_patches(tokens, torch.tensor([[0, 2], [1, 3]]))
    assert torch.equal(picked, torch.stack([tokens[0, [0, 2]], tokens[1, [1, 3]]]))


def test_normalised_patches_do_not_see_scale():
    patches = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        normalise_patches(patches), normalise_patches(1000 * patches + 5), rtol=1e-3, atol=1e-3
    )

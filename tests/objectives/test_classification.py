"""Supervised losses against their formulas, class by class, in value and gradient."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.config import FinetuneRecipe
from pipeline.errors import UserError
from pipeline.objectives.classification import classification_loss, positive_weights
from pipeline.recipes import load_recipe
from pipeline.tasks import FinetuneTask, task_of

CLIPS, CLASSES = 3, 4


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def asymmetric(logits, targets, weights, smoothing, gamma_pos, gamma_neg, margin) -> float:
    """Eq. 4 to 6 of Ridnik et al. 2021, mean over clips and classes."""
    total = 0.0
    for row, truth in zip(logits.tolist(), targets.tolist(), strict=True):
        for x, target, w in zip(row, truth, weights.tolist(), strict=True):
            y = target * (1 - smoothing) + smoothing / 2
            p = sigmoid(x)
            q = max(p - margin, 0.0)
            total -= w * y * (1 - p) ** gamma_pos * math.log(p)
            total -= (1 - y) * q**gamma_neg * math.log(1 - q)
    return total / logits.numel()


def slopes(loss, logits: torch.Tensor) -> torch.Tensor:
    """Central differences of a function of the logits."""
    found = torch.empty_like(logits)
    for place in np.ndindex(*logits.shape):
        step = torch.zeros_like(logits)
        step[place] = 1e-6
        found[place] = (loss(logits + step) - loss(logits - step)) / 2e-6
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("gamma_pos", "gamma_neg", "margin"),
    [(0, 0, 0), (1, 4, 0.05), (0, 0, 0.3), (0.5, 0.5, 0), (2, 1, 0), (0, 0.5, 0.4)],
)
def test_bce_equals_the_formula(smoothing, gamma_pos, gamma_neg, margin):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(CLIPS, CLASSES, generator=generator, dtype=torch.float64)
    targets = torch.rand(CLIPS, CLASSES, generator=generator, dtype=torch.float64).round(
        decimals=1
    )  # soft, as of mixup
    weights = torch.tensor([0.5, 1, 2, 7], dtype=torch.float64)
    numbers = {"smoothing": smoothing, "gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "margin": margin}
    leaf = logits.clone().requires_grad_()
    loss = classification_loss(leaf, targets, "bce", **numbers, pos_weight=weights)
    assert float(loss.detach()) == pytest.approx(asymmetric(logits, targets, weights, *numbers.values()))
    expected = slopes(lambda x: asymmetric(x, targets, weights, *numbers.values()), logits)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected, rtol=1e-5, atol=1e-7)
    plain = classification_loss(logits, targets, "bce", **numbers)
    assert float(plain) == pytest.approx(asymmetric(logits, targets, torch.ones(CLASSES), *numbers.values()))


def test_ce_spreads_a_share_of_the_target_over_the_classes():
    logits = torch.randn(CLIPS, CLASSES, generator=torch.Generator().manual_seed(0))
    for hard in ([0, 3, 1], [2, 2, 2]):
        found = classification_loss(logits, F.one_hot(torch.tensor(hard), CLASSES).float(), "ce", smoothing=0.1)
        torch.testing.assert_close(found, F.cross_entropy(logits, torch.tensor(hard), label_smoothing=0.1))


def test_by_default_it_is_the_plain_loss_to_the_bit():
    logits, targets = torch.randn(2, 5, 7).unbind()
    assert torch.equal(classification_loss(logits, targets.sigmoid(), "bce"),
                       F.binary_cross_entropy_with_logits(logits, targets.sigmoid()))  # fmt: skip
    assert torch.equal(classification_loss(logits, targets.softmax(1), "ce"),
                       F.cross_entropy(logits, targets.softmax(1)))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("gammas", "margin"), [((0.5, 0.5), 0.0), ((0.5, 0.5), 0.05), ((4.0, 4.0), 0.05)])
def test_sure_logits_have_finite_gradients(dtype, gammas, margin):
    logits = torch.tensor([[-300.0, -20.0, 0.0, 20.0, 300.0]], dtype=dtype, requires_grad=True)
    for target in (0.0, 1.0):
        loss = classification_loss(logits, torch.full((1, 5), target), "bce", gamma_pos=gammas[0],
                                   gamma_neg=gammas[1], margin=margin)  # fmt: skip
        assert loss.dtype == torch.float32
        assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_weights_of_positives():
    drawn = np.array([1.0, 25.0, 50.0, 100.0, 0.0])
    assert positive_weights(drawn, 100, 0.0).tolist() == [1.0] * 5
    assert positive_weights(drawn, 100, 1.0).tolist() == pytest.approx([99, 3, 1, 0, 1], abs=1e-6)
    assert positive_weights(drawn, 100, 0.5).tolist() == pytest.approx([99**0.5, 3**0.5, 1, 1e-4, 1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetune.gamma_neg=4"], r"finetune\.gamma_neg = 4\.0, but the loss is ce"),
        (["finetune.margin=.05"], "set finetune.loss=bce, or margin=0"),
        (["finetune.pos_weight=1"], r"finetune\.pos_weight = 1\.0"),
        (["finetune.pool=rows", "finetune.mask_freq=.2"], r"finetune\.pool = rows"),
        (["finetune.label_smoothing=1"], r"finetune\.label_smoothing = 1"),
        (["finetune.mask_time=1"], r"finetune\.mask_time = 1"),
        (["finetune.gamma_pos=-1"], r"finetune\.gamma_pos = -1"),
        (["model.drop_path=1"], r"model\.drop_path = 1"),
    ],
)
def test_settings_that_contradict_are_named(words, said):
    with pytest.raises(UserError, match=said):
        FinetuneTask(load_recipe(FinetuneRecipe, [], ["model.size=micro", *words]), 128, 64, 5, single_label=True)


def test_clips_of_several_labels_have_no_cross_entropy():
    recipe = load_recipe(FinetuneRecipe, [], ["model.size=micro", "finetune.loss=ce"])
    loader = SimpleNamespace(spec=SimpleNamespace(single_label=False))
    with pytest.raises(UserError, match=r"finetune\.loss = ce, .* several labels or none"):
        task_of(recipe, loader)

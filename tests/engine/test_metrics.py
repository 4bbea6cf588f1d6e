"""Metrics against definitions written out, and where classes have no positives."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from pipeline.engine.evaluation import all_metrics, auc, average_precision, d_prime, score
from pipeline.flow import Batch, Losses
from tests.reference import metrics as reference


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_their_definitions_with_ties(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, (40, 4)).astype(np.float32)
    targets = (rng.random((40, 4)) < 0.3).astype(np.float32)
    targets[0], targets[1] = 1, 0
    truth = targets > 0
    for c in range(4):
        found = average_precision(scores, targets)[c], auc(scores, targets)[c]
        expected = reference.average_precision(scores[:, c], truth[:, c]), reference.auc(scores[:, c], truth[:, c])
        assert found == pytest.approx(expected, abs=1e-6)
        assert found == (average_precision_score(truth[:, c], scores[:, c]), roc_auc_score(truth[:, c], scores[:, c]))
    found = all_metrics(scores, targets, False)
    assert found["mAP"] == pytest.approx(reference.mean_average_precision(scores, truth), abs=1e-6)
    assert found["d_prime"] == pytest.approx(reference.d_prime(found["mAUC"]), abs=1e-6)


def test_classes_without_positives_are_left_out():
    scores = np.array([[0.9, 0.1], [0.1, 0.2]])
    targets = np.array([[1, 0], [0, 0]])
    assert np.isnan(average_precision(scores, targets)[1])
    assert all_metrics(scores, targets, False)["mAP"] == 1.0


def test_d_prime_of_the_literature():
    assert d_prime(0.5) == 0
    assert d_prime(0.959) == pytest.approx(2.46, abs=0.01)


def test_accuracy_and_top5():
    scores = np.eye(8)[:, ::-1].copy()
    targets = np.eye(8)
    assert all_metrics(np.eye(8), targets, True)["accuracy"] == 1.0
    assert all_metrics(scores, targets, True)["accuracy"] == 0.0
    constant = all_metrics(np.zeros((8, 8)), targets, True)  # a collapsed model is not rewarded for ties
    assert (constant["accuracy"], constant["top5_accuracy"]) == (1 / 8, 5 / 8)
    assert all_metrics(np.zeros((2, 2)), np.eye(2), True)["accuracy"] == 0.5


def test_a_clip_without_a_finite_score_is_no_hit(caplog):
    logits = torch.tensor([[float("nan")] * 4, [0, 9, 0, 0], [0, float("inf"), 0, 0], [0, 0, 0, float("-inf")]])
    index = torch.arange(4)
    batch = Batch(index, index, index >= 0, None, None, torch.eye(4))
    scores = score(lambda _: Losses(torch.zeros(()), {}, logits), [batch])
    assert np.isfinite(scores.logits).all()
    assert "1 of 4" not in caplog.text
    assert "3 of 4 clips" in caplog.text
    assert all_metrics(scores.logits, scores.targets, True)["accuracy"] == (0.25 + 1 + 0 + 0) / 4
    assert all_metrics(scores.logits, scores.targets, False)["mAP"] > 0

"""Metrics against definitions written out, where classes have no positives, and split over ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from pipeline.engine.evaluation import (
    all_metrics,
    auc,
    average_precision,
    clip_weights,
    d_prime,
    interval,
    score,
    weighted_metric,
)
from pipeline.flow import Batch, Losses
from tests.engine.metrics import CLASSES, evaluated
from tests.ranks import run_ranks
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


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_metrics_do_not_depend_on_the_ranks(tmp_path, ranks):
    """Each rank works out its classes; all have the same bits as one process."""
    run_ranks(ranks, Path(__file__).with_name("metrics.py"), tmp_path)
    expected = json.dumps(evaluated(None))
    assert [(tmp_path / f"{rank}.json").read_text() for rank in range(ranks)] == [expected] * ranks


def test_a_rank_works_out_its_own_classes_alone(monkeypatch):
    """Three ranks, one after the other, with a gather that collects: each computes a third of the classes."""
    from pipeline import distributed
    from pipeline.engine.evaluation import by_class

    asked, gathered = [], []

    def of(classes: np.ndarray) -> np.ndarray:
        asked.append(classes.tolist())
        return classes[:, None] * np.array([1.0, 10.0])

    def gather(local: torch.Tensor) -> torch.Tensor:
        gathered.append(local)
        return torch.cat([*gathered, *[torch.zeros_like(local)] * (3 - len(gathered))])

    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "gather", gather)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found = by_class(of, CLASSES, torch.device("cpu"))
    assert sorted(number for numbers in asked for number in numbers) == list(range(CLASSES))
    assert max(map(len, asked)) == 4
    assert (found == of(np.arange(CLASSES))).all()


def test_weighted_metrics_are_those_of_the_drawn_clips():
    """scikit-learn's with sample weights, ties and draws without a positive included."""
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(60, 5)).astype(np.float32).round(1)
    targets = rng.random((60, 5)) < 0.1
    targets[0], targets[:, 4] = True, False
    weights = clip_weights(60, 300, rng)  # more than are worked out at a time
    found = weighted_metric(scores, targets, weights, "mAP")
    for weight, value in zip(weights, found, strict=True):
        known = [c for c in range(5) if weight @ targets[:, c]]
        each = [average_precision_score(targets[:, c], scores[:, c], sample_weight=weight) for c in known]
        assert value == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_draws_without_a_positive_leave_the_interval_as_it_is():
    """Of one rare class: of 4 positives among 500 clips, one draw in fifty has none, and no mAP."""
    scores = np.random.default_rng(0).normal(size=(500, 1)).astype(np.float32)
    targets = np.zeros((500, 1), np.float32)
    targets[:4] = 1
    found = interval(scores, targets, "mAP")
    weights = clip_weights(500, found["draws"], np.random.default_rng([0]))
    known = weights[1:][weights[1:, :4].any(axis=1)]
    assert 0 < len(known) < found["draws"]
    values = weighted_metric(scores, targets > 0, known, "mAP")
    assert [found["low"], found["high"]] == np.quantile(values, [0.025, 0.975]).tolist()
    nothing = interval(scores, np.zeros_like(targets), "mAP")
    assert np.isnan([nothing["low"], nothing["high"]]).all()

"""Classification metrics over a whole evaluation set.

In: scores [n, C] (logits or probabilities: only their order counts) and multi-hot targets [n, C].
Out: named floats. Ranking is scikit-learn's; a class costs one sort of n scores.
"""

import numpy as np
from scipy.stats import norm
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Average precision per class, float64 [C]; NaN where a class has no positive clip."""
    return np.array(
        [
            average_precision_score(truth, score) if truth.any() else np.nan
            for score, truth in zip(scores.T, _hot(targets).T, strict=True)
        ]
    )


def auc(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Area under the ROC curve per class, float64 [C]; NaN where a class lacks positives or negatives."""
    return np.array(
        [
            roc_auc_score(truth, score) if truth.any() and not truth.all() else np.nan
            for score, truth in zip(scores.T, _hot(targets).T, strict=True)
        ]
    )


def precision_recall(scores: np.ndarray, targets: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(recall, precision) of every threshold, recall falling, per class; empty where a class has no positive."""
    curves = []
    for score, truth in zip(scores.T, _hot(targets).T, strict=True):
        precision, recall, _ = precision_recall_curve(truth, score) if truth.any() else (np.empty(0), np.empty(0), 0)
        curves.append((recall, precision))
    return curves


def d_prime(area: float) -> float:
    """Sensitivity index sqrt(2) Phi^-1(AUC) (Gemmeke et al. 2017)."""
    return float(np.sqrt(2.0) * norm.ppf(area))


def evaluate_multilabel(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """MAP and mAUC, unweighted means over the classes that have positives, and d-prime of mAUC."""
    area = _mean(auc(scores, targets))
    return {"mAP": _mean(average_precision(scores, targets)), "mAUC": area, "d_prime": d_prime(area)}


def evaluate_single(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Top-1 and top-5 accuracy of single-label clips, and their mAP."""
    truth = targets.argmax(axis=1)
    own = scores[np.arange(len(scores)), truth][:, None]
    above, equal = (scores > own).sum(axis=1), (scores == own).sum(axis=1)

    def top(k: int) -> float:
        """Expected share of clips among whose k best classes the true one is, ties broken at random."""
        return float(np.clip((k - above) / equal, 0, 1).mean())

    return {
        "accuracy": top(1),
        "top5_accuracy": top(5),
        "mAP": _mean(average_precision(scores, targets)),
    }


def _hot(targets: np.ndarray) -> np.ndarray:
    return np.asarray(targets) > 0.5


def _mean(values: np.ndarray) -> float:
    """Mean over classes that have a value; NaN where none has."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")

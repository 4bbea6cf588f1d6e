"""Metrics by their definitions, one threshold or pair at a time."""

import statistics

import numpy as np


def average_precision(score: np.ndarray, truth: np.ndarray) -> float:
    """Sum over distinct thresholds of (recall step) x precision."""
    total, last = 0.0, 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        chosen = score >= threshold
        recall, precision = (chosen & truth).sum() / truth.sum(), (chosen & truth).sum() / chosen.sum()
        total, last = total + (recall - last) * precision, recall
    return total


def auc(score: np.ndarray, truth: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order; ties count half."""
    pairs = [(a > b) + 0.5 * (a == b) for a in score[truth] for b in score[~truth]]
    return sum(pairs) / len(pairs)


def d_prime(area: float) -> float:
    return 2**0.5 * statistics.NormalDist().inv_cdf(area)


def mean_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Unweighted mean over the classes that have a positive clip."""
    found = [average_precision(scores[:, c], truth[:, c]) for c in range(truth.shape[1]) if truth[:, c].any()]
    return sum(found) / len(found)

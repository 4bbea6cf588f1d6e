"""How sure is a metric, given the clips it was measured on? The bootstrap over clips.

In: scores and targets. Out: metrics of evaluation sets drawn with replacement, an interval.

That is the uncertainty of the evaluation set; the one of training shows in the spread over seeds.

Cost: one sort a class, then a cumulative sum over the clips a draw: C * n * draws additions. Draws are
reduced to keep that below `BUDGET` (a minute); 20 k clips of 527 classes get 200.
"""

from dataclasses import dataclass

import numpy as np

DRAWS = 1000
FEWEST_DRAWS = 200
BUDGET = 2e9
CHUNK = 50  # draws at a time: bounds the memory to CHUNK * n


@dataclass(frozen=True)
class Interval:
    """A 95 % interval.

    Attributes:
        low: 2.5 % of the draws are below.
        high: 2.5 % of the draws are above.
        draws: Evaluation sets drawn.
    """

    low: float
    high: float
    draws: int


def interval(scores: np.ndarray, targets: np.ndarray, metric: str, seed: int = 0) -> Interval:
    """95 % interval of a metric over evaluation sets drawn from this one.

    Args:
        scores: [n, C].
        targets: [n, C], multi-hot.
        metric: "mAP" or "accuracy".
        seed: Of the draws.
    """
    draws = draws_for(scores.size)
    weights = clip_weights(len(scores), draws, np.random.default_rng([seed]))
    values = weighted_metric(scores, np.asarray(targets) > 0.5, weights, metric)[1:]
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high), draws)


def draws_for(size: int) -> int:
    """Draws that `size` scores (clips x classes x runs) leave time for."""
    return int(min(DRAWS, max(FEWEST_DRAWS, BUDGET // max(1, size))))


def clip_weights(clips: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each clip is drawn: float32 [1 + draws, n]; the first row is the sample itself."""
    drawn = rng.multinomial(clips, np.full(clips, 1 / clips), draws).astype(np.float32)
    return np.concatenate([np.ones((1, clips), np.float32), drawn])


def weighted_metric(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray, metric: str) -> np.ndarray:
    """A metric with clip weights, for all draws at once.

    Args:
        scores: float32 [n, C].
        targets: bool [n, C].
        weights: float32 [draws, n], of `clip_weights`.
        metric: "mAP" or "accuracy".

    Returns:
        float64 [draws].
    """
    if metric == "accuracy":
        own = scores[np.arange(len(scores)), targets.argmax(axis=1)][:, None]
        better, equal = (scores > own).sum(axis=1), (scores == own).sum(axis=1)
        hits = ((better + (equal - 1) / 2) < 1).astype(np.float64)  # ties as in engine.metrics
        return np.asarray(weights @ hits / weights.sum(axis=1))
    chunks = [weights[i : i + CHUNK] for i in range(0, len(weights), CHUNK)]
    return np.concatenate([np.nanmean(_average_precisions(scores, targets, chunk), axis=0) for chunk in chunks])


def _average_precisions(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[C', draws] for the classes with a positive; NaN where a draw has none."""
    rows = []
    for score, truth in zip(scores.T, targets.T, strict=True):
        if not truth.any():
            continue
        order = np.argsort(-score, kind="stable")
        ranked = score[order]
        last = np.searchsorted(-ranked, -ranked, side="right") - 1  # of each group of equal scores
        positive = np.flatnonzero(truth[order])
        drawn = weights[:, order]
        seen = np.cumsum(drawn, axis=1, dtype=np.float64)[:, last[positive]]
        weight = drawn[:, positive].astype(np.float64)
        hits = np.cumsum(weight, axis=1)
        # Hits up to the end of a group of ties: those of its last positive.
        end = np.searchsorted(last[positive], last[positive], side="right") - 1
        total = hits[:, -1]
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.where(seen > 0, hits[:, end] / seen, 0.0)
            rows.append(np.where(total > 0, (weight * precision).sum(axis=1) / total, np.nan))
    return np.array(rows)

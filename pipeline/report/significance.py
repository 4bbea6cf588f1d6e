"""Is one system better than another on these clips? A paired bootstrap.

In: predictions of two systems on the same clips. Out: difference of the metric, 95 % interval, p-value.

Clips are drawn with replacement, the same draw for both systems, and the metric is taken again. That is
the uncertainty of the evaluation set; the one of training shows in the spread over seeds.

Cost: one sort a class, then a cumulative sum over the clips a draw: C * n * draws additions. Draws are
reduced to keep that below `BUDGET` (a minute); 20 k clips of 527 classes get 200.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.engine.evaluation import read_predictions

DRAWS = 1000
FEWEST_DRAWS = 200
BUDGET = 2e9
CHUNK = 50  # draws at a time: bounds the memory to CHUNK * n


@dataclass(frozen=True)
class Predictions:
    """Of one run: keys [n], targets bool [n, C], scores float32 [n, C]; n clips in key order."""

    keys: list[str]
    targets: np.ndarray
    scores: np.ndarray

    @staticmethod
    def read(path: Path) -> "Predictions":
        """From `predictions.parquet`."""
        return Predictions(*read_predictions(path))


@dataclass(frozen=True)
class Difference:
    """System minus reference, in the metric's unit (0 to 1).

    Attributes:
        value: Difference of the means over runs.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: Two-sided probability of a difference this far from zero if there were none.
        draws: Of the bootstrap.
    """

    value: float
    low: float
    high: float
    p: float
    draws: int


def paired_bootstrap(
    system: Sequence[Predictions], reference: Sequence[Predictions], metric: str, seed: int = 0
) -> Difference | None:
    """Compares the means of two systems' runs.

    Args:
        system: One entry for each run (seed, fold); runs of one fold share clips.
        reference: Likewise.
        metric: "mAP" or "accuracy".
        seed: Of the draws.

    Returns:
        None where the systems were not scored on the same clips with the same labels: nothing to pair.
    """
    folds = [_folds(system), _folds(reference)]
    if not folds[0] or folds[0].keys() != folds[1].keys():
        return None
    if any(not np.array_equal(folds[0][key][0].targets, folds[1][key][0].targets) for key in folds[0]):
        return None
    size = sum(runs[0].scores.size * len(runs) for side in folds for runs in side.values())
    draws = int(min(DRAWS, max(FEWEST_DRAWS, BUDGET // size)))
    means = [np.zeros(draws + 1), np.zeros(draws + 1)]
    for number, key in enumerate(sorted(folds[0])):
        clips = len(folds[0][key][0].keys)
        rng = np.random.default_rng([seed, number])
        drawn = rng.multinomial(clips, np.full(clips, 1 / clips), draws).astype(np.float32)
        weights = np.concatenate([np.ones((1, clips), np.float32), drawn])  # the first is the sample itself
        for i, side in enumerate(folds):
            values = [weighted_metric(run, weights, metric) for run in side[key]]
            means[i] += np.mean(values, axis=0) / len(folds[0])
    difference = means[0] - means[1]
    sample, drawn_differences = difference[0], difference[1:]
    low, high = np.quantile(drawn_differences, [0.025, 0.975])
    tail = min((drawn_differences <= 0).sum(), (drawn_differences >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (draws + 1))
    return Difference(float(sample), float(low), float(high), float(p), draws)


def weighted_metric(run: Predictions, weights: np.ndarray, metric: str) -> np.ndarray:
    """The metric with clip weights: float32 [draws, n] -> float64 [draws]."""
    if metric == "accuracy":
        own = run.scores[np.arange(len(run.keys)), run.targets.argmax(axis=1)][:, None]
        better, equal = (run.scores > own).sum(axis=1), (run.scores == own).sum(axis=1)
        hits = ((better + (equal - 1) / 2) < 1).astype(np.float64)  # ties as in engine.metrics
        return np.asarray(weights @ hits / weights.sum(axis=1))
    chunks = [weights[i : i + CHUNK] for i in range(0, len(weights), CHUNK)]
    return np.concatenate([np.nanmean(_average_precisions(run, chunk), axis=0) for chunk in chunks])


def _average_precisions(run: Predictions, weights: np.ndarray) -> np.ndarray:
    """[C', draws] for the classes with a positive; NaN where a draw has none."""
    rows = []
    for score, truth in zip(run.scores.T, run.targets.T, strict=True):
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


def _folds(runs: Sequence[Predictions]) -> dict[str, list[Predictions]]:
    """Runs on the same clips together."""
    folds: dict[str, list[Predictions]] = {}
    for run in runs:
        folds.setdefault("\n".join(run.keys), []).append(run)
    return folds

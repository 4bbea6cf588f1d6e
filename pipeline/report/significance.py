"""Is one system better than another on these clips? A paired bootstrap.

In: predictions of two systems on the same clips. Out: difference of the metric, 95 % interval, p-value.

Clips are drawn with replacement, the same draw for both systems, and the metric is taken again. That is
the uncertainty of the evaluation set; the one of training shows in the spread over seeds.

Cost: that of `engine.evaluation`'s interval for every run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.engine.evaluation import clip_weights, draws_for, weighted_metric


class Predictions(NamedTuple):
    """Of one run, what `read_predictions` gives: keys [n], targets bool [n, C], scores float32 [n, C]; in key order."""

    keys: list[str]
    targets: np.ndarray
    scores: np.ndarray


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
    draws = draws_for(size)
    means = [np.zeros(draws + 1), np.zeros(draws + 1)]
    for number, key in enumerate(sorted(folds[0])):
        clips = len(folds[0][key][0].keys)
        rng = np.random.default_rng([seed, number])
        weights = clip_weights(clips, draws, rng)
        for i, side in enumerate(folds):
            values = [weighted_metric(run.scores, run.targets, weights, metric) for run in side[key]]
            means[i] += np.mean(values, axis=0) / len(folds[0])
    difference = means[0] - means[1]
    sample, drawn_differences = difference[0], difference[1:]
    low, high = np.quantile(drawn_differences, [0.025, 0.975])
    tail = min((drawn_differences <= 0).sum(), (drawn_differences >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (draws + 1))
    return Difference(float(sample), float(low), float(high), float(p), draws)


def _folds(runs: Sequence[Predictions]) -> dict[str, list[Predictions]]:
    """Runs on the same clips together."""
    folds: dict[str, list[Predictions]] = {}
    for run in runs:
        folds.setdefault("\n".join(run.keys), []).append(run)
    return folds

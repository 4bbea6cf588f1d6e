"""Which clips train a probe, choose its setting and test it; what it comes to.

In: features, and the folds or the split to test on. Out: the content of the JSON that launchers/probe.py writes.

A probe's setting (weight decay, learning rate, k) is the best of `probes.GRIDS` on a part of the *training* clips: with
folds the next one of the training folds, since clips of one recording share a fold, else a fifth drawn by the seed.
With it the probe is trained on all training clips, and scores the test clips once.

The value is the mean over folds or seeds and the spread their standard deviation; the interval is the bootstrap's over
test clips of that mean (`engine/evaluation.py`): one draw of the clips for all seeds, one for each fold.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.engine.evaluation import all_metrics, clip_weights, draws_for, metric_name, quantiles, weighted_metric
from pipeline.errors import UserError
from pipeline.probing.features import Features, Part
from pipeline.probing.probes import GRIDS, Probe, fit, predict

log = logging.getLogger(__name__)

HELD_OUT = 0.2  # of the training clips, where there are no folds


@dataclass(frozen=True)
class Division:
    """One fold, or one seed; places of clips among the features.

    Attributes:
        name: "fold 1", "seed 0".
        train: int64 [n], those that `chosen_on` are among.
        chosen_on: Whose scores choose the probe's setting.
        test: The clips that are scored.
        seed: Of the probe.
        draw: Of the bootstrap.
    """

    name: str
    train: np.ndarray
    chosen_on: np.ndarray
    test: np.ndarray
    seed: int
    draw: int


def by_folds(folds: np.ndarray, wanted: Sequence[int], seed: int) -> list[Division]:
    """Each wanted fold held out in turn; 0 is no fold, such clips always train.

    Args:
        folds: int [n], of each clip.
        wanted: Numbers; empty: all.
        seed: Of the probes.

    Raises:
        UserError: no such fold, or fewer than two.
    """
    known = sorted(set(folds.tolist()) - {0})
    if len(known) < 2 or not set(wanted) <= set(known):
        raise UserError(f"--folds {','.join(map(str, wanted)) or 'all'}: the clips have the folds {known or 'none'}")
    made = []
    for fold in wanted or known:
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        others = [*(one for one in known if one > fold), *(one for one in known if one < fold)]
        chosen_on = np.flatnonzero(folds == others[0]) if len(others) > 1 else _fifth(train, seed)
        made.append(Division(f"fold {fold}", train, chosen_on, test, seed, fold))
    return made


def by_seeds(train: np.ndarray, test: np.ndarray, seeds: Sequence[int]) -> list[Division]:
    """The same training and test clips for each seed."""
    return [Division(f"seed {seed}", train, _fifth(train, seed), test, seed, 0) for seed in seeds]


def _fifth(train: np.ndarray, seed: int) -> np.ndarray:
    if len(train) < 2:
        raise UserError(f"{len(train)} training clips: a probe needs at least two")
    return np.sort(np.random.default_rng([seed]).permutation(train)[: max(1, int(len(train) * HELD_OUT))])


def judge(
    features: Features, divisions: Sequence[Division], probe: Probe, stream: str, layers: Sequence[int],
    single_label: bool, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Trains and tests a probe on each division; arguments as of `judge_once`.

    Returns:
        metric, value, spread, interval, n, and for each division its value and setting.
    """
    metric = metric_name(single_label)
    judged = [judge_once(features, one, probe, stream, layers, single_label, device) for one in divisions]
    parts = [part for part, _, _ in judged]
    values = [part["value"] for part in parts]
    return {
        "metric": metric,
        "value": float(np.mean(values)),
        "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "interval": _interval([(scores, targets, one.draw) for (_, scores, targets), one in
                               zip(judged, divisions, strict=True)], metric),
        "n": len(np.unique(np.concatenate([division.test for division in divisions]))),
        "parts": parts,
    }  # fmt: skip


def judge_once(
    features: Features, division: Division, probe: Probe, stream: str, layers: Sequence[int], single_label: bool,
    device: torch.device,
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:  # fmt: skip
    """Chooses a probe's setting, trains it and scores the test clips.

    Args:
        features: Of training and test clips.
        division: Which are which.
        probe: Which.
        stream: "spec", "wav" or "both".
        layers: One, or several for "cgp".
        single_label: Chooses loss and metric.
        device: To train on.

    Returns:
        name, value, chosen setting and its value on the part that chose it; scores and targets [n, C] of the test.
    """
    metric = metric_name(single_label)
    rest = np.setdiff1d(division.train, division.chosen_on)
    train, chooser, whole, test = (
        Part(features, stream, layers, where, device)
        for where in (rest, division.chosen_on, division.train, division.test)
    )
    grid = [value for value in GRIDS[probe] if probe != "knn" or value <= len(rest)]
    found = []
    for value in grid:
        scores = predict(fit(probe, train, value, single_label, division.seed), chooser)
        found.append(all_metrics(scores, _targets(features, chooser), single_label)[metric])
    best = max(range(len(grid)), key=lambda i: (-math.inf if math.isnan(found[i]) else found[i], -i))
    scores, targets = (
        predict(fit(probe, whole, grid[best], single_label, division.seed), test),
        _targets(features, test),
    )
    value = all_metrics(scores, targets, single_label)[metric]
    part = {"name": division.name, "value": value, "chosen": grid[best], "on_held_out": found[best]}
    return part, scores, targets


def _targets(features: Features, part: Part) -> np.ndarray:
    return np.asarray(features.targets[torch.from_numpy(part.where)].numpy())


def _interval(scored: Sequence[tuple[np.ndarray, np.ndarray, int]], metric: str) -> dict[str, float]:
    """95 % interval of the mean over (scores, targets, draw)."""
    draws = draws_for(sum(scores.size for scores, _, _ in scored))
    total = np.zeros(draws)
    for scores, targets, draw in scored:
        weights = clip_weights(len(scores), draws, np.random.default_rng([draw]))
        total += weighted_metric(scores, targets > 0, weights, metric)[1:]
    return quantiles(total / len(scored))

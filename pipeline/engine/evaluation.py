"""Evaluation: every held-out clip scored once, metrics of the scores, and how sure these are.

In: a forward function and a loader. Out: `Scores` in index order, equal on all ranks; metrics with an interval;
`results.json` and `predictions.parquet`. Of a pretraining: mean losses.

The interval is the bootstrap's over clips: metrics of evaluation sets drawn with replacement. That is the uncertainty
of the evaluation set; the one of training shows in the spread over seeds.

Memory: n x C scores on each host (20 k clips x 527 classes: 42 MB); everything else is per batch. Cost: a sort of n
scores a class; for the interval one sort a class, then C * n * draws additions, which are most of it. Each rank does a
share of the classes, and one small gather puts the classes' numbers together: the same bits for any number of ranks.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.sparse import csr_array
from scipy.special import ndtri

from pipeline import distributed
from pipeline.data.loader import Loader
from pipeline.data.manifest import Label
from pipeline.files import new_file
from pipeline.flow import Batch, Losses

log = logging.getLogger(__name__)

DRAWS = 1000  # of the bootstrap
FEWEST_DRAWS = 200  # which 20 k clips of 527 classes get
BUDGET = 2e9  # additions that the draws are reduced to: some seconds
CHUNK = 256  # draws at a time: bounds the memory beside the draws themselves to CHUNK * n


@dataclass(slots=True)
class Scores:
    """Raw results of n clips, ordered by row.

    Attributes:
        rows: int64 [n], rows of the shard index.
        logits: float32 [n, C].
        targets: float32 [n, C].
    """

    rows: np.ndarray
    logits: np.ndarray
    targets: np.ndarray


def score(forward: Callable[[Batch], Losses], batches: Iterable[Batch]) -> Scores:
    """Logits of every valid clip; a collective per batch (all ranks get equally many batches).

    Args:
        forward: The task, or the engine around it, in evaluation mode.
        batches: `Loader.batches()` of an evaluation.

    Raises:
        ValueError: the task returns no logits, or there is no batch.
    """
    rows, logits, targets = [], [], []
    with torch.no_grad():
        for batch in batches:
            out = forward(batch).logits
            if out is None:
                raise ValueError("the task returns no logits; score() is for classification")
            valid = distributed.gather(batch.valid.to(torch.uint8)).bool().cpu()
            rows.append(distributed.gather(batch.row).cpu()[valid])
            logits.append(distributed.gather(out.float()).cpu()[valid])
            targets.append(distributed.gather(batch.targets).cpu()[valid])
    if not rows:
        raise ValueError("no clip to score")
    row = torch.cat(rows).numpy()
    order = np.argsort(row, kind="stable")
    return Scores(row[order], finite(torch.cat(logits).numpy()[order]), torch.cat(targets).numpy()[order])


def check_same_weights(files: Sequence[Path]) -> None:
    """Makes sure that all ranks have found the same weights; a collective.

    Args:
        files: Of `weights_file`, on each rank: a node may have a cache of the hub of its own.

    Raises:
        UserError: they have not, on the ranks that found others than rank 0.
    """
    found = ", ".join(f"{file.parent.name}/{file.name}" for file in files)
    distributed.check_same({"weights": found}, "where a run is still in training, name one of its checkpoints")


def finite(logits: np.ndarray) -> np.ndarray:
    """Logits that can be ranked: NaN below all numbers, infinities at the ends; said once.

    A clip whose logits are NaN is so scored as if by chance. No comparison with NaN is true, so its true class would
    else come first.
    """
    known = np.isfinite(logits)
    if known.all():
        return logits
    clips = int((~known).any(axis=1).sum())
    log.warning("%d of %d clips have logits that are NaN or infinite: they rank last", clips, len(known))
    low, high = (logits[known].min(), logits[known].max()) if known.any() else (0.0, 0.0)
    return np.asarray(np.nan_to_num(logits, nan=low - 2, neginf=low - 1, posinf=high + 1))


def mean_losses(
    forward: Callable[[Batch], Losses], batches: Iterable[Batch], loader: Loader, device: torch.device
) -> dict[str, float]:
    """Mean of the named losses over full batches, and `bad_clips`, those replaced on all ranks; a collective.

    Contrast and its accuracy are defined over a full batch of the same size. So the last clips, which fill none, are
    left out, and another held-out clip stands in for a bad one, as in training: it counts in two batches, and no good
    clip is lost. Which clips these are depends on neither ranks nor workers.

    Args:
        forward: The task, or the engine around it, in evaluation mode.
        batches: `loader.batches(full=True)`.
        loader: Counts bad clips.
        device: Of the collective.

    Raises:
        UserError: more bad clips over all ranks than data.max_bad or data.max_bad_share allow; on all ranks alike.
    """
    totals: dict[str, torch.Tensor] = {}
    count = 0
    with torch.no_grad():
        for batch in batches:
            count += 1
            for name, value in forward(batch).named.items():
                totals[name] = totals.get(name, torch.zeros_like(value, dtype=torch.float64)) + value
    if not count:
        log.warning("fewer held-out clips than eval.batch_size: nothing to average; lower eval.batch_size")
        return {}
    bad = float(loader.replaced(0) * distributed.world_size())  # its mean over ranks is their sum
    means = distributed.mean({name: value / count for name, value in totals.items()} | {"bad_clips": bad}, device)
    loader.bad_clips.check(round(means["bad_clips"]))
    return means


def metric_name(single_label: bool) -> str:
    """The metric that the paper reports: accuracy of single-label data, else mAP."""
    return "accuracy" if single_label else "mAP"


def all_metrics(
    scores: np.ndarray, targets: np.ndarray, single_label: bool, device: torch.device | None = None
) -> dict[str, float]:
    """Metrics by name. Means over classes are unweighted, over those that have positives.

    Args:
        scores: [n, C], logits or probabilities: only their order counts.
        targets: [n, C], multi-hot.
        single_label: Top-1 and top-5 accuracy and mAP; else mAP, mAUC and d-prime of mAUC.
        device: As of `by_class`.
    """
    return _metrics(scores, targets, single_label, _curves(scores, targets, device))


def _curves(scores: np.ndarray, targets: np.ndarray, device: torch.device | None) -> np.ndarray:
    """Average precision and area under the ROC curve per class: float64 [C, 2]."""

    def of(classes: np.ndarray) -> np.ndarray:
        some, truth = scores[:, classes], targets[:, classes]
        return np.stack([average_precision(some, truth), auc(some, truth)], axis=1)

    return by_class(of, scores.shape[1], device)


def _metrics(scores: np.ndarray, targets: np.ndarray, single_label: bool, curves: np.ndarray) -> dict[str, float]:
    mean_ap, area = _mean(curves[:, 0]), _mean(curves[:, 1])
    if single_label:
        return {"accuracy": float(_top(scores, targets, 1).mean()),
                "top5_accuracy": float(_top(scores, targets, 5).mean()), "mAP": mean_ap}  # fmt: skip
    return {"mAP": mean_ap, "mAUC": area, "d_prime": d_prime(area)}


def by_class(of: Callable[[np.ndarray], np.ndarray], classes: int, device: torch.device | None) -> np.ndarray:
    """Numbers of each class, each worked out by one rank; equal on all ranks, and for any number of them.

    Args:
        of: Numbers of c classes, int64 [c] -> float64 [c, ...], each class by itself.
        classes: C.
        device: Of the collective; None: this process works out all classes, and there is no collective.

    Returns:
        float64 [C, ...].
    """
    ranks = 1 if device is None else distributed.world_size()
    found = of(np.arange(distributed.rank() if ranks > 1 else 0, classes, ranks))
    if ranks == 1:
        return found
    size = -(-classes // ranks)
    padded = np.full((size, *found.shape[1:]), np.nan)
    padded[: len(found)] = found
    gathered = distributed.gather(torch.from_numpy(padded).to(device)).cpu().numpy()
    shares = gathered.reshape(ranks, size, *found.shape[1:])
    return np.ascontiguousarray(shares.swapaxes(0, 1)).reshape(ranks * size, *found.shape[1:])[:classes]


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Average precision per class, float64 [C]; NaN where a class has no positive clip.

    sum_i (R_i - R_i-1) P_i over the distinct scores, as scikit-learn has it, to the bit.
    """
    curves = precision_recall(scores, targets)
    return np.array([-np.sum(np.diff(r) * p[:-1]) if len(r) else np.nan for r, p in curves])


def precision_recall(scores: np.ndarray, targets: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(recall, precision) of every threshold, recall falling to 0, per class; empty where a class has no positive."""
    curves = []
    for hits, false in _counts(scores, targets):
        if not hits[-1]:
            curves.append((np.empty(0), np.empty(0)))
            continue
        precision, recall = hits / (hits + false), hits / hits[-1]
        curves.append((np.append(recall[::-1], 0.0), np.append(precision[::-1], 1.0)))
    return curves


def auc(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Area under the ROC curve per class, float64 [C], to scikit-learn's bit.

    NaN where a class lacks positives or negatives.
    """
    areas = []
    for hits, false in _counts(scores, targets):
        if not hits[-1] or not false[-1]:
            areas.append(np.nan)
            continue
        bends = np.ones(len(hits), dtype=bool)  # points on a straight line add nothing
        bends[1:-1] = (np.diff(false, 2) != 0) | (np.diff(hits, 2) != 0)
        x, y = (np.append(0.0, counts[bends]) / counts[-1] for counts in (false, hits))
        areas.append(np.trapezoid(y, x))
    return np.array(areas)


def _counts(scores: np.ndarray, targets: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Per class: positives and negatives, float64 [k], among the clips at or above each of its k scores, falling."""
    for score, truth in zip(scores.T, np.asarray(targets).T > 0.5, strict=True):
        order = np.argsort(score, kind="stable")[::-1]
        last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each group of equal scores
        hits = np.cumsum(truth[order], dtype=np.float64)[last]
        yield hits, 1 + last - hits


def d_prime(area: float) -> float:
    """Sensitivity index sqrt(2) Phi^-1(AUC) (Gemmeke et al. 2017)."""
    return float(np.sqrt(2.0) * ndtri(area))


def _top(scores: np.ndarray, targets: np.ndarray, k: int) -> np.ndarray:
    """Whether the true class is among a clip's k best: float64 [n]; the expected share where ties break at random."""
    own = scores[np.arange(len(scores)), targets.argmax(axis=1)][:, None]
    above, equal = (scores > own).sum(axis=1), (scores == own).sum(axis=1)
    return np.asarray(np.clip((k - above) / equal, 0, 1))


def _mean(values: np.ndarray) -> float:
    """Mean over classes that have a value; NaN where none has."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def interval(
    scores: np.ndarray, targets: np.ndarray, metric: str, seed: int = 0, device: torch.device | None = None
) -> dict[str, float]:
    """95 % interval of a metric over evaluation sets drawn from this one: {"low", "high", "draws"}.

    Draws without a positive of any class have no mAP and are left out; NaN where there is no positive at all.

    Args:
        scores: [n, C].
        targets: [n, C], multi-hot.
        metric: "mAP" or "accuracy".
        seed: Of the draws.
        device: As of `by_class`.
    """
    draws = draws_for(scores.size)
    weights = clip_weights(len(scores), draws, np.random.default_rng([seed]))
    values = weighted_metric(scores, np.asarray(targets) > 0.5, weights, metric, device)[1:]
    return quantiles(values)


def quantiles(values: np.ndarray) -> dict[str, float]:
    """{"low", "high", "draws"} of a metric's draws, float64 [draws], those that are NaN left out; NaN if all are."""
    known = values[~np.isnan(values)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return {"low": float(low), "high": float(high), "draws": len(values)}


def draws_for(size: int) -> int:
    """Draws that `size` scores (clips x classes x runs) leave time for."""
    return int(min(DRAWS, max(FEWEST_DRAWS, BUDGET // max(1, size))))


def clip_weights(clips: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each clip is drawn: float32 [1 + draws, n]; the first row is the sample itself."""
    drawn = rng.multinomial(clips, np.full(clips, 1 / clips), draws).astype(np.float32)
    return np.concatenate([np.ones((1, clips), np.float32), drawn])


def weighted_metric(
    scores: np.ndarray, targets: np.ndarray, weights: np.ndarray, metric: str, device: torch.device | None = None
) -> np.ndarray:
    """A metric with clip weights, for all draws at once.

    Args:
        scores: float32 [n, C].
        targets: bool [n, C].
        weights: float32 [draws, n], of `clip_weights`.
        metric: "mAP" or "accuracy".
        device: As of `by_class`.

    Returns:
        float64 [draws]; NaN where a draw has no positive of any class.
    """
    if metric == "accuracy":
        return np.asarray(weights @ _top(scores, targets, 1) / weights.sum(axis=1))
    known = np.flatnonzero(targets.any(axis=0))

    def of(classes: np.ndarray) -> np.ndarray:
        mine = known[classes]
        return _average_precisions(scores[:, mine], targets[:, mine], weights)

    found = by_class(of, len(known), device)
    some = ~np.isnan(found)
    total, count = np.where(some, found, 0.0).sum(axis=0), some.sum(axis=0)
    return np.asarray(np.divide(total, count, out=np.full(len(weights), np.nan), where=count > 0))


def _average_precisions(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [C, draws] of classes with a positive; NaN where a draw has none.

    Only the clips at or above each positive are counted: the weights of the clips between two positives are summed for
    all draws at once. They are whole numbers, so these sums are exact in any order.
    """
    found = np.empty((scores.shape[1], len(weights)))
    ranked = [_Ranking.of(score, truth) for score, truth in zip(scores.T, targets.T, strict=True)]
    for first in range(0, len(weights), CHUNK):
        chunk = slice(first, first + CHUNK)
        drawn = np.ascontiguousarray(weights[chunk].T)  # (n, draws): the draws of a clip lie together
        for number, ranking in enumerate(ranked):
            found[number, chunk] = ranking.average_precision(drawn)
    return found


class _Ranking(NamedTuple):
    """A class's clips by falling score.

    Attributes:
        between: [k, n], which clips lie between two neighbours of the k ends of groups of equal scores that hold a
            positive.
        group: int64 [p], of each positive its end.
        positive: int64 [p], the positives, by falling score.
    """

    between: csr_array
    group: np.ndarray
    positive: np.ndarray

    @staticmethod
    def of(score: np.ndarray, truth: np.ndarray) -> "_Ranking":
        order = np.argsort(-score, kind="stable")
        ranked = -score[order]
        positive = np.flatnonzero(truth[order])
        ends, group = np.unique(np.searchsorted(ranked, ranked[positive], side="right"), return_inverse=True)
        clips = order[: ends[-1]]
        between = csr_array((np.ones(len(clips), np.float32), clips, np.append(0, ends)), shape=(len(ends), len(score)))
        return _Ranking(between, group, order[positive])

    def average_precision(self, drawn: np.ndarray) -> np.ndarray:
        """float64 [draws] of clip weights float32 [n, draws]."""
        seen = np.cumsum(self.between @ drawn, axis=0, dtype=np.float64)[self.group].T
        weight = np.ascontiguousarray(drawn[self.positive].T, dtype=np.float64)
        hits = np.cumsum(weight, axis=1)
        # Hits up to the end of a group of ties: those of its last positive.
        end = np.searchsorted(self.group, self.group, side="right") - 1
        total = hits[:, -1]
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.where(seen > 0, hits[:, end] / seen, 0.0)
            return np.asarray(np.where(total > 0, (weight * precision).sum(axis=1) / total, np.nan))


def results(
    scores: Scores, labels: list[Label], single_label: bool, about: dict[str, Any], device: torch.device | None = None
) -> dict[str, Any]:
    """The content of `results.json`.

    Args:
        scores: Of the evaluated clips.
        labels: Vocabulary.
        single_label: Chooses the metric.
        about: Facts that make the number comparable: weights, split, fold, digest of the shards.
        device: As of `by_class`; given one, it is a collective of ranks that have the same scores.
    """
    curves = _curves(scores.logits, scores.targets, device)
    metrics = _metrics(scores.logits, scores.targets, single_label, curves)
    positives = scores.targets.sum(axis=0).astype(int)
    name = metric_name(single_label)
    return {
        "metric": name,
        "value": metrics[name],
        "interval": interval(scores.logits, scores.targets, name, device=device),
        "metrics": metrics,
        "clips": len(scores.rows),
        "classes_without_positives": int((positives == 0).sum()),
        **about,
        "per_class": [
            {
                "label": label.name,
                "id": label.id,
                "positives": int(count),
                "average_precision": None if np.isnan(value) else float(value),
                "auc": None if np.isnan(under) else float(under),
            }
            for label, count, value, under in zip(labels, positives, *curves.T, strict=True)
        ],
    }


def read_predictions(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys [n], targets bool [n, C] and logits float32 [n, C] of `predictions.parquet`."""
    table = pq.read_table(path)
    logits = table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    targets = np.zeros(logits.shape, dtype=bool)
    for row, labels in enumerate(table["labels"].to_pylist()):
        targets[row, labels] = True
    return table["key"].to_pylist(), targets, logits


def write_predictions(scores: Scores, keys: list[str], path: Path) -> None:
    """Writes `predictions.parquet`: key, labels (indices) and logits [C] of every scored clip, in key order."""
    order = np.argsort(np.array(keys), kind="stable")
    classes = scores.logits.shape[1]
    logits = pa.array(scores.logits[order].astype(np.float32).reshape(-1))
    labels = [np.flatnonzero(row > 0.5).astype(np.int32) for row in scores.targets[order]]
    table = pa.table(
        {
            "key": pa.array([keys[i] for i in order]),
            "labels": pa.array(labels, pa.list_(pa.int32())),
            "logits": pa.FixedSizeListArray.from_arrays(logits, classes),
        }
    )
    with new_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")

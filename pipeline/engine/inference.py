"""Scoring: every clip of the evaluation part exactly once, on any number of ranks.

In: a forward function and a loader. Out: `Scores` in index order, equal on all ranks; or mean losses.

Memory: n x C scores on each host (20 k clips x 527 classes: 42 MB); everything else is per batch.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline import distributed
from pipeline.data.loader import Loader
from pipeline.flow import Batch, Losses

log = logging.getLogger(__name__)


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
        batches: `Loader.eval_batches()`.

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
    return Scores(row[order], _finite(torch.cat(logits).numpy()[order]), torch.cat(targets).numpy()[order])


def _finite(logits: np.ndarray) -> np.ndarray:
    """Logits that can be ranked: NaN below all numbers, infinities at the ends; said once.

    A clip whose logits are NaN is so scored as if by chance. No comparison with NaN is true, so its true class would
    else come first, and scikit-learn refuses a whole set for it.
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
        batches: `loader.eval_batches(full=True)`.
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

"""One result from several finetuned runs: their scores averaged, or their weights.

In: run directories of the same task. Out: `Scored`, as of a single run.

The paper's ensemble (Table 1) averages the probabilities of runs that differ in their seed. Averaged weights
make one model of checkpoints on the same path, for the cost of one.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.special import expit, softmax

from pipeline.config import Recipe
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.jobs import Scored, score_run
from pipeline.model.weights import read_weights


def score_ensemble(runs: Sequence[tuple[Path, Path]], recipe: Recipe, world: World) -> Scored:
    """Mean probability of several runs: sigmoid of multi-label data, softmax of single-label data.

    Args:
        runs: (run directory, weights file) of each.
        recipe: Names the shards.
        world: Ranks.

    Raises:
        UserError: a run has other labels, or was held out other clips.
    """
    _check_labels(runs)
    first = score_run(*runs[0], recipe, world)
    logits, pools = [first.scores.logits], [first.about["pool"]]
    for run_dir, file in runs[1:]:
        other = score_run(run_dir, file, recipe, world)
        if other.keys != first.keys:
            raise UserError(f"{run_dir}: scored other clips than {runs[0][0]}; name the same --split for both")
        logits.append(other.scores.logits)
        pools.append(other.about["pool"])
    scores = replace(first.scores, logits=mean_probability(logits, first.spec.single_label))
    pool = ", ".join(dict.fromkeys(pools))
    about = first.about | {"pool": pool, "ensemble": [str(run_dir) for run_dir, _ in runs]}
    return Scored(scores, first.keys, first.spec, about)


def mean_probability(logits: Sequence[np.ndarray], single_label: bool) -> np.ndarray:
    """What an ensemble says: the mean of its members' probabilities.

    Args:
        logits: [n, C] of each member, of the same clips in the same order.
        single_label: Softmax over the classes, else a sigmoid for each.

    Returns:
        float32 [n, C].
    """
    total = np.zeros(logits[0].shape)
    for member in logits:
        total += softmax(member.astype(np.float64), axis=1) if single_label else expit(member.astype(np.float64))
    return (total / len(logits)).astype(np.float32)


def score_averaged_weights(runs: Sequence[tuple[Path, Path]], recipe: Recipe, world: World) -> Scored:
    """The model whose weights are the mean of several runs' weights.

    Args:
        runs: (run directory, weights file) of each; the first one's configuration builds the model.
        recipe: Names the shards.
        world: Ranks.

    Raises:
        UserError: a run has other labels, or the weights are not of one architecture.
    """
    _check_labels(runs)
    mean: dict[str, torch.Tensor] = {}
    for number, (_, file) in enumerate(runs, start=1):
        weights = read_weights(file)
        if mean and {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in mean.items()}:
            raise UserError(f"{file}: its tensors are not those of {runs[0][1]}; average runs of one model and method")
        for name, tensor in weights.items():
            kept = mean.setdefault(name, torch.zeros_like(tensor, dtype=torch.float64))
            kept += (tensor.double() - kept) / number
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mean.safetensors"
        save_file({name: tensor.float().contiguous() for name, tensor in mean.items()}, file)
        scored = score_run(runs[0][0], file, recipe, world)
    return replace(scored, about=scored.about | {"averaged": [str(run_dir) for run_dir, _ in runs]})


def _check_labels(runs: Sequence[tuple[Path, Path]]) -> None:
    """Before anything is scored.

    Raises:
        UserError: a run has other labels than the first, or the same in another order.
    """
    specs = [DataSpec.load(run_dir) for run_dir, _ in runs]
    for (run_dir, _), spec in zip(runs, specs, strict=True):
        if (spec.labels, spec.single_label) != (specs[0].labels, specs[0].single_label):
            raise UserError(f"{run_dir}: trained on other labels than {runs[0][0]}; name runs of one task")

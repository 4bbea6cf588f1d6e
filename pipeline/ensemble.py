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
    first = score_run(*runs[0], recipe, world)
    squash = (lambda logits: softmax(logits, axis=1)) if first.spec.single_label else expit
    total = squash(first.scores.logits.astype(np.float64))
    for run_dir, file in runs[1:]:
        other = score_run(run_dir, file, recipe, world)
        if other.keys != first.keys:
            raise UserError(f"{run_dir}: scored other clips than {runs[0][0]}; name the same --split for both")
        total += squash(other.scores.logits.astype(np.float64))
    scores = replace(first.scores, logits=(total / len(runs)).astype(np.float32))
    about = first.about | {"ensemble": [str(run_dir) for run_dir, _ in runs]}
    return Scored(scores, first.keys, first.spec, about)


def score_averaged_weights(runs: Sequence[tuple[Path, Path]], recipe: Recipe, world: World) -> Scored:
    """The model whose weights are the mean of several runs' weights.

    Args:
        runs: (run directory, weights file) of each; the first one's configuration builds the model.
        recipe: Names the shards.
        world: Ranks.

    Raises:
        UserError: the weights are not of one architecture.
    """
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

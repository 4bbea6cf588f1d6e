"""What a launcher hands to the training loop, and what the loop must remember.

In: built parts. Out: `Job`, with the run's arithmetic, and `Progress`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.data.loader import Loader
from pipeline.engine.plan import Shape
from pipeline.engine.setup import Batches
from pipeline.flow import Losses
from pipeline.tasks import FinetuneTask, PretrainTask
from pipeline.tracking import Tracker

Forward = Callable[..., Losses]


@dataclass(slots=True)
class Plateau:
    """State of the plateau rule: halve when the metric stops improving (SSAST).

    Attributes:
        best: Highest metric so far.
        waited: Evaluations since then.
        cuts: Times the rate was cut.
    """

    best: float = -math.inf
    waited: int = 0
    cuts: int = 0

    def observe(self, metric: float, patience: int, threshold: float) -> None:
        """Takes one evaluation; cuts after more than `patience` in a row without improvement.

        As torch's ReduceLROnPlateau (mode "max", threshold_mode "rel"), which SSAST uses: an improvement is at least
        `threshold` of the best so far.
        """
        if metric > self.best + threshold * abs(self.best) or self.best == -math.inf:
            self.best, self.waited = metric, 0
            return
        self.waited += 1
        if self.waited > patience:
            self.cuts, self.waited = self.cuts + 1, 0


@dataclass(frozen=True)
class Job:
    """Everything a run needs, built by a launcher.

    Attributes:
        recipe: Settings.
        ds: Reconciled DeepSpeed configuration.
        batches: Batch arithmetic.
        task: What DeepSpeed wraps.
        loader: Training clips.
        total_steps: Optimiser steps of the run.
        evaluate: (forward function, step) -> held-out metrics, equal on all ranks; None: nothing is held out.
        metric: The metric that must grow: the plateau rule and the best checkpoint go by it.
        run_dir: Where the run lives.
        tracker: MLflow.
    """

    recipe: PretrainRecipe | FinetuneRecipe
    ds: dict[str, Any]
    batches: Batches
    task: PretrainTask | FinetuneTask
    loader: Loader
    total_steps: int
    evaluate: Callable[[Forward, int], dict[str, float]] | None
    metric: str
    run_dir: Path
    tracker: Tracker

    @property
    def shapes(self) -> list[tuple[Shape, float]]:
        """Of the inputs of each length, and its share of the clips."""
        data = self.loader.spec
        return [(Shape(samples, data.mel_bins, data.frames_of(samples), len(data.labels)), share)
                for samples, share in self.loader.length_shares.items()]  # fmt: skip

    @property
    def kept_steps(self) -> frozenset[int]:
        """Steps after which `checkpoint.keep_at` makes a checkpoint that stays."""
        return frozenset(max(1, round(share * self.total_steps)) for share in self.recipe.checkpoint.keep_at)

    def due(self, step: int, clips: float) -> bool:
        """An interval of `clips` training clips ends with step `step` (0-based); 0 never does."""
        seen = step * self.batches.total
        return clips > 0 and (seen + self.batches.total) // clips > seen // clips

    def evaluation_due(self, step: int) -> bool:
        """After step `step` the run is evaluated."""
        config = self.recipe.eval
        intervals = (
            config.every * self.batches.total,
            config.every_clips,
            config.every_epochs * self.loader.clips,
        )
        return step + 1 == self.total_steps or any(self.due(step, interval) for interval in intervals)

    def save_due(self, step: int) -> bool:
        """After step `step` (and its evaluation) a checkpoint is saved."""
        every = self.recipe.checkpoint.every
        due = self.due(step, every * self.batches.total) if every else self.evaluation_due(step)
        return due or step + 1 == self.total_steps or step + 1 in self.kept_steps


@dataclass(slots=True)
class Progress:
    """What a checkpoint must remember besides weights and optimiser; clips and masks follow from the step.

    Attributes:
        step: Finished optimiser steps.
        plateau: State of the learning-rate rule.
        bad_steps: Non-finite steps in a row.
        skipped: Non-finite steps in all.
        averaged: Epochs in the averaged weights.
        train_metric: Sum and count of the training metric since the last evaluation.
        evaluate: The evaluation after `step` is due and was interrupted.
        metric: Watched metric after `step`; None: not evaluated there.
    """

    step: int = 0
    plateau: Plateau = field(default_factory=Plateau)
    bad_steps: int = 0
    skipped: int = 0
    averaged: int = 0
    train_metric: tuple[float, int] = (0.0, 0)
    evaluate: bool = False
    metric: float | None = None

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """From a checkpoint's `state.json`."""
        values = {name: state[name] for name in cls.__slots__}
        plateau = Plateau(**state["plateau"])
        if plateau.best is None:  # -inf, which JSON lacks: no evaluation so far
            plateau.best = -math.inf
        return cls(**values | {"plateau": plateau, "train_metric": tuple(state["train_metric"])})

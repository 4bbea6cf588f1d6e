"""Learning rate as a function of the step; the plateau rule's state is three numbers.

In: step, epoch and, for "plateau", the held-out metric. Out: the learning rate.
"""

import math
from dataclasses import dataclass

from pipeline.config import OptimConfig


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


def learning_rate(optim: OptimConfig, step: int, total_steps: int, epoch: float, plateau: Plateau) -> float:
    """Rate of the optimiser step number `step` (0-based).

    Args:
        optim: Settings.
        step: 0 .. total_steps - 1.
        total_steps: Of the run.
        epoch: Finished epochs at this step, fractional.
        plateau: Its cuts so far.
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "plateau":
        return optim.lr * optim.factor**plateau.cuts
    if optim.schedule == "step":
        return optim.lr * optim.factor ** sum(epoch >= milestone for milestone in optim.milestones)
    if optim.schedule == "cosine":
        progress = (step - optim.warmup) / max(1, total_steps - optim.warmup)
        return optim.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return optim.lr

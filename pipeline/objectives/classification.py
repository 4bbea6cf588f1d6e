"""Supervised losses: BCE for multi-label clips, CE where each has one label.

In: logits [B, C] and targets [B, C]. Out: a scalar in float32 or better, the mean over clips (and classes).
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.flow import full

SMALLEST = 1e-8  # probability whose logarithm is taken


def positive_weights(drawn: np.ndarray, draws: int, power: float) -> torch.Tensor:
    """(draws without a label / draws with it) ** power for each class, 1 where it is never drawn: float32 [C].

    Args:
        drawn: [C], draws with each label, of an epoch.
        draws: All of the epoch.
        power: 0: all 1; 1: a class's labels weigh as much as their absence.
    """
    ratios = np.where(drawn > 0, (draws - drawn) / np.maximum(drawn, SMALLEST), 1.0)
    return torch.from_numpy(ratios.clip(min=SMALLEST) ** power).float()


def classification_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    kind: str,
    *,
    smoothing: float = 0.0,
    gamma_pos: float = 0.0,
    gamma_neg: float = 0.0,
    margin: float = 0.0,
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean loss of a batch.

    BCE is asymmetric (ASL; Ridnik et al. 2021, Eq. 4 to 6) where one of its three numbers is not 0. With p the
    probability of a class, y its target, w its weight and q = max(p - margin, 0), a clip and class cost

        - w y (1 - p)^gamma_pos log p - (1 - y) q^gamma_neg log(1 - q)

    Args:
        logits: [B, C].
        targets: [B, C], multi-hot or soft (mixup).
        kind: "bce" (mean over clips and classes, AST) or "ce" (soft-target cross entropy).
        smoothing: Share of a target that is spread evenly over what a class may be: the C classes of "ce", yes and no
            of "bce".
        gamma_pos: See above.
        gamma_neg: See above.
        margin: See above.
        pos_weight: w [C], of "bce"; None: 1.
    """
    logits = full(logits)
    targets = targets.to(logits.dtype)
    if smoothing:
        targets = (1 - smoothing) * targets + smoothing / (2 if kind == "bce" else logits.shape[1])
    if kind == "ce":
        return F.cross_entropy(logits, targets)
    if not (gamma_pos or gamma_neg or margin):
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight)
    log_p, log_not = F.logsigmoid(logits), F.logsigmoid(-logits)
    # Powers by way of logarithms: that of 0 to less than 1 has no finite gradient.
    hit = (gamma_pos * log_not).exp() * log_p
    log_q = (logits.sigmoid() - margin).clamp(min=SMALLEST).log() if margin else log_p
    missed = (gamma_neg * log_q).exp() * (((-logits).sigmoid() + margin).clamp(max=1.0).log() if margin else log_not)
    weighted = hit if pos_weight is None else pos_weight * hit
    return -(targets * weighted + (1 - targets) * missed).mean()

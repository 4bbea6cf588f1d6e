"""Supervised losses: BCE for multi-label clips, CE where each has one label.

In: logits [B, C] and targets [B, C]. Out: a scalar in float32 or better, the mean over clips (and classes).
"""

import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.flow import full


def classification_loss(logits: torch.Tensor, targets: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean loss of a batch.

    Args:
        logits: [B, C].
        targets: [B, C], multi-hot or soft (mixup).
        kind: "bce" (mean over clips and classes, AST) or "ce" (soft-target cross entropy).
    """
    logits = full(logits)
    targets = targets.to(logits.dtype)
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets)

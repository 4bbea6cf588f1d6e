"""Masked-patch objectives: InfoNCE and reconstruction (Eq. 2, 7; SSAST).

In: predictions and targets of the masked patches, [B, K, P]. Out: scalars in float32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.flow import full, without_autocast


@dataclass(slots=True)
class MaskedPatchLoss:
    """Scalars, float32, means over clips and masked patches.

    Attributes:
        nce: Eq. 7a. Negatives are the other masked patches of the same clip.
        mse: Eq. 7b, also averaged over a patch's values, as SSAST does.
        accuracy: Share of predictions i whose best target is their own (Figure 2, left): the target j of the largest
            logit, or with SSAST's softmax, as in its code, of the largest probability softmax_i(logits)_ij.
    """

    nce: torch.Tensor
    mse: torch.Tensor
    accuracy: torch.Tensor


def masked_patch_loss(
    predicted: torch.Tensor,
    reconstructed: torch.Tensor,
    target: torch.Tensor,
    softmax: str = "paper",
    second: torch.Tensor | None = None,
) -> MaskedPatchLoss:
    """InfoNCE and MSE of masked patches, one batched matmul for all clips.

    Args:
        predicted: c, [B, K, P].
        reconstructed: r, [B, K, P].
        target: x, [B, K, P]; no gradient flows into it.
        softmax: "paper": over targets j for a prediction i (Eq. 7a). "ssast": its code's transpose.
        second: x of the reconstruction, where that has a mask of its own.
    """
    target = full(target.detach())
    rebuilt = target if second is None else full(second.detach())
    with without_autocast(target):
        logits = full(predicted) @ target.transpose(1, 2)  # (B, K predictions, K targets), never in half precision
    own = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    best = logits.detach()
    directed = logits
    if softmax == "ssast":
        directed, best = logits.transpose(1, 2), best.log_softmax(dim=1)
    return MaskedPatchLoss(
        nce=F.cross_entropy(directed.flatten(0, 1), own.flatten()),
        mse=F.mse_loss(full(reconstructed), rebuilt),
        accuracy=(best.argmax(dim=2) == own).float().mean(),
    )


def normalise_patches(patches: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Each patch to zero mean and unit variance over its values, without gradient.

    For targets that are learned (the MSAE map): a map that shrinks to a constant would otherwise
    make the reconstruction trivially perfect.
    """
    patches = full(patches.detach())
    centred = patches - patches.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()

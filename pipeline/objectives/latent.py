"""Latent prediction: what a teacher's blocks make of a clip, as targets of its masked patches and of the whole clip.

In: block outputs of the teacher, [B, N, D] each. Out: targets, float32 or better, without gradient.

As in data2vec 2.0 (Baevski et al. 2023) and EAT (Chen et al. 2024). With x_l the output of block l, of L blocks:

    y = LayerNorm(1/L sum_l (x_l - mean x_l) / std x_l)    mean and deviation over the patches of a clip, by channel
    clip target: mean y                                    over the patches and streams of a clip

The first normalisation takes away what all patches of a clip have in common. It has to: a loss whose target holds it
makes it grow, and in a few hundred steps the teacher says nothing else. `LatentTargets.variance` tells.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.flow import full

EPS = 1e-6


class LatentTargets(NamedTuple):
    """What is to be predicted of a micro-batch.

    Attributes:
        patches: y by stream, [B, N, D]; each patch has mean 0 and variance 1.
        clip: [B, D], one for all streams.
        variance: By stream: the variance of a block's outputs over the patches of a clip, as a share of their mean
            square, mean over blocks and clips: 0 to 1. 0: the teacher says the same of all patches.
    """

    patches: dict[str, torch.Tensor]
    clip: torch.Tensor
    variance: dict[str, torch.Tensor]


def latent_targets(heard: Mapping[str, Sequence[torch.Tensor]]) -> LatentTargets:
    """Targets out of each stream's block outputs, [B, N, D] each; N may differ between streams, which count alike."""
    patches, variance = {}, {}
    for name, outputs in heard.items():
        total, shares = torch.zeros_like(full(outputs[0])), []
        for output in map(full, outputs):
            mean = output.mean(dim=1, keepdim=True)
            centred = output - mean
            spread = centred.square().mean(dim=1, keepdim=True)  # on a CPU half the time of torch.var_mean
            total += centred * (spread + EPS).rsqrt()
            shares.append(spread.mean(dim=(1, 2)) / ((spread + mean.square()).mean(dim=(1, 2)) + EPS))
        patches[name] = F.layer_norm(total / len(outputs), total.shape[-1:], eps=EPS)
        variance[name] = torch.stack(shares).mean()
    clip = torch.stack([y.mean(dim=1) for y in patches.values()]).mean(dim=0)
    return LatentTargets(patches, clip, variance)

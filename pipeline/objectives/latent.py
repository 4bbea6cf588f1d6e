"""Latent prediction: what a teacher's blocks make of a clip, as targets of its masked patches and of the whole clip.

In: block outputs of the teacher, [B, N, D] each. Out: targets, float32 or better, without gradient.

As in data2vec 2.0 (Baevski et al. 2023) and EAT (Chen et al. 2024) the outputs of several blocks are normalised each,
averaged and normalised again. With x_l the output of block l, of L blocks:

    y = 1/L sum_l LayerNorm(x_l)            each block, whatever its scale, has the same part
    patch target: (y - mean y) / std y      over the patches of a clip, channel by channel
    clip target: LayerNorm(mean y)          over the patches and streams of a clip

The two complement one another: the clip's mean, which the first takes away, is what the second keeps. A teacher that
says the same of all patches leaves nothing to predict; `LatentTargets.variance` tells.
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
        patches: By stream, [B, N, D]; mean 0 and variance 1 over the patches of a clip.
        clip: [B, D], one for all streams.
        variance: By stream, of y over the patches of a clip, mean over channels and clips: 0 where the teacher has
            collapsed, at most 1.
    """

    patches: dict[str, torch.Tensor]
    clip: torch.Tensor
    variance: dict[str, torch.Tensor]


def block_mean(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The blocks' outputs [B, N, D] -> y, their normalised mean: [B, N, D]."""
    total = F.layer_norm(full(outputs[0]), outputs[0].shape[-1:], eps=EPS)
    for output in outputs[1:]:
        total = total + F.layer_norm(full(output), output.shape[-1:], eps=EPS)
    return total / len(outputs)


def latent_targets(heard: Mapping[str, Sequence[torch.Tensor]]) -> LatentTargets:
    """Targets out of each stream's block outputs, [B, N, D] each; N may differ between streams, which count alike."""
    patches, variance, clips = {}, {}, []
    for name, outputs in heard.items():
        y = block_mean(outputs)
        spread, mean = torch.var_mean(y, dim=1, correction=0, keepdim=True)
        patches[name] = (y - mean) / (spread + EPS).sqrt()
        variance[name] = spread.mean()
        clips.append(mean.squeeze(1))
    clip = torch.stack(clips).mean(dim=0)
    return LatentTargets(patches, F.layer_norm(clip, clip.shape[-1:], eps=EPS), variance)

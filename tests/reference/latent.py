"""Latent prediction, one clip, one patch and one block at a time: what a teacher hears, its targets, the summary."""

import torch

from tests.reference import swab, visible


def heard(model, side: str, one_map: torch.Tensor) -> list[torch.Tensor]:
    """[M, T] -> the output of each block for all patches, [N, D]."""
    frequency, time, _ = getattr(model, f"{side}_tokens").positions.shape
    x, outputs = torch.stack(visible.sequence(model, side, one_map, list(range(frequency * time)))), []
    for block in model.encoder.blocks:
        x = swab.block(block, x)
        outputs.append(x[2:])
    return outputs


def normal(values: torch.Tensor) -> torch.Tensor:
    """A list of numbers with mean 0 and variance 1."""
    centred = values - values.sum() / len(values)
    return centred / torch.sqrt((centred**2).sum() / len(values) + 1e-6)


def patch_targets(outputs: list[torch.Tensor], last: int) -> torch.Tensor:
    """Each channel of each of the last blocks normalised over the patches; of their mean each patch: [N, D]."""
    total = 0.0
    for output in outputs[len(outputs) - last :]:
        total = total + torch.stack([normal(output[:, channel]) for channel in range(output.shape[1])], dim=1)
    return torch.stack([normal(patch / last) for patch in total])


def clip_target(streams: list[torch.Tensor]) -> torch.Tensor:
    """Mean target of the patches of each stream, and of the streams: [D]."""
    return sum(y.sum(dim=0) / len(y) for y in streams) / len(streams)


def variance(outputs: list[torch.Tensor], last: int) -> torch.Tensor:
    """Mean variance of a channel over the patches, as a share of the mean square."""
    shares = []
    for output in outputs[len(outputs) - last :]:
        over_patches = sum(output[:, channel].var(correction=0) for channel in range(output.shape[1])) / output.shape[1]
        shares.append(over_patches / (sum((patch**2).mean() for patch in output) / len(output) + 1e-6))
    return sum(shares) / last


def summary(linear, encoded: torch.Tensor) -> torch.Tensor:
    """What the linear layer makes of the mean visible token: [D]."""
    return linear.weight @ (encoded.sum(dim=0) / len(encoded)) + linear.bias

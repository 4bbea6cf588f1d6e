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


def average(outputs: list[torch.Tensor], last: int) -> torch.Tensor:
    """Mean of the last blocks' outputs, each token of each block normalised: [N, D]."""
    chosen = outputs[len(outputs) - last :]
    return sum(torch.stack([normal(token) for token in output]) for output in chosen) / last


def patch_targets(y: torch.Tensor) -> torch.Tensor:
    """Each channel normalised over the patches of the clip: [N, D]."""
    return torch.stack([normal(y[:, channel]) for channel in range(y.shape[1])], dim=1)


def clip_target(streams: list[torch.Tensor]) -> torch.Tensor:
    """Mean patch of each stream, their mean, normalised: [D]."""
    return normal(sum(y.sum(dim=0) / len(y) for y in streams) / len(streams))


def summary(linear, encoded: torch.Tensor) -> torch.Tensor:
    """What the linear layer makes of the mean visible token: [D]."""
    return linear.weight @ (encoded.sum(dim=0) / len(encoded)) + linear.bias

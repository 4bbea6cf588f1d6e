"""Eq. 1 sample by sample: convolve, normalise, rectify, average over 10 ms, concatenate."""

import torch


def convolve(x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """[L], [channels, kernel] -> [channels, L / stride], zero-padded by half a kernel."""
    channels, kernel = weight.shape
    half = kernel // 2
    columns = []
    for centre in range(0, len(x), stride):
        total = torch.zeros(channels, dtype=x.dtype)
        for tap in range(kernel):
            sample = centre + tap - half
            if 0 <= sample < len(x):
                total = total + weight[:, tap] * x[sample]
        columns.append(total)
    return torch.stack(columns, dim=1)


def embed(waveform: torch.Tensor, module, strides: tuple[int, ...], lengths: list[int]) -> torch.Tensor:
    """[B, T * 160] -> [B, M, T] with the weights of a `MultiScaleEmbedding` of ReLU, normalised over the audio."""
    clips = []
    for x, length in zip(waveform, lengths, strict=True):
        scales = []
        for scale, stride in zip(module.scales, strides, strict=True):
            y = convolve(x, scale.weight[:, 0], stride)
            audio = y[:, : -(-length // stride)]
            y = (y - audio.mean()) / torch.sqrt(((audio - audio.mean()) ** 2).mean() + 1e-6)
            y = torch.stack([y[c] * scale.norm_weight[c] + scale.bias[c] for c in range(len(y))])
            y = torch.where(y > 0, y, torch.zeros_like(y))
            span = 160 // stride
            frames = [y[:, start : start + span].sum(dim=1) / span for start in range(0, y.shape[1], span)]
            scales.append(torch.stack(frames, dim=1))
        clips.append(torch.cat(scales))
    return torch.stack(clips)

"""Augmentation of training clips, batched, on the device, keyed by position.

In: raw waveforms or fbanks of a batch and the clips' positions. Out: the same, changed. Every draw is a
function of (seed, position), so a clip is augmented alike on any rank and after any restart.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import betaincinv

from pipeline.config import AugmentConfig
from pipeline.rng import uniform


@dataclass(frozen=True)
class MixupPlan:
    """Who is mixed with whom.

    Attributes:
        mixed: bool [B].
        weight: float64 [B], of the clip itself; 1 where it is not mixed.
        draw: float64 [B], picks the partner.
    """

    mixed: np.ndarray
    weight: np.ndarray
    draw: np.ndarray


def changes_waveform(config: AugmentConfig) -> bool:
    """A stored fbank would not be the augmented waveform's."""
    return config.mixup > 0 or config.noise > 0 or config.roll > 0


def plan_mixup(config: AugmentConfig, seed: int, position: torch.Tensor) -> MixupPlan:
    """Draws mixup for a batch: a share `mixup` of the clips, lambda ~ Beta(alpha, alpha)."""
    draws = uniform(seed, "mixup", position.cpu(), 3).double().numpy()
    mixed = draws[:, 0] < config.mixup
    weight = np.where(mixed, betaincinv(config.mixup_alpha, config.mixup_alpha, draws[:, 1]), 1.0)
    return MixupPlan(mixed, weight, draws[:, 2])


def augment_waveform(
    waveform: torch.Tensor, config: AugmentConfig, seed: int, position: torch.Tensor, sample_rate: int
) -> torch.Tensor:
    """Circular shift and noise, on [B, L]."""
    if config.roll > 0:
        limit = config.roll * sample_rate
        shift = ((2 * uniform(seed, "roll", position, 1) - 1) * limit).round().long()
        index = torch.arange(waveform.shape[1], device=waveform.device)
        waveform = waveform.gather(1, (index - shift) % waveform.shape[1])
    if config.noise > 0:
        level = config.noise * uniform(seed, "noise.level", position, 1) * waveform.abs().amax(dim=1, keepdim=True)
        waveform = waveform + level * (2 * uniform(seed, "noise", position, waveform.shape[1]) - 1)
    return waveform


def mask_fbank(fbank: torch.Tensor, config: AugmentConfig, seed: int, position: torch.Tensor) -> torch.Tensor:
    """SpecAugment on raw fbanks [B, T, M]: one band and one span of zeros, before normalisation as in AST.

    Widths are uniform in [0, freq_mask] bins and [0, time_mask] frames.
    """
    if config.freq_mask:
        fbank = fbank.masked_fill(_span(fbank.shape[2], config.freq_mask, seed, "freq", position)[:, None, :], 0.0)
    if config.time_mask:
        fbank = fbank.masked_fill(_span(fbank.shape[1], config.time_mask, seed, "time", position)[:, :, None], 0.0)
    return fbank


def _span(length: int, widest: int, seed: int, purpose: str, position: torch.Tensor) -> torch.Tensor:
    """Bool [B, length]: one run of True per clip."""
    draws = uniform(seed, f"specaugment.{purpose}", position, 2)
    width = (draws[:, :1] * (min(widest, length) + 1)).long()
    start = (draws[:, 1:] * (length - width + 1)).long()
    index = torch.arange(length, device=position.device)
    return (index >= start) & (index < start + width)

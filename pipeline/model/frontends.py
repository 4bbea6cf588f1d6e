"""Front ends of the waveform beside MSAE, which cost less or know what a band is.

In: a waveform [B, T * 160]. Out: a map [B, channels, T] on the fbank's frames, as MSAE's.

What follows a clip's audio does not change the map of the audio: kernels that reach into the padding find zeros, as at
the end of a clip that is not padded, and with `norm` = "unpadded" statistics are those of the audio alone.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from pipeline.config import ModelConfig
from pipeline.flow import full
from pipeline.model.embed import SAMPLES_PER_FRAME, MultiScaleEmbedding, clip_norm
from pipeline.model.pooled_conv import real_positions

KERNEL, STRIDES, WIDTHS = 40, (10, 4, 4), (24, 32)  # of the strided convolutions; the last one's width is the map's
SINC_TAPS, SINC_STRIDE = 251, 40  # 16 ms, as SincNet; four values of a band's energy a frame
SAMPLE_RATE, LOWEST = 16000, 30.0  # Hz
FLOOR = 1e-8  # energy of silence: -80 dB


def frontend(config: ModelConfig) -> nn.Module:
    """The module that `model.frontend` names: waveform [B, T * 160], samples of audio [B] -> [B, channels, T]."""
    channels = sum(config.channels)
    if config.frontend == "strided":
        return StridedEmbedding(channels, config.norm)
    if config.frontend == "sinc":
        return SincEmbedding(channels, config.norm)
    return MultiScaleEmbedding(config.kernels, config.kernel_strides, config.channels, config.norm, config.activation)


class StridedEmbedding(nn.Module):
    """Strided convolutions, as in wav2vec 2.0 and WavJEPA, at 10 ms: Conv1d -> GroupNorm, then twice GELU -> Conv1d.

    Kernels after the first are as long as their strides: a frame is made of its own 160 samples and 15 on either side.
    The norm keeps the levels of a clip's frames against each other, which a norm of each position would take out.

    Args:
        channels: Of the map.
        norm: "unpadded", "group" or "none", as of MSAE.
    """

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(WIDTHS[0], KERNEL))
        self.second = nn.Parameter(torch.empty(WIDTHS[1], STRIDES[1] * WIDTHS[0]))
        self.third = nn.Parameter(torch.empty(channels, STRIDES[2] * WIDTHS[1]))
        for weight in (self.first, self.second, self.third):
            nn.init.kaiming_normal_(weight)
        self.norm_weight = None if norm == "none" else nn.Parameter(torch.ones(WIDTHS[0]))
        self.bias = nn.Parameter(torch.zeros(WIDTHS[0]))
        self.second_bias = nn.Parameter(torch.zeros(WIDTHS[1]))
        self.third_bias = nn.Parameter(torch.zeros(channels))
        self.unpadded = norm == "unpadded"

    def forward(self, waveform: torch.Tensor, length: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T * 160], of which int64 `length` [B] samples are audio (None: all) -> [B, channels, T]."""
        pad = (KERNEL - STRIDES[0]) // 2
        # As matrix products, positions before channels: activations stay in the order in which each step reads them.
        x = F.linear(F.pad(waveform, (pad, pad)).unfold(1, KERNEL, STRIDES[0]), self.first)
        if self.norm_weight is None:
            x = x + self.bias
        else:
            real = real_positions(waveform, length, STRIDES[0], x.shape[1]) if self.unpadded else None
            x = clip_norm(x.mT, self.norm_weight, self.bias, real).mT
        later = (self.second, self.second_bias), (self.third, self.third_bias)
        for (weight, bias), stride in zip(later, STRIDES[1:], strict=True):
            x = F.linear(torch.unflatten(F.gelu(x), 1, (-1, stride)).flatten(2), weight, bias)
        return x.mT


class SincEmbedding(nn.Module):
    """Band-pass filters whose edges are learned (SincNet; Ravanelli & Bengio 2018), and the logarithm of their energy.

    Filters begin as mel bands, each from one point of the mel scale to the next but one, so that the map begins as an
    fbank from the waveform. What is learned is the logarithm of each band's lower edge and width over the initial ones:
    a step of the optimiser moves all bands by like shares, and weight decay draws them back to the mel scale.

    Args:
        channels: Bands.
        norm: "unpadded", "group" or "none", of the logarithms.
    """

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.edges = nn.Parameter(torch.zeros(2, channels))
        self.norm_weight = None if norm == "none" else nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.unpadded = norm == "unpadded"

    def bands(self) -> torch.Tensor:
        """Lower and upper edges in Hz, float32 [2, channels]."""
        edges = full(self.edges)
        scale = torch.linspace(_mel(LOWEST), _mel(SAMPLE_RATE / 2), edges.shape[1] + 2, device=edges.device)
        points = 700 * (10 ** (scale / 2595) - 1)
        lower = points[:-2] * edges[0].exp()
        upper = lower + (points[2:] - points[:-2]) * edges[1].exp()
        return torch.stack([lower, upper]).clamp(max=SAMPLE_RATE / 2)

    def filters(self) -> torch.Tensor:
        """Impulse responses under a Hamming window, of gain 1, cosine and sine phase: float32 [2 channels, taps].

        The difference of two low-pass filters, sin(2 pi h n) - sin(2 pi l n) over pi n, is 2 w sinc(w n) cos(2 pi c n)
        of the width w = h - l and the centre c; with the sine for the cosine it is the same a quarter period later. The
        squares of both add up to an energy that does not depend on a tone's phase, however coarse the stride.
        """
        lower, upper = (edge[:, None] / SAMPLE_RATE for edge in self.bands())
        time = torch.arange(SINC_TAPS, device=lower.device) - SINC_TAPS // 2
        window = 0.54 + 0.46 * torch.cos(2 * torch.pi * time / (SINC_TAPS - 1))
        envelope = window * 2 * (upper - lower) * torch.sinc((upper - lower) * time)
        phase = torch.pi * (upper + lower) * time
        return torch.cat([envelope * phase.cos(), envelope * phase.sin()])

    def forward(self, waveform: torch.Tensor, length: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T * 160], of which int64 `length` [B] samples are audio (None: all) -> [B, channels, T]."""
        filters = self.filters().to(waveform.dtype)[:, None]
        x = F.conv1d(waveform[:, None], filters, stride=SINC_STRIDE, padding=SINC_TAPS // 2)
        # Energies and their logarithms in float32: half precision's smallest numbers are audible levels.
        energy = torch.unflatten(full(x).square(), 1, (2, -1)).mean(dim=1)
        x = F.avg_pool1d(energy, SAMPLES_PER_FRAME // SINC_STRIDE).clamp(min=FLOOR).log()
        if self.norm_weight is None:
            x = x + full(self.bias)[:, None]
        else:
            real = real_positions(waveform, length, SAMPLES_PER_FRAME, x.shape[2]) if self.unpadded else None
            x = clip_norm(x, full(self.norm_weight), full(self.bias), real)
        return x.to(waveform.dtype)


def _mel(frequency: float) -> float:
    return 2595 * math.log10(1 + frequency / 700)

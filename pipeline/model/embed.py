"""Representations -> patch tokens with positions.

In: a normalised fbank [B, T, M] or a waveform [B, L]. Out: a map [B, M, T], its patches, tokens [B, N, D].
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from pipeline.flow import full
from pipeline.model.masking import gather_patches
from pipeline.model.pooled_conv import pooled_conv, real_positions

SAMPLES_PER_FRAME = 160  # 10 ms at 16 kHz, the fbank's hop: both representations share a time axis
NORM_EPS = 1e-6


class MultiScaleEmbedding(nn.Module):
    """MSAE (Eq. 1): convolutions of several kernels over the waveform, pooled to the fbank's frames.

    Conv1d -> GroupNorm -> nonlinearity -> average pool, one branch a scale, concatenated on channels.
    The nonlinearity before the pool is essential: a convolution followed by an average is one long
    low-pass filter, which leaves under 0.4 % of any tone above 100 Hz. GroupNorm, because the
    running statistics of BatchNorm drift apart between data-parallel ranks. With `norm` = "unpadded" its statistics
    are those of a clip's audio without the zero padding: over the padded clip, as with "group", they fall with the
    share of padding, and the map of the same sound is 1.4 times as large in 5 s padded to 10, 3.2 times in 1 s.

    Args:
        kernels: Kernel size per scale (11, 51, 101).
        strides: Stride per scale (1, 5, 10); each divides 160.
        channels: Output channels per scale (43, 43, 42).
        norm: "unpadded", "group" or "none".
        activation: "relu", "gelu" or "none" (Eq. 1 read literally).
    """

    def __init__(
        self, kernels: tuple[int, ...], strides: tuple[int, ...], channels: tuple[int, ...], norm: str, activation: str
    ) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            Scale(kernel, stride, width, norm, activation)
            for kernel, stride, width in zip(kernels, strides, channels, strict=True)
        )

    def forward(self, waveform: torch.Tensor, length: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T * 160], of which int64 `length` [B] samples are audio (None: all) -> [B, sum of channels, T]."""
        return torch.cat([scale(waveform, length) for scale in self.scales], dim=1)


class Scale(nn.Module):
    """One scale of MSAE: Conv1d -> GroupNorm -> nonlinearity -> average pool to frames.

    Args:
        kernel: Kernel size; padded with kernel // 2.
        stride: Of the convolution; divides 160.
        channels: Output channels.
        norm: "unpadded", "group" or "none".
        activation: "relu", "gelu" or "none".
    """

    def __init__(self, kernel: int, stride: int, channels: int, norm: str, activation: str) -> None:
        super().__init__()
        self.stride, self.activation, self.unpadded = stride, activation, norm == "unpadded"
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # nn.Conv1d's
        self.norm_weight = None if norm == "none" else nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))  # of the normalisation, where there is one
        # Beyond, the k x k moments cost more than the activations that they save.
        self.fused = norm != "none" and activation == "relu" and kernel % 2 == 1 and kernel < channels

    def forward(self, waveform: torch.Tensor, length: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T * 160], of which int64 `length` [B] samples are audio (None: all) -> [B, channels, T]."""
        length = length if self.unpadded else None
        exporting = torch.compiler.is_exporting()  # no graph format knows the fused operation
        if self.fused and self.norm_weight is not None and not waveform.requires_grad and not exporting:
            return pooled_conv(
                waveform,
                self.weight[:, 0],
                self.norm_weight,
                self.bias,
                length,
                stride=self.stride,
                hop=SAMPLES_PER_FRAME,
                eps=NORM_EPS,
            )
        bias = self.bias if self.norm_weight is None else None
        x = F.conv1d(waveform[:, None], self.weight, bias, self.stride, padding=self.weight.shape[-1] // 2)
        if self.norm_weight is not None:
            real = None if length is None else real_positions(waveform, length, self.stride, x.shape[2])
            x = clip_norm(x, self.norm_weight, self.bias, real)
        if self.activation != "none":
            x = F.relu(x) if self.activation == "relu" else F.gelu(x)
        # Of an even kernel there is one position more, which at a stride of 160 would be a frame more.
        return F.avg_pool1d(x, SAMPLES_PER_FRAME // self.stride)[..., : waveform.shape[1] // SAMPLES_PER_FRAME]


def clip_norm(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """GroupNorm of one group, [B, channels, n], with the statistics of each clip's first `real` [B] positions.

    Statistics are float32 at least; `real` None: of all positions.
    """
    if real is None:
        return F.group_norm(x, 1, gain, bias, NORM_EPS)
    z = full(x)
    inside = (torch.arange(x.shape[2], device=x.device) < real[:, None]).to(z.dtype)
    count = real * x.shape[1]
    mean = (z.sum(dim=1) * inside).sum(dim=1) / count
    square = (z.square().sum(dim=1) * inside).sum(dim=1) / count
    rstd = (square - mean.square()).clamp(min=0.0).add(NORM_EPS).rsqrt()
    scale = rstd[:, None] * full(gain)
    shift = full(bias) - mean[:, None] * scale
    return (z * scale[..., None] + shift[..., None]).to(x.dtype)


class PatchEmbedding(nn.Module):
    """Patchify: a strided convolution over a map, frequency-major (index = f * T' + t), as SSAST.

    Args:
        width: D.
        patch: Patch side.
        stride: Patch stride.
        norm: A LayerNorm of each patch's token.
    """

    def __init__(self, width: int, patch: int, stride: int, norm: bool = False) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, patch, stride)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS) if norm else None

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """[B, M, T] -> [B, N, D]."""
        grid: torch.Tensor = self.proj(maps[:, None])  # (B, D, f, t)
        patches = grid.flatten(2).transpose(1, 2)
        return patches if self.norm is None else self.norm(patches)


def patchify(maps: torch.Tensor, patch: int) -> torch.Tensor:
    """The pixels of non-overlapping patches, the targets of masked prediction: [B, M, T] -> [B, N, patch^2]."""
    rows, columns = (size // patch for size in maps.shape[1:])
    cut = maps[:, : rows * patch, : columns * patch]  # `F.unfold` would start a kernel for each clip
    blocks = torch.unflatten(torch.unflatten(cut, 2, (columns, patch)), 1, (rows, patch))
    return blocks.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2).transpose(1, 2)  # laid out as `F.unfold` does


def patch_grid(mel_bins: int, frames: int, patch: int, stride: int) -> tuple[int, int]:
    """(patches along frequency, patches along time)."""
    return (mel_bins - patch) // stride + 1, (frames - patch) // stride + 1


class TokenSequence(nn.Module):
    """Masks or drops patch tokens, adds positions and prepends cls and dist: one representation's sequence.

    Position parameters keep their grid in their shape, [f, t, D], so that a checkpoint says by itself
    how it must be resized.

    Args:
        width: D.
        grid: Patches along frequency and time, of the longest input.
        modality: Add a learned vector for the representation.
        maskable: Have a mask token.
        shorter: Positions of an input of fewer columns, as of `resize_positions`; or "rotary": positions of frequency
            alone, [f, 1, D], for an encoder that tells time by `turns`.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], modality: bool, maskable: bool, shorter: str = "centre"
    ) -> None:
        super().__init__()
        self.shorter = shorter
        self.positions = nn.Parameter(torch.empty(grid[0], 1 if shorter == "rotary" else grid[1], width))
        self.mask_token = nn.Parameter(torch.empty(width)) if maskable else None
        self.modality = nn.Parameter(torch.empty(width)) if modality else None
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)
        if self.mask_token is not None:
            nn.init.xavier_normal_(self.mask_token[None, None])  # SSAST's, of shape [1, 1, D]: deviation D^-1/2

    def forward(
        self,
        patches: torch.Tensor,
        special: torch.Tensor,
        masked: torch.Tensor | None,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Builds the sequence.

        Args:
            patches: [B, N, D].
            special: [2, D], cls and dist with their positions; or [1, D].
            masked: int64 [B, K], indices of the patches that the mask token replaces; None: none.
            kept: int64 [B, N'], indices of the patches that the sequence has, each with its own position; None: all.

        Returns:
            [B, 2 + N, D], or N' for N, or 1 for 2.
        """
        if masked is not None and self.mask_token is not None:
            hidden = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device).scatter_(1, masked, True)
            patches = torch.where(hidden[..., None], self.mask_token, patches)
        rows = self.positions.shape[0]
        columns = patches.shape[1] // rows
        if self.shorter == "rotary":
            positions = self.positions.expand(-1, columns, -1)
        else:
            positions = resize_positions(self.positions, (rows, columns), self.shorter)
        patches = patches + positions.flatten(0, 1)
        if self.modality is not None:
            patches = patches + self.modality
        if kept is not None:
            patches = gather_patches(patches, kept)
        return torch.cat([special.expand(patches.shape[0], -1, -1), patches], dim=1)


class SpecialTokens(nn.Module):
    """The cls and dist tokens, or cls alone, with their positions, shared by both representations."""

    def __init__(self, width: int, count: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, width))
        self.positions = nn.Parameter(torch.empty(count, width))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self) -> torch.Tensor:
        """[count, D]."""
        return self.tokens + self.positions


def resize_positions(positions: torch.Tensor, grid: tuple[int, int], shorter: str = "centre") -> torch.Tensor:
    """Fits learned positions [f, t, D] to another grid, as SSAST does for finetuning; a view where it can be one.

    Time: where the new grid is shorter, its centre is cut out, or with `shorter` = "interpolated" all of it is
    interpolated; where it is longer, bilinear. Frequency: bilinear.
    """
    frequency, time = grid
    if time < positions.shape[1] and shorter != "interpolated":
        start = positions.shape[1] // 2 - time // 2  # SSAST's and AST's centre; for an odd `time` one later
        positions = positions[:, start : start + time]
    if positions.shape[:2] == grid:
        return positions
    resized = F.interpolate(
        positions.float().permute(2, 0, 1)[None], size=(frequency, time), mode="bilinear", align_corners=False
    )
    return resized[0].permute(1, 2, 0).to(positions.dtype)

"""Raw batches -> `Batch`es on the device: conversion, mixup, augmentation, fbank, normalisation.

In: int16 waveforms and float16 fbanks as they lie in the shards, in shared host memory. Out: float32 tensors.

A GPU gets the raw numbers (half the bytes, from pinned memory, asynchronously) and converts them there. On a
CPU each clip is converted while it is in the core's cache, into memory that is used again as soon as no
tensor refers to it: fresh memory costs a page fault per 4 KiB, as much as the conversion.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.config import AugmentConfig
from pipeline.data.augment import augment_waveform, mask_fbank
from pipeline.data.fbank import fbank as compute_fbank
from pipeline.data.reader import Needs
from pipeline.data.spec import DataSpec
from pipeline.flow import Batch

INT16_SCALE = 1 / 32768  # a power of two: exact


@dataclass(slots=True)
class RawBatch:
    """A batch on the host, as it lies in the shards.

    Attributes:
        position, row, valid: As in `Batch`.
        waveform: int16 [B, L], or None.
        partner: int16 [B, L], mixup's other clips, or None.
        weight: float64 [B], of the clip itself in its mixture.
        fbank: float16 [B, frames, M], or None.
        targets: float32 [B, C].
    """

    position: np.ndarray
    row: np.ndarray
    valid: np.ndarray
    waveform: np.ndarray | None
    partner: np.ndarray | None
    weight: np.ndarray
    fbank: np.ndarray | None
    targets: np.ndarray


class Assembler:
    """Makes batches out of raw ones.

    Args:
        spec: Format and normalisation.
        augment: Of training clips.
        needs: What the method reads.
        online: Fbanks are computed from waveforms.
        seed: Of augmentation.
        device: Of the batches.
    """

    def __init__(
        self, spec: DataSpec, augment: AugmentConfig, needs: Needs, online: bool, seed: int, device: torch.device
    ) -> None:
        self._spec, self._augment, self._needs, self._online = spec, augment, needs, online
        self._seed, self._device = seed, device
        self._memory = _Recycled()

    def __call__(self, raw: RawBatch, augmented: bool) -> Batch:
        """The batch; on a GPU its copies may still be under way on the current stream."""
        position, row, valid, targets = map(self._small, (raw.position, raw.row, raw.valid, raw.targets))
        waveform, fbank = None, None
        if raw.waveform is not None:
            waveform = self._floats(raw.waveform, raw.waveform.shape, INT16_SCALE)
            if raw.partner is not None:
                weight = self._small(raw.weight.astype(np.float32))[:, None]
                partner = self._floats(raw.partner, raw.partner.shape, INT16_SCALE)
                waveform = weight * waveform + (1 - weight) * partner
            if augmented:
                waveform = augment_waveform(waveform, self._augment, self._seed, position, self._spec.sample_rate)
        if self._online and waveform is not None:
            frames = pad_frames(compute_fbank(waveform, self._spec.sample_rate, self._spec.mel_bins), self._spec.frames)
            fbank = self._normalised(frames, position, augmented)
        elif raw.fbank is not None:
            fbank = self._stored(raw.fbank, position, augmented)
        return Batch(position, row, valid, waveform if self._needs.waveform else None, fbank, targets)

    def _small(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _stored(self, raw: np.ndarray, position: torch.Tensor, augmented: bool) -> torch.Tensor:
        spec = self._spec
        masked = augmented and (self._augment.freq_mask > 0 or self._augment.time_mask > 0)
        if self._device.type != "cpu" or masked or raw.shape[1] > spec.frames:
            floats = torch.from_numpy(raw).to(self._device, non_blocking=True).float()
            return self._normalised(pad_frames(floats, spec.frames), position, augmented)
        out = self._memory.tensor((len(raw), spec.frames, raw.shape[2]))
        floor = math.nan
        for source, target in zip(torch.from_numpy(raw), out, strict=True):
            clip = target[: len(source)]
            clip.copy_(source).sub_(spec.mean).div_(2 * spec.std)
            if math.isnan(floor):
                floor = float(torch.zeros(1).sub_(spec.mean).div_(2 * spec.std))
            target[len(source) :] = floor
        return out

    def _normalised(self, fbank: torch.Tensor, position: torch.Tensor, augmented: bool) -> torch.Tensor:
        if augmented:
            fbank = mask_fbank(fbank, self._augment, self._seed, position)
        return (fbank - self._spec.mean) / (2 * self._spec.std)

    def _floats(self, raw: np.ndarray, shape: Sequence[int], scale: float) -> torch.Tensor:
        if self._device.type != "cpu":
            return torch.from_numpy(raw).to(self._device, non_blocking=True).float().mul_(scale)
        out = self._memory.tensor(shape)
        for source, target in zip(torch.from_numpy(raw), out, strict=True):
            target.copy_(source).mul_(scale)
        return out


class _Recycled:
    """float32 memory, used again once no tensor refers to it."""

    KEPT = 16  # arrays at most

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = [np.empty(0, np.float32)]
        self._free = self._references()[0]  # of an array that only the list holds: it depends on Python's release
        self._arrays.clear()

    def _references(self) -> list[int]:
        return [sys.getrefcount(array) for array in self._arrays]

    def tensor(self, shape: Sequence[int]) -> torch.Tensor:
        """An uninitialised tensor.

        `torch.from_numpy` keeps a reference to the array for as long as its storage lives, in whichever tensors
        and views: an array that only the list refers to is free.
        """
        for number, references in enumerate(self._references()):
            if references == self._free and self._arrays[number].shape == tuple(shape):
                return torch.from_numpy(self._arrays[number])
        self._arrays = [*self._arrays[-self.KEPT + 1 :], np.empty(shape, np.float32)]
        return torch.from_numpy(self._arrays[-1])


def pad_frames(fbank: torch.Tensor, frames: int) -> torch.Tensor:
    """Zero-pads or cuts raw fbanks [B, t, M] to [B, T, M].

    Zeros come after the log and before normalisation, as in SSAST: they become -mean / (2 std).
    """
    return torch.nn.functional.pad(fbank, (0, 0, 0, frames - fbank.shape[1]))

"""Raw batches -> `Batch`es on the device: conversion, mixup, augmentation, fbank, normalisation.

In: what the readers left in shared host memory. Out: float32 tensors.

A GPU gets the stored numbers (half the bytes, from pinned memory, asynchronously) and converts them there. For a CPU
the readers have converted them (`pipeline.data.convert`), and the batch is the shared memory itself: no copy.
"""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.config import AugmentConfig
from pipeline.data.augment import add_noise, augment_waveform, mask_fbank
from pipeline.data.convert import INT16_SCALE, normalised_zero
from pipeline.data.fbank import fbank as compute_fbank
from pipeline.data.manifest import Manifest
from pipeline.data.npy import HEADER
from pipeline.data.reader import Needs
from pipeline.data.spec import DataSpec
from pipeline.flow import Batch


@dataclass(slots=True)
class RawBatch:
    """A batch on the host.

    Attributes:
        position, row, valid: As in `Batch`.
        waveform: float32 [B, L], or int16 rows (`Layout`), or None.
        partner: The same, mixup's other clips, or None.
        weight: float64 [B], of the clip itself in its mixture.
        fbank: Normalised float32 [B, T, M], or float16 rows, or None.
        targets: float32 [B, C].
        length: As in `Batch`.
    """

    position: np.ndarray
    row: np.ndarray
    valid: np.ndarray
    waveform: np.ndarray | None
    partner: np.ndarray | None
    weight: np.ndarray
    fbank: np.ndarray | None
    targets: np.ndarray
    length: np.ndarray


class Assembler:
    """Makes batches out of raw ones.

    Args:
        manifest: Formats of what is stored.
        spec: Format and normalisation of what comes out.
        augment: Of training clips.
        needs: What the method reads.
        online: Fbanks are computed from waveforms.
        seed: Of augmentation.
        device: Of the batches.
    """

    def __init__(
        self,
        manifest: Manifest,
        spec: DataSpec,
        augment: AugmentConfig,
        needs: Needs,
        online: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        self._stored = manifest
        self._spec, self._augment, self._needs, self._online = spec, augment, needs, online
        self._seed, self._device = seed, device
        self._floor = normalised_zero(spec.mean, spec.std)

    def __call__(self, raw: RawBatch, augmented: bool) -> Batch:
        """The batch; on a GPU its copies may still be under way on the current stream."""
        small = (raw.position, raw.row, raw.valid, raw.targets, raw.length)
        position, row, valid, targets, length = map(self._small, small)
        waveform, fbank = None, None
        if raw.waveform is not None:
            waveform = self._waveform(raw.waveform)
            if raw.partner is not None:
                weight = self._small(raw.weight.astype(np.float32))[:, None]
                waveform = weight * waveform + (1 - weight) * self._waveform(raw.partner)
            if augmented:
                waveform = augment_waveform(
                    waveform, length, self._augment, self._seed, position, self._spec.sample_rate
                )
        if self._online and waveform is not None:
            fbank = self._normalised(compute_fbank(waveform, self._spec.sample_rate, self._spec.mel_bins))
        elif raw.fbank is not None:
            fbank = self._fbank(raw.fbank)
        if fbank is not None and augmented:
            fbank = mask_fbank(fbank, self._augment, self._seed, position, self._floor)
            fbank = add_noise(fbank, self._augment, self._seed, position)
        return Batch(position, row, valid, waveform if self._needs.waveform else None, fbank, targets, length)

    def _small(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def _waveform(self, raw: np.ndarray) -> torch.Tensor:
        """float32 [B, L]."""
        moved = torch.from_numpy(raw).to(self._device, non_blocking=True)
        if moved.dtype == torch.float32:
            return moved
        return self._payload(moved, self._stored.audio.samples).float().mul_(INT16_SCALE)

    def _fbank(self, raw: np.ndarray) -> torch.Tensor:
        """Normalised float32 [B, T, M]."""
        moved = torch.from_numpy(raw).to(self._device, non_blocking=True)
        if moved.dtype == torch.float32:
            return moved
        frames, mel_bins = self._stored.fbank.frames, self._stored.fbank.mel_bins
        return self._normalised(self._payload(moved, frames * mel_bins).float().view(-1, frames, mel_bins))

    def _payload(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """What lies behind the headers of stored rows: a view [B, count]."""
        first = HEADER // rows.element_size()
        return rows[:, first : first + count]

    def _normalised(self, fbank: torch.Tensor) -> torch.Tensor:
        """Zero-padded or cut to T frames, then normalised, as in SSAST: the padding becomes -mean / (2 std)."""
        scaled = (fbank - self._spec.mean) / (2 * self._spec.std)
        return pad_frames(scaled, self._spec.frames, self._floor)


def pad_frames(fbank: torch.Tensor, frames: int, value: float = 0.0) -> torch.Tensor:
    """Pads fbanks [B, t, M] with `value`, or cuts them, to [B, T, M]."""
    return torch.nn.functional.pad(fbank, (0, 0, 0, frames - fbank.shape[1]), value=value)

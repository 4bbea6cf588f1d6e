"""From a slot's arrays to a batch on the device, augmented there, all clips at once, keyed by position.

In: waveforms and fbanks of a batch, and the clips' positions. Out: float32 tensors. A GPU gets the stored numbers (half
the bytes, from pinned memory, asynchronously) and converts them there. For a CPU the readers have converted them, and
the batch is the slot itself: no copy.

Every draw is a function of (seed, position), and a position names an epoch and a place in it. So a clip is
augmented alike on any rank and after any restart, and anew in each epoch. Nothing loops over clips, and
nothing is copied back from the device. `tests/reference/augment.py` says the same in plain loops.
"""

from typing import Any

import numpy as np
import torch
from scipy.special import betaincinv

from pipeline.config import AugmentConfig
from pipeline.data.corpus import Corpus
from pipeline.data.fbank import fbank as compute_fbank
from pipeline.data.fbank import frame_count, pad_frames
from pipeline.data.npy import HEADER
from pipeline.data.pool import Arrays
from pipeline.data.reader import INT16_SCALE, normalised_zero
from pipeline.data.spec import DataSpec
from pipeline.flow import Batch
from pipeline.rng import uniform


def changes_waveform(config: AugmentConfig) -> bool:
    """A stored fbank would not be the augmented waveform's."""
    return config.mixup > 0 or config.noise_snr is not None or config.roll > 0


def draw_mixup(config: AugmentConfig, seed: int, position: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws mixup for a batch: a share `mixup` of the clips, lambda ~ Beta(alpha, alpha).

    Args:
        config: Settings.
        seed: The run's seed.
        position: int64 [B], on the host: the partners must be read.

    Returns:
        bool [B], which clips are mixed; float64 [B], each clip's own weight, 1 where it is not mixed; float64 [B],
        uniform in [0, 1), the draw of its partner.
    """
    draws = uniform(seed, "mixup", position.cpu(), 3).double().numpy()
    mixed = draws[:, 0] < config.mixup
    weight = np.where(mixed, betaincinv(config.mixup_alpha, config.mixup_alpha, draws[:, 1]), 1.0)
    return mixed, weight, draws[:, 2]


class Assembler:
    """Slots -> `Batch`es: conversion, mixup, augmentation, fbank and normalisation, on the device.

    Args:
        stored: Formats of what is stored.
        spec: Format and normalisation of what comes out.
        augment: Settings.
        waveform: Batches have waveforms.
        online: Fbanks are computed from waveforms.
        seed: The run's seed.
        device: Of the batches.
    """

    def __init__(
        self,
        stored: Corpus,
        spec: DataSpec,
        augment: AugmentConfig,
        waveform: bool,
        online: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        self._stored, self._spec, self._augment, self._seed = stored, spec, augment, seed
        self._with_waveform, self._online, self._device = waveform, online, device
        self._floor = normalised_zero(spec.mean, spec.std)
        # On the device: a GPU would multiply by a number's reciprocal, and be one bit off what readers make for a CPU.
        self._divisor = torch.tensor(2 * spec.std, dtype=torch.float32, device=device)

    def __call__(self, arrays: Arrays) -> Batch:
        """The batch of a slot's arrays; on a GPU their copies may still be under way on the current stream."""

        def copy(name: str) -> torch.Tensor:  # small: who keeps it need not keep the slot
            return torch.from_numpy(arrays[name]).to(self._device, non_blocking=True, copy=True)

        position, length, augment, seed, spec = copy("position"), copy("length"), self._augment, self._seed, self._spec
        # On the host, so no device is waited for. Of a rank's clips, all of one length, the longest says which it is.
        samples = spec.length_of(int(arrays["length"].max()))
        frames = spec.frames_of(samples)
        waveform, fbank = None, None
        if "waveform" in arrays:
            waveform = self._waveform(arrays["waveform"], samples)
            if "partner" in arrays:
                weight = copy("weight")[:, None]
                waveform = weight * waveform + (1 - weight) * self._waveform(arrays["partner"], samples)
            waveform = augment_waveform(waveform, length, augment, seed, position, spec.sample_rate)
        if self._online and waveform is not None:
            fbank = self._normalised(compute_fbank(waveform, spec.sample_rate, spec.mel_bins), frames)
        elif "fbank" in arrays:
            fbank = self._fbank(arrays["fbank"], samples)
        if fbank is not None:
            fbank = add_noise(mask_fbank(fbank, augment, seed, position, self._floor), augment, seed, position)
        waveform = waveform if self._with_waveform else None
        return Batch(position, copy("row"), copy("valid"), waveform, fbank, copy("targets"), length, frames)

    def _waveform(self, rows: np.ndarray, samples: int) -> torch.Tensor:
        """float32 [B, L]."""
        moved = torch.from_numpy(rows).to(self._device, non_blocking=True)
        if moved.dtype == torch.float32:
            return moved[:, :samples]
        return _numbers(moved, torch.int16, samples).mul_(INT16_SCALE)

    def _fbank(self, rows: np.ndarray, samples: int) -> torch.Tensor:
        """Normalised float32 [B, T, M], as of the waveform's first samples alone."""
        moved = torch.from_numpy(rows).to(self._device, non_blocking=True)
        whole, mel_bins, frames = self._stored.fbank.frames, self._stored.fbank.mel_bins, self._spec.frames_of(samples)
        heard = whole if samples == self._spec.samples else frame_count(samples, self._spec.sample_rate)
        if moved.dtype == torch.float32:
            if heard < whole:
                moved[:, heard:frames] = self._floor
            return moved[:, :frames]
        return self._normalised(_numbers(moved, torch.float16, heard * mel_bins).view(-1, heard, mel_bins), frames)

    def _normalised(self, fbank: torch.Tensor, frames: int) -> torch.Tensor:
        """Normalised, then zero-padded or cut to T frames, as in SSAST: the padding becomes -mean / (2 std)."""
        scaled = (fbank - self._spec.mean) / self._divisor
        return pad_frames(scaled, frames, self._floor)


def _numbers(rows: torch.Tensor, dtype: torch.dtype, count: int) -> torch.Tensor:
    """float32 [B, count] of the numbers of a type behind the headers of stored rows, uint8 [B, bytes]."""
    first = HEADER // dtype.itemsize
    return rows.view(dtype)[:, first : first + count].float()


def augment_waveform(
    waveform: torch.Tensor,
    length: torch.Tensor,
    config: AugmentConfig,
    seed: int,
    position: torch.Tensor,
    sample_rate: int,
) -> torch.Tensor:
    """Circular shift, and white noise at a drawn signal-to-noise ratio, of the audio before the padding.

    The noise is uniform in [-a, a), of power a^2 / 3; a clip of digital silence gets none.

    Args:
        waveform: float32 [B, L].
        length: int64 [B], samples before the padding, which stays where it is.
        config: Settings.
        seed: The run's seed.
        position: int64 [B].
        sample_rate: Hz.
    """
    if config.roll <= 0 and config.noise_snr is None:
        return waveform
    index, size = torch.arange(waveform.shape[1], device=waveform.device), length[:, None]
    if config.roll > 0:
        shift = _shift(config, seed, position, sample_rate)[:, None]
        waveform = waveform.gather(1, torch.where(index < size, (index - shift) % size, index))
    if config.noise_snr is not None:
        power = waveform.square().sum(dim=1, keepdim=True) / size
        ratio = 10 ** (_noise_ratio(config.noise_snr, seed, position)[:, None] / 10)
        noise = (3 * power / ratio).sqrt() * (2 * uniform(seed, "noise.waveform", position, waveform.shape[1]) - 1)
        waveform = waveform + torch.where(index < size, noise, 0.0)
    return waveform


def add_noise(fbank: torch.Tensor, config: AugmentConfig, seed: int, position: torch.Tensor) -> torch.Tensor:
    """SSAST's noise on normalised fbanks [B, T, M]: uniform in [0, 1) times a level uniform in [0, `noise`).

    Its `dataloader.py` adds rand(T, M) x rand() / 10 after masking and normalisation to (x - mean) / (2 std), padding
    included.
    """
    if not config.noise:
        return fbank
    draws = uniform(seed, "noise", position, fbank.shape[1] * fbank.shape[2]).view_as(fbank)
    return fbank + _noise_level(config, seed, position)[:, None, None] * draws


def mask_fbank(
    fbank: torch.Tensor, config: AugmentConfig, seed: int, position: torch.Tensor, value: float = 0.0
) -> torch.Tensor:
    """SpecAugment on fbanks [B, T, M]: one band and one span of `value`, what zeros are after normalisation, as in AST.

    Widths are uniform in [0, freq_mask] bins and [0, time_mask] frames, places uniform where they fit.
    """
    for axis, widest, purpose in ((2, config.freq_mask, "freq"), (1, config.time_mask, "time")):
        if widest:
            start, width = _span(fbank.shape[axis], widest, seed, purpose, position)
            index = torch.arange(fbank.shape[axis], device=fbank.device)
            inside = (index >= start[:, None]) & (index < (start + width)[:, None])
            fbank = fbank.masked_fill(inside.unsqueeze(3 - axis), value)
    return fbank


def describe(
    config: AugmentConfig, seed: int, position: torch.Tensor, spec: DataSpec, frames: int
) -> list[dict[str, Any]]:
    """What happens to each clip beside mixup, in words for people and JSON.

    Args:
        config: Settings.
        seed: The run's seed.
        position: int64 [B].
        spec: Of the clips.
        frames: T of their batch.

    Returns:
        For each position, those that are on: roll_seconds, noise_level (of the normalised fbank), noise_snr (dB, of the
        waveform), freq_mask and time_mask ([first, count] of bins and frames).
    """
    said: list[dict[str, Any]] = [{} for _ in range(len(position))]
    columns: dict[str, list[Any]] = {}
    if config.roll > 0:
        shift = _shift(config, seed, position, spec.sample_rate)
        columns["roll_seconds"] = [round(samples / spec.sample_rate, 6) for samples in shift.tolist()]
    if config.noise > 0:
        columns["noise_level"] = [round(level, 6) for level in _noise_level(config, seed, position).tolist()]
    if config.noise_snr is not None:
        columns["noise_snr"] = [round(ratio, 3) for ratio in _noise_ratio(config.noise_snr, seed, position).tolist()]
    for name, length, widest, purpose in (
        ("freq_mask", spec.mel_bins, config.freq_mask, "freq"),
        ("time_mask", frames, config.time_mask, "time"),
    ):
        if widest:
            columns[name] = torch.stack(_span(length, widest, seed, purpose, position), dim=1).tolist()
    for name, values in columns.items():
        for clip, value in zip(said, values, strict=True):
            clip[name] = value
    return said


def _shift(config: AugmentConfig, seed: int, position: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """Samples by which each clip moves to the right: int64 [B]."""
    limit = config.roll * sample_rate
    return ((2 * uniform(seed, "roll", position, 1)[:, 0] - 1) * limit).round().long()


def _noise_level(config: AugmentConfig, seed: int, position: torch.Tensor) -> torch.Tensor:
    """Largest value that is added to a normalised fbank: float32 [B]."""
    return config.noise * uniform(seed, "noise.level", position, 1)[:, 0]


def _noise_ratio(ratios: tuple[float, float], seed: int, position: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio in dB: float32 [B]."""
    low, high = ratios
    return low + (high - low) * uniform(seed, "noise.ratio", position, 1)[:, 0]


def _span(
    length: int, widest: int, seed: int, purpose: str, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """First index and count of one run per clip: int64 [B] each."""
    draws = uniform(seed, f"specaugment.{purpose}", position, 2)
    width = (draws[:, 0] * (min(widest, length) + 1)).long()
    return (draws[:, 1] * (length - width + 1)).long(), width

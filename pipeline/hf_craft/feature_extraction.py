"""Waveforms -> the inputs of an exported network, for `transformers.AutoFeatureExtractor`.

In: samples at 16 kHz. Out: the fbank, the waveform and its length, as the shards of the run held them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin

from pipeline.data.fbank import fbank, pad_frames
from shard_tools.write import int16_levels


class CraftFeatureExtractor(FeatureExtractionMixin):
    """Removes the mean, rounds to 16 bits, pads with zeros, and computes the normalised fbank.

    Args:
        sampling_rate: Hz.
        samples: L, of a clip; what is longer is cut.
        num_mel_bins: M.
        max_length: T, frames after padding.
        mean: Of the raw fbank.
        std: Of the raw fbank; the input is (x - mean) / (2 std).
        spec: The network reads the fbank.
        wav: The network reads the waveform.
        kwargs: As of `FeatureExtractionMixin`.
    """

    def __init__(
        self,
        sampling_rate: int = 16000,
        samples: int = 160000,
        num_mel_bins: int = 128,
        max_length: int = 1024,
        mean: float = 0.0,
        std: float = 0.5,
        spec: bool = True,
        wav: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sampling_rate, self.samples = sampling_rate, samples
        self.num_mel_bins, self.max_length = num_mel_bins, max_length
        self.mean, self.std, self.spec, self.wav = mean, std, spec, wav
        self.model_input_names = ["input_values"] * spec + ["waveform", "length"] * wav

    def __call__(
        self,
        raw_speech: np.ndarray | Sequence[np.ndarray] | Sequence[float] | Sequence[Sequence[float]],
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        **_: Any,
    ) -> BatchFeature:
        """Makes a batch.

        Args:
            raw_speech: One waveform [n] in [-1, 1], or several.
            sampling_rate: Hz of them; None: the network's.
            return_tensors: "pt" or "np".

        Returns:
            `input_values` [B, T, M] and/or `waveform` [B, L] and `length` int64 [B].

        Raises:
            ValueError: another rate, integers, or a waveform that is none.
        """
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(f"waveforms of {sampling_rate} Hz, the network reads {self.sampling_rate}; resample them")
        several = len(raw_speech) > 0 and np.ndim(raw_speech[0]) > 0
        given = [np.asarray(clip) for clip in (raw_speech if several else [raw_speech])]
        if any(clip.dtype.kind in "iu" for clip in given):  # their full scale is not known
            raise ValueError("waveforms of integers; give floats in [-1, 1]: divide int16 by 32768")
        clips = [clip.astype(np.float32)[: self.samples] for clip in given]
        levels = np.zeros((len(clips), self.samples), np.float32)
        for row, clip in zip(levels, clips, strict=True):
            if clip.ndim != 1 or not clip.size or not np.isfinite(clip).all():
                raise ValueError(f"a waveform of shape {clip.shape}; give finite samples [n] of one channel")
            row[: len(clip)] = int16_levels(clip)[0]
        waveform = torch.from_numpy(levels) / 32768
        found = {}
        if self.spec:
            features = pad_frames(fbank(waveform, self.sampling_rate, self.num_mel_bins), self.max_length)
            found["input_values"] = (features - self.mean) / (2 * self.std)
        if self.wav:
            found |= {"waveform": waveform, "length": torch.tensor([len(clip) for clip in clips])}
        if return_tensors == "np":
            return BatchFeature({name: value.numpy() for name, value in found.items()})
        return BatchFeature(found)

"""fbank against Kaldi's, as torchaudio has it."""

import pytest
import soundfile
import torch
from torchaudio.compliance import kaldi

from pipeline.data.fbank import fbank, frame_count, padded_frames


def kaldi_fbank(waveform: torch.Tensor) -> torch.Tensor:
    return kaldi.fbank(
        (waveform - waveform.mean())[None], htk_compat=True, sample_frequency=16000, use_energy=False,
        window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10,
    )  # fmt: skip


def test_real_clips_agree_with_kaldi_single_and_batched(shared):
    files = sorted((shared / "data" / "esc50" / "audio").glob("*.flac"))[::100]
    waveforms = torch.stack([torch.from_numpy(soundfile.read(file, dtype="float32")[0]) for file in files])
    batched = fbank(waveforms)
    for waveform, row in zip(waveforms, batched, strict=True):
        single = fbank(waveform)
        assert torch.equal(single, row)  # neighbours do not matter
        assert (single - kaldi_fbank(waveform)).abs().max() <= 1e-3


@pytest.mark.parametrize("samples", [400, 559, 560, 16000, 160000])
def test_frames(samples):
    assert len(fbank(torch.randn(samples))) == frame_count(samples, 16000) == 1 + (samples - 400) // 160


def test_float32_inside_under_autocast():
    waveform = 0.1 * torch.randn(1, 16000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fbank(waveform), fbank(waveform.clone()))
        under = fbank(waveform)
    assert under.dtype == torch.float32
    assert torch.equal(under, fbank(waveform))


def test_too_short_is_refused():
    with pytest.raises(ValueError, match="399 samples"):
        fbank(torch.zeros(399))


def test_padded_lengths_of_the_paper():
    assert [padded_frames(seconds) for seconds in (10, 5, 2, 0.5)] == [1024, 512, 208, 64]

"""fbank against Kaldi's, as torchaudio has it."""

from dataclasses import replace

import pytest
import soundfile
import torch
from torchaudio.compliance import kaldi

from pipeline.data.fbank import Blocks, fbank, frame_count, padded_frames


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


@pytest.mark.parametrize("clips", [1, 3, 64])
def test_blocks_of_many_clips_as_a_gpu_takes_them_agree_with_kaldi(shared, clips):
    """The code that a GPU runs, on a CPU; also where the user allows reduced precision in float32 matmuls."""
    files = sorted((shared / "data" / "esc50" / "audio").glob("*.flac"))[::300]
    waveforms = torch.stack([torch.from_numpy(soundfile.read(file, dtype="float32")[0]) for file in files])
    assert Blocks.on(torch.device("cuda")).mel == torch.float64
    blocks = replace(Blocks.on(torch.device("cuda")), clips=clips)
    found = fbank(waveforms, blocks=blocks)
    assert found.dtype == torch.float32
    assert (found - fbank(waveforms)).abs().max() <= 5e-4
    for waveform, row in zip(waveforms, found, strict=True):
        assert (row - kaldi_fbank(waveform)).abs().max() <= 1e-3
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fbank(waveforms, blocks=blocks), found)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_filters_are_made_once_for_a_device(monkeypatch):
    fbank(torch.randn(2, 16000))
    monkeypatch.setattr("pipeline.data.fbank.mel_matrix", None)
    fbank(torch.randn(2, 16000))
    with torch.inference_mode():
        fbank(torch.randn(16000))
    with pytest.raises(TypeError):
        fbank(torch.randn(2, 16000), mel_bins=64)


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

"""Augmentation against its loop-written twin, and what its draws are like over many clips."""

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.config import AugmentConfig
from pipeline.data.augment import (
    add_noise,
    augment_waveform,
    changes_waveform,
    describe,
    draw_mixup,
    mask_fbank,
)
from pipeline.data.spec import DataSpec
from pipeline.rng import hashed, permutation, uniform
from tests.reference import augment as reference

SEED, RATE = 7, 16000
POSITIONS = torch.tensor([0, 1, 2, 1000003, 2**40 + 5])


def shape(frames, mel_bins):
    return DataSpec.model_construct(sample_rate=RATE, frames=frames, mel_bins=mel_bins)


@pytest.mark.parametrize("count", [1, 5, 70000])
def test_draws_are_the_twin_s(count):
    draws = uniform(SEED, "noise", POSITIONS, count)
    for position, row in zip(POSITIONS.tolist(), draws, strict=True):
        for number in {0, count // 2, count - 1}:
            assert row[number].item() == reference.draw(SEED, "noise", position, number)


def test_numpy_and_torch_hash_alike_and_permutations_are_fair():
    """hashed() is splitmix64 twice, less the lowest bit."""
    for counter in (1, 2, 77):
        seen = int(hashed(12345, np.array([counter]))[0])
        state = (counter * 0x9E3779B97F4A7C15 + 12345) % 2**64
        assert seen == reference.splitmix(reference.splitmix(state)) >> 1
    counts = np.zeros((8, 8))
    for key in range(4000):
        counts[np.arange(8), permutation(key, 8)] += 1
    assert stats.chisquare(counts.ravel(), ddof=15).pvalue > 1e-3


def test_roll_and_white_noise_are_the_twin_s():
    generator = torch.Generator().manual_seed(0)
    waveform = torch.rand(len(POSITIONS), 800, generator=generator) - 0.5
    config = AugmentConfig(roll=0.02, noise_snr=(5, 20))
    lengths = torch.tensor([800, 1, 333, 800, 799])
    waveform = torch.where(torch.arange(800) < lengths[:, None], waveform, 0.0)
    found = augment_waveform(waveform, lengths, config, SEED, POSITIONS, RATE)
    for row, clip, length, position in zip(found, waveform, lengths.tolist(), POSITIONS.tolist(), strict=True):
        rolled = reference.roll(clip[:length].tolist(), config.roll, RATE, SEED, position)
        expected = reference.add_white_noise(rolled, 5, 20, SEED, position)
        assert row[:length].tolist() == pytest.approx(expected, abs=1e-6)
        assert not torch.equal(row, clip)
        assert not row[length:].any()  # padding stays padding


def test_noise_is_ssast_s_on_the_normalised_fbank():
    fbank = torch.randn(len(POSITIONS), 30, 8, generator=torch.Generator().manual_seed(0))
    found = add_noise(fbank, AugmentConfig(noise=0.1), SEED, POSITIONS)
    for row, clip, position in zip(found, fbank, POSITIONS.tolist(), strict=True):
        expected = torch.tensor(reference.add_noise(clip.tolist(), 0.1, SEED, position))
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)
    added = found - fbank
    assert 0 < added.mean() < 0.1
    assert (added > -1e-6).all()
    assert not changes_waveform(AugmentConfig(noise=0.1))  # stored fbanks can be read


def test_a_quiet_clip_keeps_its_signal_to_noise_ratio():
    """Noise relative to the clip's peak drowned quiet clips with one loud click."""
    position = torch.arange(200)
    clips = torch.randn(len(position), 4000, generator=torch.Generator().manual_seed(0))
    clips *= torch.logspace(-3, 0, len(position))[:, None]
    clips[:, 0] *= 1000
    whole = torch.full((len(position),), 4000)
    noise = augment_waveform(clips, whole, AugmentConfig(noise_snr=(10, 30)), SEED, position, RATE) - clips
    ratio = 10 * torch.log10(clips.square().mean(dim=1) / noise.square().mean(dim=1))
    said = describe(AugmentConfig(noise_snr=(10, 30)), SEED, position, shape(10, 10), 10)
    wanted = torch.tensor([clip["noise_snr"] for clip in said])
    torch.testing.assert_close(ratio, wanted, rtol=0, atol=0.5)
    assert (ratio.min(), ratio.max()) > (9, 28)
    silence, config = torch.zeros(1, 9), AugmentConfig(noise_snr=(0, 0))
    assert torch.equal(augment_waveform(silence, torch.tensor([9]), config, SEED, position[:1], RATE), silence)


@pytest.mark.parametrize(("freq_mask", "time_mask"), [(48, 192), (0, 30), (24, 0), (500, 500), (0, 0)])
def test_specaugment_is_the_twin_s(freq_mask, time_mask):
    fbank = torch.arange(1.0, 1 + len(POSITIONS) * 60 * 40).reshape(-1, 60, 40)
    config = AugmentConfig(freq_mask=freq_mask, time_mask=time_mask)
    found = mask_fbank(fbank, config, SEED, POSITIONS)
    for row, clip, position in zip(found, fbank, POSITIONS.tolist(), strict=True):
        assert row.tolist() == reference.specaugment(clip.tolist(), freq_mask, time_mask, SEED, position)


def test_mixup_is_drawn_from_its_beta():
    position = torch.arange(20000)
    mixed, weight, chance = draw_mixup(AugmentConfig(mixup=0.5, mixup_alpha=10.0), SEED, position)
    assert mixed.mean() == pytest.approx(0.5, abs=0.02)
    assert (weight[~mixed] == 1).all()
    assert stats.kstest(weight[mixed], stats.beta(10, 10).cdf).pvalue > 1e-3
    assert stats.kstest(chance, stats.uniform.cdf).pvalue > 1e-3
    assert mixed[0] == (reference.draw(SEED, "mixup", 0, 0) < 0.5)


def test_widths_and_places_of_masks_are_uniform():
    said = describe(AugmentConfig(freq_mask=9, time_mask=20), SEED, torch.arange(20000), shape(60, 40), 60)
    for name, length, widest in (("freq_mask", 40, 9), ("time_mask", 60, 20)):
        start, width = np.array([clip[name] for clip in said]).T
        assert stats.chisquare(np.bincount(width, minlength=widest + 1)).pvalue > 1e-3
        of_one = start[width == 5]
        assert stats.chisquare(np.bincount(of_one, minlength=length - 4)).pvalue > 1e-3


def test_what_is_described_is_what_happens():
    config = AugmentConfig(freq_mask=24, time_mask=24, roll=0.01)
    said = describe(config, SEED, POSITIONS, shape(60, 40), 60)
    masked = mask_fbank(torch.ones(len(POSITIONS), 60, 40), config, SEED, POSITIONS)
    impulse = torch.zeros(len(POSITIONS), 800)
    impulse[:, 400] = 1.0
    moved = augment_waveform(impulse, torch.full_like(POSITIONS, 800), config, SEED, POSITIONS, RATE)
    for i, clip in enumerate(said):
        (bin_, bins), (frame, frames) = clip["freq_mask"], clip["time_mask"]
        assert (masked[i] == 0).sum() == 60 * bins + 40 * frames - bins * frames
        assert (masked[i, :, bin_ : bin_ + bins] == 0).all()
        assert (masked[i, frame : frame + frames] == 0).all()
        assert moved[i].abs().argmax() == round(400 + clip["roll_seconds"] * RATE)
    noisy = AugmentConfig(noise=0.2)
    levels = add_noise(torch.zeros(len(POSITIONS), 60, 40), noisy, SEED, POSITIONS).amax(dim=(1, 2))
    for level, clip in zip(levels.tolist(), describe(noisy, SEED, POSITIONS, shape(60, 40), 60), strict=True):
        assert 0.99 * clip["noise_level"] < level <= clip["noise_level"] + 1e-6
    assert describe(AugmentConfig(), SEED, POSITIONS, shape(60, 40), 60) == [{}] * len(POSITIONS)


@pytest.mark.parametrize(
    "config", [AugmentConfig(noise_snr=(0, 9), roll=0.01), AugmentConfig(freq_mask=20, time_mask=20, noise=0.5)]
)
def test_a_clip_does_not_depend_on_its_neighbours(config):
    values = torch.randn(len(POSITIONS), 60, 40, generator=torch.Generator().manual_seed(1))

    def run(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        if changes_waveform(config):
            return augment_waveform(x.flatten(1), torch.full_like(position, 2400), config, SEED, position, RATE)
        return add_noise(mask_fbank(x, config, SEED, position), config, SEED, position)

    whole = run(values, POSITIONS)
    for i in (0, 3, 4):
        assert torch.equal(run(values[i : i + 1], POSITIONS[i : i + 1])[0], whole[i])

"""Augmentation and its random numbers, one clip and one sample at a time.

In: plain lists and numbers of one clip. Out: the same. Nothing here knows of batches or tensors.
"""

import hashlib

WORD = 2**64


def splitmix(x: int) -> int:
    """The finaliser of splitmix64 on an unsigned 64-bit integer."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def draw(seed: int, purpose: str, position: int, number: int) -> float:
    """Draw `number` (0, 1, ...) of this purpose for the clip at this position, in [0, 1), 24 bits."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest(), "little") >> 1
    golden = 0x9E3779B97F4A7C15
    of_clip = splitmix((position * golden + key) % WORD)
    bits = splitmix((of_clip + (number + 1) * golden) % WORD)
    return (bits >> 40) / 2**24


def mix(own: list[float], other: list[float], weight: float) -> list[float]:
    """Mixup: weight times the clip and the rest of the other one. Waveforms and label vectors alike."""
    return [weight * a + (1 - weight) * b for a, b in zip(own, other, strict=True)]


def roll(waveform: list[float], seconds: float, sample_rate: int, seed: int, position: int) -> list[float]:
    """Moves the clip by up to `seconds` either way; what leaves at one end comes in at the other."""
    shift = round((2 * draw(seed, "roll", position, 0) - 1) * seconds * sample_rate)
    moved = [0.0] * len(waveform)
    for i, sample in enumerate(waveform):
        moved[(i + shift) % len(waveform)] = sample
    return moved


def add_noise(fbank: list[list[float]], most: float, seed: int, position: int) -> list[list[float]]:
    """`fbank + torch.rand(T, M) * np.random.rand() / 10` of SSAST's dataloader.py, where `most` is 1 / 10.

    It comes after SpecAugment and (fbank - mean) / (2 std), on the padded frames too.
    """
    level = draw(seed, "noise.level", position, 0) * most
    width = len(fbank[0])
    return [
        [value + level * draw(seed, "noise", position, t * width + m) for m, value in enumerate(frame)]
        for t, frame in enumerate(fbank)
    ]


def add_white_noise(waveform: list[float], low: float, high: float, seed: int, position: int) -> list[float]:
    """Uniform noise whose power is that of the clip less a ratio between `low` and `high` dB."""
    ratio = low + (high - low) * draw(seed, "noise.ratio", position, 0)
    power = sum(sample**2 for sample in waveform) / len(waveform)
    level = (3 * power / 10 ** (ratio / 10)) ** 0.5
    return [sample + level * (2 * draw(seed, "noise.waveform", position, i) - 1) for i, sample in enumerate(waveform)]


def masked(length: int, widest: int, seed: int, purpose: str, position: int) -> list[bool]:
    """SpecAugment's masked indices along one axis: a run of 0 to `widest`, anywhere it fits."""
    width = int(draw(seed, f"specaugment.{purpose}", position, 0) * (min(widest, length) + 1))
    start = int(draw(seed, f"specaugment.{purpose}", position, 1) * (length - width + 1))
    return [start <= i < start + width for i in range(length)]


def specaugment(
    fbank: list[list[float]], freq_mask: int, time_mask: int, seed: int, position: int
) -> list[list[float]]:
    """Zeros in one band of mel bins and one span of frames; the fbank is a list of frames."""
    bins = masked(len(fbank[0]), freq_mask, seed, "freq", position) if freq_mask else [False] * len(fbank[0])
    frames = masked(len(fbank), time_mask, seed, "time", position) if time_mask else [False] * len(fbank)
    out = []
    for t, frame in enumerate(fbank):
        out.append([0.0 if frames[t] or bins[m] else value for m, value in enumerate(frame)])
    return out

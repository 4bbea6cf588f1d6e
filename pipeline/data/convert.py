"""int16 and float16 as they lie in the shards -> float32 of a batch, in numpy alone: readers import no torch.

In: one clip's numbers, just read, still in the core's cache. Out: its row of the batch.

Nothing else touches these numbers on their way to a CPU's model, so they cross the memory's bus once as float32, as
in a plain copy. numpy converts float16 one number at a time; shifting a whole array's exponents into place takes a
sixth of that.
"""

import numpy as np

INT16_SCALE = 1 / 32768  # a power of two: exact
REBIAS = np.float32(2.0**112)  # exponents of float16 count from -15, of float32 from -127
SIGN_AND_REST = np.int32(-0x70002000)  # 0x8fffe000: what is left of a sign-extended float16 shifted by 13 bits
NOT_FINITE = 0xF800  # and above: infinities and NaNs without their sign bit


def waveform_floats(raw: np.ndarray, out: np.ndarray) -> None:
    """int16 [L] -> float32 [L] in [-1, 1)."""
    np.copyto(out, raw)
    np.multiply(out, np.float32(INT16_SCALE), out=out)


def fbank_floats(raw: np.ndarray, out: np.ndarray, mean: float, std: float) -> None:
    """float16 [n] -> float32 [m], normalised to (x - mean) / (2 std); the rest of a longer row is that of zeros."""
    count = min(len(raw), len(out))
    row = out[:count]
    half_floats(raw[:count], row)
    np.subtract(row, np.float32(mean), out=row)
    np.divide(row, np.float32(2 * std), out=row)
    out[count:] = normalised_zero(mean, std)


def normalised_zero(mean: float, std: float) -> float:
    """What padding and masks of raw zeros become."""
    return float((np.float32(0) - np.float32(mean)) / np.float32(2 * std))


def half_floats(raw: np.ndarray, out: np.ndarray) -> None:
    """float16 [n] -> float32 [n], exactly."""
    if len(raw) and (raw.view(np.uint16) << np.uint16(1)).max() >= NOT_FINITE:
        np.copyto(out, raw)
        return
    bits = out.view(np.int32)
    np.copyto(bits, raw.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, SIGN_AND_REST, out=bits)
    np.multiply(out, REBIAS, out=out)

"""Random numbers that are a pure function of (seed, purpose, position).

In: the positions of a batch's clips. Out: the same draws on any device, rank or worker.

A torch.Generator hands out numbers in the order in which they are asked for, so a clip's mask would
depend on its neighbours and on the number of ranks. Here every number is a hash of its own
coordinates (counter-based, as Philox is): drawing for a whole batch is one vectorised expression,
and resuming at step k needs no state at all.

Everything is integer arithmetic modulo 2^64, so numpy and torch, CPU and GPU, and any release of
either give the same bits; numpy's Generator promises that for no method.
"""

import hashlib
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

CACHED = 1 << 16  # draws
_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB

Int64 = TypeVar("Int64", torch.Tensor, "npt.NDArray[np.int64]")


def _shift(x: Int64, bits: int) -> Int64:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> keeps the sign; the mask drops it


def _mix(x: Int64) -> Int64:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): int64 in, well-mixed int64 out."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def stream_key(seed: int | str, purpose: str) -> int:
    """The 63-bit number that keeps draws for different purposes independent."""
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seed: int, purpose: str, position: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform draws in [0, 1) on a grid of 2^-24.

    Args:
        seed: The run's seed.
        purpose: Name of the draw, e.g. "mask.spec"; different names are independent.
        position: int64 [B], positions in the sample stream.
        count: Draws for each clip.

    Returns:
        float32 [B, count] on the device of `position`.
    """
    device = position.device
    counter = torch.arange(1, count + 1, device=device, dtype=torch.int64) * _GAMMA
    base = _mix(position * _GAMMA + stream_key(seed, purpose))
    out = torch.empty(len(position), count, device=device)
    # On a CPU in blocks that stay in its cache: noise for a batch of clips takes a quarter of the time.
    rows = max(1, CACHED // count) if device.type == "cpu" else max(1, len(position))
    for first in range(0, len(position), rows):
        bits = _shift(_mix(base[first : first + rows, None] + counter), 40)
        torch.mul(bits, 2.0**-24, out=out[first : first + rows])
    return out


def hashed(key: int, counter: np.ndarray) -> np.ndarray:
    """Uniform 63-bit integers, one for each counter: int64 [m] -> int64 [m], not negative."""
    return _shift(_mix(_mix(counter * np.int64(_GAMMA) + np.int64(key))), 1)


def permutation(key: int, count: int) -> np.ndarray:
    """A permutation of 0 .. count - 1, int64, by sorting hashes."""
    return np.asarray(np.argsort(hashed(key, np.arange(1, count + 1)), kind="stable"))

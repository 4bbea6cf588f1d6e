"""How far results differ, and TF32 on and off."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """While open, products and convolutions of float32 may use TF32, or must not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    """How many elements have other bits; raises ValueError where shapes or types differ."""
    found, expected = found.detach().cpu(), expected.detach().cpu()
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise ValueError(f"{found.dtype} {list(found.shape)}, expected {expected.dtype} {list(expected.shape)}")
    bits = BITS.get(found.dtype, found.dtype)
    return int((found.view(bits) != expected.view(bits)).sum())


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference."""
    return float((found.detach().cpu().double() - expected.detach().cpu().double()).abs().max())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, in float64."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def together(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """All values as one vector, on the host."""
    return torch.cat([tensor.detach().cpu().flatten() for tensor in tensors])

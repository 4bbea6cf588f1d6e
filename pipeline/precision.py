"""Where half precision stops: losses, softmaxes and means are taken in float32 or better.

In: a tensor of any float type. Out: float32 of bf16 and fp16; float32 and float64 as they are, so that
tests can compare with references in float64.
"""

import torch


def full(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""The arithmetic of a network that only computes: evaluation, prediction, probes and embeddings.

In: a network with its weights in float32. Out: the same, which computes as asked. bf16 is the arithmetic of training in
bf16: weights and activations of half the size, fbank, means and what comes out in float32.
"""

from typing import TypeVar

import torch
from torch import nn

from pipeline.config import PRECISIONS

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def in_precision(network: ModuleT, precision: str) -> ModuleT:
    """The network, which from now on computes so.

    Args:
        network: In evaluation mode.
        precision: "fp32": as it is. "tf32": float32 whose matrix products round their factors to 10 bits, on GPUs that
            can, in the whole process; elsewhere as fp32. "bf16".

    Raises:
        ValueError: another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: one of {', '.join(PRECISIONS)}")
    if precision == "tf32" and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    return network.to(torch.bfloat16) if precision == "bf16" else network

"""Rank program: rows of all ranks, and through which collective they came.

    gather.py OUT.json
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import distributed


class Collectives(TorchDispatchMode):
    """Their names."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func._schema.name.removeprefix("c10d::"))
        return func(*args, **(kwargs or {}))


def main() -> None:
    report = {}
    with distributed.session(60, seed=0) as world:
        for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8):
            own = torch.arange(6).view(3, 2).to(kind) + 10 * world.rank
            with Collectives() as used:
                found = distributed.gather(own.T)  # not contiguous
            report[str(kind)] = {"rows": found.tolist(), "used": used.names, "kept": found.dtype == kind}
        if world.is_main:
            Path(sys.argv[1]).write_text(json.dumps(report))
        distributed.barrier()


if __name__ == "__main__":
    main()

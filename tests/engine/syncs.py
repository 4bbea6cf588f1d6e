"""Rank program: how often the host reads a number of a device in each step that is not logged.

    syncs.py SHARDS RUN_DIR OUT words of pretrain.py ...

`OUT`.RANK is a JSON list with one number a step: calls of `_local_scalar_dense`, through which `.item()`, `float()` and
`bool()` of a tensor go, in `accumulate` and `update`. Those of torch's optimisers are left out: Adam's step numbers are
on the CPU, whatever the device.
"""

import json
import sys
import traceback
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

from launchers.pretrain import main
from pipeline import distributed
from pipeline.engine import loop


class Reads(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in func.name():
            callers = [frame.filename for frame in traceback.extract_stack()]
            self.count += not any("/torch/optim/" in name for name in callers)
        return func(*args, **(kwargs or {}))


def run() -> None:
    shards, run_dir, out, *words = sys.argv[1:]
    found: list[int] = []
    accumulate, update = loop.accumulate, loop.update

    def counted(function, first):
        def call(*args):
            with Reads() as reads:
                result = function(*args)
            found.append(reads.count) if first else found.__setitem__(-1, found[-1] + reads.count)
            Path(f"{out}.{distributed.rank()}").write_text(json.dumps(found))
            return result

        return call

    loop.accumulate, loop.update = counted(accumulate, True), counted(update, False)
    sys.argv = ["pretrain.py", *words, f"data.shards={shards}", f"run.dir={run_dir}"]
    main()


if __name__ == "__main__":
    run()

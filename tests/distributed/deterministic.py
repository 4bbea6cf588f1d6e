"""Rank program: pretrain.py, which also tells how torch is set while it trains.

    deterministic.py OUT.json words of pretrain.py ...
"""

import json
import os
import sys
from pathlib import Path

import torch

from launchers.pretrain import main
from pipeline.engine import loop


def run() -> None:
    out, *words = sys.argv[1:]
    accumulate = loop.accumulate

    def told(*args):
        warned = torch.is_deterministic_algorithms_warn_only_enabled()
        settings = [torch.are_deterministic_algorithms_enabled(), warned, torch.backends.cudnn.deterministic,
                    os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.cuda.is_initialized()]  # fmt: skip
        Path(out).write_text(json.dumps(settings))
        return accumulate(*args)

    loop.accumulate = told
    sys.argv = ["pretrain.py", *words]
    main()


if __name__ == "__main__":
    run()

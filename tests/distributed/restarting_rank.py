"""Program: ranks that restart themselves; at the first attempt one fails.

    restarting_rank.py MARKER ERROR [SECONDS]      (ERROR: memory, store or input)

SECONDS: within which ranks meet, at the first restart.
"""

import os
import sys
from pathlib import Path

import torch

from pipeline import distributed
from pipeline.errors import UserError, run_cli
from pipeline.faults import ATTEMPT, supervise

ERRORS = {
    "memory": torch.OutOfMemoryError("no memory"),
    "store": UserError("the store is out of reach", local=True, transient=True),
    "input": UserError("no such split", local=True),
}


def main() -> None:
    marker, error = Path(sys.argv[1]), ERRORS[sys.argv[2]]
    supervise(2)
    if len(sys.argv) > 3 and os.environ[ATTEMPT].endswith("attempt 1"):
        distributed.JOIN_SECONDS = float(sys.argv[3])
    with distributed.session(1800, seed=0) as world:
        distributed.barrier()
        if world.rank == 1 and not marker.exists():
            marker.touch()
            raise error
        distributed.barrier()
        sys.stdout.write(f"rank {world.rank} is done\n")


if __name__ == "__main__":
    run_cli(main)

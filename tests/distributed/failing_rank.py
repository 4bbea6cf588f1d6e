"""Program: a rank that fails while the others wait for it in a collective, and nobody can leave the group before.

    failing_rank.py KIND RANK
    failing_rank.py killed RANK RUN_DIR
    failing_rank.py pretrain RANK words of pretrain.py ...

Leaving a group of nccl waits for the other ranks; here leaving a gloo group does so too.
"""

import itertools
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline import distributed
from pipeline.errors import UserError, run_cli

KINDS = {
    "device": RuntimeError("no answer\nof device 3"),
    "input": UserError("data.max_bad = 3: too many"),
    "own input": UserError("shard 7 cannot be read", local=True),
    "store": UserError("the store is out of reach", local=True, transient=True),
}
NEVER = 10**6
kind, failing = sys.argv.pop(1), int(sys.argv.pop(1))


def hang(*args: Any) -> None:
    time.sleep(NEVER)


def main() -> None:
    with (
        distributed.session(1800, seed=0) as world,
        world.faults.watch(Path(sys.argv[1]), 12) if kind == "killed" else nullcontext(),
    ):
        distributed.barrier()
        if world.rank == failing and kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if world.rank == failing or failing < 0:
            raise KINDS[kind]
        distributed.barrier()


dist.destroy_process_group = hang
if kind == "pretrain":
    from launchers.pretrain import main as pretrain
    from pipeline.model.craft import Craft

    forward, passes = Craft.forward, itertools.count()

    def fail(self: Craft, *args: Any, **named: Any) -> Any:
        if distributed.rank() == failing and next(passes) > 12:
            raise KINDS["device"]
        return forward(self, *args, **named)

    Craft.forward = fail  # type: ignore[method-assign]
if __name__ == "__main__":
    run_cli(pretrain if kind == "pretrain" else main)

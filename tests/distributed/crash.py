"""Rank program: one rank saves checkpoint after checkpoint and is killed, 20 times; then its disk is full.

    crash.py DIR OUT.json

The engine is real; each kill hits a fork of it, which costs no start. At ZeRO 0 on one rank nothing in a
save communicates, so a fork saves as the process itself would.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from pipeline import distributed
from pipeline.config import CheckpointConfig
from pipeline.distributed import World
from pipeline.engine import checkpoint
from pipeline.engine.checkpoint import Checkpoints
from tests.distributed.layouts import Trainer

KILLS = 20


def fill(trainer: Trainer, step: int) -> None:
    """Weights and moments that tell their step."""
    trainer.step = step
    with torch.no_grad():
        for parameter in trainer.engine.module.parameters():
            parameter.fill_(float(step))
            for key in ("exp_avg", "exp_avg_sq"):
                trainer.engine.optimizer.state[parameter][key].fill_(float(step))


def save_for_ever(trainer: Trainer, run_dir: Path, world: World) -> None:
    saver = Checkpoints(run_dir, CheckpointConfig(), world)
    while True:
        fill(trainer, trainer.step + 1)
        saver.save(trainer.engine, {"step": trainer.step}, {})


def newest(run_dir: Path) -> int:
    """Step of the newest whole checkpoint, every tensor of which must be of that step."""
    state = checkpoint.read_state(run_dir)
    assert state is not None
    tensors = [tensor for files in ("weights", "optimizer-*") for _, tensor in checkpoint.stored(run_dir, state, files)]
    assert len(tensors) == 3 * len(dict(checkpoint.stored(run_dir, state, "weights")))
    assert all(bool((tensor == state["step"]).all()) for tensor in tensors)
    return int(state["step"])


def whole(run_dir: Path) -> int:
    """Step of the newest checkpoint that says it is whole, unread."""
    return max(int(file.parent.name.removeprefix("step-")) for file in run_dir.glob("checkpoints/step-*/complete"))


def main() -> None:
    run_dir, out = Path(sys.argv[1]), Path(sys.argv[2])
    draw = random.Random(0)
    steps, partial = [], 0
    with distributed.session(300, seed=0) as world:
        trainer = Trainer("plain too", 0, world, None)
        trainer.train(1)
        saver = Checkpoints(run_dir, CheckpointConfig(), world)
        fill(trainer, 1)
        saver.save(trainer.engine, {"step": 1}, {})
        saver.finish()
        for kill in range(KILLS):
            child = os.fork()
            if not child:
                save_for_ever(trainer, run_dir, world)
            before = time.monotonic()
            while kill % 2 and whole(run_dir) == trainer.step and time.monotonic() < before + 60:
                time.sleep(0.001)  # every other time the child gets on by a checkpoint, however slow the machine
            time.sleep(draw.uniform(0.02, 0.25))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            folders = list((run_dir / "checkpoints").glob("step-*"))
            partial += sum(not (folder / "complete").exists() for folder in folders)
            steps.append(newest(run_dir))
            fill(trainer, steps[-1])
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))  # no room for weights; texts still fit
        fill(trainer, steps[-1] + 1)
        saver.save(trainer.engine, {"step": trainer.step}, {})
        saver.settle()
        after_full = newest(run_dir)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        fill(trainer, steps[-1] + 2)
        saver.save(trainer.engine, {"step": trainer.step}, {})
        saver.finish()
        report = {"steps": steps, "partial": partial, "after_full": after_full, "last": newest(run_dir)}
    out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()

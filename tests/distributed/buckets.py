"""Rank program: losses, gradient norms and weights of three steps, with and without overlap, in few buckets and many.

    buckets.py OUT.json
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from pipeline import distributed
from pipeline.config import PretrainRecipe
from pipeline.distributed import World
from pipeline.engine import parts
from pipeline.engine.setup import build_engine, reconcile
from pipeline.engine.step import accumulate
from pipeline.recipes import load_recipe
from tests.distributed.gradients import COMMON, share_of, task_of

CELLS = [(stage, bf16, micro) for stage in (1, 2) for bf16 in (False, True) for micro in (12, 4)]
# More than the largest weight has, and a small part of the model.
BUCKETS = {"one": {"overlap_comm": False}, "overlap": {}, "many": {"reduce_bucket_size": 9_000}}


def steps(stage: int, bf16: bool, micro: int, words: dict[str, Any], world: World) -> list[str]:
    recipe = load_recipe(PretrainRecipe, [], [*COMMON.split(), f"train.micro_batch={micro}", "optim.lr=1e-3"])
    ds = {"zero_optimization": {"stage": stage, **words}, "bf16": {"enabled": bf16}}
    ds, batches = reconcile(ds, recipe, world)
    task = task_of(recipe)
    engine = build_engine(task, recipe, ds)
    if not (stage == 1 and bf16):  # DeepSpeed has another optimiser for that, without buckets
        assert engine.optimizer.overlap_comm is words.get("overlap_comm", True)
    found = []
    for _ in range(3):
        named = accumulate(engine, task, share_of(world), batches)
        engine.step()
        found += [distributed.mean(named, world.device)["loss"].hex(), float(engine.get_global_grad_norm()).hex()]
    weights = hashlib.sha256()
    for tensor in parts.full_weights(engine).values():
        weights.update(tensor.numpy().tobytes())
    engine.destroy()
    return [*found, weights.hexdigest()]


def main() -> None:
    with distributed.session(300, seed=0) as world:
        report = {f"{cell}": {name: steps(*cell, words, world) for name, words in BUCKETS.items()} for cell in CELLS}
        if world.is_main:
            Path(sys.argv[1]).write_text(json.dumps(report, indent=1))
        distributed.barrier()


if __name__ == "__main__":
    main()

"""Rank program: whole weights and moments of every layout, against DeepSpeed's own, and the collectives that they took.

    whole.py OUT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.config import PretrainRecipe
from pipeline.distributed import World
from pipeline.engine import parts
from pipeline.engine.setup import build_engine, reconcile
from pipeline.engine.step import accumulate
from pipeline.recipes import load_recipe
from tests.distributed.gather import Collectives
from tests.distributed.gradients import COMMON, share_of, task_of

CELLS = [(stage, bf16, offload) for stage in range(4) for bf16 in (False, True) for offload in (False, True)
         if stage or not (bf16 or offload)]  # fmt: skip



def check(stage: int, bf16: bool, offload: bool, world: World) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    recipe = load_recipe(PretrainRecipe, [], [*COMMON.split(), "optim.lr=1e-3"])
    zero: dict[str, Any] = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    ds, batches = reconcile({"zero_optimization": zero, "bf16": {"enabled": bf16}}, recipe, world)
    task = task_of(recipe)
    engine = build_engine(task, recipe, ds)
    accumulate(engine, task, share_of(world), batches)
    engine.step()
    used: dict[str, list[str]] = {}
    mean = parts.Mean(engine)
    with Collectives() as seen:
        mean.take(lambda average, weights: average.lerp_(weights, 0.5))
    used["mean"] = seen.names
    names = parts.spread(engine)
    first = next(iter(names))
    if world.rank == 0 and stage == 0:
        mean.parts[first].values[0] = -0.0
    to_main = dict.fromkeys(names, 0)
    for name, ask in (("weights", lambda: parts.full_weights(engine)),
                      ("moments", lambda: parts.full_moments(engine, to_main)),
                      ("average", lambda: parts.put_together(engine, mean.parts, to_main))):  # fmt: skip
        with Collectives() as seen:
            used[name] = seen.names
            made = ask()
        if name == "weights":
            found = made
        else:
            found |= {f"{name}/{key}": value for key, value in made.items()}
    # Whole ones of DeepSpeed, one by one.
    expected = {}
    for name, parameter in engine.module.named_parameters():
        if stage:
            whole = safe_get_full_fp32_param(parameter)
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in parts.MOMENTS}
        else:
            whole, moments = parameter.detach(), {key: engine.optimizer.state[parameter][key] for key in parts.MOMENTS}
        expected[name] = whole.float().cpu()
        expected[f"average/{name}"] = expected[name].clone()
        expected |= {f"moments/{key}/{name}": moment.float().cpu() for key, moment in moments.items()}
    if stage == 0:
        expected[f"average/{first}"].flatten()[0] = -0.0
    again = parts.Mean(engine)
    again.restore(iter((name, expected[f"average/{name}"]) for name in names))
    report = {
        "equal": found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected),
        "restored": all(torch.equal(again.parts[name].values, mean.parts[name].values) for name in names),
        "negative_zero": stage > 0 or not world.is_main or str(float(found[f"average/{first}"].flatten()[0])),
        "used": used,
        "others": len(found),
        "tensors": len(names),
        "held": sum(len(part.values) for part in mean.parts.values()),
        "whole": sum(weight.numel() for name, weight in expected.items() if name in names),
    }
    engine.destroy()
    return report


def main() -> None:
    parts.BUCKET = 20_000  # a part of these small models
    with distributed.session(300, seed=0) as world:
        report = {" ".join(map(str, cell)): check(*cell, world) for cell in CELLS}
        Path(f"{sys.argv[1]}.{world.rank}").write_text(json.dumps(report, indent=1))
        distributed.barrier()


if __name__ == "__main__":
    main()

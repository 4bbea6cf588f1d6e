"""Rank program: where the weights lie in memory when a forward pass reads them.

    alignment.py OUT.json

Of every ZeRO stage and precision: names of the weights with two or more dimensions that do not start at a multiple of
16 bytes, beside those whose own size is no such multiple.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.distributed import World
from pipeline.engine.setup import build_engine, reconcile
from pipeline.engine.step import accumulate
from pipeline.recipes import load_recipe
from tests.distributed.gradients import COMMON, share_of, task_of

CELLS = [(stage, bf16) for bf16 in (False, True) for stage in range(4) if stage or not bf16]
KINDS = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe}
WORDS = {
    "pretrain": "pretrain.method=pswacl pretrain.r_cl=1.0",
    "finetune": "finetune.method=swab finetune.fusion_layer=1 finetune.bottlenecks=3 optim.layer_decay=0.5",
}


def misplaced(kind: str, stage: int, bf16: bool, world: World) -> dict[str, list[str]]:
    recipe = load_recipe(KINDS[kind], [], f"{WORDS[kind]} {COMMON}".split())
    ds, batches = reconcile({"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}, recipe, world)
    task = task_of(recipe)
    sizes = {name: weight.numel() for name, weight in task.named_parameters() if weight.ndim > 1}
    engine = build_engine(task, recipe, ds)
    found: dict[str, int] = {}

    def look(prefix: str, module: torch.nn.Module, _: Any) -> None:
        for name, weight in module.named_parameters(prefix, recurse=False):
            if weight.ndim > 1 and weight.numel():
                found[name] = weight.data_ptr() % 16

    for name, module in task.named_modules():
        module.register_forward_pre_hook(partial(look, name))
    accumulate(engine, task, share_of(world), batches)
    engine.destroy()
    odd = [name for name, size in sizes.items() if size % 8]
    return {
        "misplaced": [name for name, place in found.items() if place and name not in odd],
        "odd": odd,
        "unseen": [name for name in sizes if name not in found],
        "seen": list(found),
    }


def main() -> None:
    with distributed.session(300, seed=0) as world:
        report = {f"{kind} {stage} {bf16}": misplaced(kind, stage, bf16, world)
                  for kind in WORDS for stage, bf16 in CELLS}  # fmt: skip
        if world.is_main:
            Path(sys.argv[1]).write_text(json.dumps(report, indent=1))
        distributed.barrier()


if __name__ == "__main__":
    main()

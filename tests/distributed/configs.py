"""Rank program: two steps under every file of configs/deepspeed/, as pretraining and as finetuning.

    configs.py OUT.json
"""

import json
import math
import sys
from pathlib import Path

from pipeline import distributed
from pipeline.command_line import read_deepspeed_config
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.distributed import World
from pipeline.engine.setup import build_engine, reconcile
from pipeline.engine.step import accumulate
from pipeline.errors import UserError
from pipeline.files import shipped
from pipeline.recipes import load_recipe
from tests.distributed.gradients import COMMON, share_of, task_of

WORDS = {"plain": "", "checkpointing": "model.checkpoint_activations=true", "clipped": "optim.clip=0.1"}
FILES = sorted(file.name for file in shipped("deepspeed").glob("*.json"))


def cells() -> list[tuple[str, str, str]]:
    """(file, kind, words): every file both ways; the recipe's own options at the two kinds of ZeRO."""
    plain = [(file, kind, "plain") for file in FILES for kind in ("pretrain", "finetune")]
    plain.remove(("compile.json", "finetune", "plain"))  # compiling takes 20 s
    return plain + [(file, "pretrain", words) for file in ("zero2.json", "zero3.json") for words in list(WORDS)[1:]]


def run(file: str, kind: str, words: str, world: World) -> dict[str, object]:
    settings = [*COMMON.split(), "train.micro_batch=6", "optim.lr=1e-3", *WORDS[words].split()]
    recipe = load_recipe(PretrainRecipe if kind == "pretrain" else FinetuneRecipe, [], settings)
    try:
        ds, batches = reconcile(read_deepspeed_config(file), recipe, world)
    except UserError as error:
        return {"refused": str(error)}
    task = task_of(recipe)
    engine = build_engine(task, recipe, ds)
    batch, losses = share_of(world), []
    for _ in range(3):
        named = accumulate(engine, task, batch, batches)
        engine.step()
        losses.append(distributed.mean(named, world.device)["loss"])
    assert all(map(math.isfinite, losses))
    engine.destroy()
    return {"losses": losses}


def main() -> None:
    with distributed.session(300, seed=0) as world:
        report = {" ".join(cell): run(*cell, world) for cell in cells()}
        if world.is_main:
            Path(sys.argv[1]).write_text(json.dumps(report, indent=1))
        distributed.barrier()


if __name__ == "__main__":
    main()

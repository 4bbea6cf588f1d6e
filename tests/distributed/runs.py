"""Rank program: whole finetunings one after the other in one process group.

    runs.py SHARDS FOLDER WORD...

FOLDER/alone: what the words say. FOLDER/straight: the modern recipe in bf16, 6 steps, every step's checkpoint
kept. FOLDER/resumed: the same, gone on from the checkpoint of step 3, between two updates of the average.
FOLDER/zero-0 to zero-3: three steps at each ZeRO stage, to be exported.
"""

import gc
import shutil
import sys
from pathlib import Path

from pipeline import distributed
from pipeline.command_line import Launch, read_deepspeed_config
from pipeline.config import FinetuneRecipe
from pipeline.distributed import World
from pipeline.recipes import load_recipe
from pipeline.train import finetune
from tests.ranks import ROOT

MODERN = ["train.steps=6", "train.batch_size=8", "model.size=micro", "checkpoint.ema=0.9", "checkpoint.ema_every=2",
          "checkpoint.every=1", "checkpoint.keep=6", "optim.warmup=1", "optim.lr=1e-3", "log.every=1",
          "log.peak_tflops=null", "eval.every_epochs=0", "finetune.loss=bce", "finetune.pos_weight=0.5",
          "finetune.gamma_neg=2", "finetune.margin=0.05"]  # fmt: skip


def run(files: list[Path], words: list[str], ds: str, world: World) -> None:
    recipe = load_recipe(FinetuneRecipe, files, [*words, "log.mlflow=false", "log.model=false"])
    distributed.seed_host(recipe.run.seed)
    finetune(Launch(recipe, read_deepspeed_config(ds)), world)
    gc.collect()


def main() -> None:
    shards, folder, words = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    modern = [ROOT / "configs" / "finetune" / "modern.yaml"]
    with distributed.session(300, seed=0) as world:
        for stage in range(4):
            few = ["train.steps=3", "eval.every_epochs=0", f"run.dir={folder / f'zero-{stage}'}"]
            run([], [*words, *few], f"zero{stage}.json", world)
        run([], [*words, f"run.dir={folder / 'alone'}"], "ds.json", world)
        words = [f"data.shards={shards}", *MODERN]
        run(modern, [*words, f"run.dir={folder / 'straight'}"], "bf16.json", world)
        if world.is_main:
            shutil.copytree(folder / "straight", folder / "resumed")
            for step in (4, 5, 6):
                shutil.rmtree(folder / "resumed" / "checkpoints" / f"step-{step:08d}")
        distributed.barrier()
        run(modern, [*words, f"run.dir={folder / 'resumed'}"], "bf16.json", world)


if __name__ == "__main__":
    main()

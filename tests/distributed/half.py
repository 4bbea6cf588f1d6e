"""Rank program: pretraining in fp16 on CPUs, in one sitting and in two, at each ZeRO stage that takes fp16.

    half.py SHARDS FOLDER

FOLDER gets a run directory `straight-STAGE` and `resumed-STAGE` of each. DeepSpeed has fp16 for GPUs alone and so have
we; its arithmetic runs on a CPU too, once both are told that there is a GPU.
"""

import gc
import sys
from dataclasses import replace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from pipeline import distributed
from pipeline.command_line import Launch, read_deepspeed_config
from pipeline.config import PretrainRecipe
from pipeline.distributed import World
from pipeline.engine import setup
from pipeline.model import craft
from pipeline.recipes import load_recipe
from pipeline.tracking import figures
from pipeline.train import pretrain

STAGES = (1, 2, 3)
STEPS, STOP = 16, 9
# Far too high at first; three good steps raise it again.
SCALER = {"loss_scale": 0, "initial_scale_power": 17, "loss_scale_window": 3, "hysteresis": 2, "min_loss_scale": 1}


def train(shards: str, run_dir: str, stage: int, steps: int, world: World) -> None:
    words = ["model.size=micro", "train.batch_size=8", "log.every=1", "log.peak_tflops=null", "optim.warmup=2",
             "data.workers=0", "log.mlflow=false", "eval.every_epochs=0", "eval.every_clips=0", "optim.lr=1e-4",
             f"data.shards={shards}", f"run.dir={run_dir}", f"train.steps={steps}", "log.pictures=0",
             *(["train.micro_batch=2"] if stage == 1 else [])]  # fmt: skip
    recipe = load_recipe(PretrainRecipe, [], words)
    distributed.seed_host(recipe.run.seed)
    ds = read_deepspeed_config("fp16.json")
    ds["fp16"] |= SCALER
    if stage != 1:  # which is fp16.json's own with several micro-batches
        ds["zero_optimization"] = {"stage": stage}
    pretrain(Launch(recipe, ds), world)
    gc.collect()


def fp16_on_cpus() -> None:
    """Lets this process train in fp16 on a CPU."""
    type(get_accelerator()).is_fp16_supported = lambda _: True
    precision = setup._precision

    def on_a_gpu(ds: dict[str, Any], stage: int, world: World) -> dict[str, Any]:
        return precision(ds, stage, replace(world, device=torch.device("cuda", 0)))

    setup._precision = on_a_gpu


def main() -> None:
    shards, folder = sys.argv[1:]
    craft.SIZES["micro"] = craft.Size(width=32, depth=2, heads=2)
    figures.curves = lambda *_: False
    fp16_on_cpus()
    torch.cuda.is_bf16_supported = lambda including_emulation=True: False
    with distributed.session(300, seed=0) as world:
        for stage in STAGES:
            train(shards, f"{folder}/straight-{stage}", stage, STEPS, world)
            train(shards, f"{folder}/resumed-{stage}", stage, STOP, world)
            train(shards, f"{folder}/resumed-{stage}", stage, STEPS, world)


if __name__ == "__main__":
    main()

"""Rank program: the frames of ours between train() and the arithmetic of a loss, in a step of pretraining.

    route.py SHARDS RUN_DIR OUT.json MICRO_BATCH
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.command_line import Launch
from pipeline.config import PretrainRecipe
from pipeline.objectives import masked_patch
from pipeline.recipes import load_recipe
from pipeline.train import pretrain
from tests.ranks import ROOT

routes: dict[str, list[str]] = {}


def traced(name: str, function: Any) -> Any:
    """`function`, whose first call notes who called it."""

    def call(*args: Any, **named: Any) -> Any:
        stack = [f"{Path(frame.filename).relative_to(ROOT)} {frame.name}" for frame in traceback.extract_stack()
                 if Path(frame.filename).is_relative_to(ROOT / "pipeline")]  # fmt: skip
        begin = "pipeline/engine/loop.py train"
        routes.setdefault(name, stack[stack.index(begin) :] if begin in stack else [])
        return function(*args, **named)

    return call


def main() -> None:
    shards, run_dir, out, micro = sys.argv[1:]
    masked_patch.F.cross_entropy = traced("masked patches", masked_patch.F.cross_entropy)  # type: ignore[assignment]
    torch.Tensor.logsumexp = traced("contrast", torch.Tensor.logsumexp)  # type: ignore[method-assign]
    words = [f"data.shards={shards}", f"run.dir={run_dir}", "model.size=micro", "train.batch_size=4", "train.steps=1",
             f"train.micro_batch={micro}", "data.workers=0", "log.mlflow=false", "log.peak_tflops=null"]  # fmt: skip
    with distributed.session(60, seed=0) as world:
        pretrain(Launch(load_recipe(PretrainRecipe, [], words), {}), world)
    Path(out).write_text(json.dumps(routes))


if __name__ == "__main__":
    main()

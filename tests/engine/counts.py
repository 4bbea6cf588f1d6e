"""Rank program: operations and bytes of training steps, counted as they run, beside the plan's.

    counts.py OUT STAGES ACCUMULATIONS PRECISIONS [key=value ...]

Each but the last is a list with commas. Rank 0 writes a list of {stage, accumulation, precision, kernels, sent,
planned, planned_kernels}.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import distributed
from pipeline.config import PretrainRecipe
from pipeline.engine import plan
from pipeline.engine.setup import build_engine, reconcile
from pipeline.engine.step import accumulate
from pipeline.flow import Batch
from pipeline.recipes import load_recipe
from pipeline.tasks import PretrainTask
from tests.distributed.half import fp16_on_cpus
from tests.engine.memory import SHAPE

CLIPS = 12
MOVED = {"allreduce_": 2, "reduce_": 1, "_allgather_base_": 1, "allgather_": 1, "allgather_into_tensor_coalesced_": 1,
         "_reduce_scatter_base_": 1, "reduce_scatter_": 1, "reduce_scatter_tensor_coalesced_": 1}  # fmt: skip


class Counter(TorchDispatchMode):
    """Kernels that are started, and bytes that a ring would send, of what runs inside."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.kernels, self.sent, self.share = 0, 0.0, (ranks - 1) / ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            tensors = ([leaf for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor)] for arg in args[:2])
            sizes = [sum(tensor.nbytes for tensor in some) for some in tensors]
            if name in MOVED:  # of gathers and scatters, the whole; of the rest, the only tensors
                self.sent += MOVED[name] * self.share * max(sizes)
        else:
            self.kernels += plan.launches(func)
        return func(*args, **(kwargs or {}))


def main() -> None:
    out, stages, accumulations, precisions, *words = sys.argv[1:]
    found = []
    torch.set_num_threads(1)
    fp16_on_cpus()
    with distributed.session(300, seed=0) as world:
        for precision in precisions.split(","):
            cost = plan.record(load_recipe(PretrainRecipe, [], words), SHAPE, precision)
            for stage in map(int, stages.split(",")):
                for accumulation in map(int, accumulations.split(",")):
                    micro = CLIPS // world.size // accumulation
                    recipe = load_recipe(PretrainRecipe, [], [f"train.batch_size={CLIPS}", *words])
                    ds = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": precision == "bf16"},
                          "fp16": {"enabled": precision == "fp16", "initial_scale_power": 4},
                          "train_micro_batch_size_per_gpu": micro}  # fmt: skip
                    ds, batches = reconcile(ds, recipe, world)
                    engine = build_engine(PretrainTask(recipe, SHAPE.mel_bins, SHAPE.frames), recipe, ds)
                    position = torch.arange(CLIPS // world.size)
                    batch = Batch(position, position, position >= 0, torch.randn(len(position), SHAPE.samples),
                                  torch.randn(len(position), SHAPE.frames, SHAPE.mel_bins),
                                  torch.zeros(len(position), 1))  # fmt: skip
                    for _ in range(2):  # the first one makes the moments
                        with Counter(world.size) as counter:
                            accumulate(engine, engine.module, batch, batches)
                            engine.step()
                    contrast = int(engine.module.contrasts_batch)
                    sent = plan.traffic(cost, stage, world.size, CLIPS, contrast, accumulation)
                    found.append({"stage": stage, "accumulation": accumulation, "precision": precision,
                                  "kernels": counter.kernels, "sent": counter.sent,
                                  "planned": sum(sent.values()),
                                  "planned_kernels": plan.kernels(cost, stage, accumulation, micro)})  # fmt: skip
                    del engine
                    gc.collect()
        if world.is_main:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

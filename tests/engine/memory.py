"""Program: the memory that a training step really takes, beside the plan's.

    memory.py SIZE CLIPS STAGE OUT.json

On Linux the peak of resident memory is counted by the kernel and can be reset: what the step adds to
what the process had before is the step's.
"""

import ctypes
import json
import re
import sys
from pathlib import Path

import torch

from pipeline import distributed
from pipeline.config import PretrainRecipe
from pipeline.engine import plan
from pipeline.engine.setup import build_engine, reconcile
from pipeline.engine.step import accumulate
from pipeline.flow import Batch
from pipeline.recipes import load_recipe
from pipeline.tasks import PretrainTask

# Of two and a half seconds, not the usual ten: all that grows with a clip is in proportion.
SHAPE = plan.Shape(samples=40_960, mel_bins=128, frames=256)


def resident(what: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most since the last reset."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main() -> None:
    size, clips, stage, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    recipe = load_recipe(PretrainRecipe, [], [f"model.size={size}", f"train.batch_size={clips}"])
    torch.set_num_threads(1)
    with distributed.session(300, seed=0) as world:
        ds, batches = reconcile({"zero_optimization": {"stage": stage}}, recipe, world)
        small = load_recipe(PretrainRecipe, [], ["model.size=micro", "train.batch_size=1"])
        for words, count in ((small, 1), (recipe, clips)):  # the small one first: libraries, caches
            before = resident("VmRSS")
            task = PretrainTask(words, SHAPE.mel_bins, SHAPE.frames)
            sizes = {"train_batch_size": count, "train_micro_batch_size_per_gpu": count}
            engine = build_engine(task, words, ds | sizes)
            position = torch.arange(count)
            batch = Batch(position, position, position >= 0, torch.randn(count, SHAPE.samples),
                          torch.randn(count, SHAPE.frames, SHAPE.mel_bins), torch.zeros(count, 1))  # fmt: skip
            for _ in range(2):  # the first one makes the moments
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")
                accumulate(engine, task, batch, batches)
                engine.step()
            measured = resident("VmHWM") - before
            del engine, task, batch
        planned = plan.memory(plan.record(recipe, SHAPE, "fp32"), stage, 1, clips)
    gpus_alone = planned.buckets + planned.context
    touched = planned.total - gpus_alone + (planned.gradients if stage else 0)  # what fills the bucket
    out.write_text(json.dumps({"measured": measured, "planned": touched, "parts": str(planned)}))


if __name__ == "__main__":
    main()

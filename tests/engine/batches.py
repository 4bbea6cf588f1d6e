"""Program: the memory that a step of CRAFT-Mosaic adds to its batch, for global batches and micro-batches.

    batches.py OUT.json G:MICRO ...

Counted by the kernel, as memory.py counts it.
"""

import ctypes
import json
import sys
from pathlib import Path

import torch

from pipeline import distributed
from pipeline.config import PretrainRecipe
from pipeline.engine.setup import build_engine, reconcile
from pipeline.engine.step import accumulate
from pipeline.flow import Batch
from pipeline.recipes import load_recipe
from pipeline.tasks import PretrainTask
from tests.engine.memory import resident
from tests.ranks import ROOT

MELS, FRAMES = 32, 64
FILE = ROOT / "configs" / "pretrain" / "craft_mosaic.yaml"


def main() -> None:
    out, sizes = Path(sys.argv[1]), [tuple(map(int, word.split(":"))) for word in sys.argv[2:]]
    torch.set_num_threads(1)
    found = {}
    with distributed.session(300, seed=0) as world:
        for clips, micro in sizes:
            words = f"model.size=micro model.channels=[11,11,10] train.batch_size={clips} train.micro_batch={micro}"
            recipe = load_recipe(PretrainRecipe, [FILE], words.split())
            ds, batches = reconcile({"zero_optimization": {"stage": 0}}, recipe, world)
            task = PretrainTask(recipe, MELS, FRAMES)
            engine = build_engine(task, recipe, ds)
            position = torch.arange(clips)
            batch = Batch(position, position, position >= 0, torch.randn(clips, FRAMES * 160),
                          torch.randn(clips, FRAMES, MELS), torch.zeros(clips, 1))  # fmt: skip
            accumulate(engine, task, batch[:micro], batches)  # makes the gradients
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            accumulate(engine, task, batch, batches)
            found[f"{clips}:{micro}"] = resident("VmHWM") - before
            del engine, task, batch
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

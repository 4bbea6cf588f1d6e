"""Rank program: pretrain.py on a device with room for so many clips at a time.

    no_room.py WHERE RANK words of pretrain.py ...

WHERE "train": rank RANK has no room for more than two clips, from the 9th step on. "eval": for none in evaluations.
"begin": for the optimiser's states.
"""

import itertools
import sys
from typing import Any

import torch

from launchers.pretrain import main
from pipeline import distributed
from pipeline.engine import loop
from pipeline.engine.setup import build_engine
from pipeline.errors import run_cli
from pipeline.model.craft import Craft

where, failing = sys.argv.pop(1), int(sys.argv.pop(1))
forward, passes = Craft.forward, itertools.count()


def limited(self: Craft, fbank: torch.Tensor, *args: Any, **named: Any) -> Any:
    full = not self.training if where == "eval" else self.training and len(fbank) > 2 and next(passes) >= 8
    if full:
        refuse()
    return forward(self, fbank, *args, **named)


def refuse() -> None:
    if distributed.rank() == failing:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2.00 GiB.")


def build(*args: Any) -> Any:
    engine = build_engine(*args)
    if where == "begin":
        refuse()
    return engine


loop.build_engine = build
Craft.forward = limited  # type: ignore[method-assign]
if __name__ == "__main__":
    run_cli(main)

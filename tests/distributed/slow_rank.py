"""Program: launchers/pretrain.py, with a rank that is slow on purpose.

    slow_rank.py SLOW_RANK SECONDS words of pretrain.py ...

Every forward pass of the network takes that much longer on the slow rank.
"""

import sys
import time
from typing import Any

from launchers.pretrain import main
from pipeline import distributed
from pipeline.errors import run_cli
from pipeline.model.craft import Craft

slow, seconds = int(sys.argv.pop(1)), float(sys.argv.pop(1))
forward = Craft.forward


def slow_forward(self: Craft, *args: Any, **named: Any) -> Any:
    if distributed.rank() == slow and self.training:
        time.sleep(seconds)
    return forward(self, *args, **named)


Craft.forward = slow_forward
if __name__ == "__main__":
    run_cli(main)

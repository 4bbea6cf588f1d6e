"""Which rank keeps the others waiting.

In: the network, whose forward passes are timed, and the time that each batch is waited for. Out: every
`log.stragglers` steps a line that names the slowest rank and its host, and two numbers for metrics.jsonl.

Ranks that train in step all take equally long for a step, the slow one as well: it works while the others
wait inside collectives. So what is compared is what a rank does alone, before the step's first collective:
waiting for data, and the network's forward passes (a third of what the step computes). At ZeRO 3 the ranks
wait for each other inside these too, and only the wait for data tells them apart.

Cost: two readings of a clock (on a GPU, two events on its stream) a forward pass; one gather of two numbers
a rank at a logged step, no more often than `log.stragglers` steps.
"""

import logging
import socket
import time
from typing import Any

import torch
from torch import nn

from pipeline import distributed
from pipeline.distributed import World

log = logging.getLogger(__name__)

NAME_BYTES = 64


class Stragglers:
    """Times this rank, and at reports compares it with the others; a collective when made.

    Args:
        network: Its forward passes are timed while it trains.
        world: Ranks.
        step: Finished steps.
        every: Steps between reports, at least; 0: never.
    """

    def __init__(self, network: nn.Module, world: World, step: int, every: int) -> None:
        self._world, self._every, self._last = world, every, step
        self._waited = 0.0
        self._begun: Any = None
        self._passes: list[tuple[Any, Any]] = []
        self._hosts: list[str] = []
        if world.size == 1 or not every:
            self._every = 0
            return
        name = socket.gethostname().encode()[:NAME_BYTES].ljust(NAME_BYTES)
        names = distributed.gather(torch.tensor([list(name)], dtype=torch.uint8, device=world.device))
        self._hosts = [bytes(row).decode(errors="replace").strip() for row in names.tolist()]
        network.register_forward_pre_hook(self._enter)
        network.register_forward_hook(self._leave)

    def waited(self, seconds: float) -> None:
        """Counts seconds that this rank waited for a batch."""
        self._waited += seconds

    def report(self, step: int, last: bool) -> dict[str, float]:
        """Where a report is due after `step`, or at the `last`: compares the ranks; a collective.

        Returns:
            `slowest_rank`, and `slowest_ratio`: its time over the median rank's; equal on all ranks.
        """
        steps = step - self._last
        if not self._every or not steps or (steps < self._every and not last):
            return {}
        own = [self._forward() / steps, self._waited / steps]
        ranks = distributed.gather(torch.tensor([own], dtype=torch.float64, device=self._world.device)).cpu()
        self._last, self._waited = step, 0.0
        totals = ranks.sum(dim=1)
        slowest, median = int(totals.argmax()), float(totals.median())  # of two: the faster
        forward, wait = ranks.median(dim=0).values.tolist()
        log.info(
            "slowest of %d ranks in %d steps: rank %d on %s, %.3f s a step (median %.3f): forward %.3f (%.3f), "
            "data wait %.3f (%.3f)",
            len(ranks), steps, slowest, self._hosts[slowest], totals[slowest], median, ranks[slowest, 0], forward,
            ranks[slowest, 1], wait,
        )  # fmt: skip
        return {"slowest_rank": float(slowest), "slowest_ratio": float(totals[slowest]) / max(median, 1e-9)}

    def _now(self) -> Any:
        if self._world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _enter(self, network: nn.Module, inputs: Any) -> None:
        self._begun = self._now() if network.training else None

    def _leave(self, network: nn.Module, inputs: Any, output: Any) -> None:
        if self._begun is not None:
            self._passes.append((self._begun, self._now()))

    def _forward(self) -> float:
        """Seconds in forward passes since the last call; the device has been waited for, losses were read."""
        passes, self._passes = self._passes, []
        if self._world.device.type != "cuda":
            return float(sum(end - begin for begin, end in passes))
        return float(sum(begin.elapsed_time(end) for begin, end in passes)) / 1000

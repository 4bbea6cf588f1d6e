"""`--max-restarts N`: a run that a fault ended goes on by itself.

In: a rank process that has read its command line. Out: the same process, forked: the child trains, the
parent waits, and forks anew where the child dies. The new child finds the newest checkpoint.

It works under any launcher (deepspeed, torchrun, srun) and over any hosts without a word between the
parents: when one rank dies, the others' collectives fail, or the watch ends them, so each parent comes
to the same attempt. Each attempt has a rendezvous port of its own, MASTER_PORT + attempt, where no late
rank of the attempt before can be met. A rank that meets nobody there gives up after `distributed.JOIN_SECONDS`.

Not restarted: success (0), bad input (2), a signal to stop. Restarted: any other end, also a fault that may pass by
itself, such as a store out of reach (75). Cost: a sleeping parent per rank, which shares
its memory with the child.
"""

import ctypes
import os
import signal
import sys
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


def supervise(restarts: int) -> None:
    """Returns in a child, as often as `restarts` allows; the parent leaves with the last child's status.

    To be called before threads or a GPU context exist: neither survives a fork.

    Args:
        restarts: Most restarts; 0: none, and no parent.

    Raises:
        SystemExit: in the parent, at the end.
    """
    if not restarts:
        return
    port, parent = int(os.environ.get("MASTER_PORT", "29500")), os.getpid()
    told: list[int] = []
    for attempt in range(restarts + 1):
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _die_with(parent)
            if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
                os.environ["MASTER_PORT"] = str(port + attempt)
                if attempt:  # torchrun's own store is at the first port; from now on rank 0 opens one
                    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            return
        status = _wait(child, told)
        if status in (0, 2) or told:
            break
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        what = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        then = f"restart {attempt + 1} of {restarts}" if attempt < restarts else f"{restarts} restarts are used up"
        sys.stderr.write(f"rank {rank} {what}; {then}\n")
        sys.stderr.flush()
    sys.exit(status if status >= 0 else 128 - status)


def _wait(child: int, told: list[int]) -> int:
    """Passes stop signals on to the child, notes them in `told`, and returns its status (-N: signal N)."""

    def forward(number: int, frame: FrameType | None) -> None:
        told.append(number)
        os.kill(child, number)

    before = {number: signal.signal(number, forward) for number in STOPS}
    try:
        _, status = os.waitpid(child, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return os.waitstatus_to_exitcode(status)


def _die_with(parent: int) -> None:
    """The kernel kills this process where its parent dies: no orphan goes on training."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        sys.exit(1)

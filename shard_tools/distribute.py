"""Runs shard plans on a pool of processes.

In: plans. Out: finished shards, in any order; each is independent, so the bytes do not depend on it.

At most twice as many plans as workers are in flight, so memory is flat in the number of shards.
"""

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from pipeline.errors import UserError
from shard_tools.write import ShardPlan, write_shard


def run(plans: Iterable[ShardPlan], workers: int) -> Iterator[ShardPlan]:
    """Writes each plan's shard and yields the plan when it is done.

    Args:
        plans: In order; taken lazily.
        workers: Processes.

    Raises:
        OSError: a shard could not be written.
        UserError: a worker was killed (out of memory, or a decoder's crash).
    """
    # BLAS and OMP threads left unset double a worker's CPU time: one thread each.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    queue = iter(plans)
    running: dict[Future[None], ShardPlan] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_single_thread) as pool:
        try:
            while True:
                while len(running) < 2 * workers and (plan := next(queue, None)) is not None:
                    running[pool.submit(write_shard, plan)] = plan
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    yield running.pop(future)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed (out of memory?); finished shards are kept: run the same command again, "
                "with fewer --workers"
            ) from error
        finally:
            for future in running:
                future.cancel()


def _single_thread() -> None:
    torch.set_num_threads(1)

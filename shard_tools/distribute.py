"""Runs shard plans on an engine: processes of this machine, or a Ray cluster.

In: plans, taken lazily. Out: finished shards, in any order; each is independent, so the bytes do not
depend on it. A bounded number of plans is in flight, so memory is flat in the number of shards.

A process that dies takes one attempt at one shard with it, and the shard is tried again; so it is after trouble of
the machine (a store, the network or the scratch disk that is away), some times with longer and longer waits. What goes
on for longer ends the build, with nothing recorded of the shard. Slices need no engine: plan.py.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from pipeline.errors import UserError
from pipeline.faults import stop_signals
from shard_tools.segment import MachineError
from shard_tools.write import ShardPlan, write_shard

Item = TypeVar("Item")
Result = TypeVar("Result")

ENGINES = ("process", "ray", "inline")
WAITS = (1.0, 5.0, 20.0)  # seconds before a shard is tried again after trouble of the machine
DEATHS = 2  # of workers at one shard that end the build
RAY_DEATHS = 5  # nodes of a cluster come and go
# BLAS and OMP threads left unset double a worker's CPU time: one thread each.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def run(plans: Iterable[ShardPlan], workers: int, engine: str = "process") -> Generator[ShardPlan, None, None]:
    """Writes each plan's shard and yields the plan when it is done.

    Args:
        plans: In order; taken lazily.
        workers: Processes; with Ray at most so many tasks at a time.
        engine: "process", "ray", or "inline": in this process, for debuggers and profilers.

    Raises:
        OSError: a shard could not be written.
        UserError: workers were killed again and again (out of memory?), the machine's trouble goes on, or Ray is not
            there.
    """
    if engine == "inline":
        for plan in plans:
            write_patiently(plan)
            yield plan
    else:
        yield from _run_ray(plans, workers) if engine == "ray" else _run_processes(plans, workers)


def write_patiently(plan: ShardPlan) -> None:
    """`write_shard`, tried again after trouble of the machine.

    Raises:
        UserError: the trouble goes on.
        OSError: as `write_shard`.
    """
    for pause in (*WAITS, None):
        try:
            write_shard(plan)
            return
        except MachineError as error:
            if pause is None:
                raise UserError(
                    f"{plan.name}: {error} (tried {len(WAITS) + 1} times); that is trouble of this machine, its disks "
                    "or its network, and nothing is recorded of it: when it is over, run the same command to go on"
                ) from error
            time.sleep(pause)


def _run_processes(plans: Iterable[ShardPlan], workers: int) -> Generator[ShardPlan, None, None]:
    for name, value in ONE_THREAD.items():
        os.environ.setdefault(name, value)
    queue = iter(plans)
    running: dict[Future[None], tuple[int, ShardPlan, int]] = {}  # worker, plan, deaths at it
    with _pools() as pool:
        # One pool for each worker: a death breaks a pool, and must be told which shard it was.
        pools = {number: pool(1) for number in range(workers)}
        idle = list(pools)

        def begin(number: int, plan: ShardPlan, deaths: int) -> None:
            try:
                future = _submit(pools[number], write_patiently, plan)
            except BrokenProcessPool:  # its worker was killed, at the last shard or with nothing to do
                pools[number].shutdown()
                pools[number] = pool(1)
                future = _submit(pools[number], write_patiently, plan)
            running[future] = number, plan, deaths

        while True:
            while idle and (plan := next(queue, None)) is not None:
                begin(idle.pop(), plan, 0)
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                number, plan, deaths = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool as error:
                    _check_deaths(plan, deaths + 1, DEATHS, error)
                    begin(number, plan, deaths + 1)
                    continue
                idle.append(number)
                yield plan


def each(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Results of a function, in the order of the items; one worker: in this process.

    At most twice as many items as workers are in flight.

    Raises:
        UserError: a worker was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    queue = iter(items)
    try:
        with _pools() as pool:
            made = pool(workers)
            ahead = deque(_submit(made, function, item) for item in islice(queue, 2 * workers))
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(_submit(made, function, item) for item in islice(queue, 1))
                yield result
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed (out of memory?); run it again with fewer --workers") from error


@contextmanager
def _pools() -> Iterator[Callable[[int], ProcessPoolExecutor]]:
    """Makes pools of processes that end with the block: once they are done, after an error at once."""
    # Workers hold the reading end: when this process stops, or is killed, they see the end of the pipe.
    reader, writer = multiprocessing.Pipe(duplex=False)
    context, made = multiprocessing.get_context("spawn"), list[ProcessPoolExecutor]()

    def pool(workers: int) -> ProcessPoolExecutor:
        made.append(ProcessPoolExecutor(workers, context, _begin_worker, (reader,)))
        return made[-1]

    try:
        yield pool
    except BaseException:
        writer.close()  # the workers exit at once
        raise
    finally:
        for one in made:
            one.shutdown(cancel_futures=True)
        writer.close()
        reader.close()


def _submit(pool: ProcessPoolExecutor, function: Callable[[Item], Result], item: Item) -> Future[Result]:
    """Hands a task to a pool, which may start a worker for it; Ctrl-C waits until it has, and is ours alone.

    A worker that it met at its imports, or that was left without what it is started with, would end with a traceback.
    """
    with stop_signals() as told:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a worker inherits it, and keeps it
        try:
            future = pool.submit(function, item)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for number in told:
        signal.raise_signal(number)
    return future


def _begin_worker(reader: Connection) -> None:
    """One thread; and no worker outlives its parent."""
    torch.set_num_threads(1)

    def follow() -> None:
        reader.poll(None)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _check_deaths(plan: ShardPlan, deaths: int, most: int, error: BaseException) -> None:
    if deaths >= most:
        raise UserError(
            f"{most} worker processes were killed while they wrote {plan.name} (out of memory?); finished shards are "
            "kept: run the same command again, with fewer --workers"
        ) from error


def _run_ray(plans: Iterable[ShardPlan], workers: int) -> Generator[ShardPlan, None, None]:
    """The cluster of RAY_ADDRESS, or of `ray start` on this machine, or else a local one that ends with the build.

    Its nodes need this project installed, and see inputs and --out under the same paths.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--distributor ray: Ray is not installed; pip install 'craft-audio[ray]'") from error
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING, runtime_env={"env_vars": ONE_THREAD})
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"--distributor ray: {error}; check RAY_ADDRESS") from error
    task: Callable[[ShardPlan], Any] = ray.remote(num_cpus=1, max_retries=0)(_write_alone).remote
    queue = iter(plans)
    running: dict[Any, tuple[ShardPlan, int]] = {}  # plan, deaths at it
    try:
        while True:
            # Twice the cluster's processors, asked for anew as clusters grow and shrink: no node waits for the driver.
            processors = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
            room = min(workers, 2 * max(1, processors))
            while len(running) < room and (plan := next(queue, None)) is not None:
                running[task(plan)] = plan, 0
            if not running:
                return
            done, _ = ray.wait(list(running))
            for future in done:
                plan, deaths = running.pop(future)
                try:
                    ray.get(future)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:  # the worker, its node or what it gave back is gone
                    _check_deaths(plan, deaths + 1, RAY_DEATHS, error)
                    running[task(plan)] = plan, deaths + 1
                    continue
                yield plan
    finally:
        for future in running:
            ray.cancel(future, force=True)
        if own:
            ray.shutdown()


def _write_alone(plan: ShardPlan) -> None:
    torch.set_num_threads(1)
    write_patiently(plan)

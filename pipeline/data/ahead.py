"""Fetching ahead: the shards of the batches to come are in the node's cache before a reader asks.

In: which shards each batch reads. Out: nothing but the cache's content; without it readers fetch what they
need themselves, later. A process of its own does it, out of reach of the training process's interpreter lock.
"""

import logging
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection

import numpy as np

from pipeline.data.cache import Cache, NoRoomError, Remote
from pipeline.errors import UserError
from pipeline.files import has_begun, obey_alone

log = logging.getLogger(__name__)

DOWNLOADS = 4  # of one rank at once
TRIES = 3  # to start the process


class Prefetcher:
    """Fetches the shards of a moving range of batches, in a process of its own.

    Args:
        remote: Where the shards are.
        shards_of: Batch -> the shards that this rank reads for it.
        batches: How far ahead.
        first: First batch.
        stop: Behind the last batch; None: no last one.
    """

    def __init__(
        self, remote: Remote, shards_of: Callable[[int], np.ndarray], batches: int, first: int, stop: int | None
    ) -> None:
        context = multiprocessing.get_context("fork")
        for _ in range(TRIES):
            self._pipe, theirs = context.Pipe()
            words = (os.getpid(), theirs, remote, shards_of, batches, first, stop)
            self._process = context.Process(target=_fetch, args=words, daemon=True)
            self._process.start()
            theirs.close()
            if has_begun(self._process, self._pipe):
                return
        log.warning("no process that fetches shards ahead begins: readers fetch them as they go, slower")

    def advance(self, step: int) -> None:
        """Batch `step` is about to be read."""
        if self._pipe.closed:
            return
        try:
            self._pipe.send(step)
        except OSError:
            self.close()
            log.warning(
                "the process that fetches shards ahead ended (status %s): readers fetch them as they go, slower",
                self._process.exitcode,
            )

    def close(self) -> None:
        """Ends the process; an unfinished download is void."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _fetch(
    parent: int, pipe: Connection, remote: Remote, shards_of: Callable[[int], np.ndarray], batches: int, front: int,
    stop: int | None,
) -> None:  # fmt: skip
    """Fetches shards in the order of the batches, and keeps them by their locks until no batch to come reads them."""
    obey_alone(parent)
    pipe.send(None)  # see `has_begun`
    cache, threads = Cache(remote), ThreadPoolExecutor(DOWNLOADS)
    last: dict[int, int] = {}  # shard -> the last batch of the range that reads it
    queue: deque[int] = deque()
    running: dict[Future[int], int] = {}
    held: dict[int, int] = {}  # shard -> descriptor
    not_before = 0.0
    while True:
        if pipe.poll(0.02 if queue or running else None):
            step = pipe.recv()
            while pipe.poll():  # batches may be faster than a turn of this loop: the last one counts
                step = pipe.recv()
            while front <= step + batches and front != stop:
                shards = np.unique(shards_of(front)).tolist()
                queue.extend(shard for shard in shards if shard not in last)
                last |= dict.fromkeys(shards, front)
                front += 1
            for shard in [shard for shard, until in last.items() if until < step]:
                del last[shard]
                if shard in held:
                    os.close(held.pop(shard))
        while queue and len(running) < DOWNLOADS and time.monotonic() >= not_before:
            shard = queue.popleft()
            if shard in last:
                running[threads.submit(cache.open, shard, ahead=True)] = shard
        for future in wait(running, timeout=0.05, return_when=FIRST_COMPLETED).done if running else ():
            shard = running.pop(future)
            try:
                descriptor = future.result()
            except NoRoomError:
                queue.appendleft(shard)
                not_before = time.monotonic() + 1
            except (OSError, UserError) as error:
                log.info("not fetched ahead: %s", error)  # the reader that needs the shard meets it too, and says so
            else:
                if shard in last and shard not in held:
                    held[shard] = descriptor
                else:
                    os.close(descriptor)

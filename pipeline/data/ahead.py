"""Fetching ahead: the shards of the batches to come are in the node's cache before a reader asks.

In: which shards each batch reads. Out: nothing but the cache's content; without it readers fetch what they
need themselves, later. `python -m pipeline.data.ahead FD` is the process that does it, out of reach of the
training process's interpreter lock.
"""

import logging
import os
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection

import numpy as np

from pipeline.data.cache import Cache, NoRoomError, Remote
from pipeline.data.process import connect, start_process
from pipeline.errors import UserError

log = logging.getLogger(__name__)

DOWNLOADS = 4  # of one rank at once


class Scout:
    """Tells the fetching process what is wanted: the shards of a moving range of batches.

    Args:
        remote: Where the shards are.
        shards_of: Batch -> the shards that this rank reads for it.
        batches: How far ahead.
        first: First batch.
        stop: Behind the last batch; 0: no last one.
    """

    def __init__(
        self, remote: Remote, shards_of: Callable[[int], np.ndarray], batches: int, first: int, stop: int
    ) -> None:
        self._process: subprocess.Popen[bytes] | None
        self._pipe: Connection
        self._process, self._pipe = start_process("pipeline.data.ahead")
        self._shards_of, self._batches, self._stop = shards_of, batches, stop
        self._front = first
        self._range: deque[tuple[int, list[int]]] = deque()
        self._uses: Counter[int] = Counter()
        self._send(remote)

    def advance(self, step: int) -> None:
        """Batch `step` is about to be read."""
        want, drop = [], []
        while self._front <= step + self._batches and (not self._stop or self._front < self._stop):
            shards = np.unique(self._shards_of(self._front)).tolist()
            want += [shard for shard in shards if not self._uses[shard]]
            self._uses.update(shards)
            self._range.append((self._front, shards))
            self._front += 1
        while self._range and self._range[0][0] < step:
            for shard in self._range.popleft()[1]:
                self._uses[shard] -= 1
                if not self._uses[shard]:
                    drop.append(shard)
                    del self._uses[shard]
        if want or drop:
            self._send((want, drop))

    def close(self) -> None:
        """Ends the process; an unfinished download is void."""
        self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _send(self, message: object) -> None:
        if self._process is None:
            return
        try:
            self._pipe.send(message)
        except OSError:
            log.warning(
                "the process that fetches shards ahead ended (status %s): readers fetch them as they go, slower",
                self._process.wait(),
            )
            self._process = None


class _Fetcher:
    """Fetches what is wanted, in that order, and keeps it by its lock until it is dropped."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._pool = ThreadPoolExecutor(DOWNLOADS)
        self._queue: deque[int] = deque()
        self._wanted: set[int] = set()
        self._running: dict[Future[int], int] = {}
        self._kept: dict[int, int] = {}
        self._not_before = 0.0

    @property
    def idle(self) -> bool:
        return not self._running and not self._queue

    def change(self, want: list[int], drop: list[int]) -> None:
        self._wanted.update(want)
        self._queue.extend(want)
        for number in drop:
            self._wanted.discard(number)
            if number in self._kept:
                os.close(self._kept.pop(number))

    def step(self) -> None:
        """Starts what may be started, takes in what has finished."""
        while self._queue and len(self._running) < DOWNLOADS and time.monotonic() >= self._not_before:
            number = self._queue.popleft()
            if number in self._wanted:
                self._running[self._pool.submit(self._cache.open, number, ahead=True)] = number
        if not self._running:
            return
        for future in wait(self._running, timeout=0.05, return_when=FIRST_COMPLETED).done:
            self._finished(self._running.pop(future), future)

    def _finished(self, number: int, future: Future[int]) -> None:
        try:
            descriptor = future.result()
        except NoRoomError:
            self._queue.appendleft(number)
            self._not_before = time.monotonic() + 1
        except (OSError, UserError) as error:
            log.info("not fetched ahead: %s", error)  # the reader that needs the shard meets it too, and says so
        else:
            if number in self._wanted and number not in self._kept:
                self._kept[number] = descriptor
            else:
                os.close(descriptor)


def main(descriptor: int) -> None:
    """Serves one loader until it goes away."""
    pipe = connect(descriptor)
    try:
        fetcher = _Fetcher(Cache(pipe.recv()))
        while True:
            if pipe.poll(None if fetcher.idle else 0.02):
                fetcher.change(*pipe.recv())
            fetcher.step()
    except (EOFError, ConnectionResetError):
        os._exit(0)  # not waiting for downloads: their locks are freed, their parts are void


if __name__ == "__main__":
    main(int(sys.argv[1]))

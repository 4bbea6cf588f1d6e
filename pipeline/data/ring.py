"""A ring of batches in shared memory, filled by reader processes while the consumer works.

In: jobs for a region of the memory. Out: the region, filled, and the bad clips.

Measured (tests/benchmarks/bench_loader.py): torch's DataLoader costs more than the reading, since it pickles,
copies and stacks each clip. Here a reader writes a clip straight into its row of a batch. A batch is cut into pieces
for all readers, so the first one comes early and a slow reader holds up little. The memory is a nameless file: nothing
is left of it after kill -9, and a container's small /dev/shm is no limit.

A filled region may be handed over as it is: once released, it is filled again when no array or tensor refers to it
any more, and for a consumer that keeps its batches the file grows by a region. Memory: the batches in flight and
those that the consumer holds, whatever the number of readers. The pipes hold at most the jobs of the batches in
flight: a consumer that stops taking batches stops the readers.
"""

import logging
import mmap
import os
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from pipeline.data.messages import Answer, Hello, Order
from pipeline.data.process import start_process
from pipeline.data.reader import Access, Problem, Reader
from pipeline.errors import UserError

log = logging.getLogger(__name__)

DEATHS = 3  # of the readers of one task, that end the run
PIECE = 8  # jobs of a task at least


@dataclass(slots=True)
class _Helper:
    process: subprocess.Popen[bytes]
    connection: Connection
    tasks: dict[int, "_Task"] = field(default_factory=dict)


@dataclass(slots=True)
class _Task:
    region: int
    jobs: np.ndarray
    deaths: int = 0


class _Region:
    """Memory of a batch.

    Attributes:
        content: uint8, of which all arrays of the batch are views; None: it was released.
        open: Unanswered tasks.
        problems: Bad clips.
    """

    def __init__(self, file: int, number: int, size: int) -> None:
        self._memory = mmap.mmap(file, size, offset=number * size)
        self.open: set[int] = set()
        self.problems: list[Problem] = []
        self.content: np.ndarray | None = None
        self._last: weakref.ref[np.ndarray] | None = None

    def free(self) -> bool:
        return self.content is None and (self._last is None or self._last() is None)

    def take(self) -> None:
        self.content = np.frombuffer(self._memory, np.uint8)
        self._last = weakref.ref(self.content)


class Ring:
    """Regions of equal size and the processes that fill them; used by one thread.

    Args:
        access: To the shards.
        size: Bytes of a region.
        workers: Reader processes; 0: this one reads, when `start` is called.
    """

    def __init__(self, access: Access, size: int, workers: int) -> None:
        self._access = access
        self.size = -(-max(1, size) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._file = _nameless()
        self._regions: list[_Region] = []
        self._reader: Reader | None = None
        self._helpers = [self._start() for _ in range(workers)]
        self._tasks = 0

    def take(self) -> int:
        """A region that nobody refers to, a new one if need be."""
        number = next((number for number, region in enumerate(self._regions) if region.free()), len(self._regions))
        if number == len(self._regions):
            os.ftruncate(self._file, (number + 1) * self.size)
            self._regions.append(_Region(self._file, number, self.size))
        self._regions[number].take()
        return number

    def release(self, region: int) -> None:
        """The region may be taken again once no array of its content is left."""
        self._regions[region].content = None

    def start(self, region: int, jobs: np.ndarray) -> None:
        """Begins to fill a region that was taken.

        Args:
            region: Its number.
            jobs: JOB [n].
        """
        if not self._helpers:
            self._regions[region].problems = self.read(region, jobs)
            return
        piece = max(PIECE, -(-len(jobs) // len(self._helpers)))
        for first in range(0, len(jobs), piece):
            self._submit(_Task(region, jobs[first : first + piece]))

    def finish(self, region: int) -> list[Problem]:
        """Waits until the region is filled; returns its bad clips.

        Raises:
            UserError: a shard cannot be had for now, or readers die one after the other.
        """
        while self._regions[region].open:
            self._receive()
        problems, self._regions[region].problems = self._regions[region].problems, []
        return problems

    def content(self, region: int) -> np.ndarray:
        """All bytes of a region that was taken."""
        content = self._regions[region].content
        if content is None:
            raise ValueError(f"region {region} was released")
        return content

    def array(self, region: int, start: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """A view of the region from byte `start` on."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.asarray(self.content(region)[start : start + size].view(dtype).reshape(shape))

    def read(self, region: int, jobs: np.ndarray) -> list[Problem]:
        """Reads a few more jobs into a region, here and now."""
        if self._reader is None:
            self._reader = Reader(self._access)
        return self._reader.fill(jobs, self.content(region))

    def close(self) -> None:
        """Ends the readers, whatever they are doing. What was handed over stays."""
        for helper in self._helpers:
            helper.connection.close()
            helper.process.kill()
        for helper in self._helpers:
            helper.process.wait()
        self._helpers = []
        if self._reader is not None:
            self._reader.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _start(self) -> _Helper:
        process, connection = start_process("pipeline.data.worker", self._file)
        connection.send(Hello(self._access, self._file, self.size))
        return _Helper(process, connection)

    def _submit(self, task: _Task) -> None:
        helper = min(self._helpers, key=lambda helper: len(helper.tasks))
        self._tasks += 1
        helper.tasks[self._tasks] = task
        self._regions[task.region].open.add(self._tasks)
        self._send(helper, self._tasks, task)

    def _send(self, helper: _Helper, number: int, task: _Task) -> None:
        try:
            helper.connection.send(Order(number, task.region, task.jobs.tobytes()))
        except OSError:
            log.debug("reader %d is gone", helper.process.pid)  # `_receive` sees the closed pipe and restarts it

    def _receive(self) -> None:
        for ready in wait([helper.connection for helper in self._helpers]):
            helper = next(helper for helper in self._helpers if helper.connection is ready)
            try:
                answer: Answer = helper.connection.recv()
            except (EOFError, OSError):
                self._replace(helper)
                continue
            region = self._regions[helper.tasks.pop(answer.task).region]
            region.open.discard(answer.task)
            region.problems += answer.problems
            if answer.error:
                raise UserError(answer.error, local=True, transient=answer.transient)

    def _replace(self, dead: _Helper) -> None:
        """Starts another reader and gives it the dead one's tasks."""
        dead.connection.close()
        status = dead.process.wait()
        log.warning("a reader process ended (status %d); another one takes over its %d tasks", status, len(dead.tasks))
        if dead.tasks:
            first = next(iter(dead.tasks.values()))  # tasks are done in order: the others did not kill it
            first.deaths += 1
            if first.deaths >= DEATHS:
                raise UserError(
                    f"{DEATHS} reader processes ended one after the other (status {status}) on the same clips; if the "
                    "memory is short, lower data.workers or data.prefetch",
                    local=True,
                    transient=True,
                )
        helper = self._start()
        helper.tasks = dead.tasks
        self._helpers[self._helpers.index(dead)] = helper
        for number, task in helper.tasks.items():
            self._send(helper, number, task)


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("craft-ring")
    with tempfile.TemporaryFile() as file:  # not Linux
        return os.dup(file.fileno())

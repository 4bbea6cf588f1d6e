"""A ring of batches in shared memory, filled by reader processes while the consumer works.

In: jobs for a slot. Out: the slot's memory, filled, and the bad clips.

Measured (tests/benchmarks/bench_loader.py): torch's DataLoader costs more than the reading, since it pickles,
copies and stacks each clip. Here a reader writes a clip straight into its row of a batch. A
batch is cut into pieces for all readers, so the first one comes early and a slow reader holds up little. The
memory is a nameless file: nothing is left of it after kill -9, and a container's small /dev/shm is no limit.
Memory: `slots` batches, whatever the number of readers. The pipes hold at most the slots' jobs:
a consumer that stops taking batches stops the readers.
"""

import logging
import mmap
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from pipeline.data.cache import Directory, Remote, open_source
from pipeline.data.messages import Answer, Hello
from pipeline.data.process import start_process
from pipeline.data.reader import Files, Problem, fill
from pipeline.errors import UserError

log = logging.getLogger(__name__)

DEATHS = 3  # of the readers of one task, that end the run
PIECE = 8  # jobs of a task at least


@dataclass(slots=True)
class _Reader:
    process: subprocess.Popen[bytes]
    connection: Connection
    tasks: dict[int, "_Task"] = field(default_factory=dict)


@dataclass(slots=True)
class _Task:
    slot: int
    jobs: np.ndarray
    deaths: int = 0


class Ring:
    """Slots of equal size and the processes that fill them; used by one thread.

    Args:
        source: Of the shards.
        open_files: Shards that a reader keeps open.
        slots: Batches in flight.
        size: Bytes of a slot.
        workers: Reader processes; 0: this one reads, when a slot is asked for.
    """

    def __init__(self, source: Remote | Directory, open_files: int, slots: int, size: int, workers: int) -> None:
        self._hello = (source, open_files)
        self.size = -(-max(1, size) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.slots = slots
        self._file = _nameless()
        os.ftruncate(self._file, self.slots * self.size)
        self.memory = mmap.mmap(self._file, self.slots * self.size)
        self._view = memoryview(self.memory)
        self._files: Files | None = None
        self._readers = [self._start() for _ in range(workers)]
        self._next = 0
        self._open: list[set[int]] = [set() for _ in range(slots)]  # unanswered tasks
        self._problems: list[list[Problem]] = [[] for _ in range(slots)]

    def start(self, slot: int, jobs: np.ndarray) -> None:
        """Begins to fill a slot, whose last content is given up.

        Args:
            slot: Its number.
            jobs: JOB [n].
        """
        self.finish(slot)
        if not self._readers:
            self._problems[slot] = fill(jobs, self.files, self._slot(slot))
            return
        piece = max(PIECE, -(-len(jobs) // len(self._readers)))
        for first in range(0, len(jobs), piece):
            self._submit(_Task(slot, jobs[first : first + piece]))

    def finish(self, slot: int) -> list[Problem]:
        """Waits until the slot is filled; returns its bad clips.

        Raises:
            UserError: a shard cannot be had for now, or readers die one after the other.
        """
        while self._open[slot]:
            self._receive()
        problems, self._problems[slot] = self._problems[slot], []
        return problems

    def array(self, slot: int, start: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """A view of the slot's memory from byte `start` on."""
        count = int(np.prod(shape))
        return np.frombuffer(self._view, dtype, count, slot * self.size + start).reshape(shape)

    def read(self, slot: int, jobs: np.ndarray) -> list[Problem]:
        """Reads a few more jobs into a filled slot, here and now."""
        return fill(jobs, self.files, self._slot(slot))

    @property
    def files(self) -> Files:
        """Own open shards."""
        if self._files is None:
            source, open_files = self._hello
            self._files = Files(open_source(source), open_files)
        return self._files

    def close(self) -> None:
        """Ends the readers, whatever they are doing."""
        for reader in self._readers:
            reader.connection.close()
            reader.process.kill()
        for reader in self._readers:
            reader.process.wait()
        self._readers = []
        if self._files is not None:
            self._files.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _slot(self, slot: int) -> memoryview:
        return self._view[slot * self.size : (slot + 1) * self.size]

    def _start(self) -> _Reader:
        process, connection = start_process("pipeline.data.worker", self._file)
        connection.send(Hello(*self._hello, self._file, self.slots * self.size))
        return _Reader(process, connection)

    def _submit(self, task: _Task) -> None:
        reader = min(self._readers, key=lambda reader: len(reader.tasks))
        self._next += 1
        reader.tasks[self._next] = task
        self._open[task.slot].add(self._next)
        self._send(reader, self._next, task)

    def _send(self, reader: _Reader, number: int, task: _Task) -> None:
        start = task.slot * self.size
        try:
            reader.connection.send((number, start, start + self.size, task.jobs.tobytes()))
        except OSError:
            log.debug("reader %d is gone", reader.process.pid)  # `_receive` sees the closed pipe and restarts it

    def _receive(self) -> None:
        for ready in wait([reader.connection for reader in self._readers]):
            reader = next(reader for reader in self._readers if reader.connection is ready)
            try:
                answer: Answer = reader.connection.recv()
            except (EOFError, OSError):
                self._replace(reader)
                continue
            task = reader.tasks.pop(answer.task)
            self._open[task.slot].discard(answer.task)
            self._problems[task.slot] += answer.problems
            if answer.error:
                raise UserError(answer.error, local=True)

    def _replace(self, dead: _Reader) -> None:
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
                )
        reader = self._start()
        reader.tasks = dead.tasks
        self._readers[self._readers.index(dead)] = reader
        for number, task in reader.tasks.items():
            self._send(reader, number, task)


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("craft-ring")
    with tempfile.TemporaryFile() as file:  # not Linux
        return os.dup(file.fileno())

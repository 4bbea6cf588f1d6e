"""Reader processes: forks of the training process that fill slots, each with the steps that come its way in turn.

In: numbers of steps. Out: the slots of them, filled, in order. A reader that died is replaced and reads its steps anew.

torch's DataLoader could do it: whole steps as items, and the numbers of slots through its queues. Built so, the loader
gave 4 to 14 % fewer clips a second (rows "ours" of tests/benchmarks/bench_loader.py): an answer passes a thread, a lock
and a poll on its way. Here each reader has a pipe. The pipes hold the steps in flight at most: a consumer that takes no
batches stops the readers.
"""

import gc
import logging
import multiprocessing
import os
from collections import deque
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from pipeline.data.pool import Arrays, Pool
from pipeline.data.steps import Problems, Steps
from pipeline.errors import UserError
from pipeline.files import has_begun, obey_alone

log = logging.getLogger(__name__)

DEATHS = 3  # of readers one after the other, that end the run
LAST_SECONDS = 5.0  # between the end of a reader's pipe and its own


class Workers:
    """The readers of one iterator; used by one thread.

    Args:
        steps: What they do.
        pool: Of the slots.
        count: n, of them; 0: this process reads.

    Raises:
        UserError: they cannot be started.
    """

    def __init__(self, steps: Steps, pool: Pool, count: int) -> None:
        self._steps, self._pool = steps, pool
        self._flight: deque[tuple[int, int]] = deque()  # slot and step, in order
        self._deaths = 0
        self._readers: list[tuple[BaseProcess, Connection]] = []
        try:
            for _ in range(count):  # all of them, and then their first messages
                self._readers.append(self._begin())
            for number in range(count):
                self._see_begin(number)
        except UserError:
            self.close()
            raise

    def __len__(self) -> int:
        """Steps that were started and not finished."""
        return len(self._flight)

    def start(self, step: int) -> None:
        """Has a step read, by reader step mod n, into a slot that nobody refers to."""
        slot = self._pool.take()
        self._flight.append((slot, step))
        self._send(slot, step)

    def finish(self) -> tuple[Arrays, Problems, UserError | None]:
        """Waits for the first of the steps that were started.

        Returns:
            Its slot's fields; all bad clips that were met; the error that must end the run.

        Raises:
            UserError: readers died one after the other, or one that died cannot be replaced.
        """
        slot, step = self._flight[0]
        problems, error = self._answer(step) if self._readers else self._steps.fill(slot, step)
        self._flight.popleft()
        if error is not None and not isinstance(error, UserError):
            raise error
        return self._pool.release(slot), problems, error

    def close(self) -> None:
        """Ends the readers, whatever they are doing."""
        for process, connection in self._readers:
            process.kill()
            connection.close()
        for process, _ in self._readers:
            process.join()
        for slot, _ in self._flight:
            self._pool.release(slot)
        self._readers.clear()
        self._flight.clear()
        self._steps.close()

    def _begin(self) -> tuple[BaseProcess, Connection]:
        """A fork: no second import of torch, and nothing is pickled.

        Raises:
            UserError: the machine has no room for it.
        """
        context = multiprocessing.get_context("fork")
        try:
            ours, theirs = context.Pipe()
            process = context.Process(target=self._serve, args=(os.getpid(), ours, theirs), daemon=True)
            process.start()
        except OSError as error:  # memory, processes, open files
            raise UserError(
                f"no reader process can be started: {error.strerror}; lower data.workers, or raise the limit of the "
                "memory, processes or open files of this job",
                local=True,
                transient=True,
            ) from error
        theirs.close()
        return process, ours

    def _see_begin(self, number: int) -> None:
        """Waits until a reader has begun; one that hangs is replaced.

        Raises:
            UserError: those in its place hang, too, or cannot be started.
        """
        for attempt in range(DEATHS):
            if attempt:
                self._readers[number] = self._begin()
            if has_begun(*self._readers[number]):
                return
        raise UserError(f"{DEATHS} reader processes hung before they began; start the run again", local=True,
                        transient=True)  # fmt: skip

    def _serve(self, parent: int, other: Connection, own: Connection) -> None:
        """What a reader does. The training process's CUDA context, inherited too, is of no use to it."""
        gc.freeze()  # what was inherited is never finalised here, tensors and events of a GPU least of all
        obey_alone(parent)
        torch.set_num_threads(1)  # the pool of threads of the training process is not in a fork
        for connection in (other, *(connection for _, connection in self._readers)):
            connection.close()  # or no reader would see the end of its pipe
        own.send(None)  # see `has_begun`
        while True:
            try:
                slot, step = own.recv()
            except (EOFError, ConnectionResetError):
                return
            try:
                answer: tuple[Problems, Exception | None] = self._steps.fill(slot, step)
            except Exception as error:
                log.exception("a reader process, at batch %d", step)
                answer = [], error
            own.send(answer)

    def _send(self, slot: int, step: int) -> None:
        if not self._readers:
            return
        process, connection = self._readers[step % len(self._readers)]
        try:
            connection.send((slot, step))
        except OSError:
            log.debug("reader %d is gone", process.pid)  # `_answer` meets the end of its pipe

    def _answer(self, step: int) -> tuple[Problems, Exception | None]:
        number = step % len(self._readers)
        while True:
            try:
                answer: tuple[Problems, Exception | None] = self._readers[number][1].recv()
            except (EOFError, ConnectionResetError):
                self._replace(number, step)
            else:
                self._deaths = 0
                return answer

    def _replace(self, number: int, step: int) -> None:
        """Starts another reader in place of the one that died at a step, with the steps that it had."""
        process, connection = self._readers[number]
        connection.close()
        process.join(LAST_SECONDS)
        process.kill()
        process.join()
        status, self._deaths = process.exitcode, self._deaths + 1
        log.warning("a reader process ended (status %s); another one begins at its batch %d", status, step)
        if self._deaths == DEATHS:
            raise UserError(
                f"{DEATHS} reader processes ended one after the other (status {status}) on the same clips; if the "
                "memory is short, lower data.workers or data.prefetch",
                local=True,
                transient=True,
            )
        self._readers[number] = self._begin()
        self._see_begin(number)
        for slot, later in self._flight:
            if later % len(self._readers) == number:
                self._send(slot, later)

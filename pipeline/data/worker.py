"""A reader process: `python -m pipeline.data.worker FD`, started by `pipeline.data.ring`.

In: jobs over a pipe. Out: filled memory, shared with the training process, and what went wrong.

It holds no state worth keeping: killed, it is started again and its jobs are read anew. It ends when
the pipe closes, however the training process ended; the memory has no name and goes with its users.
"""

import mmap
import sys

import numpy as np

from pipeline.data.messages import Answer, Hello, Order
from pipeline.data.process import connect
from pipeline.data.reader import JOB, Reader
from pipeline.errors import UserError


def main(descriptor: int) -> None:
    """Answers tasks until the other side goes away."""
    connection = connect(descriptor)
    regions: dict[int, np.ndarray] = {}
    reader: Reader | None = None
    try:
        hello: Hello = connection.recv()
        while True:
            order: Order = connection.recv()
            memory = regions.get(order.region)
            if memory is None:
                mapped = mmap.mmap(hello.memory, hello.size, offset=order.region * hello.size)
                memory = regions[order.region] = np.frombuffer(mapped, np.uint8)
            try:
                reader = reader or Reader(hello.access)
                answer = Answer(order.task, reader.fill(np.frombuffer(order.jobs, JOB), memory))
            except UserError as error:
                answer = Answer(order.task, [], str(error), error.transient)
            connection.send(answer)
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))

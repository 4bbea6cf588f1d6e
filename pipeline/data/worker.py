"""A reader process: `python -m pipeline.data.worker FD`, started by `pipeline.data.ring`.

In: jobs over a pipe. Out: filled memory, shared with the training process, and what went wrong.

It holds no state worth keeping: killed, it is started again and its jobs are read anew. It ends when
the pipe closes, however the training process ended; the memory has no name and goes with its users.
"""

import mmap
import sys

import numpy as np

from pipeline.data.cache import open_source
from pipeline.data.messages import Answer, Hello
from pipeline.data.process import connect
from pipeline.data.reader import JOB, Files, fill
from pipeline.errors import UserError


def main(descriptor: int) -> None:
    """Answers tasks until the other side goes away."""
    connection = connect(descriptor)
    try:
        hello: Hello = connection.recv()
        memory = memoryview(mmap.mmap(hello.memory, hello.size))
        files: Files | None = None
        while True:
            task, start, stop, jobs = connection.recv()
            try:
                files = files or Files(open_source(hello.source), hello.open_files)
                answer = Answer(task, fill(np.frombuffer(jobs, JOB), files, memory[start:stop]))
            except UserError as error:
                answer = Answer(task, [], str(error))
            connection.send(answer)
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))

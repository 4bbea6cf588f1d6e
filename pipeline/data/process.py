"""Helper processes that end with the training process, however that ends.

In: a module with a `main(FD)`. Out: the process and a pipe to it.
"""

import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from pathlib import Path


def start_process(module: str, *inherited: int) -> tuple[subprocess.Popen[bytes], Connection]:
    """`python -m module FD` with a pipe to it; it gets none of this process's other files.

    Not `multiprocessing`: that would import the launcher, and torch with it, in each child.
    """
    ours, theirs = Pipe()
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(theirs.fileno())],
        pass_fds=(theirs.fileno(), *inherited),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    theirs.close()
    return process, ours


def connect(descriptor: int) -> Connection:
    """The helper's end of the pipe. It reads end-of-file once the training process is gone.

    Signals to the process group, or to all processes of a Slurm step, are for the training process, which may
    still need its readers to finish.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    return Connection(descriptor)

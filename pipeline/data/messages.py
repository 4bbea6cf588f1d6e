"""What the training process and its readers say to each other, pickled over a pipe.

A module of its own: a worker's main module has another name in the process that reads its answers.
"""

from typing import NamedTuple

from pipeline.data.cache import Directory, Remote
from pipeline.data.reader import Problem


class Hello(NamedTuple):
    """What a worker is told first.

    Attributes:
        source: Of the shards.
        open_files: Shards that it keeps open.
        memory: Descriptor of the shared memory.
        size: Bytes of it.
    """

    source: Remote | Directory
    open_files: int
    memory: int
    size: int


class Answer(NamedTuple):
    """What a worker says of a task.

    Attributes:
        task: Its number.
        problems: Bad clips.
        error: Text of the UserError that ends the run; empty: none.
    """

    task: int
    problems: list[Problem]
    error: str = ""

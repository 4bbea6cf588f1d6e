"""What the training process and its readers say to each other, pickled over a pipe.

A module of its own: a worker's main module has another name in the process that reads its answers.
"""

from typing import NamedTuple

from pipeline.data.reader import Access, Problem


class Hello(NamedTuple):
    """What a worker is told first.

    Attributes:
        access: To the shards.
        memory: Descriptor of the shared memory.
        size: Bytes of a region of it.
    """

    access: Access
    memory: int
    size: int


class Order(NamedTuple):
    """What it is told to do.

    Attributes:
        task: Number.
        region: Which region of the memory to fill.
        jobs: JOB [n], as bytes.
    """

    task: int
    region: int
    jobs: bytes


class Answer(NamedTuple):
    """What it says of a task.

    Attributes:
        task: Its number.
        problems: Bad clips.
        error: Text of the UserError that ends the run; empty: none.
        transient: Of that UserError.
    """

    task: int
    problems: list[Problem]
    error: str = ""
    transient: bool = False

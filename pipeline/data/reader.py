"""Index rows -> bytes: members read in place out of the tars and checked. Imports no torch: workers start in 0.2 s.

In: jobs, each one payload of one clip and its place in memory. Out: the memory filled, and what went wrong.

A clip is one or two preads at the index's offsets; the tar is never walked, so a tar that was cut or
overwritten cannot pass as a shorter data set. Each payload is checked against its xxh3 (0.02 ms a
clip). Cost per clip is constant; open files are bounded.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import xxhash

from pipeline.data.cache import Source

JOB = np.dtype(
    [
        ("clip", "<i4"),  # place in the batch
        ("shard", "<i4"),
        ("offset", "<i8"),  # of the member in the tar
        ("size", "<i8"),  # of the member, .npy header included
        ("xxh3", "<u8"),
        ("start", "<i8"),  # of the payload in the memory
        ("length", "<i8"),  # of the payload
    ]
)
Problem = tuple[int, str]  # place in the batch, what is wrong with the clip


@dataclass(frozen=True)
class Needs:
    """Which members are read at all.

    Attributes:
        waveform: int16 waveforms.
        fbank: float16 fbanks.
    """

    waveform: bool
    fbank: bool


class Files:
    """Open shards, the most recently used ones.

    Args:
        source: Opens them.
        limit: How many stay open.
    """

    def __init__(self, source: Source, limit: int) -> None:
        self._source, self._limit = source, limit
        self._open: OrderedDict[int, int] = OrderedDict()
        self._lost: dict[int, OSError] = {}

    def get(self, number: int) -> int:
        """Descriptor of a shard.

        Raises:
            OSError: it is not there; asked once only, since a server may take its time to say so.
            UserError: it cannot be had for now.
        """
        if number in self._lost:
            raise self._lost[number]
        descriptor = self._open.get(number)
        if descriptor is None:
            try:
                descriptor = self._open[number] = self._source.open(number)
            except OSError as error:
                self._lost[number] = error
                raise
            if len(self._open) > self._limit:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(number)
        return descriptor

    def close(self) -> None:
        """Closes all."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def fill(jobs: np.ndarray, files: Files, memory: memoryview) -> list[Problem]:
    """Reads payloads into `memory`.

    Args:
        jobs: JOB [n].
        files: Open shards.
        memory: Of a slot, bytes.

    Returns:
        The bad ones. Their places in the memory hold anything.

    Raises:
        UserError: a shard cannot be had for now.
    """
    problems = []
    for clip, shard, offset, size, xxh3, start, length in jobs.tolist():
        problem = _read(files, shard, offset, size, xxh3, memory[start : start + length])
        if problem is not None:
            problems.append((clip, problem))
    return problems


def _read(files: Files, shard: int, offset: int, size: int, xxh3: int, payload: memoryview) -> str | None:
    if size < len(payload):
        return f"{size} bytes are in the index, its format has {len(payload)}"
    header = bytearray(size - len(payload))
    try:
        count = os.preadv(files.get(shard), [header, payload], offset)
    except OSError as error:
        return error.strerror or str(error)
    if count != size:
        return f"{count} of {size} bytes: the tar is cut"
    digest = xxhash.xxh3_64(header)
    digest.update(payload)
    return None if digest.intdigest() == xxh3 else "its hash differs from the index: damaged"

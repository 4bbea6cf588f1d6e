"""Index rows -> bytes: members read in place out of the tars and checked. Imports no torch: workers start in 0.1 s.

In: jobs, each one member of one clip and its place in memory. Out: the memory filled, and what went wrong.

A clip is one or two preads at the index's offsets; the tar is never walked, so a tar that was cut or
overwritten cannot pass as a shorter data set. Each member is checked against its xxh3 while it is in the core's
cache. Cost per clip is constant; open files are bounded.
"""

import os
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import xxhash

from pipeline.data.cache import Directory, Remote, Source, open_source
from pipeline.data.convert import fbank_floats, waveform_floats

RAW, WAVEFORM, FBANK = range(3)  # what becomes of a payload: nothing, or float32
HEADER = 128  # bytes of an .npy header
JOB = np.dtype(
    [
        ("clip", "<i4"),  # place in the batch
        ("shard", "<i4"),
        ("kind", "<i4"),
        ("offset", "<i8"),  # of the member in the tar
        ("size", "<i8"),  # of the member, .npy header included
        ("xxh3", "<u8"),
        ("length", "<i8"),  # of the payload
        ("start", "<i8"),  # of what becomes of it in the memory; HEADER free bytes lie before a raw one
        ("room", "<i8"),  # for it
    ]
)
Problem = tuple[int, str]  # place in the batch, what is wrong with the clip


class Needs(NamedTuple):
    """Which members are read at all.

    Attributes:
        waveform: int16 waveforms.
        fbank: float16 fbanks.
    """

    waveform: bool
    fbank: bool


class Access(NamedTuple):
    """What a reader must know.

    Attributes:
        source: Where the shards are.
        open_files: Shards that a reader keeps open.
        mean, std: Normalisation of fbanks.
    """

    source: Remote | Directory
    open_files: int
    mean: float
    std: float


class Reader:
    """Reads members into memory; used by one thread.

    Args:
        access: To the shards.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._files = _Files(open_source(access.source), access.open_files)
        self._scratch = bytearray(0)

    def fill(self, jobs: np.ndarray, memory: np.ndarray) -> list[Problem]:
        """Reads, checks and converts.

        Args:
            jobs: JOB [n].
            memory: uint8, of a batch.

        Returns:
            The bad ones. Their places in the memory hold anything.

        Raises:
            UserError: a shard cannot be had for now.
        """
        problems = []
        view = memory.data
        for clip, shard, kind, offset, size, xxh3, length, start, room in jobs.tolist():
            header = size - length
            if header < 0:
                problems.append((clip, f"{size} bytes are in the index, its format has {length}"))
                continue
            in_place = kind == RAW and header <= HEADER
            member = view[start - header : start + length] if in_place else self._space(size)
            problem = self._read(shard, offset, xxh3, member)
            if problem is not None:
                problems.append((clip, problem))
            elif not in_place:
                self._place(kind, member[header:], memory[start : start + room])
        return problems

    def close(self) -> None:
        """Closes the shards."""
        self._files.close()

    def _space(self, size: int) -> memoryview:
        if len(self._scratch) < size:
            self._scratch = bytearray(size)
        return memoryview(self._scratch)[:size]

    def _read(self, shard: int, offset: int, xxh3: int, member: memoryview) -> str | None:
        try:
            count = os.preadv(self._files.get(shard), [member], offset)
        except OSError as error:
            return error.strerror or str(error)
        if count != len(member):
            return f"{count} of {len(member)} bytes: the tar is cut"
        return None if xxhash.xxh3_64_intdigest(member) == xxh3 else "its hash differs from the index: damaged"

    def _place(self, kind: int, payload: memoryview, target: np.ndarray) -> None:
        if kind == WAVEFORM:
            waveform_floats(np.frombuffer(payload, np.int16), target.view(np.float32))
        elif kind == FBANK:
            access = self._access
            fbank_floats(np.frombuffer(payload, np.float16), target.view(np.float32), access.mean, access.std)
        else:
            target[:] = np.frombuffer(payload, np.uint8)


class _Files:
    """Open shards, the most recently used ones."""

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
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

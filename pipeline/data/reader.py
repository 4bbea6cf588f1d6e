"""Index rows -> bytes: members read in place out of the tars and checked. Imports no torch: workers start in 0.1 s.

In: jobs, each one member of one clip and its place in memory. Out: the memory filled, and what went wrong.

A clip is one or two preads at the index's offsets; the tar is never walked, so a tar that was cut or
overwritten cannot pass as a shorter data set. Each member is checked against its xxh3 while it is in the core's
cache, and its .npy header with the manifest's format. Cost per clip is constant; open files are bounded.

A shard that is away for a moment (a file server that restarts, a name that a node remembers as missing) is asked for
again after a short wait, and where that does not help every RETRY_SECONDS: its clips are replaced meanwhile, not for
good.
"""

import errno
import os
import time
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import xxhash

from pipeline.data.cache import Directory, Remote, Source, open_source
from pipeline.data.convert import fbank_floats, waveform_floats
from pipeline.data.npy import HEADER, Array, header_problem

# What a member is, and what becomes of it: nothing, or float32.
WAVEFORM, FBANK, RAW_WAVEFORM, RAW_FBANK = range(4)
WAITS = (0.1, 0.4, 1.0)  # seconds before a shard that could be opened a moment ago is given up for a while
HEADERS_KEPT = 16  # spellings of the same header
RETRY_SECONDS = 30.0  # between further tries
PASSING = (errno.ENOENT, errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN)
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
        waveform, fbank: What the members are.
        open_files: Shards that a reader keeps open.
        mean, std: Normalisation of fbanks.
        absent: Numbers of shards that were not there at the start: nobody waits for them.
    """

    source: Remote | Directory
    waveform: Array
    fbank: Array
    open_files: int
    mean: float
    std: float
    absent: frozenset[int] = frozenset()


class Reader:
    """Reads members into memory; used by one thread.

    Args:
        access: To the shards.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._files = _Files(open_source(access.source), access.open_files, access.absent)
        self._scratch = bytearray(0)
        waveform, fbank = access.waveform, access.fbank
        self._arrays = {WAVEFORM: waveform, RAW_WAVEFORM: waveform, FBANK: fbank, RAW_FBANK: fbank}
        self._headers: dict[int, set[bytes]] = {kind: set() for kind in self._arrays}  # that were found right

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
            in_place = kind >= RAW_WAVEFORM and header <= HEADER
            member = view[start - header : start + length] if in_place else self._space(size)
            problem = self._read(shard, offset, xxh3, member) or self._header(kind, bytes(member[:header]))
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
            count = self._files.read(shard, member, offset)
        except OSError as error:
            return error.strerror or str(error)
        if count != len(member):
            return f"{count} of {len(member)} bytes: the tar is cut"
        return None if xxhash.xxh3_64_intdigest(member) == xxh3 else "its hash differs from the index: damaged"

    def _header(self, kind: int, found: bytes) -> str | None:
        if found in self._headers[kind]:
            return None
        problem = header_problem(found, self._arrays[kind])
        if problem is None and len(self._headers[kind]) < HEADERS_KEPT:
            self._headers[kind].add(found)
        return problem

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

    def __init__(self, source: Source, limit: int, absent: frozenset[int]) -> None:
        self._source, self._limit = source, limit
        self._open: OrderedDict[int, int] = OrderedDict()
        self._lost: dict[int, tuple[str, float]] = dict.fromkeys(absent, ("not there", 0.0))

    def read(self, number: int, memory: memoryview, offset: int) -> int:
        """Fills memory from a shard; returns how many bytes there were.

        Raises:
            OSError: it is not there, or cannot be read.
            UserError: it cannot be had for now.
        """
        problem, until = self._lost.get(number, ("", 0.0))
        if time.monotonic() < until:
            raise OSError(problem)  # a server may take its time to say so
        waits = iter(() if problem else WAITS)
        while True:
            try:
                count = os.preadv(self._get(number), [memory], offset)
            except OSError as error:
                if number in self._open:  # a descriptor that went stale stays so
                    os.close(self._open.pop(number))
                wait = next(waits, None) if error.errno in PASSING else None
                if wait is None:
                    self._lost[number] = error.strerror or str(error), time.monotonic() + RETRY_SECONDS
                    raise
                time.sleep(wait)
            else:
                self._lost.pop(number, None)
                return count

    def _get(self, number: int) -> int:
        descriptor = self._open.get(number)
        if descriptor is None:
            descriptor = self._open[number] = self._source.open(number)
            if len(self._open) > self._limit:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(number)
        return descriptor

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

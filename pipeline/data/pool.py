"""Batches in memory that the training process and its readers share.

In: what a batch holds. Out: numbered slots, each one NumPy record whose fields are the arrays of a batch.

The memory is a nameless file: nothing is left of it after kill -9, and a container's small /dev/shm is no limit. A
batch on a CPU is its slot, not a copy, so a slot is used again when no array or tensor refers to it any more; for a
consumer that keeps its batches the file grows. For a GPU the slots are pinned, each once, and are used again when their
copies are done.
"""

import mmap
import os
import weakref
from collections import deque
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import torch

from pipeline.data.corpus import Corpus
from pipeline.data.npy import HEADER

ALIGNED = 64  # bytes
COPYING = 2  # batches that a GPU may still be copying when another slot is taken

Arrays = dict[str, np.ndarray]


def slot_type(corpus: Corpus, clips: int, frames: int, members: tuple[str, ...], raw: bool) -> np.dtype[np.void]:
    """What a slot holds.

    For a CPU, waveforms are float32 [B, L] and fbanks normalised float32 [B, T, M], ready for the model. For a GPU they
    are rows of the stored bytes, half as many, each with its .npy header, which is read along.

    Args:
        corpus: Formats, and the number of classes.
        clips: B.
        frames: T, of float32 fbanks.
        members: Of "waveform", "partner" (mixup's other waveform) and "fbank", those that are read.
        raw: Stored bytes.

    Returns:
        A record of them; of what was drawn, `position` and `valid` as in `Batch` and `planned` int64 [B] (index rows);
        and of what was read, `row`, `targets` and `length` as in `Batch`, and `weight` float32 [B] (of the clip itself
        in its mixture; 1 where it is not mixed).
    """
    audio, fbank = corpus.audio.array, corpus.fbank.array
    fields: dict[str, tuple[str, tuple[int, ...]]] = {
        "position": ("<i8", ()), "valid": ("?", ()), "planned": ("<i8", ()), "row": ("<i8", ()), "length": ("<i8", ()),
        "weight": ("<f4", ()), "targets": ("<f4", (len(corpus.labels),)),
    }  # fmt: skip
    for member in members:
        array = fbank if member == "fbank" else audio
        shape = (frames, corpus.fbank.mel_bins) if member == "fbank" else audio.shape
        fields[member] = ("u1", (_aligned(HEADER + array.size),)) if raw else ("<f4", shape)
    formats = [np.dtype((kind, (clips, *shape))) for kind, shape in fields.values()]
    offsets = np.cumsum([0, *(_aligned(field.itemsize) for field in formats)])
    size = -(-int(offsets[-1]) // mmap.PAGESIZE) * mmap.PAGESIZE
    return np.dtype({"names": list(fields), "formats": formats, "offsets": offsets[:-1].tolist(), "itemsize": size})


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class Pool:
    """Slots of one type.

    Args:
        kind: Their `slot_type`.
        pinned: For a GPU.
    """

    def __init__(self, kind: np.dtype[np.void], pinned: bool) -> None:
        self._kind, self._pinned, self._owner = kind, pinned, os.getpid()
        if hasattr(os, "memfd_create"):
            self._file: IO[bytes] = os.fdopen(os.memfd_create("craft-batches"), "r+b")
        else:  # not Linux
            self._file = TemporaryFile()  # noqa: SIM115 - as long as the pool
        self._memory: list[mmap.mmap] = []
        self._last: list[weakref.ref[np.ndarray]] = []  # of each slot, to see whether anybody refers to it
        self._filling: dict[int, np.ndarray] = {}
        self._copying: deque[tuple[torch.cuda.Event, np.ndarray]] = deque()
        self._mapped: dict[int, Arrays] = {}  # in a reader

    def take(self) -> int:
        """A slot to fill that nobody refers to, a new one if need be; from now on it is in use."""
        while self._copying and (len(self._copying) > COPYING or self._copying[0][0].query()):  # type: ignore[no-untyped-call]
            self._copying.popleft()[0].synchronize()
        slot = next((slot for slot, last in enumerate(self._last) if last() is None), len(self._last))
        if slot == len(self._memory):
            self._file.truncate((slot + 1) * self._kind.itemsize)
            memory = self._map(slot)
            if self._pinned:
                _checked(_cudart().cudaHostRegister(_address(memory), len(memory), 0))
            self._memory.append(memory)
        record = np.frombuffer(self._memory[slot], self._kind)
        self._last[slot : slot + 1] = [weakref.ref(record)]
        self._filling[slot] = record
        return slot

    def arrays(self, slot: int) -> Arrays:
        """A slot's fields, for who fills it.

        A reader maps the memory itself: what a fork would leave it of pinned memory is CUDA's affair.
        """
        if os.getpid() == self._owner:
            return _fields(self._filling[slot])
        if slot not in self._mapped:
            self._mapped[slot] = _fields(np.frombuffer(self._map(slot), self._kind))
        return self._mapped[slot]

    def release(self, slot: int) -> Arrays:
        """A filled slot's fields; the slot is in use as long as one of them, or of their views, is."""
        return _fields(self._filling.pop(slot))

    def copied(self, arrays: Arrays, event: "torch.cuda.Event") -> None:
        """The slot of these fields is in use until `event`, too."""
        self._copying.append((event, next(iter(arrays.values()))))

    def close(self) -> None:
        """Waits for copies, unpins, and frees what is not in use."""
        for event, _ in self._copying:
            event.synchronize()
        if self._pinned:
            for memory in self._memory:
                _checked(_cudart().cudaHostUnregister(_address(memory)))
        self._copying.clear()
        self._filling.clear()
        self._memory.clear()
        self._last.clear()
        self._file.close()

    def _map(self, slot: int) -> mmap.mmap:
        size = self._kind.itemsize
        return mmap.mmap(self._file.fileno(), size, offset=slot * size)


def _fields(record: np.ndarray) -> Arrays:
    return {name: record[name][0] for name in record.dtype.names or ()}


def _address(memory: mmap.mmap) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _checked(status: Any) -> None:
    torch.cuda.check_error(int(status))

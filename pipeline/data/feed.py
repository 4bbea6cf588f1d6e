"""Plans -> raw batches, several in flight, bad clips replaced -> batches on the device.

In: a walk through batches. Out: `Batch`es in order. The readers live as long as the iterator: one that is
dropped early, or an error, ends them at once.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.data.ahead import Scout
from pipeline.data.assemble import RawBatch
from pipeline.data.bad import BadClips, stand_ins
from pipeline.data.cache import Directory, Remote
from pipeline.data.index import ShardIndex
from pipeline.data.plan import Layout, Plan, Walk, targets
from pipeline.data.ring import Ring
from pipeline.flow import Batch

Finish = Callable[[Plan, RawBatch], Batch]


@dataclass(frozen=True)
class Reading:
    """How shards are read.

    Attributes:
        source: Where they are.
        open_files: Shards that a reader keeps open.
        workers: Reader processes.
        prefetch: Batches in flight.
        fetch_ahead: Batches whose remote shards are fetched before they are read.
    """

    source: Remote | Directory
    open_files: int
    workers: int
    prefetch: int
    fetch_ahead: int


class Feed:
    """The machinery below an iterator of batches.

    Args:
        index: Of the shards.
        layout: Of a slot.
        reading: How shards are read.
        bad: Takes down bad clips.
        device: Of the batches.
        classes: C.

    Attributes:
        touched: int64 [shards], bytes asked of each shard.
    """

    def __init__(
        self, index: ShardIndex, layout: Layout, reading: Reading, bad: BadClips, device: torch.device, classes: int
    ) -> None:
        self._index, self._layout, self._reading, self._bad = index, layout, reading, bad
        self._device, self._classes = device, classes
        self._rings: list[Ring] = []
        self.touched = np.zeros(len(index.shard_names), np.int64)

    def batches(self, walk: Walk, finish: Finish) -> Iterator[Batch]:
        """The batches of a walk.

        Args:
            walk: Which ones.
            finish: Makes a batch out of a raw one, whose memory is used again afterwards.

        Raises:
            UserError: a bad clip under `on_error` "raise", none left to replace it, or shards that cannot be had.
        """
        workers = self._reading.workers
        slots = self._reading.prefetch if workers else 1
        ring = Ring(self._reading.source, self._reading.open_files, slots, self._layout.size, workers)
        self._rings.append(ring)
        source, scout = self._reading.source, None
        if isinstance(source, Remote):
            scout = Scout(source, walk.shards_ahead, self._reading.fetch_ahead, walk.first, walk.stop)
        flight: deque[tuple[int, Plan]] = deque()
        steps = iter(range(walk.first, walk.stop)) if walk.stop else itertools.count(walk.first)
        copies = _Copies(self._device, ring)

        def fill() -> None:
            while (slot := copies.free(wait=not flight)) is not None and (step := next(steps, None)) is not None:
                if scout is not None:
                    scout.advance(step)
                plan = walk.plan(step)
                flight.append((slot, plan))
                ring.start(slot, self._jobs(plan))

        try:
            fill()
            while flight:
                slot, plan = flight.popleft()
                raw = self._raw(ring, slot, plan, walk)
                with copies.of(slot):
                    batch = finish(plan, raw)
                copies.hand_over(batch)
                if workers:
                    fill()  # the readers work while the batch is trained on
                yield batch
                fill()
        finally:
            if scout is not None:
                scout.close()
            copies.close()
            ring.close()
            self._rings.remove(ring)

    def close(self) -> None:
        """Ends the readers of iterators that were left unfinished."""
        for ring in self._rings:
            ring.close()

    def _jobs(self, plan: Plan) -> np.ndarray:
        jobs = self._layout.jobs(self._index, plan)
        np.add.at(self.touched, jobs["shard"], jobs["size"])
        return jobs

    def _raw(self, ring: Ring, slot: int, plan: Plan, walk: Walk) -> RawBatch:
        """The slot's content, bad clips replaced."""
        rows, partners = plan.rows.copy(), None if plan.partners is None else plan.partners.copy()
        lost = set()
        for number, problem in sorted(ring.finish(slot)):
            partner, place, member = self._layout.meaning(number)
            wanted = partners if partner and partners is not None else rows
            self._bad.met(int(wanted[place]), f"{member}: {problem}")
            lost.add((partner, place))
        for partner, place in sorted(lost):
            wanted = partners if partner and partners is not None else rows
            wanted[place] = self._replace(ring, slot, plan, walk, (partner, place))
        part = self._layout.array
        return RawBatch(
            plan.position,
            rows,
            plan.valid.copy(),
            part(ring, slot, "waveform"),
            part(ring, slot, "partner") if plan.mixup is not None else None,
            np.ones(len(rows)) if plan.mixup is None else plan.mixup.weight,
            part(ring, slot, "fbank"),
            targets(self._index, self._classes, plan, rows, partners),
        )

    def _replace(self, ring: Ring, slot: int, plan: Plan, walk: Walk, lost: tuple[bool, int]) -> int:
        """Reads a stand-in; returns its row. Where every other clip is in the batch or bad, one of those must do."""
        partner, place = lost
        held = set(walk.rows_of(plan.step * walk.batch_size + np.arange(walk.batch_size)).tolist())
        for avoided in (held, set()):
            for row in stand_ins(walk.rows_of, int(plan.position[place]), walk.stride, walk.clips):
                if row in self._bad.rows or row in avoided:
                    continue
                problems = ring.read(slot, self._layout.stand_in(self._index, partner, row, place))
                if not problems:
                    return row
                self._bad.met(row, f"{self._layout.meaning(problems[0][0])[2]}: {problems[0][1]}")
        raise self._bad.none_left(int(plan.rows[place]))


class _Copies:
    """Slots that may be filled again: on a CPU at once; on a GPU when their copies are done.

    On a GPU the ring's memory is pinned, and a stream of its own copies and converts the next batch while the
    current one is trained on.
    """

    def __init__(self, device: torch.device, ring: Ring) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._free: deque[tuple[int, torch.cuda.Event | None]] = deque((slot, None) for slot in range(ring.slots))
        if self._cuda is not None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            whole = np.frombuffer(ring.memory, np.uint8)
            self._address = whole.ctypes.data
            _checked(_cudart().cudaHostRegister(self._address, whole.nbytes, 0))

    def free(self, wait: bool) -> int | None:
        """A slot to fill; None: there is none yet, unless `wait`."""
        if not self._free:
            return None
        slot, event = self._free[0]
        if event is not None and not event.query():  # type: ignore[no-untyped-call]
            if not wait:
                return None
            event.synchronize()
        self._free.popleft()
        return slot

    @contextmanager
    def of(self, slot: int) -> Iterator[None]:
        """Around the conversion of a slot's content."""
        event = None
        with nullcontext() if self._cuda is None else torch.cuda.stream(self._stream):
            yield
            if self._cuda is not None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
        self._free.append((slot, event))

    def hand_over(self, batch: Batch) -> None:
        """Lets the training stream wait for the batch, and keeps its memory until that stream is done with it."""
        if self._cuda is None:
            return
        current = torch.cuda.current_stream(self._cuda)
        current.wait_stream(self._stream)
        for tensor in (batch.position, batch.row, batch.valid, batch.waveform, batch.fbank, batch.targets):
            if tensor is not None:
                tensor.record_stream(current)

    def close(self) -> None:
        """Waits for copies and unpins."""
        if self._cuda is not None:
            self._stream.synchronize()
            _checked(_cudart().cudaHostUnregister(self._address))


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _checked(status: Any) -> None:
    torch.cuda.check_error(int(status))

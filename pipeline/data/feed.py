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
from pipeline.data.cache import Remote
from pipeline.data.index import ShardIndex
from pipeline.data.plan import Layout, Plan, Walk, lengths, targets
from pipeline.data.reader import Access
from pipeline.data.ring import Ring
from pipeline.flow import Batch

Finish = Callable[[Plan, RawBatch], Batch]


@dataclass(frozen=True)
class Reading:
    """How shards are read.

    Attributes:
        access: What a reader must know.
        workers: Reader processes.
        prefetch: Batches in flight.
        fetch_ahead: Batches whose remote shards are fetched before they are read.
    """

    access: Access
    workers: int
    prefetch: int
    fetch_ahead: int


class Feed:
    """The machinery below an iterator of batches.

    Args:
        index: Of the shards.
        layout: Of a region of the ring.
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
            finish: Makes a batch out of a raw one.

        Raises:
            UserError: a bad clip under `on_error` "raise", none left to replace it, or shards that cannot be had.
        """
        workers = self._reading.workers
        ring = Ring(self._reading.access, self._layout.size, workers)
        self._rings.append(ring)
        source, scout = self._reading.access.source, None
        if isinstance(source, Remote):
            scout = Scout(source, walk.shards_ahead, self._reading.fetch_ahead, walk.first, walk.stop)
        flight: deque[tuple[int, Plan]] = deque()
        steps = iter(range(walk.first, walk.stop)) if walk.stop else itertools.count(walk.first)
        copies = _Copies(self._device, ring, self._reading.prefetch if workers else 1)

        def fill() -> None:
            while copies.room(len(flight)) and (step := next(steps, None)) is not None:
                if scout is not None:
                    scout.advance(step)
                plan = walk.plan(step)
                region = copies.take()
                flight.append((region, plan))
                ring.start(region, self._jobs(plan))

        try:
            fill()
            while flight:
                region, plan = flight.popleft()
                with copies.of(region):
                    batch = finish(plan, self._raw(ring, region, plan, walk))
                copies.hand_over(batch)
                if workers:
                    fill()  # the readers work while the batch is trained on
                yield batch
                del batch  # its memory is the ring's
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

    def _raw(self, ring: Ring, region: int, plan: Plan, walk: Walk) -> RawBatch:
        """The region's content, bad clips replaced."""
        rows, partners = plan.rows.copy(), None if plan.partners is None else plan.partners.copy()
        lost = set()
        for number, problem in sorted(ring.finish(region)):
            partner, place, member = self._layout.meaning(number)
            wanted = partners if partner and partners is not None else rows
            self._bad.met(int(wanted[place]), f"{member}: {problem}")
            lost.add((partner, place))
        for partner, place in sorted(lost):
            wanted = partners if partner and partners is not None else rows
            wanted[place] = self._replace(ring, region, plan, walk, (partner, place))
        mixup = plan.mixup
        if mixup is not None and partners is not None:  # a window of one clip, or one clip that stands in for both
            mixup = mixup.without(partners == rows)
        part = self._layout.array
        return RawBatch(
            plan.position,
            rows,
            plan.valid.copy(),
            part(ring, region, "waveform"),
            part(ring, region, "partner") if plan.mixup is not None else None,
            np.ones(len(rows)) if mixup is None else mixup.weight,
            part(ring, region, "fbank"),
            targets(self._index, self._classes, mixup, rows, partners),
            lengths(self._index, mixup, rows, partners),
        )

    def _replace(self, ring: Ring, region: int, plan: Plan, walk: Walk, lost: tuple[bool, int]) -> int:
        """Reads a stand-in; returns its row. Where every other clip is in the batch or bad, one of those must do."""
        partner, place = lost
        held = set(walk.rows_of(plan.step * walk.batch_size + np.arange(walk.batch_size)).tolist())
        rows_of = walk.others_of if partner else walk.rows_of
        for avoided in (held, set()):
            for row in stand_ins(rows_of, int(plan.position[place]), walk.stride, walk.clips):
                if row in self._bad.rows or row in avoided:
                    continue
                problems = ring.read(region, self._layout.stand_in(self._index, partner, row, place))
                if not problems:
                    return row
                self._bad.met(row, f"{self._layout.meaning(problems[0][0])[2]}: {problems[0][1]}")
        raise self._bad.none_left(int(plan.rows[place]))


class _Copies:
    """Regions that may be filled again: when nobody refers to them; on a GPU when their copies are done.

    On a GPU the ring's memory is pinned, and a stream of its own copies and converts the next batch while the
    current one is trained on.

    Args:
        device: Of the batches.
        ring: The regions'.
        limit: Of batches in flight, on a GPU with those that are being copied.
    """

    def __init__(self, device: torch.device, ring: Ring, limit: int) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._ring, self._limit = ring, limit
        self._pending: deque[tuple[int, torch.cuda.Event]] = deque()
        self._pinned: dict[int, int] = {}
        if self._cuda is not None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def room(self, in_flight: int) -> bool:
        """Whether another batch may be read. Where none is in flight it waits for a copy."""
        while self._pending:
            region, event = self._pending[0]
            if not event.query():  # type: ignore[no-untyped-call]
                if in_flight:
                    break
                event.synchronize()
            self._pending.popleft()
            self._ring.release(region)
        return in_flight + len(self._pending) < self._limit

    def take(self) -> int:
        """A region to fill."""
        region = self._ring.take()
        if self._cuda is not None and region not in self._pinned:
            content = self._ring.content(region)
            self._pinned[region] = content.ctypes.data
            _checked(_cudart().cudaHostRegister(self._pinned[region], content.nbytes, 0))
        return region

    @contextmanager
    def of(self, region: int) -> Iterator[None]:
        """Around the conversion of a region's content."""
        with nullcontext() if self._cuda is None else torch.cuda.stream(self._stream):
            yield
            if self._cuda is None:
                self._ring.release(region)  # the batch holds it
                return
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._pending.append((region, event))

    def hand_over(self, batch: Batch) -> None:
        """Lets the training stream wait for the batch, and keeps its memory until that stream is done with it."""
        if self._cuda is None:
            return
        current = torch.cuda.current_stream(self._cuda)
        current.wait_stream(self._stream)
        for tensor in (
            batch.position, batch.row, batch.valid, batch.waveform, batch.fbank, batch.targets, batch.length
        ):  # fmt: skip
            if tensor is not None:
                tensor.record_stream(current)

    def close(self) -> None:
        """Waits for copies and unpins."""
        if self._cuda is not None:
            self._stream.synchronize()
            for address in self._pinned.values():
                _checked(_cudart().cudaHostUnregister(address))


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _checked(status: Any) -> None:
    torch.cuda.check_error(int(status))

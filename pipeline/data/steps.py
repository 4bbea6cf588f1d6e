"""Global batch -> this rank's clips of it, in a slot of shared memory.

In: the number of a batch and of a slot. Out: the slot filled, bad clips replaced, and what was wrong with those.

A reader does all of it: which clips come, where they lie, what they hold, their targets. So each reader makes the
windows of the order for itself (some tenths of a microsecond a clip, of which reading takes a hundred), and nothing of
it delays the training process, however many clips there are. The stand-in for a bad clip is found there too, by a
rule that knows no ranks: see `pipeline.data.bad`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pipeline.config import AugmentConfig
from pipeline.data.augment import draw_mixup
from pipeline.data.bad import stand_ins
from pipeline.data.index import ShardIndex
from pipeline.data.lengths import EvalLengths, LengthOrder
from pipeline.data.mixture import MixedOrder
from pipeline.data.order import TrainOrder
from pipeline.data.pool import Arrays, Pool
from pipeline.data.reader import Reader
from pipeline.errors import UserError

Order = TrainOrder | MixedOrder | LengthOrder | EvalLengths
Problems = list[tuple[int, str]]  # index row of a bad clip, what is wrong with it


class Draw(NamedTuple):
    """One rank's clips of a batch, before anything is read.

    Attributes:
        position: int64 [B], in the sample stream.
        valid: bool [B], as in `Batch`.
        rows: int64 [B], of the index.
        mixed: bool [B], with another clip.
        partners: int64 [B], rows of those; of other clips anything.
        weight: float64 [B], of the clip itself in its mixture; 1 where it is not mixed.
    """

    position: np.ndarray
    valid: np.ndarray
    rows: np.ndarray
    mixed: np.ndarray
    partners: np.ndarray
    weight: np.ndarray


class Steps:
    """Reads whole steps of one rank.

    Args:
        order: Of the clips.
        others: Of mixup's other clips.
        index: Of the shards.
        pool: Of the slots.
        members: Of "waveform", "partner" and "fbank", those that are read.
        open_reader: Opens the shards; called in the process that reads them.
        augment: Mixup.
        seed: Of mixup.
        batch_size: G.
        rank: This rank, which takes positions k G + rank, k G + rank + R, ... of batch k.
        world_size: R.
    """

    def __init__(
        self,
        order: Order,
        others: Order,
        index: ShardIndex,
        pool: Pool,
        members: tuple[str, ...],
        open_reader: Callable[[], Reader],
        augment: AugmentConfig,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._order, self._others, self._index, self._pool = order, others, index, pool
        self._own = tuple(member for member in members if member != "partner")
        self._open_reader = open_reader
        self._reader: Reader | None = None
        self._augment, self._seed = augment, seed
        self._places = np.arange(rank, batch_size, world_size)
        self._batch_size = batch_size
        self._stride = -(-batch_size // order.streams) * order.streams
        self._bad: set[int] = set()

    def draw(self, step: int) -> Draw:
        """What this rank's clips of global batch `step` are."""
        position = step * self._batch_size + self._places
        filled, valid = self._order.filled(position)
        rows = self._order.rows(filled)
        if isinstance(self._others, EvalLengths) or not self._augment.mixup:
            return Draw(position, valid, rows, np.zeros(len(rows), bool), rows, np.ones(len(rows)))
        mixed, weight, chance = draw_mixup(self._augment, self._seed, torch.from_numpy(position))
        return Draw(position, valid, rows, mixed, self._others.partners(position, chance, rows), weight)

    def shards(self, step: int) -> np.ndarray:
        """Numbers of the shards that this rank reads for global batch `step`."""
        draw = self.draw(step)
        return self._index.shards_of(np.concatenate([draw.rows, draw.partners[draw.mixed]]))

    def fill(self, slot: int, step: int) -> tuple[Problems, UserError | None]:
        """Writes this rank's clips of global batch `step` into a slot.

        Returns:
            All bad clips that were met; the error that must end the run.
        """
        problems: Problems = []
        try:
            self._fill(self._pool.arrays(slot), step, problems)
        except UserError as error:  # a value: the bad clips before it are told, too
            return problems, error
        return problems, None

    def close(self) -> None:
        """Closes the shards that this process has opened."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _fill(self, arrays: Arrays, step: int, problems: Problems) -> None:
        """Looks all clips up, then reads: a look-up between two reads, each of which fills the cache, costs double."""
        if self._reader is None:
            self._reader = self._open_reader()
        draw = self.draw(step)
        arrays["position"][:], arrays["valid"][:], arrays["planned"][:] = draw.position, draw.valid, draw.rows
        size = len(draw.rows)
        mixed = np.flatnonzero(draw.mixed)
        places = np.concatenate([np.arange(size), mixed])  # in the batch; from `size` on are mixup's other clips
        rows = np.concatenate([draw.rows, draw.partners[mixed]])
        clips = self._index.clips(rows)
        bad = []
        for members, first, stop in ((self._own, 0, size), (("partner",), size, len(rows))):
            if first < stop:
                some = slice(first, stop)
                for i, problem in self._read(arrays, members, places[some], clips.shard[some], clips.rows[some]):
                    bad.append(first + i)
                    problems.append((int(rows[first + i]), problem))
        self._bad.update(rows[bad].tolist())
        for i in bad:
            rows[i] = self._stand_in(arrays, step, int(places[i]), i >= size, int(rows[i]), problems)
        if bad:
            clips = self._index.clips(rows)

        arrays["row"][:] = rows[:size]
        # Not mixed after all: the other clip of a window of one, or one clip that stands in for both.
        mixed_in = rows[size:] != rows[mixed]
        mixed, others = mixed[mixed_in], size + np.flatnonzero(mixed_in)
        share = np.ones(len(rows), np.float32)
        share[mixed], share[others] = draw.weight[mixed], 1 - draw.weight[mixed]
        arrays["weight"][:] = share[:size]
        targets, samples, own = arrays["targets"], clips.rows["samples"], clips.which < size
        targets[:] = 0
        targets[clips.which[own], clips.labels[own]] = share[clips.which[own]]
        arrays["length"][:] = samples[:size]
        if len(others):
            theirs = np.isin(clips.which, others)
            targets[places[clips.which[theirs]], clips.labels[theirs]] += share[clips.which[theirs]]
            arrays["length"][mixed] = np.maximum(samples[mixed], samples[others])

    def _read(
        self, arrays: Arrays, members: Sequence[str], places: np.ndarray, shards: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[int, str]]:
        """Reads members of clips [m] to their places in the batch; yields the number and problem of each bad one."""
        assert self._reader is not None
        read = self._reader.read
        columns = []
        for member in members:
            kind = "waveform" if member == "partner" else member
            columns.append((kind, rows[kind].tolist(), arrays[member]))
        for i, (place, shard) in enumerate(zip(places.tolist(), shards.tolist(), strict=True)):
            for kind, where, out in columns:
                problem = read(kind, shard, where[i], out[place])
                if problem is not None:
                    yield i, f"{kind}: {problem}"
                    break

    def _stand_in(self, arrays: Arrays, step: int, place: int, other: bool, planned: int, problems: Problems) -> int:
        """Reads another clip in place of a bad one; returns its row.

        Where every other clip is in the batch or bad, one of the batch must stand in.
        """
        batch = set(self._order.rows(step * self._batch_size + np.arange(self._batch_size)).tolist())
        order, position = (self._others if other else self._order).source(int(arrays["position"][place]))
        for avoided in (batch, set()):
            for row in stand_ins(order.rows, position, self._stride, len(order)):
                if row in self._bad or row in avoided:
                    continue
                clip = self._index.clips(np.array([row]))
                members = ("partner",) if other else self._own
                problem = next(self._read(arrays, members, np.array([place]), clip.shard, clip.rows), None)
                if problem is None:
                    return row
                self._bad.add(row)
                problems.append((row, problem[1]))
        key, shard_name = self._index.name(planned)
        raise UserError(
            f"no clip can be read in place of {key} of {shard_name}, nor any other; run verify_shards.py", local=True
        )

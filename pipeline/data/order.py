"""Which clip comes when: a pure function of (manifest digest, split, seed, position).

In: positions in a run's endless sample stream. Out: rows of the shard index.

Position g belongs to epoch g // m, where it is place p = g mod m; each clip of the part comes exactly
once an epoch (m = n; class-balanced epochs are m draws, see `pipeline.data.balance`). Batch k is positions
k G .. (k + 1) G - 1. The rule for an epoch's last batch: it is filled up with the beginning of the next
epoch. So no clip is dropped and no batch is short, and since the rule knows no ranks, it is the same for any
number of them. The whole state of a run's reader is its step.

An epoch's sequence is its shards in random order, each shuffled within. It is cut into S streams whose
lengths differ by at most one; place p takes slot p div S of stream p mod S. A stream is cut into
windows of `window` clips (the first and last of an epoch: half to one and a half times that), each
shuffled. Streams change windows at different places, so new shards are needed one by one. Where R
divides S, a rank's places all lie in its own S / R streams, that is in about 1 / R of the shards (a shard at a
cut is read by two ranks). Data that does not fill S windows needs no locality: S is halved until it
does, and up to two windows of clips are one true permutation.

Cost: memory O(shards + S x (window + clips of a shard)), whatever the clips; a new epoch O(shards); a
look-up, resuming included, O(window + clips of a shard). Only integers are used (`pipeline.rng`), so an
order stays the same on any machine and with any release of numpy.

Quality, against true permutations (`tests/benchmarks/bench_shuffle.py`, 400,000 clips, defaults): on shards as
build_shards.py writes them, of permuted clips, the class mix of batches scatters alike (1.00). In the worst case, clips
stored class by class, it scatters 1.05 times as much, and that of 100 batches in a row 6 times; window=8192 or
streams=256 bring that to 2.6 or 1.4, at four times the open shards. WebDataset's shuffle buffer of 1000 has 6.2 and 21.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.balance import Draws, Weights
from pipeline.errors import UserError
from pipeline.rng import permutation, stream_key

WINDOWS_KEPT = 4  # in memory per stream: batches in flight may lie in several
BLOCKS_KEPT = 2  # shuffled shards in memory per stream: the next window goes on in the last one's shard


@dataclass(frozen=True, eq=False)
class Part:
    """The clips of a run, grouped by shard.

    Attributes:
        starts: int64 [shards + 1], where each shard's clips begin.
        rows: int32 [n], their rows of the shard index; None: `first`, `first` + 1, ...
        first: Index row of the first clip.
        key: What names this part: digest of the manifest, split and fold.
    """

    starts: np.ndarray
    rows: np.ndarray | None
    first: int
    key: str

    @staticmethod
    def of(rows: np.ndarray, shards: np.ndarray, key: str) -> "Part":
        """From index rows [n] and the shard number [n] of each; the rows of a shard ascend and lie together."""
        edges = np.flatnonzero(shards[1:] != shards[:-1]) + 1
        starts = np.concatenate([[0], edges, [len(rows)]]).astype(np.int64)
        whole = bool((rows[1:] == rows[:-1] + 1).all())
        return Part(starts, None if whole else rows.astype(np.int32), int(rows[0]), key)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """Index rows of the part's clips of these numbers: int64 [m] -> int64 [m]."""
        return self.first + numbers if self.rows is None else self.rows[numbers].astype(np.int64)

    def shard(self, number: int) -> np.ndarray:
        """Index rows of a shard's clips, ascending."""
        return self.at(np.arange(self.starts[number], self.starts[number + 1]))


@dataclass(frozen=True, eq=False)
class LabelTable:
    """Labels of index row i: `label_values[label_offsets[i] : label_offsets[i + 1]]`."""

    label_offsets: np.ndarray
    label_values: np.ndarray


def part_weights(part: Part, table: LabelTable, classes: int, counts: np.ndarray | None = None) -> Weights:
    """Class-balanced weights of a part's clips; `counts` int64 [C] of the clips whose part it is, None: its own."""

    def labels(shard: int) -> tuple[np.ndarray, np.ndarray]:
        rows = part.shard(shard)
        begins, ends = table.label_offsets[rows].astype(np.int64), table.label_offsets[rows + 1].astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(ends - begins)])
        where = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], ends - begins)
        return offsets, table.label_values[where]

    return Weights(labels, len(part.starts) - 1, classes, counts)


def train_order(
    part: Part,
    data: DataConfig,
    seed: int,
    table: Callable[[], LabelTable],
    classes: int,
    counts: np.ndarray | None = None,
) -> "TrainOrder":
    """The order that the settings ask for; `counts` as of `part_weights`.

    Raises:
        UserError: an epoch length that the sampler cannot have, or clips without labels for a balanced one.
    """
    if data.sampler == "shuffle":
        if data.epoch_clips:
            raise UserError(
                f"data.epoch_clips = {data.epoch_clips}: data.sampler=shuffle takes each of the {len(part)} clips once "
                "an epoch; set data.sampler=balanced, or data.epoch_clips=0"
            )
        return TrainOrder(part, seed, data.streams, data.window)
    if not data.replacement and not 0 < data.epoch_clips < len(part):
        raise UserError(
            f"data.replacement = false, data.epoch_clips = {data.epoch_clips}: without replacement an epoch draws "
            f"fewer than the {len(part)} clips, each at most once; set data.epoch_clips (PaSST: 100000 of 2 million)"
        )
    labels = table()
    if not labels.label_values.size:
        raise UserError("data.sampler = balanced: no clip has a label; set data.sampler=shuffle, or build with labels")
    weights = part_weights(part, labels, classes, counts)
    if not weights.labelled:
        raise UserError(
            f"data.sampler = balanced: none of the {len(part)} clips to train on has a label; set data.sampler=shuffle"
        )
    return TrainOrder(part, seed, data.streams, data.window, weights, data.epoch_clips, data.replacement)


def joined(numbers: np.ndarray, of: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """Rows out of several orders, each asked once.

    Args:
        numbers: int64 [m], of the order that each row comes from.
        of: Number of an order, and bool [m] where it is asked -> its rows there.

    Returns:
        int64 [m].
    """
    found = np.empty(len(numbers), np.int64)
    for number in np.unique(numbers).tolist():
        mine = numbers == number
        found[mine] = of(number, mine)
    return found


class EvalOrder:
    """The clips of a part as the index has them, each once, then again from the start."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Index rows of these positions: int64 [m] -> int64 [m]."""
        return self.part.at(positions % len(self.part))


class TrainOrder:
    """Shuffled order of training; used by one thread. A batch costs some thirty calls of numpy, however large it is.

    Args:
        part: Clips.
        seed: The run's seed.
        streams: S, at most.
        window: Clips of a shuffle window.
        weights: For class-balanced sampling; None: each clip once an epoch.
        epoch_clips: m, draws of a class-balanced epoch; 0: n.
        replacement: Draw independently; else no clip twice in an epoch.
    """

    def __init__(
        self,
        part: Part,
        seed: int,
        streams: int,
        window: int,
        weights: Weights | None = None,
        epoch_clips: int = 0,
        replacement: bool = True,
    ) -> None:
        self.part = part
        self.key = f"{part.key}/{seed}"
        self._clips = epoch_clips or len(part)
        self.streams, self.window = streams, window
        while self.streams > 1 and self._clips < self.streams * window:
            self.streams //= 2
        self.weights, self.replacement = weights, replacement
        if weights is not None and not replacement:
            weights.cut(self._clips)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        size, longer = divmod(self._clips, self.streams)
        number = np.arange(self.streams)
        self._length = size + (number < longer)
        self._start = number * size + np.minimum(number, longer)
        half = window // 2
        self._phase = half + (number + 1) * window // self.streams  # where a stream's second window begins
        self._cuts = np.where(self._length - half >= self._phase, (self._length - half - self._phase) // window + 1, 0)
        self._windows = int(self._cuts.max()) + 1  # of a stream, at most
        # Line w of a stream holds its window w, w + WINDOWS_KEPT, ... Untouched lines cost no memory.
        self._lines = np.empty((self.streams * WINDOWS_KEPT, min(2 * window, int(self._length[0]))), np.int32)
        self._held = np.full(len(self._lines), -1)

    def __len__(self) -> int:
        """m, clips of an epoch."""
        return self._clips

    def filled(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of what a batch holds, int64 [m] -> int64 [m], and which of them count, bool [m]: here each."""
        return positions, np.ones(len(positions), bool)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Index rows of these positions: int64 [m] -> int64 [m].

        An epoch of 20 clips in 2 streams: position 27 is place 7 of epoch 1, so slot 3 of stream 1, which holds places
        10 .. 19 of the epoch's sequence. Slot 3 lies in one of the stream's windows, say slots 2 .. 5: places 12 .. 15
        of the sequence, permuted by the window's own key; the position gets the second of them. Windows are
        kept in `_lines`, so that a batch makes only those that it is the first to meet.
        """
        epoch, stream, slot = self._split(positions)
        number, first, stop = self._bounds(stream, slot)
        key = (epoch * self._windows + number) * self.streams + stream  # names the window
        line = stream * WINDOWS_KEPT + number % WINDOWS_KEPT
        found = self._lines[line, slot - first].astype(np.int64)
        missing = np.flatnonzero(self._held[line] != key)
        for name in np.unique(key[missing]) if len(missing) else ():
            here = missing[key[missing] == name]
            i = here[0]
            start = int(self._start[stream[i]])
            rows = self._epoch(int(epoch[i])).slice(start + int(first[i]), start + int(stop[i]))
            rows = rows[permutation(stream_key(self.key, f"window/{epoch[i]}/{stream[i]}/{number[i]}"), len(rows))]
            self._lines[line[i], : len(rows)] = rows
            self._held[line[i]] = name
            found[here] = rows[slot[here] - first[here]]
        return np.asarray(found)

    def partners(self, positions: np.ndarray, draws: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Another clip for each position, out of this order's shuffle window, so of the shards that are read there.

        Args:
            positions: int64 [m].
            draws: [m], uniform in [0, 1).
            own: int64 [m], index rows of the clips, of this order or of another one of the part.

        Returns:
            int64 [m], index rows; the clip itself where the window holds no other.
        """
        epoch, stream, slot = self._split(positions)
        _, first, stop = self._bounds(stream, slot)
        size = stop - first
        turn = slot - first + 1 + (draws * (size - 1)).astype(np.int64)
        found = self.rows(self._position(epoch, stream, first + turn % size))
        for i in np.flatnonzero(found == own):
            # A window of weighted draws may hold the clip itself again: the next other one is taken.
            turns = first[i] + (turn[i] + np.arange(size[i])) % size[i]
            rows = self.rows(self._position(epoch[i], stream[i], turns))
            found[i] = next(iter(rows[rows != own[i]]), own[i])
        return found

    def sources(self) -> list[tuple["TrainOrder", float]]:
        """The order of each set of shards, and its draws in an epoch."""
        return [(self, len(self))]

    def source(self, position: int) -> tuple["TrainOrder", int]:
        """The order of one set of shards, this one, and a position in it: see `pipeline.data.mixture`."""
        return self, position

    def _split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, stream and slot of positions."""
        epoch, place = np.divmod(positions, self._clips)
        slot, stream = np.divmod(place, self.streams)
        return epoch, stream, slot

    def _position(self, epoch: np.ndarray, stream: np.ndarray, slot: np.ndarray) -> np.ndarray:
        return np.asarray(epoch * self._clips + slot * self.streams + stream)

    def _bounds(self, stream: np.ndarray, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number, begin and end of the windows in which slots of streams lie."""
        phase, cuts = self._phase[stream], self._cuts[stream]
        number = np.where(slot < phase, 0, np.minimum((slot - phase) // self.window + 1, cuts))
        first = np.where(number > 0, phase + (number - 1) * self.window, 0)
        stop = np.where(number == cuts, self._length[stream], phase + number * self.window)
        return number, first, stop

    def _epoch(self, epoch: int) -> "_Epoch":
        if epoch not in self._epochs:
            self._epochs[epoch] = _Epoch(self, epoch)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


class _Epoch:
    """One epoch's sequence: shards in random order, cut out on demand."""

    def __init__(self, order: TrainOrder, epoch: int) -> None:
        self._part, self._key = order.part, f"{order.key}/{epoch}"
        sizes = np.diff(order.part.starts)
        self._order = permutation(stream_key(self._key, "shards"), len(sizes))
        self._draws: Draws | None = None
        counts = sizes[self._order]
        if order.weights is not None:
            self._draws = Draws(order.weights, self._order, len(order), order.replacement, self._key)
            counts = self._draws.counts
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()
        self._kept = BLOCKS_KEPT * order.streams

    def slice(self, first: int, stop: int) -> np.ndarray:
        """Rows first .. stop - 1 of the sequence."""
        pieces = []
        place = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < stop:
            begin, end = int(self._starts[place]), min(stop, int(self._starts[place + 1]))
            if first < end:  # a shard may be drawn nothing from
                pieces.append(self._block(place)[first - begin : end - begin])
                first = end
            place += 1
        return np.concatenate(pieces)

    def _block(self, place: int) -> np.ndarray:
        """Shuffled rows of the shard at this place."""
        block = self._blocks.get(place)
        if block is None:
            rows = self._part.shard(int(self._order[place]))
            if self._draws is None:
                block = rows[permutation(stream_key(self._key, f"shard/{place}"), len(rows))]
            else:
                block = rows[self._draws.of(place)]
            self._blocks[place] = block
            if len(self._blocks) > self._kept:
                self._blocks.popitem(last=False)
        return block

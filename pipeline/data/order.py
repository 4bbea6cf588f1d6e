"""Which clip comes when: a pure function of (manifest digest, split, seed, position).

In: positions in a run's endless sample stream. Out: rows of the shard index.

Position g belongs to epoch g // n, where it is position p = g mod n; each clip of the part comes exactly
once an epoch. Batch k is positions k G .. (k + 1) G - 1, so a batch may hold the end of one epoch and
the beginning of the next: no clip is dropped and no batch is short, for any number of ranks. The whole
state of a run's reader is its step.

An epoch's sequence is its shards in random order, each shuffled within. It is cut into S streams whose
lengths differ by at most one; position p takes slot p div S of stream p mod S, out of a shuffle
window of the stream. Where R divides S, a rank's positions all lie in its own S / R streams, that is in
about 1 / R of the shards (a shard at a cut is read by two ranks).

Memory is O(shards + S x window) plus four bytes a clip; a look-up is O(1), resuming included.
"""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

WINDOWS_KEPT = 4  # shuffle windows in memory per stream: of this epoch and the next, and of mixup's partners


@dataclass(frozen=True, eq=False)
class Part:
    """The clips of a run, grouped by shard.

    Attributes:
        rows: int64 [n], rows of the shard index, in index order.
        shards: int64 [n], shard number of each.
        key: What names this part: digest of the manifest, split and fold.
    """

    rows: np.ndarray
    shards: np.ndarray
    key: str

    def __len__(self) -> int:
        return len(self.rows)


class TrainOrder:
    """Shuffled order of training.

    Args:
        part: Clips.
        seed: The run's seed.
        streams: S.
        window: Clips of a shuffle window.
        weights: float64 [n], for class-balanced sampling: an epoch is n draws in proportion to them.
        replacement: Draw independently; else systematically, so that each clip comes its expected
            number of times, rounded up or down.
    """

    def __init__(
        self,
        part: Part,
        seed: int,
        streams: int,
        window: int,
        weights: np.ndarray | None = None,
        replacement: bool = True,
    ) -> None:
        self.part = part
        self.seed = seed
        self.streams = min(streams, len(part))
        self.window = window
        self.weights = weights
        self.replacement = replacement
        self._lock = threading.Lock()  # reader threads share the caches
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Index rows of these positions: int64 [m] -> int64 [m]."""
        found = []
        with self._lock:
            for position in positions.tolist():
                window, slot = self._locate(position)
                found.append(window[slot])
        return np.array(found, np.int64)

    def partners(self, positions: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Another clip for each position, out of its own shuffle window, so of the same shards.

        Args:
            positions: int64 [m].
            draws: [m], uniform in [0, 1).

        Returns:
            int64 [m], index rows; the clip itself where its window holds no other.
        """
        found = []
        with self._lock:
            for position, draw in zip(positions.tolist(), draws.tolist(), strict=True):
                window, slot = self._locate(position)
                turned = np.roll(window, -slot)
                first = int(draw * (len(window) - 1)) + 1
                # A window of weighted draws may hold the clip itself again: the next other one is taken.
                others = np.r_[turned[first:], turned[1:first]]
                others = others[others != turned[0]]
                found.append(others[0] if len(others) else turned[0])
        return np.array(found, np.int64)

    def _locate(self, position: int) -> tuple[np.ndarray, int]:
        epoch, local = divmod(position, len(self.part))
        slot, stream = divmod(local, self.streams)
        number, offset = divmod(slot, self.window)
        return self._window(epoch, stream, number), offset

    def _window(self, epoch: int, stream: int, number: int) -> np.ndarray:
        key = (epoch, stream, number)
        window = self._windows.get(key)
        if window is None:
            size, longer = divmod(len(self.part), self.streams)
            start = stream * size + min(stream, longer)
            stop = start + size + (stream < longer)
            first = start + number * self.window
            window = self._epoch(epoch).slice(first, min(first + self.window, stop))
            window = window[self._rng("window", *key).permutation(len(window))]
            self._windows[key] = window
            if len(self._windows) > WINDOWS_KEPT * self.streams:
                self._windows.popitem(last=False)
        return window

    def _epoch(self, epoch: int) -> "_Epoch":
        if epoch not in self._epochs:
            self._epochs[epoch] = _Epoch(self, epoch)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _rng(self, *coordinates: object) -> np.random.Generator:
        text = "/".join(map(str, (self.part.key, self.seed, *coordinates)))
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def _draw(self, epoch: int) -> np.ndarray:
        """Indices into the part that this epoch consists of, ascending: all of them, or weighted draws."""
        count = len(self.part)
        if self.weights is None:
            return np.arange(count)
        edges = np.cumsum(self.weights / self.weights.sum())
        rng = self._rng("draw", epoch)
        points = np.sort(rng.random(count)) if self.replacement else (np.arange(count) + rng.random()) / count
        return np.minimum(np.searchsorted(edges, points, side="right"), count - 1)  # sorted points: 4 x faster


class _Epoch:
    """One epoch's sequence: shards in random order, cut out on demand."""

    def __init__(self, order: TrainOrder, epoch: int) -> None:
        drawn = order._draw(epoch)
        shards = order.part.shards[drawn]
        starts = np.flatnonzero(np.r_[True, shards[1:] != shards[:-1]])
        stops = np.r_[starts[1:], len(drawn)]
        shuffled = order._rng("shards", epoch).permutation(len(starts))
        self._rows = order.part.rows[drawn]
        self._starts, self._stops = starts[shuffled], stops[shuffled]
        self._ends = np.cumsum(self._stops - self._starts)
        self._order, self._epoch = order, epoch

    def slice(self, first: int, stop: int) -> np.ndarray:
        """Rows first .. stop - 1 of the sequence."""
        pieces = []
        block = int(np.searchsorted(self._ends, first, side="right"))
        while first < stop:
            begin = int(self._ends[block - 1]) if block else 0
            rows = self._rows[self._starts[block] : self._stops[block]]
            rows = rows[self._order._rng("shard", self._epoch, int(self._starts[block])).permutation(len(rows))]
            end = min(stop, int(self._ends[block]))
            pieces.append(rows[first - begin : end - begin])
            first, block = end, block + 1
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def balanced_weights(offsets: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """AST's class-balanced weights: a clip weighs the sum over its labels of 1000 / (count + 0.01).

    Args:
        offsets: int64 [n + 1], where each clip's labels begin in `labels`.
        labels: int64, labels of all clips, one after the other.
        classes: C.

    Returns:
        float64 [n]; a clip without labels weighs as one of the most frequent class.
    """
    counts = np.bincount(labels, minlength=classes)
    per_label = 1000.0 / (counts[labels] + 0.01)
    sums = np.r_[0.0, np.cumsum(per_label)]
    weights = sums[offsets[1:]] - sums[offsets[:-1]]
    return np.asarray(np.where(np.diff(offsets) > 0, weights, 1000.0 / (counts.max(initial=0) + 0.01)))

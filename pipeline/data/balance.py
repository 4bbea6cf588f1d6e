"""Class-balanced sampling: how often each shard and clip comes in an epoch.

In: the labels of a part's clips, an epoch of m draws. Out: which clips are drawn, shard by shard, on demand.

Weights are AST's and SSAST's: a clip weighs the sum over its labels of 1000 / (clips of that class + 0.01). An epoch is
m points on the line on which the clips, shards in the epoch's random order, lie one after the other, each as
long as its weight:

- with replacement: one independent point in each of m equal slices. The expected draws of a clip are m w / sum(w),
  as of independent draws over the whole line; the class counts scatter less.
- without: m equally spaced points with one random offset (systematic sampling). Weights are first cut at the
  spacing, so no clip is drawn twice, and the chance of the others is in proportion to their weight.

So a shard's draws are found from its place on the line alone: a new epoch costs O(shards), a shard
O(its clips), for 2 thousand clips or 10 million. All arithmetic is on integers, in units of 2^-32:
any machine gives the same draws.
"""

from collections.abc import Callable

import numpy as np

from pipeline.rng import hashed, permutation, stream_key

UNIT = 2.0**32  # weights run from 5e-4 (a class of 2 million) up; 10 million clips sum to 2^51

Labels = Callable[[int], tuple[np.ndarray, np.ndarray]]


def class_weights(counts: np.ndarray) -> np.ndarray:
    """1000 / (count + 0.01) for each class: int64 [C] -> float64 [C]."""
    return 1000.0 / (counts + 0.01)


class Weights:
    """Weights of a part's clips, kept as sums per shard.

    Args:
        labels: Shard number -> (int64 [clips + 1] where each clip's labels begin, their class indices).
        shards: Number of shards.
        classes: C.
        counts: int64 [C], clips of each class that the weights go by; None: those of the part.

    Attributes:
        sums: int64 [shards], in units of 2^-32.
        counts: int64 [C], clips of each class in the part.
        labelled: Whether any clip has a label.
    """

    def __init__(self, labels: Labels, shards: int, classes: int, counts: np.ndarray | None = None) -> None:
        self._labels, self._shards = labels, shards
        self.counts = np.zeros(classes, np.int64)
        for shard in range(shards):
            self.counts += np.bincount(labels(shard)[1], minlength=classes)
        counts = self.counts if counts is None else counts
        self.labelled = bool(counts.any())
        self._class = np.rint(class_weights(counts) * UNIT).astype(np.int64)
        self._bare = self._class[counts.argmax()]
        self._cap = np.iinfo(np.int64).max
        self.sums = self._sum()

    def of(self, shard: int) -> np.ndarray:
        """int64 [clips of the shard], in units of 2^-32; a clip without labels weighs as one of the commonest class."""
        offsets, values = self._labels(shard)
        sums = np.concatenate([[0], np.cumsum(self._class[values])])
        weights = sums[offsets[1:]] - sums[offsets[:-1]]
        return np.asarray(np.minimum(np.where(offsets[1:] > offsets[:-1], weights, self._bare), self._cap))

    def drawn(self, draws: float) -> np.ndarray:
        """Expected draws of each class's clips among `draws`: float64 [C]; one more pass over the labels."""
        sums = np.zeros(len(self.counts))
        for shard in range(self._shards):
            offsets, values = self._labels(shard)
            sums += np.bincount(values, np.repeat(self.of(shard), np.diff(offsets)), len(sums))
        return np.asarray(draws * sums / self.sums.sum())

    def cut(self, draws: int) -> None:
        """Cuts the weights so that `draws` equally spaced points, fewer than the clips, meet no clip twice.

        The cut is the largest K with K draws <= sum(min(w, K)): what is cut off one clip goes to the others.
        """
        weights = np.concatenate([self.of(shard) for shard in range(self._shards)])
        cap, before = int(weights.sum()) // draws, -1
        while cap != before:  # falls at each turn, because weights above it are whole units above it
            above = weights > cap
            before, cap = cap, int(weights[~above].sum()) // (draws - int(above.sum()))
        self._cap = cap
        self.sums = self._sum()

    def _sum(self) -> np.ndarray:
        return np.array([self.of(shard).sum() for shard in range(self._shards)])


class Draws:
    """The draws of one epoch.

    Args:
        weights: Of the clips; cut, if drawn without replacement.
        order: int64 [shards], the epoch's order of shards.
        count: m.
        replacement: See above.
        key: Name of the epoch's random numbers.

    Attributes:
        counts: int64 [shards], draws of each shard, in the epoch's order.
    """

    def __init__(self, weights: Weights, order: np.ndarray, count: int, replacement: bool, key: str) -> None:
        self._weights, self._order, self._replacement, self._key = weights, order, replacement, key
        self._edges = np.concatenate([[0], np.cumsum(weights.sums[order])])
        self._total, self._count = int(self._edges[-1]), count
        self._hash = stream_key(key, "points")
        self._offset = self._hash % self._total
        self._first = self._before(self._edges)
        self.counts = np.diff(self._first)

    def of(self, place: int) -> np.ndarray:
        """Clips drawn from the shard at `place` of the epoch's order, shuffled: int64 [counts[place]]."""
        weights = self._weights.of(int(self._order[place]))
        # Equally spaced points exclude neighbours on the line, so each epoch has other neighbours.
        line = permutation(stream_key(self._key, f"line/{place}"), len(weights))
        points = self._points(np.arange(self._first[place], self._first[place + 1])) - self._edges[place]
        drawn = line[np.searchsorted(np.cumsum(weights[line]), points, side="right")]
        return np.asarray(drawn[permutation(stream_key(self._key, f"drawn/{place}"), len(drawn))])

    def _points(self, numbers: np.ndarray) -> np.ndarray:
        """Places on the line, ascending: int64 [k] -> int64 [k]."""
        step, rest = divmod(self._total, self._count)
        if not self._replacement:
            return np.asarray(numbers * step + (numbers * rest + self._offset) // self._count)  # (n total + offset) / m
        starts, stops = (n * step + n * rest // self._count for n in (numbers, numbers + 1))
        return np.asarray(starts + hashed(self._hash, numbers) % (stops - starts))

    def _before(self, edges: np.ndarray) -> np.ndarray:
        """How many points lie before each place: int64 [k] -> int64 [k].

        Without replacement point n lies at floor((n total + offset) / m), so before `edge` lie the n with n total +
        offset < edge m. With it, point n is anywhere in slice n, [n total / m, (n + 1) total / m): all slices before
        the edge's own count, and that one if its point lies before the edge. Four draws of a line of 10: slices begin
        at 0, 2, 5, 7; before 6 lie the points of the first two, and that of [5, 7) if it is 5. Products of weights
        and draws need more than 64 bits, hence Python's integers.
        """
        total, count = self._total, self._count
        if not self._replacement:
            return np.array([max(0, -((self._offset - edge * count) // total)) for edge in edges.tolist()])
        slices = np.array([min(count - 1, ((edge + 1) * count - 1) // total) for edge in edges.tolist()])
        return np.asarray(slices + (self._points(slices) < edges))

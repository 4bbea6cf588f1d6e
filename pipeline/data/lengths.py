"""Batches of inputs of one length: a pure function of (the orders of each length, seed, position).

In: positions in a run's endless sample stream, as in `pipeline.data.order`. Out: rows of the index, all of one length
within a batch.

The clips of each length of `data.seconds` have an order of their own, as if they were a data set. Batch k is of one
length; which one says the law of `pipeline.data.mixture`, with batches in place of positions: of the first q batches,
each length has its share of q, to within one batch for each length, and 64 batches in a row are shuffled. Position g
of batch k = g div G is position c G + g mod G of that length's own order, if k is its c-th batch. So a clip's input
does not depend on the clips beside it: no padding up to the longest of a batch, no attention mask, and each rank has as
much to do as the others in each step. An epoch of a length is each of its clips once; with shares in proportion to the
clips, each clip comes about once in an epoch of all.

Cost: a look-up is that of one order. Which clips have which length is read from the index at the start (8 bytes a clip
for a moment, 4 bytes a clip to keep).
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from pipeline.data.mixture import MixedOrder, Turns
from pipeline.data.order import EvalOrder, TrainOrder, joined


class LengthOrder:
    """Order of training over several lengths; used by one thread.

    Args:
        orders: Of the clips of each length.
        shares: Of the batches of each length; they need not sum to 1.
        key: Names the order: digest of the corpus and seed.
        batch_size: G.
        clips: Positions of an epoch; 0: as many as there are clips.

    Attributes:
        streams: Of the order that has most.
        turns: Which length each batch is of.
    """

    def __init__(
        self,
        orders: Sequence[TrainOrder | MixedOrder],
        shares: Sequence[Fraction],
        key: str,
        batch_size: int,
        clips: int = 0,
    ) -> None:
        self._orders, self._batch_size = orders, batch_size
        self.streams = max(order.streams for order in orders)
        self._clips = clips or sum(map(len, orders))
        self.turns = Turns(len(orders), [(0, shares)], f"{key}/lengths", 1, 1)

    def __len__(self) -> int:
        """Positions of an epoch."""
        return self._clips

    def filled(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As of `TrainOrder`: each position counts."""
        return positions, np.ones(len(positions), bool)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Index rows of these positions: int64 [m] -> int64 [m]."""
        lengths, own = self._split(positions)
        return joined(lengths, lambda number, mine: self._orders[number].rows(own[mine]))

    def partners(self, positions: np.ndarray, draws: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Another clip of the same length for each position; see `TrainOrder.partners`."""
        lengths, places = self._split(positions)
        return joined(
            lengths, lambda number, mine: self._orders[number].partners(places[mine], draws[mine], own[mine])
        )

    def sources(self) -> list[tuple[TrainOrder, float]]:
        """The order of each length of each set of shards, and its draws in an epoch."""
        return [(source, self._clips * share * draws / len(order))
                for order, share in zip(self._orders, self.turns.first_shares, strict=True)
                for source, draws in order.sources()]  # fmt: skip

    def source(self, position: int) -> tuple[TrainOrder, int]:
        """The order of one length of one set, and the position in it, that a position's clip is of."""
        lengths, own = self._split(np.array([position]))
        return self._orders[int(lengths[0])].source(int(own[0]))

    def _split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the length, and position in its own order, of positions: int64 [m] -> int64 [m], int64 [m]."""
        batches, places = np.divmod(positions, self._batch_size)
        lengths, turns = self.turns.split(batches)
        return lengths, turns * self._batch_size + places


class EvalLengths:
    """The order of an evaluation: each clip once, batches of one length.

    First come the full batches of all lengths, then what is left of each length, each rest in a batch that is filled up
    with the length's first clip.

    Args:
        orders: Of the clips of each length.
        batch_size: G.

    Attributes:
        streams: Of which it has one.
        full: Full batches.
        batches: All of them.
    """

    def __init__(self, orders: Sequence[EvalOrder], batch_size: int) -> None:
        self._orders, self._batch_size, self.streams = orders, batch_size, 1
        full = [len(order) // batch_size for order in orders]
        rests = [number for number, order in enumerate(orders) if len(order) % batch_size]
        self.full, self.batches = sum(full), sum(full) + len(rests)
        # Of each batch its length, and its number among the batches of that length.
        self._length = np.concatenate([np.repeat(np.arange(len(orders)), full), np.array(rests, np.int64)])
        turns = [*(np.arange(count) for count in full), np.array([full[number] for number in rests], np.int64)]
        self._turn = np.concatenate(turns)
        firsts = [int(np.flatnonzero(self._length == number)[0]) for number in range(len(orders))]
        self._first = np.array(firsts, np.int64) * batch_size  # position of each length's first clip
        self._clips = np.array([len(order) for order in orders], np.int64)

    def __len__(self) -> int:
        return int(self._clips.sum())

    def filled(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of what a batch holds, int64 [m] -> int64 [m], and which of them count, bool [m]."""
        lengths, own = self._split(positions)
        valid = own < self._clips[lengths]
        return np.where(valid, positions, self._first[lengths]), valid

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Index rows of these positions: int64 [m] -> int64 [m]."""
        lengths, own = self._split(positions)
        return joined(lengths, lambda number, mine: self._orders[number].rows(own[mine]))

    def sources(self) -> list[tuple[EvalOrder, float]]:
        """The order of each length, and its clips."""
        return [(order, len(order)) for order in self._orders]

    def source(self, position: int) -> tuple[EvalOrder, int]:
        """The order of one length, and the position in it, that a position's clip is of."""
        lengths, own = self._split(np.array([position]))
        return self._orders[int(lengths[0])], int(own[0])

    def _split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As of `LengthOrder`."""
        batches, places = np.divmod(positions, self._batch_size)
        return self._length[batches], self._turn[batches] * self._batch_size + places

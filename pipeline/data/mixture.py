"""Several sets of shards in one order: a pure function of (their digests, seed, weights, position).

In: positions in a run's endless sample stream, as in `pipeline.data.order`. Out: of which set each is, and its position
in that set's own stream, so a row of the index.

Position g belongs to lane s = g mod L and round q = g div L; L is `data.streams`. In each lane the sets take turns: of
its first q rounds, set i gets c_i(q, s), where with weights w_1 .. w_k

    c_1 = floor(q w_1 + u_1),  c_2 = floor((q - c_1) w_2 / (1 - w_1) + u_2),  ...,  c_k = what is left,

all in exact fractions. The offset u_i = r / L, r a permutation of the lanes for each set, lets a set's turns come in
one lane after the other: over all lanes together each set's count is within k clips of its share, at the end of any
64 rounds. Within these, each lane shuffles its turns by a key of its own. The c-th turn of set i in lane s is
position c L + s of that set's stream. So each position of it comes exactly once and nearly in order (lanes are at most
one turn and 64 rounds apart), and a set's epoch is each of its clips once. Where R divides L, a rank's L / R lanes are
its own streams in each set, so it reads about 1 / R of every set's shards. Nothing depends on ranks, workers, batches
or restarts.

An epoch of the mixture is as many positions as all sets have clips (or `data.epoch_clips`). With the default weights,
the shares of the clips, each clip comes about once in it; else a set is drawn more or less often than that.

A schedule changes the weights at the first round that begins at or after its step; counts go on from where they were.
Cost: a look-up is that of the sets; 64 rounds of all lanes are made at once, O(L (64 + k)), whatever the clips and the
position.
"""

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from pipeline.data.order import TrainOrder, joined
from pipeline.rng import hashed, permutation, stream_key

ROUNDS = 64  # shuffled together
KEPT = 4  # blocks of so many rounds in memory


class Turns:
    """Which set each position is of, and its position in that set's own stream; used by one thread.

    Args:
        sets: How many there are.
        phases: First step, and weight of each set from there on; the first one from step 0.
        key: Names the law's random numbers.
        lanes: L.
        batch_size: G, positions of a step.
    """

    def __init__(
        self,
        sets: int,
        phases: Sequence[tuple[int, Sequence[float | Fraction]]],
        key: str,
        lanes: int,
        batch_size: int,
    ) -> None:
        self.lanes = lanes
        self._sets, self._key = sets, key
        self._begins = np.array([-(-step * batch_size // lanes) for step, _ in phases])  # first round of each phase
        self._weights = [[Fraction(weight) for weight in weights] for _, weights in phases]
        self._offsets = [permutation(stream_key(key, f"lanes/{i}"), lanes).tolist() for i in range(sets)]
        self._before = [np.zeros((sets, lanes), np.int64)]  # turns of each set and lane before a phase
        for phase, rounds in enumerate(np.diff(self._begins).tolist()):
            self._before.append(self._before[-1] + self._turns(phase, rounds))
        self._blocks: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @property
    def first_shares(self) -> list[float]:
        """Of the positions of the first phase, by set; none of a length that only sets of weight 0 have."""
        whole = float(sum(self._weights[0])) or 1.0
        return [float(weight) / whole for weight in self._weights[0]]

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the set, and position in its own stream, of positions: int64 [m] -> int64 [m], int64 [m]."""
        rounds, lane = np.divmod(positions, self.lanes)
        phase = np.searchsorted(self._begins, rounds, side="right") - 1
        block, place = np.divmod(rounds - self._begins[phase], ROUNDS)
        sets, own = np.empty_like(lane), np.empty_like(lane)
        for number, name in sorted(set(zip(phase.tolist(), block.tolist(), strict=True))):
            here = (phase == number) & (block == name)
            of, turn = self._block(number, name)
            sets[here] = of[lane[here], place[here]]
            own[here] = turn[lane[here], place[here]] * self.lanes + lane[here]
        return sets, own

    def _block(self, phase: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Set, and number of its turn in the lane: int64 [L, rounds] each."""
        if (phase, block) not in self._blocks:
            first, stop = block * ROUNDS, (block + 1) * ROUNDS
            if phase + 1 < len(self._begins):
                stop = min(stop, int(self._begins[phase + 1] - self._begins[phase]))
            begin = self._turns(phase, first)
            until = np.cumsum(self._turns(phase, stop) - begin, axis=0)  # [k, L]; the last row is the rounds
            counter = np.arange(self.lanes * ROUNDS).reshape(self.lanes, ROUNDS)[:, : stop - first]
            shuffled = np.argsort(hashed(stream_key(self._key, f"{phase}/{block}"), counter), axis=1, kind="stable")
            rank = np.argsort(shuffled, axis=1)
            of = (rank[:, :, None] >= until.T[:, None, :]).sum(2)
            turn = np.empty_like(of)
            for number in range(self._sets):
                mine = of == number
                before = self._before[phase][number] + begin[number] - 1
                turn[mine] = (np.cumsum(mine, axis=1) + before[:, None])[mine]
            self._blocks[phase, block] = of, turn
            if len(self._blocks) > KEPT:
                self._blocks.popitem(last=False)
        return self._blocks[phase, block]

    def _turns(self, phase: int, rounds: int) -> np.ndarray:
        """c: turns of each set in each lane in the first rounds of a phase, int64 [k, L]."""
        left = [rounds] * self.lanes
        weight = sum(self._weights[phase], Fraction(0))
        found = []
        for number, own in enumerate(self._weights[phase]):
            share = own / weight if weight else Fraction(0)
            weight -= own
            n, d = share.numerator, share.denominator
            offsets = self._offsets[number]
            if number + 1 < self._sets:
                whole = d * self.lanes
                turns = [(q * n * self.lanes + u * d) // whole for q, u in zip(left, offsets, strict=True)]
            else:
                turns = left
            found.append(turns)
            left = [q - c for q, c in zip(left, turns, strict=True)]
        return np.array(found, np.int64)


class MixedOrder:
    """Order of training over several sets; used by one thread.

    Args:
        orders: Of the sets' parts, over the rows of one index.
        phases: First step, and weight of each set from there on; the first one from step 0.
        key: Names the mixture: digest of the corpus and seed.
        lanes: L.
        batch_size: G, positions of a step.
        clips: Positions of an epoch; 0: as many as the sets have clips.

    Attributes:
        streams: L.
        turns: Which set each position is of.
    """

    def __init__(
        self,
        orders: Sequence[TrainOrder],
        phases: Sequence[tuple[int, Sequence[float | Fraction]]],
        key: str,
        lanes: int,
        batch_size: int,
        clips: int = 0,
    ) -> None:
        self.streams = lanes
        self.turns = Turns(len(orders), phases, key, lanes, batch_size)
        self._orders = orders
        self._clips = clips or sum(map(len, orders))

    def __len__(self) -> int:
        """Positions of an epoch."""
        return self._clips

    def filled(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As of `TrainOrder`: each position counts."""
        return positions, np.ones(len(positions), bool)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Index rows of these positions: int64 [m] -> int64 [m]."""
        sets, own = self.turns.split(positions)
        return joined(sets, lambda number, mine: self._orders[number].rows(own[mine]))

    def partners(self, positions: np.ndarray, draws: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Another clip of the same set for each position; see `TrainOrder.partners`."""
        sets, places = self.turns.split(positions)
        return joined(
            sets, lambda number, mine: self._orders[number].partners(places[mine], draws[mine], own[mine])
        )

    def sources(self) -> list[tuple[TrainOrder, float]]:
        """The order of each set, and its draws in an epoch of the first phase."""
        return [(order, self._clips * share)
                for order, share in zip(self._orders, self.turns.first_shares, strict=True)]  # fmt: skip

    def source(self, position: int) -> tuple[TrainOrder, int]:
        """The order of one set, and the position in it, that a position's clip is of."""
        sets, own = self.turns.split(np.array([position]))
        return self._orders[int(sets[0])], int(own[0])


def shares(clips: Sequence[int], weights: Sequence[float | None], temperature: float) -> list[float]:
    """Weights of the sets: as given, else clips^(1 / temperature); they need not sum to 1."""
    given = [weight for weight in weights if weight is not None]
    if given:
        return given
    return [float(count) if temperature == 1 else round(count ** (1 / temperature), 6) for count in clips]

"""What happens to bad clips: counted, said once per shard, replaced by a rule that knows no ranks.

In: clips that could not be read. Out: the rows to try in their place, or the error that ends the run.

The stand-in for the clip of position g is the first readable one of the clips of positions g + k D, g + (k + 1) D, ...
where D is the least multiple of the streams that is not less than the global batch, and k a hash of g in 1 .. 16,
turning round at the epoch's end. So it comes from the same stream, whose shards this rank reads anyhow; no two
clips of a batch can get the same stand-in, nor one that the batch holds already,
within an epoch (each position of an epoch is another clip);
and a cut tar is made up for by many clips of its stream. Nothing in it depends on ranks, workers or restarts.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from pipeline.errors import UserError
from pipeline.rng import hashed

log = logging.getLogger(__name__)

NAMED = 10  # bad clips in the text of an error
CHUNK = 16
SPREAD = 16

RowsOf = Callable[[np.ndarray], np.ndarray]


def stand_ins(rows_of: RowsOf, position: int, stride: int, clips: int) -> Iterator[int]:
    """Rows to try in place of the clip of `position`: the rule above, then every clip of the part.

    Args:
        rows_of: Positions [m] -> rows [m].
        position: Of the bad clip.
        stride: D.
        clips: Of an epoch.
    """
    epoch, place = divmod(position, clips)
    block, residue = divmod(place, stride)
    blocks = clips // stride
    begin = block + 1 + int(hashed(0, np.array([position]))[0]) % SPREAD
    for first in range(0, blocks, CHUNK):
        turned = (begin + np.arange(first, min(first + CHUNK, blocks))) % blocks
        yield from rows_of(epoch * clips + turned * stride + residue).tolist()
    for first in range(1, 2 * clips, CHUNK):
        yield from rows_of(position + np.arange(first, min(first + CHUNK, 2 * clips))).tolist()


class BadClips:
    """Bad clips of one rank.

    Args:
        shards: Directory or URL, for messages.
        name: Row -> key and shard.
        on_error: "skip" or "raise".
        max_bad: More replaced samples in an epoch end the run.

    Attributes:
        problems: Key -> shard and problem, of every bad clip met so far, stand-ins included.
        replaced: Epoch -> samples that this rank replaced in it.
    """

    def __init__(self, shards: str, name: Callable[[int], tuple[str, str]], on_error: str, max_bad: int) -> None:
        self.problems: dict[str, str] = {}
        self.replaced: Counter[int] = Counter()
        self.rows: set[int] = set()
        self._shards, self._name, self._on_error, self._max_bad = shards, name, on_error, max_bad
        self._reported: set[str] = set()

    def met(self, row: int, problem: str) -> None:
        """Takes down a bad clip.

        Raises:
            UserError: `on_error` is "raise".
        """
        key, shard = self._name(row)
        self.rows.add(row)
        self.problems[key] = f"{shard}: {problem}"
        if self._on_error == "raise":
            raise UserError(f"{self._shards}/{shard}: clip {key}: {problem}; run verify_shards.py", local=True)
        if shard not in self._reported:
            self._reported.add(shard)
            log.warning("%s: clip %s: %s; replaced (later ones of this shard are only counted)", shard, key, problem)

    def count(self, epoch: int, samples: int) -> None:
        """Adds replaced samples of an epoch.

        Raises:
            UserError: this rank alone had more than `max_bad`; see `check` for all ranks.
        """
        self.replaced[epoch] += samples
        self.check(self.replaced[epoch], local=True)

    def check(self, total: int, local: bool = False) -> None:
        """Compares an epoch's replaced samples, of all ranks, with the limit.

        Args:
            total: Their number.
            local: Only this rank knows of it.

        Raises:
            UserError: too many.
        """
        if total > self._max_bad:
            named = "; ".join(f"{key} ({problem})" for key, problem in list(self.problems.items())[:NAMED])
            raise UserError(
                f"data.max_bad = {self._max_bad}: {total} samples of one epoch could not be read from {self._shards}, "
                f"such as {named or 'those that other ranks name'}; run verify_shards.py, or raise data.max_bad",
                local=local,
            )

    def none_left(self, row: int) -> UserError:
        """The error for a part without one readable clip."""
        key, shard = self._name(row)
        return UserError(
            f"{self._shards}: no clip can be read in place of {key} of {shard}, nor any other; run verify_shards.py",
            local=True,
        )

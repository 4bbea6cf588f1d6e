"""What happens to bad clips: counted, said once per shard, replaced by a rule that knows no ranks.

In: clips that could not be read. Out: the rows to try in their place, or the error that ends the run.

The stand-in for the clip of position g is the first readable one of the clips of positions g + k D, g + (k + 1) D, ...
where D is the least multiple of the streams that is not less than the global batch, and k a hash of g in 1 .. 16,
turning round at the epoch's end. So it comes from the same stream, whose shards this rank reads anyhow; no two
clips of a batch can get the same stand-in, nor one that the batch holds already,
within an epoch (each position of an epoch is another clip);
and a cut tar is made up for by many clips of its stream. Nothing in it depends on ranks, workers or restarts.

How many bad samples an epoch may have, over all ranks, says `BadClips`. Missing and cut tars are seen at the start.
"""

import logging
import math
import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.manifest import ShardRecord
from pipeline.data.storage import is_remote, sizes
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
    """Bad clips of one rank, and how many an epoch may have: `data.max_bad`, and a share of its clips, rounded up.

    Args:
        data: Settings.
        name: Row -> key and shard.
        clips: Of an epoch, over all ranks.

    Attributes:
        problems: Key -> shard and problem, of every bad clip met so far, stand-ins included.
    """

    def __init__(self, data: DataConfig, name: Callable[[int], tuple[str, str]], clips: int) -> None:
        self.problems: dict[str, str] = {}
        self._data, self._name, self._clips = data, name, clips
        self._reported: set[str] = set()
        # Steps in which samples were replaced, ascending, and how many of the run's before each and in all. A long run
        # has many, and looks each step up.
        self._steps, self._sums = array("q"), array("q", [0])

    def missing(self, tars: dict[int, tuple[str, ShardRecord]], clips: np.ndarray) -> frozenset[int]:
        """Compares the sizes of a part's tars with the manifest, by one listing, before anything is read.

        Stores that cannot list (web servers, or by their permissions) are not looked at.

        Args:
            tars: Of the part, by number: directory or URL, and record.
            clips: int64 [tars], of the part in each.

        Returns:
            Numbers of those that are not there.

        Raises:
            UserError: so much is missing that an epoch would have too many bad samples.
        """
        there: dict[str, dict[str, int]] = {}
        for location in dict.fromkeys(location for location, _ in tars.values()):
            try:
                listed = {} if location.startswith(("http://", "https://")) else sizes(location)
            except OSError as error:
                log.info("%s: not listed: %s", location, error)
                continue
            if listed or not is_remote(location):
                there[location] = listed
        found = {number: there[where].get(record.name) if where in there else record.size
                 for number, (where, record) in tars.items()}  # fmt: skip
        wrong = [(tars[number][1], size, int(n)) for (number, size), n in zip(found.items(), clips, strict=True)
                 if size != tars[number][1].size]  # fmt: skip
        if not wrong:
            return frozenset()
        share = sum(n * max(0.0, 1 - (size or 0) / record.size) for record, size, n in wrong) / int(clips.sum())
        named = "; ".join(
            f"{record.name} ({'not there' if size is None else f'{size} bytes of {record.size}'})"
            for record, size, _ in wrong[:NAMED]
        )
        said = f"{len(wrong)} of {len(tars)} tars are not as manifest.json says, with {share:.0%} of the clips"
        said = f"{self._data.shown}: {said}: {named}"
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # each node says it: its disk may be the only one that lacks
        exceeded = self._exceeded(share * self._clips)
        if exceeded:
            more = "allows less: mend them (verify_shards.py --repair), or raise it"
            raise UserError(f"{said}; {exceeded} {more}", local=first)
        if first:
            log.warning("%s", said)
        return frozenset(number for number, size in found.items() if size is None)

    def met(self, row: int, problem: str) -> None:
        """Takes down a bad clip.

        Raises:
            UserError: `on_error` is "raise".
        """
        key, shard = self._name(row)
        self.problems[key] = f"{shard}: {problem}"
        if self._data.on_error == "raise":
            raise UserError(f"{shard}: clip {key}: {problem}; run verify_shards.py", local=True)
        if shard not in self._reported:
            self._reported.add(shard)
            log.warning("%s: clip %s: %s; replaced (later ones of this shard are only counted)", shard, key, problem)

    def replace(self, step: int, count: int) -> None:
        """Takes down how many samples this rank replaced in a step; of an evaluation, all are of step 0.

        Of a run that goes on, rank 0 begins with those of all ranks in the epoch so far, at the last step before.

        Steps come in order; where one comes again, what was known of it and later ones is void.
        """
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
            self._sums.pop()
        self._steps.append(step)
        self._sums.append(self._sums[-1] + count)

    def replaced(self, first: int, stop: int) -> int:
        """Samples that this rank replaced in steps first .. stop - 1."""
        return self._sums[bisect_left(self._steps, stop)] - self._sums[bisect_left(self._steps, first)]

    def check(self, total: int, local: bool = False) -> None:
        """Compares an epoch's replaced samples, of all ranks, with the limit.

        Args:
            total: Their number.
            local: Only this rank knows of it.

        Raises:
            UserError: too many.
        """
        exceeded = self._exceeded(total)
        if exceeded:
            named = "; ".join(f"{key} ({problem})" for key, problem in list(self.problems.items())[:NAMED])
            elsewhere = "those that the logs of other ranks, or of before a restart, name"
            raise UserError(
                f"{exceeded}: {total} samples of one epoch could not be read from {self._data.shown}, such as "
                f"{named or elsewhere}; run verify_shards.py, or raise {exceeded.split(' ')[0]}",
                local=local,
            )

    def _exceeded(self, bad: float) -> str:
        """The setting that a number of bad samples exceeds; "": none."""
        data = self._data
        if bad > data.max_bad:
            return f"data.max_bad = {data.max_bad}"
        if bad > math.ceil(data.max_bad_share * self._clips):
            return f"data.max_bad_share = {data.max_bad_share:g}"
        return ""

"""The shard index: where the members of a clip lie, and what its labels are, for the shards in use.

In: a directory of shards. Out: `ShardIndex`. The manifest alone says which rows a shard has; `index.parquet` is read
shard by shard, when a clip of it is first asked for, once its hash was compared. So opening costs one pass over the
file and grows with the shards (a whole loader: 0.17 s for 2 M clips in 4,000 shards; class weights, which need each
label, bring that to 0.48 s: tests/benchmarks/bench_growth.py), and memory holds the rows of the `ROWS_KEPT` clips whose
shards were used last (80 bytes a clip, in each process that reads).
"""

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.manifest import IndexFile, Manifest
from pipeline.data.order import LabelTable, Part
from pipeline.errors import UserError

ROWS_KEPT = 1 << 19  # three times the shards that 64 streams with windows of 2048 clips have open
PLACE = np.dtype([("offset", "<i8"), ("size", "<i8"), ("xxh3", "<u8")])  # of a member in its tar
ROW = np.dtype([("samples", "<i8"), ("waveform", PLACE), ("fbank", PLACE)])
UNPACK_ROW = Struct("<qqqQqqQ").unpack_from  # a fifth of the time of numpy's own

Place = tuple[int, int, int]


class Entry(NamedTuple):
    """What the index says of a clip.

    Attributes:
        shard: Number of its shard.
        samples: Of audio before the padding, at least 1.
        waveform, fbank: Offset, size and xxh3 of the member, its .npy header included.
        labels: int32 [labels].
    """

    shard: int
    samples: int
    waveform: Place
    fbank: Place
    labels: np.ndarray


class ShardIndex:
    """Rows of `index.parquet`.

    Args:
        directory: Directory or URL of the shards.
        manifest: Theirs.
        members: "waveform", "fbank": whose places are read; those of others are 0.
        rows_kept: Rows in memory, of the shards used last, and at least those of one.

    Attributes:
        shard_names: By shard number.

    Raises:
        UserError: the index cannot be read, or is not the one that the manifest lists.
    """

    def __init__(
        self,
        directory: str,
        manifest: Manifest,
        members: Sequence[str] = ("waveform", "fbank"),
        rows_kept: int = ROWS_KEPT,
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.shard_names = [shard.name for shard in manifest.shards]
        sizes = np.array([shard.clips for shard in manifest.shards], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._bounds = array("q", self._starts.tolist())  # for single rows, of which numpy is slow
        self._members = members
        self._file = IndexFile(directory, manifest)
        self._groups = np.concatenate([[0], np.cumsum(self._file.sizes)]).astype(np.int64)
        self._decoded: dict[tuple[str, ...], tuple[int, pa.Table]] = {}
        self._kept: OrderedDict[int, tuple[memoryview, memoryview, np.ndarray]] = OrderedDict()
        self._room = max(1, rows_kept // int(sizes.max(initial=1)))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def part(
        self, splits: Sequence[str], fold: int, held_out: bool, limit: int, name: str, ids: pa.Array | None = None
    ) -> Part:
        """The clips of a part of a run.

        Args:
            splits: Of the data; their clips follow one another in this order.
            fold: Fold to hold out; 0: none.
            held_out: The clips of that fold, not the others.
            limit: Only the first clips; 0: all.
            name: Of the part, for its random numbers.
            ids: string [i], the keys of the clips to take, of those that are there; None: all. Reads the keys once.

        Raises:
            UserError: no such fold, or no clip.
        """
        of_shards = np.array([shard.split for shard in self.manifest.shards])
        chosen = np.concatenate([np.flatnonzero(of_shards == split) for split in splits])
        sizes = np.diff(self._starts)[chosen]
        begins = self._starts[:-1][chosen]
        together = len(begins) > 0 and bool((begins[1:] == begins[:-1] + sizes[:-1]).all())
        if together and not fold and ids is None:
            starts = np.concatenate([[0], np.cumsum(sizes)])
            if limit:
                starts = np.unique(np.minimum(starts, limit))
            return Part(starts, None, int(begins[0]), name)
        rows = np.concatenate([np.arange(b, b + n) for b, n in zip(begins, sizes, strict=True)] or [np.empty(0, int)])
        named = ",".join(splits)
        if fold:
            folds = self._file.check(self._file.read(["fold"]))["fold"].to_numpy()[rows]
            if fold not in folds:
                raise UserError(f"data.fold = {fold}: split '{named}' has folds {sorted(set(folds.tolist()))}")
            rows = rows[(folds == fold) == held_out]
        if ids is not None:
            keys = self._file.check(self._file.read(["key"]))["key"].cast(pa.string())
            rows = rows[pc.is_in(keys, value_set=ids).to_numpy()[rows]]
            if not len(rows):
                raise UserError(
                    f"{self.directory}: none of the {len(ids)} listed ids is in split '{named}', the first of them is "
                    f"{ids[0].as_py()!r:.100}; inspect_shards.py --ids-out FILE writes those of the shards"
                )
        rows = rows[: limit or None]
        if not len(rows):
            raise UserError(f"{self.directory}: no clip in split '{named}', fold {fold}; see its failures.jsonl")
        return Part.of(rows, self.shards(rows), name)

    def shards(self, rows: np.ndarray) -> np.ndarray:
        """Shard numbers of rows: int64 [m] -> int64 [m]."""
        return np.asarray(np.searchsorted(self._starts, rows, side="right") - 1)

    def label_columns(self) -> LabelTable:
        """Labels of all rows, for class weights; 12 bytes a clip of two labels."""
        return LabelTable(*_lists(self._file.check(self._file.read(["labels"]))["labels"]))

    def clip(self, row: int) -> Entry:
        """What the index says of a row; the rows of its shard are read where they are not in memory.

        Raises:
            UserError: rows that cannot be, or are not those of the manifest.
        """
        shard = bisect_right(self._bounds, row) - 1
        kept = self._kept.get(shard)
        if kept is None:
            rows, offsets, labels = self._read(shard)
            kept = self._kept[shard] = rows.view(np.uint8).data, offsets.data, labels
            if len(self._kept) > self._room:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(shard)
        packed, begins, labels = kept
        place = row - self._bounds[shard]
        samples, *places = UNPACK_ROW(packed, place * ROW.itemsize)
        mine = labels[begins[place] : begins[place + 1]]
        return Entry(shard, samples, (places[0], places[1], places[2]), (places[3], places[4], places[5]), mine)

    def name(self, row: int) -> tuple[str, str]:
        """Key and shard of a row."""
        key = self._file.check(self._rows(row, row + 1, ("key",)))["key"][0]
        return str(key), self.shard_names[bisect_right(self._bounds, row) - 1]

    def _read(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ROW [n], and its labels: int32 [n + 1] where each row's begin, int32 [labels]."""
        start, stop = self._bounds[shard], self._bounds[shard + 1]
        places = [(member, what, f"{member}_{what}") for member in self._members for what in PLACE.names or ()]
        columns = ("shard", "split", "labels", "seconds", *(column for _, _, column in places))
        table = self._file.check(self._rows(start, stop, columns))
        named = table["shard"].combine_chunks().unique().to_pylist()
        if named != [self.shard_names[shard]]:
            raise UserError(
                f"{self.directory}/index.parquet: rows {start} to {stop - 1} are of {', '.join(named)}, manifest.json "
                f"has {self.shard_names[shard]} there: one of another build; run verify_shards.py"
            )
        audio, rows = self.manifest.audio, np.zeros(stop - start, ROW)
        rows["samples"] = np.clip(np.rint(table["seconds"].to_numpy() * audio.sample_rate), 1, audio.samples)
        for member, what, column in places:
            rows[member][what] = table[column].to_numpy()
        return rows, *_lists(table["labels"])

    def _rows(self, start: int, stop: int, columns: tuple[str, ...]) -> pa.Table:
        """Some columns of rows start .. stop - 1. The last row group stays decoded: neighbours follow often."""
        parts = []
        group = int(np.searchsorted(self._groups, start, side="right")) - 1
        while start < stop:
            kept = self._decoded.get(columns)
            if kept is None or kept[0] != group:
                kept = group, self._file.read(columns, group)
                self._decoded[columns] = kept
            begin, end = int(self._groups[group]), min(stop, int(self._groups[group + 1]))
            parts.append(kept[1].slice(start - begin, end - start))
            start, group = end, group + 1
        return pa.concat_tables(parts).unify_dictionaries()


def _lists(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [m + 1] from 0, and values, of a list column."""
    combined = column.combine_chunks()
    lists = combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined
    offsets, values = np.asarray(lists.offsets), np.asarray(lists.values)
    return offsets - offsets[0], values[offsets[0] : offsets[-1]]

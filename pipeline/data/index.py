"""The shard index: where the members of a clip lie, and what its labels are, for the shards in use.

In: a directory of shards. Out: `ShardIndex`. The manifest alone says which rows a shard has; `index.parquet` is read
shard by shard, when a clip of it is first asked for, once its hash was compared. So opening costs one pass over the
file and grows with the shards (a whole loader: 0.17 s for 2 M clips in 4,000 shards; class weights, which need each
label, bring that to 0.48 s: tests/benchmarks/bench_growth.py), and memory holds the rows of the `ROWS_KEPT` clips whose
shards were used last (80 bytes a clip, in each process that reads).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.corpus import Corpus
from pipeline.data.manifest import IndexFile
from pipeline.data.order import LabelTable, Part
from pipeline.data.storage import join
from pipeline.errors import UserError

ROWS_KEPT = 1 << 19  # three times the shards that 64 streams with windows of 2048 clips have open
PLACE = np.dtype([("offset", "<i8"), ("size", "<i8"), ("xxh3", "<u8")])  # of a member in its tar
ROW = np.dtype([("samples", "<i8"), ("waveform", PLACE), ("fbank", PLACE), ("begin", "<i4"), ("count", "<i4")])


class Clips(NamedTuple):
    """What the index says of clips [m].

    Attributes:
        shard: int64 [m], numbers of their shards.
        rows: ROW [m]: `samples` of audio before the padding, at least 1; offset, size and xxh3 of the members
            `waveform` and `fbank`, their .npy headers included.
        which: int64 [labels of all], whose of the m a label is.
        labels: int32 [labels of all], the label.
    """

    shard: np.ndarray
    rows: np.ndarray
    which: np.ndarray
    labels: np.ndarray


class ShardIndex:
    """Rows of the `index.parquet` of each set of shards, one set's behind the other's; its shards likewise.

    Args:
        corpus: The sets.
        members: "waveform", "fbank": whose places are read; those of others are 0.
        rows_kept: Rows in memory, of the shards used last, and at least those of one.

    Attributes:
        shards: By number.
        locations: Directory or URL of each shard.

    Raises:
        UserError: the index cannot be read, or is not the one that the manifest lists.
    """

    def __init__(
        self,
        corpus: Corpus,
        members: Sequence[str] = ("waveform", "fbank"),
        rows_kept: int = ROWS_KEPT,
    ) -> None:
        manifests = [member.manifest for member in corpus.members]
        self._corpus, self._members = corpus, members
        self.shards = [shard for manifest in manifests for shard in manifest.shards]
        self.locations = [member.location for member in corpus.members for _ in member.manifest.shards]
        self._set_of = np.repeat(np.arange(len(manifests)), [len(manifest.shards) for manifest in manifests])
        sizes = np.array([shard.clips for shard in self.shards], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._first = [int(self._starts[np.searchsorted(self._set_of, number)]) for number in range(len(manifests))]
        self._files = [IndexFile(member.location, member.manifest) for member in corpus.members]
        self._groups = [np.concatenate([[0], np.cumsum(file.sizes)]).astype(np.int64) for file in self._files]
        self._decoded: dict[tuple[int, tuple[str, ...]], tuple[int, pa.Table]] = {}
        # A shard's rows lie in a slot as wide as the largest shard; memory that no row was written to costs nothing.
        width = int(sizes.max(initial=1))
        slots = min(len(sizes), max(1, rows_kept // width))
        self._slot_of = np.full(len(sizes), -1)  # -1: not in memory
        self._shard_in = np.full(slots, -1)
        self._used = np.zeros(slots, np.int64)  # call of `clips` that last needed a slot
        self._calls = 0
        self._rows = np.zeros((slots, width), ROW)
        self._labels = np.zeros((slots, 2 * width), np.int32)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def part(
        self,
        splits: Sequence[tuple[int, str]],
        fold: int,
        held_out: bool,
        limit: int,
        name: str,
        ids: pa.Array | None = None,
    ) -> Part:
        """The clips of a part of a run.

        Args:
            splits: Number of the set and name, of each split; their clips follow one another in this order.
            fold: Fold to hold out; 0: none.
            held_out: The clips of that fold, not the others.
            limit: Only the first clips; 0: all.
            name: Of the part, for its random numbers.
            ids: string [i], the keys of the clips to take, of those that are there; None: all. Reads the keys once.

        Raises:
            UserError: no such fold, or no clip.
        """
        of_shards = np.array([shard.split for shard in self.shards])
        chosen = np.concatenate(
            [np.flatnonzero((of_shards == split) & (self._set_of == number)) for number, split in splits]
        )
        sizes = np.diff(self._starts)[chosen]
        begins = self._starts[:-1][chosen]
        together = len(begins) > 0 and bool((begins[1:] == begins[:-1] + sizes[:-1]).all())
        if together and not fold and ids is None:
            starts = np.concatenate([[0], np.cumsum(sizes)])
            if limit:
                starts = np.unique(np.minimum(starts, limit))
            return Part(starts, None, int(begins[0]), name)
        rows = np.concatenate([np.arange(b, b + n) for b, n in zip(begins, sizes, strict=True)] or [np.empty(0, int)])
        where, named = self._corpus.members[splits[0][0]].location, ",".join(split for _, split in splits)
        if fold:
            columns = [file.check(file.read(["fold"]))["fold"].to_numpy() for file in self._files]
            folds = np.concatenate(columns)[rows]
            if fold not in folds:
                raise UserError(f"data.fold = {fold}: split '{named}' has folds {sorted(set(folds.tolist()))}")
            rows = rows[(folds == fold) == held_out]
        if ids is not None:
            keys = [file.check(file.read(["key"]))["key"].cast(pa.string()) for file in self._files]
            there = np.concatenate([pc.is_in(one, value_set=ids).to_numpy() for one in keys])
            rows = rows[there[rows]]
            if not len(rows):
                raise UserError(
                    f"{where}: none of the {len(ids)} listed ids is in split '{named}', the first of them is "
                    f"{ids[0].as_py()!r:.100}; inspect_shards.py --ids-out FILE writes those of the shards"
                )
        rows = rows[: limit or None]
        if not len(rows):
            raise UserError(f"{where}: no clip in split '{named}', fold {fold}; see its failures.jsonl")
        return Part.of(rows, self.shards_of(rows), name)

    def by_length(self, parts: Sequence[Part], lengths: Sequence[int]) -> list[list[Part | None]]:
        """For each length and each part the clips whose audio it is the shortest to hold, or None where there is none.

        Args:
            parts: Of one run.
            lengths: Samples, ascending; the last one is that of the shards' clips.
        """
        seconds = [file.check(file.read(["seconds"]))["seconds"].to_numpy() for file in self._files]
        number = np.searchsorted(lengths, self._samples(np.concatenate(seconds))).astype(np.int8)
        found: list[list[Part | None]] = []
        for length, samples in enumerate(lengths):
            found.append([])
            for part in parts:
                rows = part.at(np.arange(len(part)))
                rows = rows[number[rows] == length]
                made = Part.of(rows, self.shards_of(rows), f"{part.key}/{samples}") if len(rows) else None
                found[-1].append(made)
        return found

    def _samples(self, seconds: np.ndarray) -> np.ndarray:
        """Samples of audio before the padding, at least 1."""
        audio = self._corpus.audio
        return np.asarray(np.clip(np.rint(seconds * audio.sample_rate), 1, audio.samples))

    def shards_of(self, rows: np.ndarray) -> np.ndarray:
        """Shard numbers of rows: int64 [m] -> int64 [m]."""
        return np.asarray(np.searchsorted(self._starts, rows, side="right") - 1)

    def label_columns(self) -> LabelTable:
        """Labels of all rows, for class weights; 12 bytes a clip of two labels."""
        found = [_lists(file.check(file.read(["labels"]))["labels"]) for file in self._files]
        lengths = [np.diff(offsets) for offsets, _ in found]
        values = [self._joined(number, labels) for number, (_, labels) in enumerate(found)]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]) if len(found) > 1 else found[0][0]
        return LabelTable(offsets, np.concatenate(values) if len(found) > 1 else values[0])

    def clips(self, rows: np.ndarray) -> Clips:
        """What the index says of rows: int64 [m]; those of shards that are not in memory are read.

        Some twenty calls of numpy, however many clips.

        Raises:
            UserError: rows that cannot be, or are not those of the manifest.
        """
        shards = self.shards_of(rows)
        self._calls += 1
        if (self._slot_of[shards] < 0).any():
            self._load(np.unique(shards))
        slots = self._slot_of[shards]
        self._used[slots] = self._calls
        found = self._rows[slots, rows - self._starts[shards]]
        counts = found["count"]
        which = np.repeat(np.arange(len(rows)), counts)
        place = np.arange(len(which)) + np.repeat(found["begin"] - np.cumsum(counts) + counts, counts)
        return Clips(shards, found, which, self._labels[slots[which], place])

    def name(self, row: int) -> tuple[str, str]:
        """Key and shard of a row; of several sets the shard with its directory."""
        shard = int(self.shards_of(np.array([row]))[0])
        file = self._files[self._set_of[shard]]
        key = file.check(self._table(shard, row, row + 1, ("key",)))["key"][0]
        name = self.shards[shard].name
        return str(key), name if len(self._files) == 1 else join(self.locations[shard], name)

    def _joined(self, number: int, labels: np.ndarray) -> np.ndarray:
        """Labels of a set in the joined vocabulary."""
        classes = self._corpus.members[number].classes
        return labels if classes is None else classes[labels]

    def _load(self, needed: np.ndarray) -> None:
        """Reads those of the shards that are not in memory, in place of the ones that were not used for longest."""
        slots = self._slot_of[needed]
        self._used[slots[slots >= 0]] = self._calls
        more = len(needed) - len(self._rows)
        if more > 0:
            self._shard_in = np.append(self._shard_in, np.full(more, -1))
            self._used = np.append(self._used, np.zeros(more, np.int64))
            self._rows, self._labels = (
                np.concatenate([kept, np.zeros((more, kept.shape[1]), kept.dtype)])
                for kept in (self._rows, self._labels)
            )
        for shard in needed[slots < 0].tolist():
            rows, labels = self._read(shard)
            slot = int(self._used.argmin())
            if self._shard_in[slot] >= 0:
                self._slot_of[self._shard_in[slot]] = -1
            self._slot_of[shard], self._shard_in[slot], self._used[slot] = slot, shard, self._calls
            self._rows[slot, : len(rows)] = rows
            if len(labels) > self._labels.shape[1]:
                self._labels = np.pad(self._labels, ((0, 0), (0, len(labels) - self._labels.shape[1])))
            self._labels[slot, : len(labels)] = labels

    def _read(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """ROW [n] of a shard, and the labels of all n."""
        start, stop = int(self._starts[shard]), int(self._starts[shard + 1])
        number, name = int(self._set_of[shard]), self.shards[shard].name
        places = [(member, what, f"{member}_{what}") for member in self._members for what in PLACE.names or ()]
        columns = ("shard", "split", "labels", "seconds", *(column for _, _, column in places))
        table = self._files[number].check(self._table(shard, start, stop, columns))
        named = table["shard"].combine_chunks().unique().to_pylist()
        if named != [name]:
            first = self._first[number]
            raise UserError(
                f"{self.locations[shard]}/index.parquet: rows {start - first} to {stop - first - 1} are of "
                f"{', '.join(named)}, manifest.json has {name} there: one of another build; run verify_shards.py"
            )
        rows = np.zeros(stop - start, ROW)
        rows["samples"] = self._samples(table["seconds"].to_numpy())
        for member, what, column in places:
            rows[member][what] = table[column].to_numpy()
        offsets, labels = _lists(table["labels"])
        rows["begin"], rows["count"] = offsets[:-1], np.diff(offsets)
        return rows, self._joined(number, labels)

    def _table(self, shard: int, start: int, stop: int, columns: tuple[str, ...]) -> pa.Table:
        """Some columns of rows start .. stop - 1, all of one shard.

        The last row group stays decoded: neighbours follow often.
        """
        number = int(self._set_of[shard])
        start, stop = start - self._first[number], stop - self._first[number]
        parts, groups, name = [], self._groups[number], (number, columns)
        group = int(np.searchsorted(groups, start, side="right")) - 1
        while start < stop:
            kept = self._decoded.get(name)
            if kept is None or kept[0] != group:
                kept = group, self._files[number].read(columns, group)
                self._decoded[name] = kept
            begin, end = int(groups[group]), min(stop, int(groups[group + 1]))
            parts.append(kept[1].slice(start - begin, end - start))
            start, group = end, group + 1
        return pa.concat_tables(parts).unify_dictionaries()


def _lists(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [m + 1] from 0, and values, of a list column."""
    combined = column.combine_chunks()
    lists = combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined
    offsets, values = np.asarray(lists.offsets), np.asarray(lists.values)
    return offsets - offsets[0], values[offsets[0] : offsets[-1]]

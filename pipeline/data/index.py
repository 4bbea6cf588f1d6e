"""The shard index: where the members of a clip lie, and what its labels are, for the shards in use.

In: shards and needs. Out: `ShardIndex`. The manifest alone says which rows a shard has; `index.parquet` is read
shard by shard, when a batch first asks for a clip of it, once its hash was compared. So opening costs one pass over the
file and grows with the shards (a whole loader: 0.17 s for 2 M clips in 4,000 shards; class weights, which need each
label, bring that to 0.48 s: tests/benchmarks/bench_growth.py), and memory holds the rows of the `ROWS_KEPT` clips whose
shards were used last (40 bytes a clip and member). Reads of a batch are vectorised: no Python loop over clips.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.data.manifest import INDEX_SCHEMA, IndexFile, Manifest
from pipeline.data.order import LabelTable, Part
from pipeline.data.reader import JOB, Needs
from pipeline.errors import UserError

ROWS_KEPT = 1 << 19  # three times the shards that 64 streams with windows of 2048 clips have open
WHAT = ("offset", "size", "xxh3")


class Found(NamedTuple):
    """Rows of the index that are in memory.

    Attributes:
        shards: int64 [m], numbers of their shards.
        where: int64 [m], their places.
    """

    shards: np.ndarray
    where: np.ndarray


class ShardIndex:
    """Rows of `index.parquet`.

    Args:
        directory: Directory or URL of the shards.
        manifest: Theirs.
        needs: Members whose places are loaded.
        rows_kept: Rows in memory, of the shards used last, and at least those of one batch.

    Attributes:
        shard_names: By shard number.

    Raises:
        UserError: the index cannot be read, or is not the one that the manifest lists.
    """

    def __init__(self, directory: str, manifest: Manifest, needs: Needs, rows_kept: int = ROWS_KEPT) -> None:
        self.directory = directory
        self.manifest = manifest
        self.shard_names = [shard.name for shard in manifest.shards]
        sizes = np.array([shard.clips for shard in manifest.shards], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        members = [member for member in ("waveform", "fbank") if getattr(needs, member)]
        self._columns = ["seconds", *(f"{member}_{what}" for member in members for what in WHAT)]
        self._file = IndexFile(directory, manifest)
        self._groups = np.concatenate([[0], np.cumsum(self._file.sizes)]).astype(np.int64)
        self._decoded: dict[tuple[str, ...], tuple[int, pa.Table]] = {}
        self._kept = _Kept(self._columns, sizes, rows_kept)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def part(self, splits: Sequence[str], fold: int, held_out: bool, limit: int, name: str) -> Part:
        """The clips of a part of a run.

        Args:
            splits: Of the data; their clips follow one another in this order.
            fold: Fold to hold out; 0: none.
            held_out: The clips of that fold, not the others.
            limit: Only the first clips; 0: all.
            name: Of the part, for its random numbers.

        Raises:
            UserError: no such fold, or no clip.
        """
        of_shards = np.array([shard.split for shard in self.manifest.shards])
        chosen = np.concatenate([np.flatnonzero(of_shards == split) for split in splits])
        sizes = np.diff(self._starts)[chosen]
        begins = self._starts[:-1][chosen]
        together = len(begins) > 0 and bool((begins[1:] == begins[:-1] + sizes[:-1]).all())
        if together and not fold:
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
        rows = rows[: limit or None]
        if not len(rows):
            raise UserError(f"{self.directory}: no clip in split '{named}', fold {fold}; see its failures.jsonl")
        return Part.of(rows, self.shards(rows), name)

    def shards(self, rows: np.ndarray) -> np.ndarray:
        """Shard numbers of rows: int64 [m] -> int64 [m]."""
        return np.asarray(np.searchsorted(self._starts, rows, side="right") - 1)

    def label_columns(self) -> LabelTable:
        """Labels of all rows, for class weights; 12 bytes a clip of two labels."""
        column = self._file.check(self._file.read(["labels"]))["labels"].combine_chunks()
        labels = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        return LabelTable(np.asarray(labels.offsets), np.asarray(labels.values))

    def find(self, rows: np.ndarray) -> Found:
        """Rows [m] in memory, until the next call; shards that are not there are read."""
        shards = self.shards(rows)
        for shard in self._kept.missing(shards):
            self._kept.put(shard, self._read(shard))
        return Found(shards, self._kept.slot[shards] * self._kept.width + rows - self._starts[shards])

    def labels(self, rows: Found) -> tuple[np.ndarray, np.ndarray]:
        """Labels of rows [m]: (which of the rows, label index), one pair for each label."""
        where = rows.where
        begins, counts = self._kept.begins[where], self._kept.counts[where]
        which = np.repeat(np.arange(len(where)), counts)
        at = np.arange(len(which)) + np.repeat(begins - np.cumsum(counts) + counts, counts)
        return which, self._kept.labels[np.repeat(where // self._kept.width, counts), at]

    def lengths(self, rows: Found) -> np.ndarray:
        """Samples of audio before the padding of rows [m]: int64 [m], at least 1."""
        audio = self.manifest.audio
        samples = np.rint(self._kept.columns["seconds"][rows.where] * audio.sample_rate).astype(np.int64)
        return np.asarray(np.clip(samples, 1, audio.samples))

    def jobs(self, member: str, rows: Found) -> np.ndarray:
        """Reads of a member ("waveform" or "fbank") of rows [m]: JOB [m] without places in memory."""
        jobs = np.zeros(len(rows.where), JOB)
        jobs["shard"] = rows.shards
        for what in WHAT:
            jobs[what] = self._kept.columns[f"{member}_{what}"][rows.where]
        return jobs

    def name(self, row: int) -> tuple[str, str]:
        """Key and shard of a row."""
        key = self._file.check(self._rows(row, row + 1, ("key",)))["key"][0]
        return str(key), self.shard_names[int(self.shards(np.array([row]))[0])]

    def _read(self, shard: int) -> pa.Table:
        start, stop = int(self._starts[shard]), int(self._starts[shard + 1])
        table = self._file.check(self._rows(start, stop, ("shard", "split", "labels", *self._columns)))
        named = table["shard"].combine_chunks().unique().to_pylist()
        if named != [self.shard_names[shard]]:
            raise UserError(
                f"{self.directory}/index.parquet: rows {start} to {stop - 1} are of {', '.join(named)}, manifest.json "
                f"has {self.shard_names[shard]} there: one of another build; run verify_shards.py"
            )
        return table

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


class _Kept:
    """Columns of the shards used last, a slot each; all slots are as wide as the largest shard.

    Attributes:
        width: Rows of a slot.
        slot: int64 [shards], where each shard is; -1: not in memory.
        columns: Name -> [slots x width].
        begins, counts: int64 [slots x width], where a row's labels lie in its slot's line of `labels`.
        labels: int32 [slots, most labels of a shard].
    """

    def __init__(self, columns: list[str], sizes: np.ndarray, rows: int) -> None:
        self.width = int(sizes.max(initial=1))
        slots = min(len(sizes), max(1, rows // self.width))
        self.slot = np.full(len(sizes), -1, np.int64)
        self.columns: dict[str, np.ndarray] = {
            name: np.zeros(slots * self.width, INDEX_SCHEMA.field(name).type.to_pandas_dtype()) for name in columns
        }
        self.begins, self.counts = (np.zeros(slots * self.width, np.int64) for _ in range(2))
        self.labels = np.zeros((slots, 2 * self.width), np.int32)
        self._shard = np.full(slots, -1, np.int64)
        self._used = np.zeros(slots, np.int64)
        self._clock = 0

    def missing(self, shards: np.ndarray) -> list[int]:
        """Which of these are not in memory; the others will not be put out by `put` until the next call."""
        self._clock += 1
        slots = self.slot[shards]
        self._used[slots[slots >= 0]] = self._clock
        missing: list[int] = np.unique(shards[slots < 0]).tolist() if (slots < 0).any() else []
        needed = len(missing) + int((self._used == self._clock).sum())
        if needed > len(self._shard):
            self._widen(needed)
        return missing

    def put(self, shard: int, rows: pa.Table) -> None:
        """Takes a shard in, in place of the one that was not used for longest."""
        slot = int(self._used.argmin())
        if self._shard[slot] >= 0:
            self.slot[self._shard[slot]] = -1
        self.slot[shard], self._shard[slot], self._used[slot] = slot, shard, self._clock
        part = slice(slot * self.width, slot * self.width + len(rows))
        for name, column in self.columns.items():
            column[part] = rows[name].to_numpy()
        offsets, values = _lists(rows["labels"])
        self.begins[part], self.counts[part] = offsets[:-1], np.diff(offsets)
        if len(values) > self.labels.shape[1]:
            self.labels = np.pad(self.labels, ((0, 0), (0, len(values) - self.labels.shape[1])))
        self.labels[slot, : len(values)] = values

    def _widen(self, slots: int) -> None:
        """More slots: a batch touches more shards than there are."""
        more = slots - len(self._shard)
        self.columns = {name: np.pad(column, (0, more * self.width)) for name, column in self.columns.items()}
        self.begins, self.counts = (np.pad(column, (0, more * self.width)) for column in (self.begins, self.counts))
        self.labels = np.pad(self.labels, ((0, more), (0, 0)))
        self._shard, self._used = np.pad(self._shard, (0, more), constant_values=-1), np.pad(self._used, (0, more))


def _lists(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [m + 1] from 0, and values, of a list column."""
    combined = column.combine_chunks()
    lists = combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined
    offsets = np.asarray(lists.offsets).astype(np.int64)
    return offsets - offsets[0], np.asarray(lists.values)[offsets[0] : offsets[-1]]

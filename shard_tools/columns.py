"""Clips and failures as columns: a catalog of two million rows in a few hundred megabytes.

In: `Clip` and `Failure` objects, one at a time. Out: the same objects by row, or Arrow tables.

A `Clip` object costs about 500 bytes with its strings; a row here about 100, because strings lie end to
end in one buffer and numbers in arrays. Objects are made when a row is asked for and dropped after use.
"""

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.data.storage import is_remote
from pipeline.flow import Clip

TRIMMED = {None: -1, False: 0, True: 1}


@dataclass(frozen=True)
class Failure:
    """A listed clip that is not in the shards, or not from its first file: a line of `failures.jsonl`.

    Attributes:
        id: The data set's own name for it.
        path: Of its file, relative to the audio root.
        reason: Its kind, a colon, and more.
        split: Name of the split.
        key: Of the sample that it would be; "": it has none.
        row: Line of the table that lists it, or its number in the catalog where there is no table; None: not known.
        start: First second of the segment.
        end: Last second; None: the end of the file.
        used: The file that gave the clip after all; "": none, the clip is not in the shards.
    """

    id: str
    path: str
    reason: str
    split: str
    key: str = ""
    row: int | None = None
    start: float = 0.0
    end: float | None = None
    used: str = ""

    def line(self) -> dict[str, Any]:
        """As JSON; `used` only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "used" or value}


class Strings:
    """Strings end to end in one buffer; file names that are not UTF-8 survive (surrogateescape)."""

    def __init__(self) -> None:
        self._heap = bytearray()
        self._offsets = array("q", [0])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        return self._heap[self._offsets[row] : self._offsets[row + 1]].decode("utf-8", "surrogateescape")

    def append(self, text: str) -> None:
        """Adds a row."""
        self._heap += text.encode("utf-8", "surrogateescape")
        self._offsets.append(len(self._heap))

    def truncate(self, rows: int) -> None:
        """Keeps the first rows."""
        del self._offsets[rows + 1 :]
        del self._heap[self._offsets[-1] :]

    def arrow(self) -> pa.Array:
        """large_binary [rows], a view: nothing may be appended while it lives."""
        buffers = [None, pa.py_buffer(self._offsets), pa.py_buffer(self._heap)]
        return pa.Array.from_buffers(pa.large_binary(), len(self), buffers)


class Names:
    """Strings of which there are few (splits, reasons), as codes."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._codes: dict[str, int] = {}
        self.rows = array("i")

    def __getitem__(self, row: int) -> str:
        return self.names[self.rows[row]]

    def append(self, name: str) -> None:
        """Adds a row."""
        code = self._codes.setdefault(name, len(self.names))
        if code == len(self.names):
            self.names.append(name)
        self.rows.append(code)

    def of(self, name: str) -> np.ndarray:
        """int64, the rows that hold the name."""
        return np.flatnonzero(np.asarray(self.rows) == self._codes.get(name, -1))


class Clips(Sequence[Clip]):
    """Clips of a catalog; behaves as a sequence of `Clip` that can be appended to.

    Args:
        root: Paths below it are kept relative to it.
    """

    def __init__(self, root: str) -> None:
        self._prefix = root.rstrip("/") + "/"
        self._outside = array("q")  # rows whose file does not lie below the root
        self._others: dict[int, tuple[Clip, ...]] = {}  # by row, of those few that have several files
        self._absolute = self._prefix if is_remote(root) else os.path.abspath(root).rstrip("/") + "/"
        self._key, self._path, self._id = Strings(), Strings(), Strings()
        self._split = Names()
        self._start, self._end = array("d"), array("d")  # end: NaN is None
        self._labels, self._label_offsets = array("i"), array("q", [0])
        self._fold, self._trimmed, self._line = array("h"), array("b"), array("i")
        self._hash = array("Q")

    def __len__(self) -> int:
        return len(self._key)

    @overload
    def __getitem__(self, row: int) -> Clip: ...
    @overload
    def __getitem__(self, row: slice) -> list[Clip]: ...
    def __getitem__(self, row: int | slice) -> Clip | list[Clip]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(row)
        path, end, trimmed = self._path[row], self._end[row], self._trimmed[row]
        return Clip(
            key=self._key[row],
            path=path if path.startswith("/") or is_remote(path) else self._prefix + path,
            start=self._start[row],
            end=None if end != end else end,
            labels=tuple(self._labels[self._label_offsets[row] : self._label_offsets[row + 1]]),
            split=self._split[row],
            fold=self._fold[row],
            id=self._id[row],
            trimmed=None if trimmed < 0 else bool(trimmed),
            line=self._line[row],
            others=self._others.get(row, ()),
        )

    def __iter__(self) -> Iterator[Clip]:
        return (self[row] for row in range(len(self)))

    def append(self, clip: Clip) -> None:
        """Adds a clip."""
        path = clip.path
        if path.startswith(self._prefix):
            path = path[len(self._prefix) :]
        elif not is_remote(path):
            path = os.path.abspath(path).removeprefix(self._absolute)
        if path.startswith("/") or is_remote(path):
            self._outside.append(len(self))
        if clip.others:
            self._others[len(self)] = clip.others
        self._key.append(clip.key)
        self._path.append(path)
        self._id.append(clip.id)
        self._split.append(clip.split)
        self._start.append(clip.start)
        self._end.append(float("nan") if clip.end is None else clip.end)
        self._labels.extend(clip.labels)
        self._label_offsets.append(len(self._labels))
        self._fold.append(clip.fold)
        self._trimmed.append(TRIMMED[clip.trimmed])
        self._line.append(clip.line)
        self._hash.append(xxhash.xxh3_64_intdigest(f"{clip.split}\0{clip.key}".encode("utf-8", "surrogateescape")))

    def truncate(self, rows: int) -> None:
        """Keeps the first rows."""
        for strings in (self._key, self._path, self._id):
            strings.truncate(rows)
        for column in (self._split.rows, self._start, self._end, self._fold, self._trimmed, self._line, self._hash):
            del column[rows:]
        del self._label_offsets[rows + 1 :]
        del self._labels[self._label_offsets[-1] :]
        self._outside = array("q", (row for row in self._outside if row < rows))
        self._others = {row: others for row, others in self._others.items() if row < rows}

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in order of appearance."""
        used = set(np.unique(np.asarray(self._split.rows)).tolist())
        return [name for code, name in enumerate(self._split.names) if code in used]

    def rows(self, split: str) -> np.ndarray:
        """int64, the rows of a split, in order."""
        return self._split.of(split)

    def label_counts(self, split: str, classes: int) -> np.ndarray:
        """int64 [classes], clips of a split with each label."""
        chosen = np.zeros(len(self), bool)
        chosen[self.rows(split)] = True
        of_label = np.repeat(chosen, np.diff(np.asarray(self._label_offsets)))
        return np.bincount(np.asarray(self._labels)[of_label], minlength=classes)

    def repeat(self) -> tuple[Clip, Clip] | None:
        """The first two clips of one split that share a key, if there are any."""
        hashes = np.asarray(self._hash)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        for left, right in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            first, second = self[left], self[right]
            if (first.split, first.key) == (second.split, second.key):
                return first, second
        return None

    def others(self, rows: np.ndarray) -> str:
        """Hash of the further files of the given rows; "": they have none."""
        found = [
            [place, recorded(other, self._prefix), other.start, other.end, other.trimmed]
            for place, row in enumerate(rows.tolist())
            for other in self._others.get(row, ())
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(found).encode()) if found else ""

    def table(self, rows: np.ndarray) -> pa.Table:
        """The given rows as Arrow columns; strings are large_binary, paths as they are recorded (`recorded`)."""
        take = pa.array(rows)
        path = self._path.arrow().take(take)
        outside = np.isin(rows, np.asarray(self._outside))
        if outside.any():
            path = pc.if_else(pa.array(outside), self._id.arrow().take(take), path)
        labels = pa.LargeListArray.from_arrays(
            pa.array(np.asarray(self._label_offsets)), pa.array(np.asarray(self._labels))
        )
        end, trimmed = np.asarray(self._end)[rows], np.asarray(self._trimmed)[rows]
        return pa.table(
            {
                "key": self._key.arrow().take(take),
                "path": path,
                "id": self._id.arrow().take(take),
                "start": np.asarray(self._start)[rows],
                "end": pa.array(end, mask=np.isnan(end)),
                "labels": labels.take(take),
                "fold": np.asarray(self._fold)[rows],
                "trimmed": pa.array(trimmed == 1, mask=trimmed < 0),
            }
        )


class Failures(Sequence[Failure]):
    """Failures of a catalog; behaves as a sequence of `Failure` that can be appended to."""

    def __init__(self) -> None:
        self._id, self._path, self._key = Strings(), Strings(), Strings()
        self._reason, self._split = Names(), Names()
        self._row, self._start, self._end = array("q"), array("d"), array("d")  # row: -1, end: NaN are None

    def __len__(self) -> int:
        return len(self._id)

    @overload
    def __getitem__(self, row: int) -> Failure: ...
    @overload
    def __getitem__(self, row: slice) -> list[Failure]: ...
    def __getitem__(self, row: int | slice) -> Failure | list[Failure]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        end = self._end[row]
        return Failure(
            id=self._id[row],
            path=self._path[row],
            reason=self._reason[row],
            split=self._split[row],
            key=self._key[row],
            row=None if self._row[row] < 0 else self._row[row],
            start=self._start[row],
            end=None if end != end else end,
        )

    def __iter__(self) -> Iterator[Failure]:
        return (self[row] for row in range(len(self)))

    def append(self, failure: Failure) -> None:
        """Adds a failure."""
        self._id.append(failure.id)
        self._path.append(failure.path)
        self._reason.append(failure.reason)
        self._split.append(failure.split)
        self._key.append(failure.key)
        self._row.append(-1 if failure.row is None else failure.row)
        self._start.append(failure.start)
        self._end.append(float("nan") if failure.end is None else failure.end)

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in order of appearance."""
        return list(self._split.names)

    def rows(self, split: str) -> np.ndarray:
        """int64, the rows of a split, in order."""
        return self._split.of(split)

    def table(self, rows: np.ndarray) -> pa.Table:
        """Ids and paths of the given rows as Arrow columns."""
        take = pa.array(rows)
        return pa.table({"id": self._id.arrow().take(take), "path": self._path.arrow().take(take)})


def relative(path: str, root: str) -> str:
    """A file's way from the audio root."""
    if is_remote(path):
        return path.removeprefix(root.rstrip("/") + "/")
    return os.path.relpath(path, root)


def recorded(clip: Clip, root: str) -> str:
    """A clip's file as shards name it: its way from the audio root where it is named by it, else the clip's id.

    So nothing in shards says where else on a machine, or behind which URL, a file lay.
    """
    inside = clip.path.startswith(root.rstrip("/") + "/")
    return relative(clip.path, root) if inside else clip.id or clip.path.rpartition("/")[2]


def digest(table: pa.Table, columns: Sequence[str]) -> str:
    """Hash of columns of a table of this module, equal for equal rows however they are chunked."""
    whole = xxhash.xxh3_128()
    for name in columns:
        column: Any = table[name].combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_large_list(column.type) or pa.types.is_large_binary(column.type):
            offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
            whole.update(np.diff(offsets).tobytes())
            column = column.flatten() if pa.types.is_large_list(column.type) else column
        if pa.types.is_large_binary(column.type):
            whole.update(memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]])
        else:
            column = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
            whole.update(np.asarray(column.fill_null(0)).tobytes())
            whole.update(np.asarray(column.is_null().cast(pa.int8())).tobytes())
    return whole.hexdigest()

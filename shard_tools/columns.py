"""What a data set lists, as Arrow tables: two million rows in a few hundred megabytes.

In: `Clip` and `Failure` objects, one at a time. Out: the same objects by row, or columns.

A `Clip` object costs about 500 bytes with its strings, a row about 130. Objects wait until there are enough for a batch
of columns, and are made again when a row is asked for.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.data.storage import is_remote
from pipeline.flow import Clip

BATCH = 1 << 14  # rows that wait as objects
TEXT = pa.large_binary()  # UTF-8; the bytes of names that are not survive (surrogateescape)
FEW = pa.dictionary(pa.int32(), pa.string())  # of which there are few: splits, reasons


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


# In the order of the fields of `Clip` and `Failure`.
AT = pa.list_(pa.int64(), 2)
SEGMENT = [("path", TEXT), ("start", pa.float64()), ("end", pa.float64()), ("trimmed", pa.bool_()), ("at", AT)]
SCHEMAS = {
    Clip: pa.schema([
        ("key", TEXT), ("path", TEXT), ("start", pa.float64()), ("end", pa.float64()),
        ("labels", pa.large_list(pa.int32())), ("split", FEW), ("fold", pa.int16()), ("id", TEXT),
        ("trimmed", pa.bool_()), ("line", pa.int32()), ("at", AT),
        ("events", pa.large_list(pa.list_(pa.float64(), 3))), ("others", pa.large_list(pa.struct(SEGMENT))),
    ]),
    Failure: pa.schema([
        ("id", TEXT), ("path", TEXT), ("reason", FEW), ("split", FEW), ("key", TEXT), ("row", pa.int64()),
        ("start", pa.float64()), ("end", pa.float64()), ("used", FEW),
    ]),
}  # fmt: skip
Row = TypeVar("Row", Clip, Failure)


class Rows(Sequence[Row], Generic[Row]):
    """Clips or failures of a catalog: a sequence of them that can be appended to, over an Arrow table.

    Args:
        kind: `Clip` or `Failure`.
        root: Of the audio: paths of clips below it are kept relative to it.
    """

    def __init__(self, kind: type[Row], root: str = "") -> None:
        self._kind: type[Row] = kind
        self._schema, self._root = SCHEMAS[kind], root.rstrip("/") + "/"
        self._absolute = self._root if is_remote(root) else os.path.abspath(root).rstrip("/") + "/"
        self._waiting: list[Row] = []
        self._table = self._schema.empty_table()

    def __len__(self) -> int:
        return len(self._table) + len(self._waiting)

    @overload
    def __getitem__(self, row: int) -> Row: ...
    @overload
    def __getitem__(self, row: slice) -> list[Row]: ...
    def __getitem__(self, row: int | slice) -> Row | list[Row]:
        chosen = range(len(self))[row]
        return self.at([chosen])[0] if isinstance(chosen, int) else self.at(chosen)

    def __iter__(self) -> Iterator[Row]:
        for first in range(0, len(self), BATCH):
            yield from self[first : first + BATCH]

    def append(self, row: Row) -> None:
        """Adds one."""
        self._waiting.append(row)
        if len(self._waiting) == BATCH:
            self._write()

    def truncate(self, rows: int) -> None:
        """Keeps the first rows."""
        self._table = self.table.slice(0, rows)

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in order of appearance."""
        names: list[str] = pc.unique(self.table["split"].cast(pa.string())).to_pylist()
        return names

    def rows(self, split: str) -> np.ndarray:
        """int64, the rows of a split, in order."""
        return np.flatnonzero(self._mask(split).to_numpy())

    def of(self, split: str) -> Iterator[Row]:
        """The objects of a split, one after another."""
        rows = self.rows(split)
        for first in range(0, len(rows), BATCH):
            yield from self.at(rows[first : first + BATCH])

    @property
    def table(self) -> pa.Table:
        """All rows as columns, each in one piece, as rows are slow to find in many.

        To be asked for before threads do: then it stays as it is until a row is added.
        """
        if self._waiting:
            self._write()
        table = self._table
        if table.column(0).num_chunks > 1:
            self._table, whole = self._schema.empty_table(), []
            table = table.unify_dictionaries()
            while table.num_columns:  # one after another, each freed before the next is made
                whole.append(table.column(0).combine_chunks())
                table = table.remove_column(0)
            self._table = pa.Table.from_arrays(whole, schema=self._schema)
        return self._table

    def take(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """Some rows; some columns of them, or all."""
        table = self.table
        return (table if columns is None else table.select(columns)).take(pa.array(rows, pa.int64()))

    def at(self, rows: Sequence[int] | np.ndarray) -> list[Row]:
        """The objects of some rows."""
        cells = {name: column.to_pylist() for name, column in zip(self._schema.names, self.take(rows), strict=True)}
        for field in self._schema:
            if field.type == TEXT:
                cells[field.name] = list(map(_text, cells[field.name]))
        others = cells.pop("others", None)
        if others is not None:
            cells["path"] = list(map(self._located, cells["path"]))
            cells["labels"] = list(map(tuple, cells["labels"]))
            cells["at"] = list(map(_place, cells["at"]))
            cells["events"] = [tuple((on, off, int(label)) for on, off, label in one) for one in cells["events"]]
        found: list[Any] = [self._kind(*row) for row in zip(*cells.values(), strict=True)]
        for place, files in enumerate(others or ()):
            if files:
                clip = found[place]
                where = [{"path": self._located(_text(file["path"])), "at": _place(file["at"])} for file in files]
                further = [replace(clip, **file | known) for file, known in zip(files, where, strict=True)]
                found[place] = replace(clip, others=tuple(further))
        return found

    def recorded(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Columns of some clips, paths as they are recorded (`recorded`)."""
        table = self.take(rows, list(dict.fromkeys([*columns, "id"])))
        if "path" in columns:
            path = table["path"]
            outside = pc.or_(pc.starts_with(path, "/"), pc.match_substring(path, "://"))
            if pc.any(outside).as_py():
                path = pc.if_else(outside, table["id"], path)
            table = table.set_column(table.column_names.index("path"), "path", path)
        return table.select(columns)

    def label_counts(self, split: str, classes: int) -> np.ndarray:
        """int64 [classes], clips of a split with each label."""
        labels = pc.list_flatten(self.table["labels"].filter(self._mask(split)))
        return np.bincount(labels.to_numpy(), minlength=classes)

    def repeat(self) -> tuple[Row, Row] | None:
        """The first two of one split that share a key, if there are any."""
        for split in self.splits:
            mine = self._mask(split)
            keys = self.table["key"].filter(mine)
            if pc.count_distinct(keys).as_py() == len(keys):
                continue
            counts = keys.value_counts()
            twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
            rows = np.flatnonzero(pc.and_(mine, pc.equal(self.table["key"], twice[0])).to_numpy())
            first, second = self.at(rows[:2])
            return first, second
        return None

    def others(self, rows: np.ndarray) -> str:
        """Hash of the further files of the given clips; "": they have none."""
        counts = pc.list_value_length(self.table["others"]).to_numpy()[rows]
        places = np.flatnonzero(counts)
        clips: list[Any] = self.at(rows[places])
        found = [
            [place, recorded(other, self._root), other.start, other.end, other.trimmed]
            for place, clip in zip(places.tolist(), clips, strict=True)
            for other in clip.others
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(found).encode()) if found else ""

    def _write(self) -> None:
        """Makes columns of what waits."""
        columns = []
        for field in self._schema:
            values = list(map(attrgetter(field.name), self._waiting))
            if field.name == "others":
                values = [self._segments(files) if files else () for files in values]
            elif field.name == "path" and self._kind is Clip:
                values = list(map(self._inside, values))
            if field.type == TEXT:
                with suppress(UnicodeEncodeError):  # some name is not UTF-8
                    columns.append(pa.array(values, TEXT))
                    continue
                values = list(map(_bytes, values))
            columns.append(pa.array(values, field.type))
        self._table = pa.concat_tables([self._table, pa.Table.from_arrays(columns, schema=self._schema)])
        self._waiting = []

    def _segments(self, files: Sequence[Clip]) -> list[dict[str, Any]]:
        return [
            {"path": _bytes(self._inside(one.path)), "start": one.start, "end": one.end, "trimmed": one.trimmed,
             "at": one.at}
            for one in files
        ]  # fmt: skip

    def _mask(self, split: str) -> pa.ChunkedArray:
        return pc.equal(self.table["split"], split)

    def _inside(self, path: str) -> str:
        """A path as it is kept: relative to the root where it lies below it."""
        if path.startswith(self._root):
            return path[len(self._root) :]
        return path if is_remote(path) else os.path.abspath(path).removeprefix(self._absolute)

    def _located(self, path: str) -> str:
        return path if path.startswith("/") or is_remote(path) else self._root + path


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _place(pair: list[int] | None) -> tuple[int, int] | None:
    return (pair[0], pair[1]) if pair else None


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


def digest(table: pa.Table) -> str:
    """Hash of the columns of a table of this module, equal for equal rows however they are chunked."""
    whole = xxhash.xxh3_128()
    for chunked in table.columns:
        column: Any = chunked.combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_large_list(column.type) or column.type == TEXT:
            offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
            whole.update(np.diff(offsets).tobytes())
            column = column.flatten() if pa.types.is_large_list(column.type) else column
        if column.type == TEXT:
            whole.update(memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]])
        else:
            column = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
            whole.update(np.asarray(column.fill_null(0)).tobytes())
            whole.update(np.asarray(column.is_null().cast(pa.int8())).tobytes())
    return whole.hexdigest()

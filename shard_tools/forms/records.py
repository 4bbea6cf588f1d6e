"""Rows of a table with a header, of JSON lines or of a Parquet table, as dictionaries.

In: a csv, tsv, .jsonl or .parquet file. Out: (line, row); cells of a csv are text, other values what they are.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipeline.data.storage import Location
from pipeline.errors import UserError
from shard_tools.sources import ParquetSource
from shard_tools.tables import Table

LABELS = ("labels", "label", "tags", "tag", "category", "class", "classes", "event_labels", "command")  # of a clip
BATCH = 1 << 14  # rows


def label_column(row: dict[str, Any], names: Sequence[str] = LABELS) -> str | None:
    """The first column of labels in which a row has some, else the first that it has; None: it has none."""
    there = [name for name in names if name in row]
    return next((name for name in there if row[name] not in (None, "")), there[0] if there else None)


@contextmanager
def parquet_source(path: str) -> Iterator[ParquetSource]:
    """A Parquet file whose trouble is the user's.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with ParquetSource(path) as source:
            yield source
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]:.160}; get the file again") from error


def is_json(path: Location) -> bool:
    """Whether a file is JSON, by its name: a pipe can be read only once."""
    return str(path).lower().endswith((".json", ".jsonl", ".ndjson"))


def records_of(path: Location, needed: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row).

    Raises:
        UserError: it cannot be read, or a row lacks what is needed.
    """
    if str(path).lower().endswith(".parquet"):
        with parquet_source(str(path)) as file:
            absent = [name for name in needed if name not in file.schema.names]
            if absent:
                raise UserError(f"{path}: no column '{absent[0]}' (has {', '.join(file.schema.names[:20])})")
            line = 0
            for batch in file.file.iter_batches(BATCH, use_threads=False):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
        return
    source = Table(path)
    if not is_json(path):
        names = source.columns(needed)
        for line, cells in source.records(names):
            yield line, dict(zip(names, (cells,) if isinstance(cells, str) else cells, strict=True))
        return
    for line, text in enumerate(source.lines(), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise source.problem(line, f"no JSON ({error})", "write one object a line") from error
        lacking = next((name for name in needed if not isinstance(row, dict) or name not in row), None)
        if lacking is not None or not isinstance(row, dict):
            raise source.problem(line, f"no '{lacking}'", f"each line needs {', '.join(needed)}")
        yield line, row

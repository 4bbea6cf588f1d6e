"""index.parquet as builds write it and as other tools read it, a row group at a time.

In: Arrow tables of rows. Out: a file whose bytes depend on its rows alone; the rows of one shard after another.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.manifest import INDEX_SCHEMA, Manifest, open_checked
from pipeline.data.storage import Location, join
from pipeline.errors import UserError

ROW_GROUP = 1 << 12  # rows that a loader decodes to get at a shard's
PLAIN = pa.schema([(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in INDEX_SCHEMA])


class IndexWriter:
    """index.parquet in row groups of one size; use it in `with`."""

    def __init__(self, path: Any) -> None:
        self._writer = pq.ParquetWriter(path, INDEX_SCHEMA, compression="zstd")
        self._waiting = PLAIN.empty_table()

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._flush(1)
        self._writer.close()

    def write(self, table: pa.Table) -> None:
        """Adds rows."""
        self._waiting = pa.concat_tables([self._waiting, table.cast(PLAIN)])
        self._flush(ROW_GROUP)

    def _flush(self, least: int) -> None:
        while len(self._waiting) >= least:
            # Encoded here: dictionaries of the parts differ with how the rows came.
            group = self._waiting.slice(0, ROW_GROUP).combine_chunks().cast(INDEX_SCHEMA)
            self._writer.write_table(group, row_group_size=ROW_GROUP)
            self._waiting = self._waiting.slice(ROW_GROUP)


def index_groups(location: Location, manifest: Manifest) -> Iterator[pa.Table]:
    """Row groups of the index.parquet that the manifest lists, one at a time, without dictionaries (PLAIN).

    Raises:
        UserError: it is another one, damaged, or no index.
    """
    try:
        with pq.ParquetFile(open_checked(location, "index.parquet", manifest.index)) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number).cast(PLAIN)
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: other columns
        raise UserError(f"{join(location, 'index.parquet')}: {error}; build the shards again") from error


def rows_by_shard(location: Location, manifest: Manifest) -> Iterator[tuple[str, pa.Table]]:
    """Rows that follow one another and are of one shard, with its name; all rows, in order.

    Raises:
        UserError: as `index_groups`.
    """
    waiting = PLAIN.empty_table()
    for group in index_groups(location, manifest):
        waiting = pa.concat_tables([waiting, group])
        while True:
            name = waiting["shard"][0].as_py()
            count = pc.index(pc.equal(waiting["shard"], name), False).as_py()
            if count < 0:
                break  # it may go on in the next row group
            yield name, waiting.slice(0, count)
            waiting = waiting.slice(count)
    if len(waiting):
        yield waiting["shard"][0].as_py(), waiting

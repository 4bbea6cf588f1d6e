"""JSON lines and Parquet tables that name files, as a csv does.

| column | what |
|---|---|
| path | of the file, or a member of a container (`a.tar::x.wav`); absolute, or relative to the root |
| labels | ids or names: a list, or text, several separated by `;` |
| start, end, split, fold, key | if they are there |
"""

from collections.abc import Iterator

from pipeline.data.storage import Location
from pipeline.errors import UserError
from shard_tools.catalogs import Catalog, Names
from shard_tools.forms.entries import Asked, Entry, Files, assemble, names_of
from shard_tools.forms.records import records_of
from shard_tools.tables import SEPARATOR


def read(asked: Asked, table: Location) -> Catalog:
    """Their catalog.

    Raises:
        UserError: a row is malformed, or no file is there.
    """
    files, called = Files(asked.root), Names(asked.root, table)

    def entries() -> Iterator[Entry]:
        for line, row in records_of(table, ("path", "labels")):
            try:
                start, end = float(row.get("start") or 0.0), None if row.get("end") is None else float(row["end"])
                fold = None if row.get("fold") in (None, "") else int(row["fold"])
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(f"{table}:{line}: start, end or fold is no number; correct it") from error
            if isinstance(row.get("fold"), float) and fold != row["fold"]:
                raise UserError(f"{table}:{line}: fold {row['fold']} is no whole number; correct it")
            where, name = called.of(str(row["path"]))
            yield Entry(str(row.get("key") or name + (f"-{start:g}" if start else "")), files.at(where),
                        names_of(row["labels"], f"{table}:{line}"), str(row.get("split") or ""), line,
                        start=start, end=end, fold=fold, trimmed=False if start else None)  # fmt: skip

    return assemble("csv", asked, entries, None, files.report, table, SEPARATOR)

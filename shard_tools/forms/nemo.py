"""NeMo's manifests.

| file | what |
|---|---|
| --table, or all such files in the root | lines of audio_filepath, offset, duration, split, and `label`, ... |

Paths are absolute, or relative to the root. A manifest's name tells the split of a line that does not. Transcripts
(`text`) are no labels.
"""

from collections.abc import Iterator

from pipeline.data.storage import Location, join
from pipeline.errors import UserError
from shard_tools.catalogs import Catalog, Names
from shard_tools.forms.entries import Asked, Entry, Files, assemble, names_of, split_of_row
from shard_tools.forms.records import label_column, records_of


def read(asked: Asked, tables: list[str] | None = None) -> Catalog:
    """Their catalog.

    Raises:
        UserError: a manifest is malformed or has no labels, or no file is there.
    """
    paths: list[Location] = [asked.table] if asked.table else [join(asked.root, name) for name in tables or []]
    files = Files(asked.root)

    def entries() -> Iterator[Entry]:
        for path in paths:
            called = Names(asked.root, path)
            for line, row in records_of(path, ("audio_filepath",)):
                column = label_column(row)
                if column is None:
                    raise UserError(f"{path}:{line}: no label (it has {', '.join(row)}); add 'label', or build without "
                                    "labels: --dataset unlabelled")  # fmt: skip
                try:
                    start = float(row.get("offset") or 0.0)
                    end = start + float(row["duration"]) if row.get("duration") else None
                except (TypeError, ValueError, OverflowError) as error:
                    raise UserError(f"{path}:{line}: offset or duration is no number; correct it") from error
                where, name = called.of(str(row["audio_filepath"]))
                yield Entry(name + (f"-{start:g}" if start else ""), files.at(where),
                            names_of(row[column], f"{path}:{line}"),
                            split_of_row(row, str(path).rpartition("/")[2]), line, start=start, end=end,
                            trimmed=False if start else None, table=path)  # fmt: skip

    return assemble("nemo", asked, entries, None, files.report, paths[0] if paths else asked.root)

"""Audio without labels, to pretrain on.

| what | read |
|---|---|
| --root, a folder | every audio file in it; or else those in its tars and zips, its Parquet or HDF5 files |
| --table, a list | a path a line, or a column `path`, `file_name`, `audio_filepath`, `filename`, `wav`, ... |

Paths of a list are absolute, or relative to the root (default: the list's folder).
"""

from collections.abc import Iterator

from pipeline.errors import UserError
from shard_tools.audio_files import audio_paths, endings_of, kind, split_name, walk, what_is_there
from shard_tools.catalogs import Catalog, Names
from shard_tools.columns import relative
from shard_tools.forms import hdf5, parquet
from shard_tools.forms.entries import Asked, Entry, Files, assemble, lines_of
from shard_tools.forms.records import is_json, records_of
from shard_tools.names import split_source
from shard_tools.sources import Place
from shard_tools.tables import Table

PATHS = ("path", "file_name", "audio_filepath", "filename", "wav", "audio", "file")


def read(asked: Asked) -> Catalog:
    """Its catalog, without labels.

    Raises:
        UserError: there is no audio, or the list cannot be read.
    """
    if asked.table is not None:
        return _listed(asked)
    places: dict[str, Place] = {}
    endings = endings_of(walk(asked.root))
    inside = {ending.lower() for ending in endings}
    if not any(kind(ending) == 0 for ending in endings) and not inside & {".tar", ".zip"}:
        if ".parquet" in inside:
            return parquet.read(asked, labelled=False)
        if inside & {".h5", ".hdf5"}:
            return hdf5.read(asked, labelled=False)

    def entries() -> Iterator[Entry]:
        for path in audio_paths(walk(asked.root), places):
            ending = split_name(path)[1]
            if kind(ending) == 0 or (kind(ending) == 1 and not split_source(path)[1]):
                yield Entry(relative(path, str(asked.root)), path, at=places.pop(path, None))

    return assemble("unlabelled", asked, entries, [], lambda: what_is_there(endings))


def column_of(source: Table) -> str | None:
    """The column of a table that holds paths; None: it is no table with one, but perhaps a path a line.

    Raises:
        UserError: it cannot be read.
    """
    if is_json(source.path):
        has = next(iter(records_of(source.path)), (0, {}))[1]
        return next((name for name in PATHS if name in has), None)
    for name in PATHS:
        try:
            return name if source.columns((name,)) else None
        except UserError:
            continue  # without it
    return None


def _listed(asked: Asked) -> Catalog:
    assert asked.table is not None
    source, files, called = Table(asked.table), Files(asked.root), Names(asked.root, asked.table)
    column = column_of(source)

    def entries() -> Iterator[Entry]:
        lines = lines_of(source.lines()) if column is None else (
            (line, str(row[column])) for line, row in records_of(source.path, (column,)))  # fmt: skip
        for line, path in lines:
            where, name = called.of(path)
            yield Entry(name, files.at(where), line=line)

    return assemble("unlabelled", asked, entries, [], files.report, source.path)

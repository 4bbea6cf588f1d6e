"""UrbanSound8K.

| file below the root | what |
|---|---|
| metadata/UrbanSound8K.csv | slice_file_name,...,fold,classID,class |
| audio/foldN/ | SLICE_FILE_NAME; folds 1 to 10 |
"""

from collections.abc import Iterator

from pipeline.data.manifest import Label
from pipeline.data.storage import join
from shard_tools.catalogs import MOST_FOLDS, Catalog
from shard_tools.forms.entries import Asked, Entry, Files, assemble
from shard_tools.tables import Table

MARK = "metadata/UrbanSound8K.csv"


def read(asked: Asked) -> Catalog:
    """Its catalog; classes in the order of their classID.

    Raises:
        UserError: the csv is missing or malformed, or no file is there.
    """
    source, files = Table(join(asked.root, MARK)), Files(join(asked.root, "audio"))
    columns = ("slice_file_name", "fold", "classID", "class")
    names: dict[int, str] = {}
    for line, (_, _, number, name) in source.records(columns):
        if names.setdefault(source.integer(line, "classID", number), name) != name:
            raise source.problem(line, f"classID {number} is '{name}' here and another before", "correct one of them")

    def entries() -> Iterator[Entry]:
        for line, (name, fold, _, label) in source.records(columns):
            number = source.integer(line, "fold", fold, 1, MOST_FOLDS)
            yield Entry(name.rpartition(".")[0] or name, labels=[label], line=line, fold=number,
                        **files.named(f"fold{number}/{name}"))  # fmt: skip

    labels = [Label(id=names[number], name=names[number].replace("_", " ")) for number in sorted(names)]
    return assemble("urbansound8k", asked, entries, labels, files.report, source.path)

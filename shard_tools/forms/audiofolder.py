"""AudioFolder, the Hugging Face way of laying out audio: with metadata, or with folders of splits and classes.

| below the root | what |
|---|---|
| metadata.csv, .tsv, .jsonl in any folder | `file_name` from there on, `label` or `labels`; folders tell the split |
| SPLIT/CLASS/... | without metadata: folders named train, test, val, ... and in them one folder a class |

Several labels of a clip are a list in .jsonl; in .csv they need --label-separator.
"""

from collections.abc import Iterator

from pipeline.data.storage import Location, join
from pipeline.errors import UserError
from shard_tools.audio_files import kind, split_name, walk
from shard_tools.catalogs import NOISE_FOLDER, Catalog
from shard_tools.columns import relative
from shard_tools.forms.entries import Asked, Entry, Files, assemble, names_of, split_of
from shard_tools.forms.records import LABELS, records_of
from shard_tools.tables import SEPARATOR

MARKS = ("metadata.csv", "metadata.tsv", "metadata.jsonl")


def read(asked: Asked) -> Catalog:
    """Its catalog; every metadata file is read.

    Raises:
        UserError: a metadata file is malformed, there is neither metadata nor folders of splits, or no file is there.
    """
    root, files = asked.root, Files(asked.root)
    inside = [relative(path, str(root)) for path in walk(root)] if asked.table is None else []
    tables = [name for name in inside if name.rpartition("/")[2].lower() in MARKS]
    if asked.table is not None or tables:

        def listed() -> Iterator[Entry]:
            for name in tables or [""]:
                folder = f"{name.rpartition('/')[0]}/".lstrip("/")
                path: Location = join(root, name) if name else asked.table or ""
                for line, row in records_of(path, ("file_name",)):
                    found = next((row[column] for column in LABELS if column in row), None)
                    labels = names_of(found, asked.separator)
                    if asked.separator is None and any(SEPARATOR in str(label) for label in labels):
                        raise UserError(f"{path}:{line}: label {labels[0]!r} holds '{SEPARATOR}'; give "
                                        f"--label-separator '{SEPARATOR}' where it is several")  # fmt: skip
                    place = f"{folder}{row['file_name']}"
                    yield Entry(place, files.at(place), labels, str(row.get("split") or "") or split_of(folder), line)

        return assemble("audiofolder", asked, listed, None, files.report, tables[0] if tables else asked.table)

    def nested() -> Iterator[Entry]:
        for name in inside:
            parts = name.split("/")
            split = split_of(parts[0]) if len(parts) > 2 else ""
            if split and parts[1] != NOISE_FOLDER and kind(split_name(name)[1]) is not None:
                yield Entry(name, join(root, name), [parts[1]], split)

    return assemble("audiofolder", asked, nested, None, lambda: f"{files.report()}; it is read as metadata.csv with "
                    "file_name,label, or as SPLIT/CLASS/FILE")  # fmt: skip

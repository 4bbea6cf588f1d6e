"""AudioFolder, the Hugging Face way of laying out audio: with metadata, or with folders of splits and classes.

| below the root | what |
|---|---|
| metadata.csv, .tsv, .jsonl in any folder | `file_name` from there on, `label` or `labels`; folders tell the split |
| SPLIT/CLASS/... | without metadata: folders named train, test, val, ... and in them one folder a class |

Several labels of a clip are a list in .jsonl; in .csv they need --label-separator. Metadata of which only a part has
labels is refused; without any, the clips have none.
"""

import logging
from collections.abc import Iterator

from pipeline.data.storage import Location, join
from pipeline.errors import UserError
from shard_tools.audio_files import kind, split_name, walk
from shard_tools.catalogs import NOISE_FOLDER, Catalog
from shard_tools.columns import relative
from shard_tools.forms.entries import Asked, Entry, Files, assemble, names_of, split_of, split_of_row
from shard_tools.forms.records import label_column, records_of

log = logging.getLogger(__name__)

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
            labelled, without = False, ""
            for name in tables or [""]:
                folder = f"{name.rpartition('/')[0]}/".lstrip("/")
                path: Location = join(root, name) if name else asked.table or ""
                for line, row in records_of(path, ("file_name",)):
                    column = label_column(row)
                    labelled = labelled or column is not None
                    if column is None:
                        without = without or f"{path}:{line}: no label (it has {', '.join(row)})"
                    if labelled and without:
                        raise UserError(f"{without}, where other rows have one; add 'label' (empty where there is "
                                        "none), or build without labels: --dataset unlabelled")  # fmt: skip
                    labels = names_of(None if column is None else row[column], f"{path}:{line}")
                    place = f"{folder}{row['file_name']}"
                    yield Entry(place, files.at(place), labels, split_of_row(row, folder), line,
                                table=path)  # fmt: skip

        return assemble("audiofolder", asked, listed, None, files.report, asked.table or root)

    def nested() -> Iterator[Entry]:
        for name in inside:
            split, label = _split_and_class(name)
            if split and kind(split_name(name)[1]) is not None:
                yield Entry(name, join(root, name), [label], split)

    outside = [name for name in inside if not _split_and_class(name)[0] and kind(split_name(name)[1]) == 0]
    if outside:
        log.warning("%s: %d audio files are in no class folder of a split and are left out, such as %s", root,
                    len(outside), outside[0])  # fmt: skip

    return assemble("audiofolder", asked, nested, None, lambda: f"{files.report()}; it is read as metadata.csv with "
                    "file_name,label, or as SPLIT/CLASS/FILE")  # fmt: skip


def _split_and_class(name: str) -> tuple[str, str]:
    """What the folders SPLIT/CLASS/ of a file tell; "" and "": it lies in no such folders."""
    top, *inner = name.split("/")
    split = split_of(top) if len(inner) > 1 and inner[0] != NOISE_FOLDER else ""
    return (split, inner[0]) if split else ("", "")

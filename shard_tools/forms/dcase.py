"""DCASE's tables of sound events.

| file below the root | what |
|---|---|
| weak .tsv | filename, event_labels: separated by commas |
| strong .tsv | filename, onset, offset, event_label: an event a row, in seconds; all empty: a clip without events |
| anywhere | the audio, by its name, or by the end of its path where `filename` has folders |

A clip of several tables has the labels of all; its events, with onset and offset, are `events` in its JSON. A table's
folder or name tells the split; of files of one name the one whose folder tells it is taken.
"""

from collections.abc import Iterator

from pipeline.data.storage import Location, join
from shard_tools.catalogs import Catalog
from shard_tools.forms.entries import Asked, Entry, Files, assemble, split_of
from shard_tools.tables import Table

COLUMNS = ("filename", "onset", "offset", "event_label", "event_labels")


def read(asked: Asked, tables: list[str] | None = None) -> Catalog:
    """Its catalog.

    Raises:
        UserError: a table is malformed, or no file is there.
    """
    paths: list[Location] = [asked.table] if asked.table else [join(asked.root, name) for name in tables or []]
    files = Files(asked.root)
    clips: dict[tuple[str, str], tuple[dict[str, None], list[tuple[float, float, str]], int, Location]] = {}
    for path in paths:
        source = Table(path)
        split = split_of(str(path).removeprefix(str(asked.root)))
        strong = "onset" in source.columns(COLUMNS[:1])
        for line, (name, onset, offset, one, several) in source.records(COLUMNS[:1], COLUMNS[1:]):
            found = [label for cell in (several.split(",") if several else [one]) if (label := cell.strip())]
            if not found and not (strong and not onset + offset + one + several):
                raise source.problem(line, "no event_label and no event_labels", "complete the row, or delete it")
            labels, events, *_ = clips.setdefault((split, name), ({}, [], line, path))
            labels |= dict.fromkeys(found)
            if onset or offset:
                first, last = source.seconds(line, "onset", onset), source.seconds(line, "offset", offset)
                if last <= first:
                    raise source.problem(line, f"offset {last:g} is not after onset {first:g}", "correct it")
                events += [(first, last, label) for label in found]

    def entries() -> Iterator[Entry]:
        for (split, name), (labels, events, line, table) in clips.items():
            yield Entry(name, labels=list(labels), split=split, line=line, events=tuple(events), table=table,
                        **files.named(name, split))  # fmt: skip

    return assemble("dcase", asked, entries, None, files.report, paths[0] if paths else asked.root)

"""A csv of better labels for listed clips, such as PSLA's enhanced label sets for AudioSet.

In: columns `id,labels`: a clip's key (YTID_START in milliseconds) or its YouTube id, which stands for all of its
segments, and the labels that replace the official ones, ids or names, `a;b`. Out: `Overrides`.

They are applied while the catalog is read, to missing clips too, so that counts by class stay true.
Memory: about 0.2 KB a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from pipeline.data.manifest import Label
from pipeline.data.storage import Location, read_bytes
from pipeline.errors import UserError
from shard_tools.tables import Table
from shard_tools.vocabulary import spellings


@dataclass(slots=True)
class Overrides:
    """Labels by clip.

    Attributes:
        path: Of the csv.
        digest: xxh3 of its bytes.
        labels: Label indices, by key or id.
        used: Rows that met a listed clip.
    """

    path: str
    digest: str
    labels: dict[str, tuple[int, ...]]
    used: set[str] = field(default_factory=set)

    def of(self, key: str, id_: str, official: tuple[int, ...]) -> tuple[int, ...]:
        """Labels of a clip: those of its key, else of its id, else the official ones."""
        for name in (key, id_):
            if name in self.labels:
                self.used.add(name)
                return self.labels[name]
        return official

    def record(self) -> dict[str, Any]:
        """What the manifest says of them."""
        return {"file": self.path.rsplit("/", 1)[-1], "xxh3": self.digest, "rows": len(self.labels),
                "rows applied": len(self.used)}  # fmt: skip


def read_overrides(path: Location, vocabulary: Sequence[Label], separator: str | None = None) -> Overrides:
    """Reads and checks the csv.

    Args:
        path: Of the csv.
        vocabulary: Classes by their index.
        separator: Of several labels in a cell; None: `;`.

    Raises:
        UserError: it is not there, or a row has no labels, unknown ones, or an id that came before.
    """
    try:
        content = read_bytes(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--label-overrides {path}: {reason}; give a csv with the columns id,labels") from error
    source = Table(path, content)
    index = spellings(vocabulary)
    found: dict[str, tuple[int, ...]] = {}
    same: dict[tuple[int, ...], tuple[int, ...]] = {}  # few sets of labels are distinct
    for line, (id_cell, cell) in source.records(("id", "labels")):
        name, names = id_cell.strip(), source.labels(line, cell, separator, index)
        if not name or not names:
            what = f"'{name}' has no {'labels' if name else 'id'}"
            raise source.problem(line, what, "delete the row, or complete it")
        if name in found:
            raise source.problem(line, f"'{name}' came before", "keep one of its rows")
        labels = tuple(sorted({index[part] for part in names}))
        found[name] = same.setdefault(labels, labels)
    return Overrides(str(path), xxhash.xxh3_128_hexdigest(content), found)

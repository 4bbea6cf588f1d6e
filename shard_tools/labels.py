"""The classes of a data set, and better labels for some of its clips.

In: a vocabulary csv, the labels of a table, or AudioSet's ontology; and a csv of labels that replace the official ones,
such as PSLA's enhanced label sets. Out: `Label`s, whose position is the index used everywhere; `Overrides`, which are
applied while the catalog is read, to missing clips too, so that counts by class stay true (about 0.2 KB of memory a
row). A spelling that could stand for two classes is refused.
"""

import json
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from pipeline.data.manifest import Label
from pipeline.data.storage import Location, read_bytes
from pipeline.errors import UserError
from shard_tools.tables import Table

log = logging.getLogger(__name__)


def spellings(labels: Sequence[Label]) -> dict[str, int]:
    """Index of each class by its id and by its name."""
    return {spelling: number for number, label in enumerate(labels) for spelling in (label.name, label.id)}


def of_ontology(path: Location, ids: Iterable[str]) -> list[Label]:
    """Classes by their ids, sorted, with the names of AudioSet's ontology.json.

    Raises:
        UserError: the file is missing or something else.
    """
    try:
        names = {node["id"]: node["name"] for node in json.loads(read_bytes(path))}
        return [Label(id=mid, name=names.get(mid, mid)) for mid in sorted(set(ids))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__} {error}"
        raise UserError(f"--ontology {path}: {reason:.200}; give AudioSet's ontology.json") from error


def read_vocabulary(path: Location) -> list[Label]:
    """Classes by their index, from a csv index,mid,display_name.

    Raises:
        UserError: the indices are not 0 to C - 1, each once, or a spelling stands for two classes.
    """
    source = Table(path)
    labels: dict[int, Label] = {}
    lines: dict[int, int] = {}
    spelled: dict[str, int] = {}
    for line, (number_cell, mid_cell, name_cell) in source.records(("index", "mid", "display_name")):
        number, mid, name = source.integer(line, "index", number_cell), mid_cell.strip(), name_cell.strip()
        if not mid or not name:
            raise source.problem(line, "an empty mid or display_name", "complete the row")
        if number in labels:
            what = f"index {number} is that of line {lines[number]} too"
            raise source.problem(line, what, "number the classes 0 to C - 1")
        for spelling in {mid, name}:
            if spelled.setdefault(spelling, number) != number:
                what = f"'{spelling[:80]}' is also a mid or display_name of line {lines[spelled[spelling]]}"
                raise source.problem(line, what, "give each class its own")
        labels[number], lines[number] = Label(id=mid, name=name), line
    gap = next((number for number in range(len(labels)) if number not in labels), None)
    if gap is not None:
        beyond = max(labels)
        what = f"index {beyond}, and no row has index {gap}: {len(labels)} rows must be numbered 0 to {len(labels) - 1}"
        raise source.problem(lines[beyond], what, "number the classes without gaps, or add the missing rows")
    return [labels[number] for number in range(len(labels))]


def of_table(source: Table, separator: str | None) -> list[Label]:
    """The labels of a table."""
    cells: set[str] = set()  # of few classes many rows
    names: set[str] = set()
    for line, (_, cell) in source.records(("path", "labels")):
        if cell not in cells:
            cells.add(cell)
            names.update(source.labels(line, cell, separator))
    return of_names(names, source.path)


def of_names(names: Iterable[str], where: Location) -> list[Label]:
    """Classes by their names, sorted; two that look alike are said.

    Args:
        names: Of the classes.
        where: They are listed, for the message.
    """
    alike: dict[str, str] = {}
    classes = sorted(names)
    for name in classes:
        other = alike.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            log.warning("%s: '%s' and '%s' are two classes; are they meant as one?", where, other, name)
    return [Label(id=name, name=name) for name in classes]


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
    """Reads and checks a csv of the columns `id,labels`.

    Its ids are clips' keys (YTID_START in milliseconds), or YouTube ids, which stand for all of their segments; its
    labels ids or names of classes, `a;b`.

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

"""What a form lists -> a `Catalog`: the rules that all forms share.

In: entries, one a clip, from a function that can be called twice; the vocabulary, or None for the entries' labels.
Out: a `Catalog`, whose clips were found and whose missing ones are listed.

| what | rule |
|---|---|
| a label | id or name of a class, or its number; one that the vocabulary lacks is refused |
| a clip twice in a split | counts once where it says the same of the same file, else it is refused |
| one id twice in containers | two clips, the later one named by its place; refused where their labels differ |
| a clip without its file | is listed as missing; a split without any file is refused |
| --split | takes one of the splits that the form tells, or names the only one where it tells none |
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from pipeline.data.manifest import Label
from pipeline.data.storage import Location, is_remote, join, local
from pipeline.errors import UserError
from pipeline.files import check_name
from pipeline.flow import Clip
from shard_tools.audio_files import AudioFiles, audio_paths, kind, split_name, walk, what_is_there
from shard_tools.catalogs import KEY_LIMIT, MISSING, Catalog, clean_key
from shard_tools.columns import Failure, relative
from shard_tools.labels import read_vocabulary, spellings
from shard_tools.names import split_source
from shard_tools.sources import Place

log = logging.getLogger(__name__)

KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{KEY_LIMIT}}}")
TRAIN, EVAL = "train", "eval"
# Words of folders and files that tell a split, and what it is called.
SPLIT_WORDS = {
    "train": TRAIN, "training": TRAIN, "bal": TRAIN, "balanced": TRAIN, "unbal": "unbalanced",
    "unbalanced": "unbalanced", "eval": EVAL, "evaluation": EVAL, "test": "test", "testing": "test", "val": "val",
    "valid": "valid", "validation": "validation", "dev": "dev", "development": "development",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What the command line asks of a form.

    Attributes:
        root: Of the audio, or of the data set.
        table: A file that lists it; None: it is looked for below the root.
        class_labels: A vocabulary; None: the form's own.
        split: Name of a split; None: all, or `train`.
        separator: Of several labels in one cell; None: the form's own.
        source_rate: Hz, of waveforms whose file does not say it.
    """

    root: Location
    table: Location | None = None
    class_labels: Location | None = None
    split: str | None = None
    separator: str | None = None
    source_rate: int | None = None


class Entry(NamedTuple):
    """A clip that a data set lists.

    Attributes:
        id: The data set's own name for it; with the split it is the key.
        path: Of its source; "": there is none.
        labels: Ids, names or numbers of its classes.
        split: Its split; "": the form does not tell.
        line: Of the table; 0: there is none.
        at: As in `Clip`, as are the following.
    """

    id: str
    path: str
    labels: Sequence[str | int] = ()
    split: str = ""
    line: int = 0
    at: Place = None
    start: float = 0.0
    end: float | None = None
    fold: int = 0
    trimmed: bool | None = None
    others: tuple[tuple[str, Place], ...] = ()
    events: tuple[tuple[float, float, str], ...] = ()


class Files:
    """The audio below a root, looked at when it is first asked for.

    Args:
        root: Directory or URL.
        normal: Makes one name of several spellings.
    """

    def __init__(self, root: Location, normal: Callable[[str], str] = str) -> None:
        self.root = root
        self._normal = normal
        self._places: dict[str, Place] = {}

    @cached_property
    def _named(self) -> AudioFiles:
        return AudioFiles(audio_paths(walk(self.root), self._places), self._normal)

    @cached_property
    def _listed(self) -> set[str]:
        return set(walk(self.root))

    def find(self, names: Iterable[str]) -> list[tuple[str, str, Place]]:
        """Name, source and place of the audio under some names without their endings, anywhere below the root."""
        return [(name, path, self._places.get(path)) for name, path in self._named.find(names)]

    def named(self, name: str) -> dict[str, Any]:
        """Fields of an `Entry` for the audio of a name, with its ending or without."""
        stem, ending = split_name(name)
        found = self.find([stem if kind(ending) == 0 else stem + ending])
        if not found:
            return {"path": ""}
        return {"path": found[0][1], "at": found[0][2], "others": tuple((path, at) for _, path, at in found[1:])}

    def at(self, path: str) -> str:
        """A path relative to the root, or absolute, where there is such a file; else ""."""
        where = path if is_remote(path) else join(self.root, path)
        file = split_source(where)[0]
        there = file in self._listed if is_remote(self.root) else local(file).is_file()
        return where if there else ""

    def report(self) -> str:
        """Says which names had several files; what files there are, in words."""
        if "_named" in self.__dict__:
            self._named.report()
        return what_is_there(self._named.endings)


def assemble(
    dataset: str,
    asked: Asked,
    entries: Callable[[], Iterable[Entry]],
    labels: Sequence[Label] | None,
    there: Callable[[], str],
    table: Location | None = None,
) -> Catalog:
    """The catalog of a form.

    Args:
        dataset: Name of the form.
        asked: Of the command line; its vocabulary goes before `labels`.
        entries: Makes the clips; called once more where the labels are not known.
        labels: The form's own vocabulary; None: the labels of the entries, sorted.
        there: Says what is there instead of what is missing.
        table: That lists the clips, for messages.

    Raises:
        UserError: as the table above says.
    """
    if asked.class_labels is not None:
        labels = read_vocabulary(asked.class_labels)
    elif labels is None:
        labels = _labels_of(entries())
    index: dict[Any, int] = {**{number: number for number in range(len(labels))}, **spellings(labels)}
    catalog = Catalog(dataset, asked.root, list(labels))
    seen: dict[str, int] = {}
    splits: set[str] = set()
    doubles = again = 0
    for entry in entries():
        split = entry.split or asked.split or TRAIN
        if split not in splits:
            splits.add(check_name(split, "split"))
        if asked.split not in (None, split):
            continue
        unknown = next((label for label in entry.labels if label not in index), None)
        if unknown is not None:
            raise _problem(table, entry, f"label '{unknown!s:.80}' is not in the vocabulary", "see --class-labels")
        picked = tuple(sorted({index[label] for label in entry.labels}))
        id_ = entry.id
        key = id_ if KEY.fullmatch(id_) else clean_key(id_)
        facts, count = hash((entry.start, entry.end, entry.fold, picked, entry.path if entry.line else "")), len(seen)
        if seen.setdefault(f"{split}\0{key}", facts) != facts:
            raise _problem(table, entry, f"'{entry.id}' came before with another segment, file, fold or other labels",
                           "keep one of the two, or give each its own id")  # fmt: skip
        if len(seen) == count and not entry.line and split_source(entry.path)[1]:  # each container may count from 0
            id_, again = relative(entry.path, str(asked.root)), again + 1
            key = clean_key(id_)
            seen.setdefault(f"{split}\0{key}", facts)
        if len(seen) == count:
            doubles += 1
            continue
        if not entry.path:
            catalog.miss(Failure(entry.id, entry.id, MISSING, split, key, entry.line or None, entry.start, entry.end),
                         picked)  # fmt: skip
            continue
        clip = Clip(
            key,
            entry.path,
            entry.start,
            entry.end,
            picked,
            split,
            entry.fold,
            id_,
            entry.trimmed,
            entry.line,
            entry.at,
            tuple((onset, offset, index[name]) for onset, offset, name in entry.events),
        )
        if entry.others:
            others = [Clip(key, path, entry.start, entry.end, picked, split, entry.fold, id_, entry.trimmed,
                           entry.line, at) for path, at in entry.others]  # fmt: skip
            clip = replace(clip, others=tuple(others))
        catalog.clips.append(clip)
    any_clips = bool(seen)
    del seen  # before the columns are put together
    if again:
        log.warning("%s: %d clips have the id of another one, and go by FILE::MEMBER; is one there twice?",
                    asked.root, again)  # fmt: skip
    if doubles:
        log.warning("%s: %d clips are listed twice, and count once", table or asked.root, doubles)
    if not any_clips:
        has = f"no clips of split '{asked.split}'; it has {', '.join(sorted(splits))}" if splits else "lists no clips"
        raise UserError(f"{table or asked.root}: {has}: {there()}")
    empty = catalog.empty_split()
    if empty is not None:
        count = len(catalog.missing.rows(empty))
        first = next(iter(catalog.missing.of(empty))).id
        raise UserError(f"--audio-root {asked.root}: 0 of {count} listed clips of split '{empty}' have a file, such as "
                        f"'{first}': {there()}")  # fmt: skip
    return catalog


def split_of(path: str) -> str:
    """The split that a file's name, or else its nearest folder that does, tells; "": none does."""
    for part in reversed(path.split("/")):
        words = [word for word in re.split(r"[^a-z]+", part.lower()) if word]
        found = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
        for name in ("unbalanced", EVAL, *dict.fromkeys(found)):  # as in unbalanced_train and balanced_eval
            if name in found:
                return name
    return ""


def names_of(labels: Any, separator: str | None = None) -> list[str | int]:
    """Labels out of a cell of JSON or Parquet: a name, a number, or a list of them."""
    if labels is None or labels == "":
        return []
    if isinstance(labels, str):
        return [part.strip() for part in labels.split(separator)] if separator else [labels.strip()]
    if isinstance(labels, (list, tuple)):
        return [label if isinstance(label, int) else str(label).strip() for label in labels]
    return [labels] if isinstance(labels, int) else [str(labels)]


def _labels_of(entries: Iterable[Entry]) -> list[Label]:
    names = {label for entry in entries for label in entry.labels}
    if any(isinstance(name, int) for name in names):
        raise UserError("labels are numbers, and nothing says of which classes; give --class-labels CSV "
                        "(index,mid,display_name)")  # fmt: skip
    return [Label(id=str(name), name=str(name)) for name in sorted(map(str, names))]


def _problem(table: Location | None, entry: Entry, what: str, remedy: str) -> UserError:
    where = f"{table}:{entry.line}" if table is not None and entry.line else entry.path or entry.id
    return UserError(f"{where}: {what}; {remedy}")


def lines_of(text: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(line, text) of what is not blank."""
    return ((number, line.strip()) for number, line in enumerate(text, 1) if line.strip())

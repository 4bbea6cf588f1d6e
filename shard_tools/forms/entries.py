"""What a form lists -> a `Catalog`: the rules that all forms share.

In: entries, one a clip, from a function that can be called twice; the vocabulary, or None for the entries' labels.
Out: a `Catalog`, whose clips were found and whose missing ones are listed.

| what | rule |
|---|---|
| a label | id or name of a class, or its number; one that the vocabulary lacks is refused |
| labels in one text | as in a csv; what seems to be several, and nothing says how they are separated, is refused |
| a clip twice in a split | counts once where it says the same of the same file, else it is refused |
| ids that differ by an ending | as many clips, the keys of the later ones with a hash |
| one id twice in containers | two clips, the later one named by its place; refused where their labels differ |
| start, end, fold | a segment in time, and a fold that the index can hold; fold 0 beside others is refused |
| a clip without its file | is listed as missing; a split without any file is refused |
| --split | takes one of the splits that the form tells, or names the only one where it tells none |
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.manifest import Label
from pipeline.data.storage import Location, is_remote, join
from pipeline.errors import UserError
from pipeline.files import check_name
from pipeline.flow import Clip
from shard_tools.audio_files import AudioFiles, audio_paths, kind, split_name, walk, what_is_there
from shard_tools.catalogs import KEY_LIMIT, MISSING, MOST_FOLDS, Catalog, check_folds, claim, clean_key, located
from shard_tools.columns import Failure, relative
from shard_tools.labels import of_names, read_vocabulary, spellings
from shard_tools.names import split_source
from shard_tools.sources import Place
from shard_tools.stamps import stamp
from shard_tools.tables import MOST_SECONDS, cell_labels

log = logging.getLogger(__name__)

KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{KEY_LIMIT}}}")
TRAIN, EVAL = "train", "eval"
# Words of folders and files that tell a split, and what it is called.
SPLIT_WORDS = {
    "train": TRAIN, "training": TRAIN, "bal": TRAIN, "balanced": TRAIN, "unbal": "unbalanced",
    "unbalanced": "unbalanced", "eval": EVAL, "evaluation": EVAL, "test": "test", "testing": "test", "val": "val",
    "valid": "valid", "validation": "validation", "dev": "dev", "devel": "devel", "development": "development",
    "trainset": TRAIN, "traindata": TRAIN, "testset": "test", "testdata": "test", "trainval": "trainval",
    "heldout": "heldout",
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
        labels: Ids, names or numbers of its classes; one text: a cell, which may hold several.
        split: Its split; "": the form does not tell.
        line: Of the table; 0: there is none.
        at: As in `Clip`, as are the following.
        fold: None: none is given.
        table: That lists it, where the form has several.
    """

    id: str
    path: str
    labels: Sequence[str | int] = ()
    split: str = ""
    line: int = 0
    at: Place = None
    start: float = 0.0
    end: float | None = None
    fold: int | None = None
    trimmed: bool | None = None
    others: tuple[tuple[str, Place], ...] = ()
    events: tuple[tuple[float, float, str], ...] = ()
    table: Location = ""


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
        self._ends: dict[str, str] = {}  # by file, the listed name of which only the end is known here

    @cached_property
    def _named(self) -> AudioFiles:
        return AudioFiles(audio_paths(walk(self.root), self._places), self._normal)

    @cached_property
    def _listed(self) -> set[str]:
        return set(walk(self.root))

    def find(self, names: Iterable[str]) -> list[tuple[str, str, Place]]:
        """Name, source and place of the audio under some names without their endings, anywhere below the root."""
        return [(name, path, self._places.get(path)) for name, path in self._named.find(names)]

    def named(self, name: str, split: str = "") -> dict[str, Any]:
        """Fields of an `Entry` for the audio of a name.

        Args:
            name: With its ending or without, with folders or without.
            split: Of the clip; "": not known.

        Raises:
            UserError: files in several folders could be meant.
        """
        stem, ending = split_name(name)
        found = self._meant(name, split, self.find([stem if kind(ending) == 0 else stem + ending]))
        if not found:
            return {"path": ""}
        return {"path": found[0][1], "at": found[0][2], "others": tuple((path, at) for _, path, at in found[1:])}

    def _meant(self, name: str, split: str, found: list[tuple[str, str, Place]]) -> list[tuple[str, str, Place]]:
        """Of the files whose name is a listed one without its folders and its ending, those that it means.

        The file at the path itself; or else those whose path ends with it, in one folder: the one that tells the
        split, or that has the file with the very ending. Where there are none, a file whose own path is the end of the
        listed one, as the root may lie below the folder that the table begins in.
        """
        if len(found) < 2 and "/" not in name:
            return found
        wanted = f"/{relative(name, str(self.root)) if name.startswith('/') else os.path.normpath(name)}"
        above = wanted.rpartition("/")[0] + "/"
        places = {path: f"/{self._inside(path)}" for _, path, _ in found}

        def folder(path: str) -> str:
            return places[path].rpartition("/")[0]

        exact = [one for one in found if places[one[1]] == wanted]
        if exact:
            return exact
        ends = [one for one in found if f"{folder(one[1])}/".endswith(above)]
        if not ends:
            ends = [one for one in found if above.endswith(f"{folder(one[1])}/")]
            longest = max((folder(path) for _, path, _ in ends), key=len, default="")
            ends = [one for one in ends if folder(one[1]) == longest]
            for _, path, _ in ends:
                if self._ends.setdefault(path, wanted) != wanted:
                    raise UserError(f"{self.root}: '{self._ends[path][1:]}' and '{wanted[1:]}' could both be {path}; "
                                    "give the --root that their paths begin in")  # fmt: skip
        found = ends
        very = [one for one in found if places[one[1]].endswith(wanted[len(above) - 1 :])]
        folders = {folder(path): path for _, path, _ in found}
        if len(folders) > 1:
            left = {one for one in folders if split and split_of(one) == split} or set(folders)
            left = left if len(left) == 1 else left & {folder(path) for _, path, _ in very}
            if len(left) != 1:
                first, second = sorted(folders.values())[:2]
                raise UserError(f"{self.root}: '{name}' could be {first} or {second}; write its path from the root on, "
                                "or move one of them away")  # fmt: skip
            found, very = ([one for one in group if folder(one[1]) in left] for group in (found, very))
        return very or found

    def _inside(self, path: str) -> str:
        """A file's way from the root; a container is a folder, without its ending."""
        holder, member = split_source(path)
        inside = relative(holder, str(self.root))
        return f"{inside.rpartition('.')[0]}/{member}" if member else inside

    def at(self, path: str) -> str:
        """A path relative to the root, or absolute, where there is such a file; else ""."""
        where = path if is_remote(path) else join(self.root, path)
        return located(where, self._listed if is_remote(self.root) else None)

    def report(self) -> str:
        """What files there are, in words."""
        return what_is_there(self._named.endings)


def assemble(
    dataset: str,
    asked: Asked,
    entries: Callable[[], Iterable[Entry]],
    labels: Sequence[Label] | None,
    there: Callable[[], str],
    table: Location | None = None,
    separator: str = "",
) -> Catalog:
    """The catalog of a form.

    Args:
        dataset: Name of the form.
        asked: Of the command line; its vocabulary goes before `labels`.
        entries: Makes the clips; called once more where the labels are not known.
        labels: The form's own vocabulary; None: the labels of the entries, sorted.
        there: Says what is there instead of what is missing.
        table: That lists the clips, for messages.
        separator: Of several labels in a text, where the command line gives none; "": none is known.

    Raises:
        UserError: as the table above says.
    """

    def names(entry: Entry, index: dict[Any, int] | None) -> Sequence[str | int]:
        if not isinstance(entry.labels, str):
            return entry.labels
        return cell_labels(entry.labels, asked.separator, index, partial(_problem, table, entry), separator)

    labelled = labels is None or len(labels) > 0 or asked.class_labels is not None
    if asked.class_labels is not None:
        labels = read_vocabulary(asked.class_labels)
    elif labels is None:
        labels = _labels_of((names(entry, None) for entry in entries()), table or asked.root)
    index: dict[Any, int] = {**{number: number for number in range(len(labels))}, **spellings(labels)}
    catalog = Catalog(dataset, asked.root, list(labels))
    seen: dict[str, int] = {}
    splits: set[str] = set()
    folds: Counter[tuple[str, int]] = Counter()
    first_of_fold: dict[tuple[str, int], str] = {}
    doubles = again = listed = unlabelled = 0
    several, example = 0, ("", "")  # clips of several files
    for entry in entries():
        split = entry.split or asked.split or TRAIN
        if split not in splits:
            splits.add(check_name(split, f"{_where(table, entry)}: split" if entry.split else "--split"))
        if asked.split not in (None, split):
            continue
        called = names(entry, index)
        _check(table, entry, called, len(labels))
        unknown = next((label for label in called if label not in index), None)
        if unknown is not None:
            raise _problem(table, entry, f"label '{unknown!s:.80}' is not in the vocabulary", "see --class-labels")
        picked, fold = tuple(sorted({index[label] for label in called})), entry.fold or 0
        id_ = entry.id
        container, member = split_source(entry.path)
        counted = not entry.line and member != ""  # each container may count from 0
        if counted and container not in catalog.containers:
            try:
                catalog.containers[container] = stamp(container)
            except OSError as error:
                raise UserError(f"{container}: {error}; try again when its store answers") from error
        facts = hash((entry.start, entry.end, fold, picked, "" if counted else entry.path))
        plain = id_ if KEY.fullmatch(id_) else clean_key(id_)
        key, same = claim(seen, split, plain, id_, facts)
        if counted and (same or key != plain):
            id_, again = relative(entry.path, str(asked.root)), again + 1
            key, same = claim(seen, split, clean_key(id_), id_, facts)
        if same is False:
            raise _problem(table, entry, f"'{entry.id}' came before with another segment, file, fold or other labels",
                           "keep one of the two, or give each its own id")  # fmt: skip
        if same:
            doubles += 1
            continue
        listed, unlabelled = listed + 1, unlabelled + (not picked)
        group = split, -1 if entry.fold is None else min(fold, 1)
        folds[group] += 1
        if group not in first_of_fold:
            first_of_fold[group] = _where(table, entry)
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
            fold,
            id_,
            entry.trimmed,
            entry.line,
            entry.at,
            tuple((onset, offset, index[name]) for onset, offset, name in entry.events),
        )
        if entry.others:
            others = [Clip(key, path, entry.start, entry.end, picked, split, fold, id_, entry.trimmed, entry.line,
                           at) for path, at in entry.others]  # fmt: skip
            clip = replace(clip, others=tuple(others))
            several, example = several + 1, example if several else (entry.path, entry.others[0][0])
        catalog.clips.append(clip)
    del seen  # before the columns are put together
    check_folds(folds, first_of_fold)
    if again:
        log.warning("%s: %d clips have the id of another one, and go by FILE::MEMBER; is one there twice?",
                    asked.root, again)  # fmt: skip
    if doubles:
        log.warning("%s: %d clips are listed twice, and count once", table or asked.root, doubles)
    if unlabelled and labelled:
        log.warning("%s: %d of %d clips have no label", table or asked.root, unlabelled, listed)
    if several:
        log.warning("%s: %d clips have several files, such as %s (taken) and %s: where one cannot be decoded, the next "
                    "is taken", asked.root, several, *example)  # fmt: skip
    if not listed:
        has = f"no clips of split '{asked.split}'; it has {', '.join(sorted(splits))}" if splits else "lists no clips"
        raise UserError(f"{table or asked.root}: {has}: {there()}")
    empty = catalog.empty_split()
    if empty is not None:
        count = len(catalog.missing.rows(empty))
        first = next(iter(catalog.missing.of(empty))).id
        raise UserError(f"--audio-root {asked.root}: 0 of {count} listed clips of split '{empty}' have a file, such as "
                        f"'{first}': {there()}")  # fmt: skip
    _say_shared(catalog, table or asked.root)
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


def split_of_row(row: dict[str, Any], path: str) -> str:
    """The split that a row, or a JSON of a clip, says itself as `split`; else what `path` tells."""
    return str(row.get("split") or "").strip() or split_of(path)


def names_of(labels: Any, where: str) -> Sequence[str | int]:
    """Labels of an `Entry` out of a value of JSON or Parquet: a text, a number, a list of names or numbers, or null.

    Args:
        labels: The value.
        where: It stands, for messages.

    Raises:
        UserError: it is anything else.
    """
    if labels is None or isinstance(labels, str):
        return labels or []
    found = labels if isinstance(labels, list) else [labels]
    wrong = next((label for label in found if not isinstance(label, (str, int)) or isinstance(label, bool)), found)
    if wrong is not found:
        raise UserError(f"{where}: label {wrong!r:.80} is no name and no number of a class; correct it (null or [] "
                        "stands for no label)")  # fmt: skip
    stripped = [label.strip() if isinstance(label, str) else label for label in found]
    return [label for label in stripped if label != ""]  # as between two separators of a text


def _labels_of(called: Iterable[Iterable[str | int]], where: Location) -> list[Label]:
    names = {label for one in called for label in one}
    if any(isinstance(name, int) for name in names):
        raise UserError("labels are numbers, and nothing says of which classes; give --class-labels CSV "
                        "(index,mid,display_name)")  # fmt: skip
    return of_names(map(str, names), where)


def _check(table: Location | None, entry: Entry, called: Sequence[str | int], classes: int) -> None:
    """Refuses a segment or a fold that cannot be, and numbers of classes that are columns of zeros and ones."""
    end = entry.end
    if not 0 <= entry.start <= MOST_SECONDS or (end is not None and not entry.start < end <= MOST_SECONDS):
        raise _problem(table, entry, f"start {entry.start:g} and end {'none' if end is None else f'{end:g}'} cannot be",
                       "give seconds from 0 on, and an end after the start")  # fmt: skip
    if not 0 <= (entry.fold or 0) <= MOST_FOLDS:
        raise _problem(table, entry, f"fold {entry.fold} is no number from 0 to {MOST_FOLDS}", "correct it")
    numbers = [label for label in called if isinstance(label, int)]
    if len(set(numbers)) == len(numbers):
        return
    if len(numbers) == classes and set(numbers) <= {0, 1}:
        raise _problem(table, entry, f"labels are {classes} zeros and ones, one of each class, not numbers of classes",
                       "write the numbers or names of those that are 1")  # fmt: skip
    twice = next(number for number in numbers if numbers.count(number) > 1)
    raise _problem(table, entry, f"class {twice} stands several times in its labels", "write each once")


def _say_shared(catalog: Catalog, where: Location) -> None:
    """Says which clips are in several splits."""
    if len(catalog.splits) < 2:
        return
    table = catalog.clips.table.select(["path", "start", "end", "split"])
    table = table.set_column(3, "split", table["split"].cast(pa.string()))
    found = table.group_by(["path", "start", "end"]).aggregate([("split", "count_distinct")])
    shared = found.filter(pc.greater(found["split_count_distinct"], 1))["path"]
    if len(shared):
        first = min(shared.to_pylist()).decode("utf-8", "replace")
        log.warning("%s: %d clips are in several splits, such as '%s': a model is then tested on what it was trained "
                    "on", where, len(shared), first)  # fmt: skip


def _problem(table: Location | None, entry: Entry, what: str, remedy: str) -> UserError:
    return UserError(f"{_where(table, entry)}: {what}; {remedy}")


def _where(table: Location | None, entry: Entry) -> str:
    """What lists an entry."""
    table = entry.table or table
    return f"{table}:{entry.line}" if table is not None and entry.line else entry.path or entry.id


def lines_of(text: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(line, text) of what is not blank."""
    return ((number, line.strip()) for number, line in enumerate(text, 1) if line.strip())

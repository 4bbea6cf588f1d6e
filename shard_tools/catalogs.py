"""A data set on disk -> the list of its clips and its label vocabulary.

In: official csv files, a table, or a folder of folders, on disk or at fsspec URLs. Out: a `Catalog`.
Nothing is decoded here; a clip whose file is missing is an entry of `missing`, never a silent gap. What could be
understood in two ways is refused, and what was left out is said.

Scale: one pass over the csv and one over the directory tree. Clips are kept as columns (columns.py); the
largest passing costs are the table of file names, about 0.3 KB a file, and that of keys, 0.2 KB a clip.
"""

import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.manifest import Label
from pipeline.data.storage import Location, is_remote, join, local
from pipeline.errors import UserError
from pipeline.files import check_name
from pipeline.flow import Clip
from shard_tools.audio_files import (
    HELD_OUT,
    AudioFiles,
    audio_paths,
    endings_of,
    joiner,
    kind,
    listed,
    plain_times,
    refuse_split_folders,
    segment_names,
    split_name,
    walk,
    what_is_there,
)
from shard_tools.columns import Failure, Rows, relative
from shard_tools.labels import Overrides, of_names, of_ontology, of_table, read_overrides, read_vocabulary, spellings
from shard_tools.names import split_source
from shard_tools.sources import Place
from shard_tools.stamps import Stamp
from shard_tools.tables import SEPARATOR, Table

log = logging.getLogger(__name__)

KEY_LIMIT = 60  # a tar member name of at most 100 bytes fits one header
MOST_FOLDS = 32767  # int16 in the index
HASH = (1 << 64) - 1
LOOK_AROUND = 100_000  # files looked at to say what is there instead of what is missing
SEGMENT_ID = re.compile(r"[A-Za-z0-9_-]{1,50}")  # part of a sample's key
NOISE_FOLDER = "_background_noise_"  # Speech Commands' recordings for mixing
MISSING = "missing: no such audio file"


@dataclass(slots=True)
class Catalog:
    """What a data set lists.

    Attributes:
        dataset: Its name, for the manifest.
        root: Directory that clip paths are relative to.
        labels: Vocabulary; a clip's labels are indices into it.
        clips: Clips whose file was found.
        missing: Listed clips without a file.
        missing_labels: How often each label index occurs among them, by split.
        overrides: Labels that replace the official ones; already applied.
        containers: Stamps of those whose own content says what the clips in them are, when it was read.
    """

    dataset: str
    root: Location
    labels: list[Label]
    clips: Rows[Clip] = field(init=False)
    missing: Rows[Failure] = field(default_factory=lambda: Rows(Failure))
    missing_labels: dict[str, Counter[int]] = field(default_factory=dict)
    overrides: Overrides | None = None
    containers: dict[str, Stamp] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clips = Rows(Clip, str(self.root))

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have clips, in order of appearance."""
        return self.clips.splits

    def miss(self, failure: Failure, labels: Iterable[int]) -> None:
        """Adds a listed clip without a file."""
        self.missing.append(failure)
        self.missing_labels.setdefault(failure.split, Counter()).update(labels)

    def class_listed(self, split: str) -> list[int]:
        """`listed` by class, in the order of the vocabulary."""
        counts = self.clips.label_counts(split, len(self.labels))
        for label, count in self.missing_labels.get(split, Counter()).items():
            counts[label] += count
        return [int(count) for count in counts]

    def listed(self, split: str) -> int:
        """Clips of the split that the source names, found or not."""
        return len(self.clips.rows(split)) + len(self.missing.rows(split))

    def empty_split(self) -> str | None:
        """The first split none of whose clips has a file."""
        return next((name for name in self.missing.splits if not len(self.clips.rows(name))), None)


def audioset(
    root: Location,
    segments: Location,
    class_labels: Location | None,
    ontology: Location | None,
    split: str,
    listing: Location | None = None,
    overrides: Location | None = None,
    separator: str | None = None,
) -> Catalog:
    """AudioSet's official csv and audio named after YouTube ids, anywhere below `root`: files, or else in tars or zips.

    Files are found as `YTID.*`, `YTID_START.*` or `YTID_START_END.*`, with a Y before or without, the times as seconds
    (30, 30.0, 000030) or milliseconds (30000). A file with a start in its name is the segment itself; of the others,
    one that ends before the segment does, and is as long as the segment, is taken for it where the csv has no other
    segment of the video; any other is cut.

    Args:
        root: Of the audio.
        segments: The csv.
        class_labels: Vocabulary; None: the labels of the csv, named by `ontology`.
        ontology: AudioSet's ontology.json.
        split: Name of the split.
        listing: Paths below `root`, one a line, instead of a walk (hours, for two million files on a network disk).
        overrides: A csv of labels that replace the official ones (labels.py).
        separator: Of several labels in a cell of `overrides`; None: `;`.

    Raises:
        UserError: a missing or malformed file, a label that is not in the vocabulary, a segment twice with other
            labels, or no file at all.
    """
    check_name(split, "--split")
    source = Table(segments)
    if class_labels is not None:
        labels = read_vocabulary(class_labels)
    elif ontology is not None:
        labels = of_ontology(ontology, (mid for row in _segments(source) for mid in row[4]))
    else:
        raise UserError("--class-labels is missing; give AudioSet's class_labels_indices.csv")
    index = {label.id: number for number, label in enumerate(labels)}
    several = of_several_segments((ytid, start) for _, ytid, start, _, _ in _segments(source))
    places: dict[str, Place] = {}
    files = AudioFiles(audio_paths(listed(root, listing) if listing else walk(root), places), plain_times)
    catalog = Catalog("audioset", root, labels)
    catalog.overrides = read_overrides(overrides, labels, separator) if overrides else None
    seen: dict[str, int] = {}  # key: hash of what its row says
    doubles: list[int] = []
    for line, ytid, start, end, mids in _segments(source):
        unknown = [mid for mid in mids if mid not in index]
        if unknown:
            raise source.problem(line, f"label '{unknown[0]}' is not in the vocabulary", "see --class-labels")
        key, count, facts = f"{ytid}_{round(start * 1000)}", len(seen), hash((end, frozenset(mids)))
        if seen.setdefault(key, facts) != facts:
            raise source.problem(
                line,
                f"segment '{ytid}' at {start:g} s came before with another end or other labels",
                "write all labels of a segment in one row",
            )
        if len(seen) == count:
            doubles.append(line)
            continue
        picked = tuple(sorted({index[mid] for mid in mids}))
        if catalog.overrides is not None:
            picked = catalog.overrides.of(key, ytid, picked)
        found = files.find(segment_names(ytid, start, end))
        if not found:
            reason = "missing: no such audio file below --audio-root"
            catalog.miss(Failure(key, "", reason, split, key, line, start, end), picked)
            continue
        whole, clips = (plain_times(ytid), plain_times(f"Y{ytid}")), []
        guess = False if hash(ytid) in several else None  # one file cannot be each of several segments
        for stem, path in found:
            first, last, trimmed = (start, end, guess) if stem in whole else (0.0, end - start, True)
            at = places.get(path)
            clips.append(Clip(key, path, first, last, picked, split, id=ytid, trimmed=trimmed, line=line, at=at))
        catalog.clips.append(clips[0] if len(clips) == 1 else replace(clips[0], others=tuple(clips[1:])))
    if not seen:
        raise UserError(f"{segments}: holds no segments; give an official AudioSet segments csv")
    _say_doubles(source, doubles)
    files.report()
    endings = files.endings
    del seen, files  # before the columns are put together
    _require_files(catalog, lambda: f"{what_is_there(endings)}; files are looked for as YTID.wav, YYTID.wav, "
                   "YTID_30.000.wav, YTID_30000.wav and the like")  # fmt: skip
    return catalog


def esc50(root: Location, split: str) -> Catalog:
    """ESC-50: `meta/esc50.csv` and `audio/`, any audio extension; folds 1 to 5.

    Raises:
        UserError: the csv is missing, lacks a column or contradicts itself, or no file is there.
    """
    check_name(split, "--split")
    source = Table(join(root, "meta/esc50.csv"))
    names: dict[int, str] = {}
    rows: dict[str, tuple[int, int]] = {}
    lines: dict[str, int] = {}
    doubles: list[int] = []
    for line, (name, fold_cell, target_cell, category) in source.records(("filename", "fold", "target", "category")):
        fold = source.integer(line, "fold", fold_cell, 1, MOST_FOLDS)
        target = source.integer(line, "target", target_cell)
        if not name or not category:
            raise source.problem(line, "an empty filename or category", "complete the row")
        if names.setdefault(target, category) != category:
            what = f"target {target} is '{names[target]}' in a row before and '{category}' here"
            raise source.problem(line, what, "correct one of them")
        if lines.setdefault(name, line) != line:
            doubles.append(line)
        if rows.setdefault(name, (fold, target)) != (fold, target):
            raise source.problem(line, f"'{name}' came before with another fold or target", "keep one of the rows")
    twice = next((name for name, count in Counter(names.values()).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{source.path}: category '{twice}' has several targets; correct them")
    catalog = Catalog("esc50", root, [Label(id=names[t], name=names[t].replace("_", " ")) for t in sorted(names)])
    order = {target: number for number, target in enumerate(sorted(names))}
    files = AudioFiles(walk(join(root, "audio")))
    for name, (fold, target) in rows.items():
        stem = Path(name).stem
        found = files.find([stem])
        if not found:
            catalog.miss(Failure(stem, name, MISSING, split, clean_key(stem), lines[name]), [order[target]])
            continue
        label, key = (order[target],), clean_key(stem)
        clips = [Clip(key, path, 0.0, None, label, split, fold, stem, line=lines[name]) for _, path in found]
        catalog.clips.append(replace(clips[0], others=tuple(clips[1:])))
    _say_doubles(source, doubles)
    files.report()
    _require_files(catalog, lambda: f"{what_is_there(files.endings)} in audio/; the names in the csv are matched "
                   "without their endings")  # fmt: skip
    return catalog


def table(
    root: Location, path: Location, class_labels: Location | None, split: str | None, separator: str | None = None
) -> Catalog:
    """A csv with the columns `path` and `labels` (several: `a;b`), and optionally start, end, split, fold, key.

    Args:
        root: Paths are relative to it.
        path: The csv.
        class_labels: Vocabulary csv (index,mid,display_name); None: the labels of the table, sorted.
        split: Take only this split of the `split` column, or name the only one.
        separator: Of several labels in a cell; None: `;`, and labels that hold a comma are refused where no vocabulary
            has them.

    Raises:
        UserError: a missing file or column, a bad number, a label outside the vocabulary, a clip twice with other
            labels, folds that do not count from 1, or a split without files.
    """
    source = Table(path)
    labels = read_vocabulary(class_labels) if class_labels else of_table(source, separator)
    index = spellings(labels)
    catalog = Catalog("csv", root, labels)
    if not is_remote(root) and not local(root).is_dir():
        raise UserError(f"--audio-root {root}: is no directory; give the directory that the paths of {path} begin in")
    there, place = set(walk(root)) if is_remote(root) else None, joiner(root)
    seen: dict[str, int] = {}  # as `claim` keeps it
    # Split and segment: hash of labels and fold. Without a column of keys the key is the segment's.
    segments: dict[str, int] | None = {} if "key" in source.columns(("path", "labels")) else None
    doubles: list[int] = []
    in_splits: dict[str, None] = {}
    again, shared, unlabelled, first_missing = [], [], 0, ""
    folds: Counter[tuple[str, int]] = Counter()
    first_of_fold: dict[tuple[str, int], str] = {}

    def rows() -> Iterator[TableRow]:
        return _table_rows(source, separator, index, split, Names(root, path))

    for line, own, called, name, facts in rows():
        key, same = claim(seen, own, clean_key(called), called, hash(facts))
        if same is False:
            first = next(row for row in rows() if (row[1], row[2]) == (own, called))
            raise _contradiction(source, line, called, facts, first, separator, segments is not None)
        if same:
            doubles.append(line)
            continue
        location, start, end, picked, fold = facts
        in_splits[own] = None
        segment = f"\0{key}"
        if segments is not None:
            segment, digest, count = f"\0{location}\0{start}\0{end}", hash((picked, fold)), len(segments)
            if segments.setdefault(own + segment, digest) != digest:
                first = next(row for row in rows() if (row[1], *row[4][:3]) == (own, location, start, end))
                raise _contradiction(source, line, called, facts, first, separator, True)
            if len(segments) == count:
                again.append(line)
        if any(other + segment in (seen if segments is None else segments) for other in in_splits if other != own):
            shared.append(line)
        file = located(location if is_remote(location) else place(location), there)
        unlabelled += not picked
        group = own, min(fold, 1)
        folds[group] += 1
        if group not in first_of_fold:
            first_of_fold[group] = f"{path}:{line}"
        if not file:
            catalog.miss(Failure(name, name, MISSING, own, key, line, start, end), picked)
            first_missing = first_missing or location
            continue
        guess = False if start else None  # a file is cut where the table says, whatever its length
        clip = Clip(key, file, start, end, picked, own, max(0, fold), name, trimmed=guess, line=line)
        catalog.clips.append(clip)
    if not seen:
        raise UserError(f"{path}: no row of split '{split}'; give a split of its column")
    check_folds(folds, first_of_fold)
    _say_doubles(source, doubles)
    if again:
        log.warning("%s: %d rows list, under another key, what an earlier row lists, such as line %d: such clips count "
                    "several times", path, len(again), again[0])  # fmt: skip
    if shared:
        log.warning("%s: %d clips are in several splits, such as line %d: a model is then tested on what it was "
                    "trained on", path, len(shared), shared[0])  # fmt: skip
    if unlabelled:
        log.warning("%s: %d of %d clips have no label", path, unlabelled, len(seen))
    del seen, segments  # before the columns are put together
    near = _near(root, first_missing, there) if first_missing else ""
    _require_files(catalog, lambda: f"such as '{first_missing}'; {near or what_is_there(_endings(root, there))}")
    if near:
        log.warning("%s: %d listed files are not there, such as '%s'; %s", path, len(catalog.missing), first_missing,
                    near)  # fmt: skip
    return catalog


def folder(root: Location, split: str | None = None) -> Catalog:
    """One folder per class below `root`; every file in it that can be audio is a clip of that class.

    Where `root` holds Speech Commands' lists of held-out files, they make the splits `validation` and `test`, and the
    rest is `train`.

    Args:
        root: The directory.
        split: Name of the split; with such lists, the one to take (None: all).

    Raises:
        UserError: no class folder, or folders that are splits or folds and no classes.
    """
    if split is not None:
        check_name(split, "--split")
    files: dict[str, list[str]] = {}
    inner: dict[str, None] = {}  # folders in the class folders
    stray: list[str] = []
    left_out: Counter[str] = Counter()
    for path in walk(root):
        name, _, below = relative(path, str(root)).partition("/")
        if not below:
            stray.append(name)
            continue
        if kind(split_name(path)[1]) is None:
            left_out[split_name(path)[1]] += 1
            continue
        files.setdefault(name, []).append(path)
        if "/" in below:
            inner.setdefault(below.partition("/")[0])
    noise = files.pop(NOISE_FOLDER, None)
    classes = sorted(files)
    if not classes:
        raise UserError(
            f"--audio-root {root}: holds no folders of audio ({what_is_there(left_out + endings_of(stray))}); a folder "
            "data set has one folder per class"
        )
    refuse_split_folders(root, classes, list(inner))
    if noise is not None:
        log.warning("%s: %s (%d files) is no class and is left out", root, NOISE_FOLDER, len(noise))
    if left_out:
        log.warning("%s: left out as no audio, by their endings: %s", root, what_is_there(left_out).partition(": ")[2])
    outside = [name for name in stray if kind(split_name(name)[1]) == 0]
    if outside:
        log.warning("%s: %d audio files are in no class folder and are left out, such as %s", root, len(outside),
                    outside[0])  # fmt: skip
    if len(classes) == 1:
        log.warning("%s: one class only, '%s'; is this the folder that holds the class folders?", root, classes[0])
    held_out = _held_out(root, stray)
    if held_out and split not in (None, "train", *HELD_OUT.values()):
        raise UserError(f"--split {split}: the lists of {root} make the splits train, {', '.join(HELD_OUT.values())}; "
                        "give one of them, or leave it out for all")  # fmt: skip
    catalog, held = Catalog("folder", root, of_names(classes, root)), set[str]()
    for number, name in enumerate(classes):
        for path in sorted(files[name]):
            inside = relative(path, str(root))
            listed, own = "", split or "train"
            if held_out is not None:
                listed, own = held_out.get(_bare(inside), ("", "train"))
                held.add(listed)
            if split in (None, own):
                catalog.clips.append(Clip(clean_key(inside), path, 0.0, None, (number,), own, 0, inside))
    for inside, own in (held_out or {}).values():
        if inside not in held and split in (None, own):
            name = inside.partition("/")[0]
            catalog.miss(Failure(inside, inside, MISSING, own), [classes.index(name)] if name in files else [])
    _require_files(catalog, lambda: "see its list of held-out files")
    return catalog


def clean_key(name: str) -> str:
    """A sample key out of any name: [A-Za-z0-9_-], no dot, short; a changed name gets a hash to stay unique.

    A short ending is left out: two names that differ by it alone have one key, which `claim` tells apart.
    """
    stem, key = _letters(name)
    if key and (key == name or (key == stem and "/" not in name and len(name) - len(stem) <= 5)):
        return key
    return _hashed_key(name)


def _hashed_key(name: str) -> str:
    return f"{_letters(name)[1]}-{hashlib.blake2b(name.encode('utf-8', 'surrogateescape'), digest_size=5).hexdigest()}"


def _letters(name: str) -> tuple[str, str]:
    """A name without its ending, and what of that a key can hold."""
    stem = name.rsplit(".", 1)[0] if "." in name else name
    return stem, re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_")[:KEY_LIMIT]


def claim(seen: dict[str, int], split: str, key: str, name: str, facts: int) -> tuple[str, bool | None]:
    """The key of a clip, which no other name of its split has.

    Args:
        seen: By split and key, the hashes of the name that has it and of what was said of it, in one number.
        split: Of the clip.
        key: That it gets where no other name has it; else one with a hash.
        name: Of which the key was made.
        facts: Hash of what is said of the clip.

    Returns:
        The key; and None where the name is new, else whether the same was said of it before.
    """
    named, said = hash(name) & HASH, facts & HASH
    for hashed in (False, True):
        key, count = _hashed_key(name) if hashed else key, len(seen)
        before = seen.setdefault(f"{split}\0{key}", named << 64 | said)
        if len(seen) > count:
            return key, None
        if before >> 64 == named:
            return key, before & HASH == said
    return key, False


def located(path: str, there: set[str] | None) -> str:
    """A file as it is spelled where it lies, or a member of one; "": there is none.

    Some systems write an accented letter of a file's name as one sign and some as two, and tables come from others.

    Args:
        path: As it is listed, from the root of the file system on, or a URL.
        there: All files of a store; None: the disk is asked.
    """
    forms = [] if path.isascii() else [unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)]
    for spelled in dict.fromkeys([path, *forms]):
        holder = split_source(spelled)[0]
        if holder in there if there is not None else os.path.isfile(holder):
            return spelled
    return ""


def _segments(source: Table) -> Iterator[tuple[int, str, float, float, list[str]]]:
    """(line, id, start, end, label ids) of an official segments csv."""
    for line, row in source.rows():
        try:
            ytid, start_cell, end_cell, mids_cell = row
        except ValueError as error:
            row_text = ",".join(row)[:80]
            raise source.problem(
                line, f"'{row_text}' is not 'YTID, start, end, \"labels\"'", "give an official AudioSet segments csv"
            ) from error
        if ytid == "YTID":
            continue  # the header, without its #
        if SEGMENT_ID.fullmatch(ytid) is None:
            raise source.problem(line, f"'{ytid[:40]}' is no YouTube id", "give an official AudioSet segments csv")
        start, end = source.seconds(line, "start", start_cell), source.seconds(line, "end", end_cell)
        if end <= start:
            raise source.problem(line, f"end {end:g} is not after start {start:g}", "correct it")
        mids = [mid.strip() for mid in mids_cell.split(",")]
        if not all(mids):
            raise source.problem(line, f"labels '{mids_cell[:40]}' with an empty one", "correct the row, or delete it")
        yield line, ytid, start, end, mids


def of_several_segments(segments: Iterable[tuple[str, float]]) -> set[int]:
    """Hashes of the videos of which several segments, of other starts, are listed; 16 bytes of memory a segment."""
    pairs = ((hash(ytid), round(start * 1000)) for ytid, start in segments)
    found = np.fromiter(pairs, np.dtype((np.int64, 2)))
    video, start = found[np.lexsort(found.T[::-1])].T
    again = (video[1:] == video[:-1]) & (start[1:] != start[:-1])
    return set(video[1:][again].tolist())


TableRow = tuple[int, str, str, str, tuple[str, float, float | None, tuple[int, ...], int]]


class Names:
    """What shards call the files of a table: nothing of where they lie on this machine.

    Args:
        root: Of the audio.
        table: The csv.
    """

    def __init__(self, root: Location, table: Location) -> None:
        self._roots = _prefixes(root)
        self._folders = _prefixes(str(table).rpartition("/")[0] if is_remote(table) else local(table).parent)
        self._outside: dict[str, str] = {}  # names of files that lie below neither
        self._count: Counter[str] = Counter()

    def of(self, path: str) -> tuple[str, str]:
        """Of a path as it is listed: where the file is, relative to the root or absolute; and its name.

        The name is the path where that is relative, else its way from the root or from the table's folder, else its
        last part: the second of several such files is NAME#2, by their order in the table.
        """
        if not is_remote(path) and not os.path.isabs(path):
            return path, path
        plain = path if is_remote(path) else os.path.normpath(path)
        for prefix in self._roots:
            if plain.startswith(prefix):
                return plain[len(prefix) :], plain[len(prefix) :]
        for prefix in self._folders:
            if plain.startswith(prefix):
                return path, plain[len(prefix) :]
        name = self._outside.get(plain)
        if name is None:
            last = re.split(r"[?#]", plain, maxsplit=1)[0] if is_remote(path) else plain  # no signature of a URL
            last = last.rstrip("/").rpartition("/")[2]
            self._count[last] += 1
            name = self._outside[plain] = last if self._count[last] == 1 else f"{last}#{self._count[last]}"
        return path, name


def _prefixes(folder: Location) -> list[str]:
    """How absolute paths below a folder begin: by its name, or by where links lead."""
    if is_remote(folder):
        return [f"{str(folder).rstrip('/')}/"]
    return [f"{place.rstrip('/')}/" for place in (os.path.abspath(local(folder)), os.path.realpath(local(folder)))]


def _table_rows(
    source: Table, separator: str | None, index: dict[str, int], split: str | None, called: Names
) -> Iterator[TableRow]:
    """(line, split, name of the clip, name of the file, (path, start, end, labels, fold)) of a table.

    A clip's name is its cell of keys, or else its file's and its start. A fold is -1 where the cell is empty.
    """
    names: set[str] = set()
    columns = (("path", "labels"), ("start", "end", "split", "fold", "key"))
    for line, (path, labels, start_cell, end_cell, split_cell, fold_cell, key_cell) in source.records(*columns):
        own = split_cell.strip() or split or "train"
        if own not in names:
            names.add(check_name(own, f"{source.path}:{line}: split" if split_cell.strip() else "--split"))
        if split is not None and own != split:
            continue
        if not path:
            raise source.problem(line, "an empty path", "name the file, or delete the row")
        start = source.seconds(line, "start", start_cell) if start_cell.strip() else 0.0
        end = source.seconds(line, "end", end_cell) if end_cell.strip() else None
        if end is not None and end <= start:
            raise source.problem(line, f"end {end:g} is not after start {start:g}", "correct it")
        fold = source.integer(line, "fold", fold_cell, 0, MOST_FOLDS) if fold_cell.strip() else -1
        picked = tuple(sorted({index[name] for name in source.labels(line, labels, separator, index)}))
        location, name = called.of(path)
        clip = key_cell or name + (f"-{start:g}" if start else "")
        yield line, own, clip, name, (location, start, end, picked, fold)


def _contradiction(
    source: Table, line: int, key: str, facts: tuple[Any, ...], first: TableRow, separator: str | None, keys: bool
) -> UserError:
    """How a row differs from the first one of its key, or of its segment under another key; `keys`: they are given."""
    names = ("path", "start", "end", "labels", "fold")
    differs = next((name for name, old, new in zip(names, first[4], facts, strict=True) if old != new), "row")
    if differs == "path":
        what = f"'{facts[0]}' gets the same key '{key}' as '{first[4][0]}' in line {first[0]}"
    else:
        other = "other labels" if differs == "labels" else f"another {differs}"
        under = "" if first[2] == key else f" under the key '{first[2]}'"
        what = f"'{facts[0]}' came before{under} with {other}, in line {first[0]}"
    remedies = {
        "labels": f"write all labels of a clip in one row, such as dog{separator or SEPARATOR}bark",
        "fold": "keep one of the rows",
    }
    apart = "give each its own key" if keys else "tell them apart by a column key"
    return source.problem(line, what, remedies.get(differs, apart))


def check_folds(folds: Counter[tuple[str, int]], first: dict[tuple[str, int], str]) -> None:
    """Refuses fold 0 beside others, and says where a split's clips have folds only in part.

    Args:
        folds: Clips by split and fold: -1 none is given, 0 that number, 1 any other.
        first: What lists the first of each, in the order of the clips.

    Raises:
        UserError: as said.
    """
    zero = next((where for (_, fold), where in first.items() if fold == 0), None)
    if zero is not None and any(fold > 0 for _, fold in folds):
        what = "fold 0 beside others: folds count from 1, and 0 would be in every training set"
        raise UserError(f"{zero}: {what}; add 1 to the whole column")
    for split in dict.fromkeys(split for split, fold in first if fold <= 0):
        where = next(where for (name, fold), where in first.items() if name == split and fold <= 0)
        if folds[split, 1]:
            log.warning("%s: %d clips of split '%s' have no fold and %d have one: those without are in every "
                        "training set", where, folds[split, -1] + folds[split, 0], split, folds[split, 1])  # fmt: skip


def _bare(name: str) -> str:
    """A path without its ending: a list names the files that were there before somebody encoded them anew."""
    return name.removesuffix(split_name(name)[1])


def _held_out(root: Location, names: Sequence[str]) -> dict[str, tuple[str, str]] | None:
    """Path and split of each file in Speech Commands' lists, by its path without ending; None: there are no lists."""
    lists = [name for name in HELD_OUT if name in names]
    found: dict[str, tuple[str, str]] = {}
    for name in lists:
        source = Table(join(root, name))
        for line, text in enumerate(source.lines(), start=1):
            inside = text.strip().removeprefix("./")
            if inside and found.setdefault(_bare(inside), (inside, HELD_OUT[name]))[1] != HELD_OUT[name]:
                raise source.problem(line, f"'{inside[:80]}' is in {next(iter(HELD_OUT))} too", "keep it in one list")
    if lists:
        log.info("%s: splits by %s; the rest is train", root, " and ".join(lists))
    return found if lists else None


def _require_files(catalog: Catalog, said: Callable[[], str]) -> None:
    """Refuses a split none of whose clips has a file.

    Args:
        catalog: All that was listed.
        said: Makes the words on what is there instead.

    Raises:
        UserError: there is one.
    """
    empty = catalog.empty_split()
    if empty is not None:
        count = len(catalog.missing.rows(empty))
        raise UserError(
            f"--audio-root {catalog.root}: 0 of {count} listed clips of split '{empty}' have a file: {said()}"
        )


def _say_doubles(source: Table, doubles: Sequence[int]) -> None:
    if doubles:
        log.warning("%s: %d rows repeat an earlier one and count once, such as line %d", source.path, len(doubles),
                    doubles[0])  # fmt: skip


def _near(root: Location, path: str, there: set[str] | None) -> str:
    """What a listed path that is not there may have meant."""
    straight = path.replace("\\", "/")
    folder_ = os.path.dirname(join(root, straight))
    if there is not None:
        names = [name.rpartition("/")[2] for name in there if name.rpartition("/")[0] == folder_]
    else:
        try:
            names = [entry.name for entry in islice(os.scandir(folder_), LOOK_AROUND)]
        except OSError:
            names = []
    wanted = straight.rpartition("/")[2].strip().lower()
    same = sorted(
        (name for name in names if wanted in (name.lower(), split_name(name)[0].lower())
         or (split_name(name)[0].lower() == split_name(wanted)[0] and kind(split_name(name)[1]) == 0)),
        key=lambda name: (name.lower() != wanted, kind(split_name(name)[1]) != 0, name),
    )  # fmt: skip
    if not same:
        return ""
    why = "paths with backslashes are of Windows: write /, and " if "\\" in path else ""
    why = why or ("names lack their endings; " if not split_name(wanted)[1] else "")
    return f"{why}did you mean '{(straight.rpartition('/')[0] + '/').lstrip('/')}{same[0]}'?"


def _endings(root: Location, there: set[str] | None) -> Counter[str]:
    return endings_of(islice(walk(root) if there is None else iter(there), LOOK_AROUND))

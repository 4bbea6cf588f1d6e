"""A data set on disk -> the list of its clips and its label vocabulary.

In: official csv files, a table, or a folder of folders, on disk or at fsspec URLs. Out: a `Catalog`.
Nothing is decoded here; a clip whose file is missing is an entry of `missing`, never a silent gap.

Scale: one pass over the csv and one over the directory tree. Clips are kept as columns (columns.py); the
largest passing cost is the table of file names, about 0.3 KB a file.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from pipeline.data.manifest import Label
from pipeline.data.storage import Location, attempt, file_system, is_remote, join, local, read_bytes
from pipeline.errors import UserError
from pipeline.flow import Clip
from shard_tools.columns import Clips, Failure, Failures, relative
from shard_tools.overrides import Overrides, read_overrides

KEY_LIMIT = 60  # a tar member name of at most 100 bytes fits one header


@dataclass(slots=True)
class Catalog:
    """What a data set lists.

    Attributes:
        dataset: Its name, for the manifest.
        root: Directory that clip paths are relative to.
        labels: Vocabulary; a clip's labels are indices into it.
        clips: Clips whose file was found; a sequence of `Clip` in columns.
        missing: Listed clips without a file.
        missing_labels: How often each label index occurs among them, by split.
        overrides: Labels that replace the official ones; already applied.
    """

    dataset: str
    root: Location
    labels: list[Label]
    clips: Clips = field(init=False)
    missing: Failures = field(default_factory=Failures)
    missing_labels: dict[str, Counter[int]] = field(default_factory=dict)
    overrides: Overrides | None = None

    def __post_init__(self) -> None:
        self.clips = Clips(str(self.root))

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in order of appearance."""
        return list(dict.fromkeys([*self.clips.splits, *self.missing.splits]))

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


def audioset(
    root: Location,
    segments: Location,
    class_labels: Location | None,
    ontology: Path | None,
    split: str,
    listing: Location | None = None,
    overrides: Location | None = None,
) -> Catalog:
    """AudioSet's official csv and audio files named after YouTube ids, anywhere below `root`.

    Files are found as `YTID.*`, `YTID_START.*` (seconds or milliseconds) or `YYTID.*`. A file with a
    start in its name is the segment itself; of the others, one that is too short to reach the
    segment's end is taken for a trimmed segment, a longer one is cut at the segment.

    Args:
        root: Of the audio.
        segments: The csv.
        class_labels: Vocabulary; None: the labels of the csv, named by `ontology`.
        ontology: AudioSet's ontology.json.
        split: Name of the split.
        listing: Paths below `root`, one a line, instead of a walk (hours, for two million files on a network disk).
        overrides: A csv of labels that replace the official ones (overrides.py).

    Raises:
        UserError: a missing or malformed file, or a label that is not in the vocabulary.
    """
    labels = _audioset_labels(segments, class_labels, ontology)
    index = {label.id: number for number, label in enumerate(labels)}
    files = _files_by_stem(_listed(root, listing) if listing else _walk(root))
    catalog = Catalog("audioset", root, labels)
    catalog.overrides = read_overrides(overrides, labels) if overrides else None
    seen: set[str] = set()
    for line, ytid, start, end, mids in _segments(segments):
        unknown = [mid for mid in mids if mid not in index]
        if unknown:
            raise UserError(f"{segments}:{line}: label '{unknown[0]}' is not in the vocabulary; see --class-labels")
        key = f"{ytid}_{round(start * 1000)}"
        if key in seen:
            continue
        seen.add(key)
        picked = tuple(sorted(index[mid] for mid in mids))
        if catalog.overrides is not None:
            picked = catalog.overrides.of(key, ytid, picked)
        found = next(((stem, cut) for stem, cut in _audioset_stems(ytid, start, end) if stem in files), None)
        if found is None:
            failure = Failure(key, "", "missing: no such audio file below --audio-root", split)
            catalog.miss(failure, picked)
            continue
        stem, is_segment = found
        catalog.clips.append(
            Clip(
                key=key,
                path=files[stem],
                start=0.0 if is_segment else start,
                end=end - start if is_segment else end,
                labels=picked,
                split=split,
                id=ytid,
                trimmed=True if is_segment else None,
            )
        )
    return catalog


def esc50(root: Location, split: str) -> Catalog:
    """ESC-50: `meta/esc50.csv` and `audio/`, any audio extension; folds 1 to 5.

    Raises:
        UserError: the csv is missing or lacks a column.
    """
    table = join(root, "meta/esc50.csv")
    rows = list(_read_csv(table, ("filename", "fold", "target", "category")))
    names = {int(row["target"]): row["category"] for row in rows}
    catalog = Catalog("esc50", root, [Label(id=names[t], name=names[t].replace("_", " ")) for t in sorted(names)])
    order = {target: number for number, target in enumerate(sorted(names))}
    files = _files_by_stem(_walk(join(root, "audio")))
    for row in rows:
        stem = Path(row["filename"]).stem
        if stem not in files:
            failure = Failure(stem, row["filename"], "missing: no such audio file", split)
            catalog.miss(failure, [order[int(row["target"])]])
            continue
        label = (order[int(row["target"])],)
        clip = Clip(clean_key(stem), files[stem], 0.0, None, label, split, int(row["fold"]), stem)
        catalog.clips.append(clip)
    return catalog


def table(root: Location, path: Location, class_labels: Location | None, split: str | None) -> Catalog:
    """A csv with the columns `path` and `labels` (several: `a;b`), and optionally start, end, split, fold, key.

    Args:
        root: Paths are relative to it.
        path: The csv.
        class_labels: Vocabulary csv (index,mid,display_name); None: the labels of the table, sorted.
        split: Take only this split of the `split` column, or name the only one.

    Raises:
        UserError: a missing file or column, a bad number, or a label outside the vocabulary.
    """
    rows = list(_read_csv(path, ("path", "labels")))
    names = sorted({name for row in rows for name in _names(row["labels"])})
    labels = _vocabulary(class_labels) if class_labels else [Label(id=name, name=name) for name in names]
    index = {spelling: number for number, label in enumerate(labels) for spelling in (label.name, label.id)}
    catalog = Catalog("csv", root, labels)
    there = set(_walk(root)) if is_remote(root) else None
    for line, row in enumerate(rows, start=2):
        own = row.get("split") or split or "train"
        if split is not None and own != split:
            continue
        unknown = [name for name in _names(row["labels"]) if name not in index]
        if unknown:
            raise UserError(f"{path}:{line}: label '{unknown[0]}' is not in {class_labels}; add it there or correct it")
        file = row["path"] if is_remote(row["path"]) else join(root, row["path"])
        if file not in there if there is not None else not os.path.isfile(file):
            failure = Failure(row["path"], row["path"], "missing: no such audio file", own)
            catalog.miss(failure, {index[name] for name in _names(row["labels"])})
            continue
        start, end, fold = (_number(path, line, row, name) for name in ("start", "end", "fold"))
        picked = tuple(sorted({index[name] for name in _names(row["labels"])}))
        key = row.get("key") or f"{row['path']}" + (f"-{start:g}" if start else "")
        catalog.clips.append(Clip(clean_key(key), file, start or 0.0, end, picked, own, int(fold or 0), row["path"]))
    return catalog


def folder(root: Location, split: str) -> Catalog:
    """One folder per class below `root`; every file in it is a clip of that class.

    Raises:
        UserError: no class folder.
    """
    files: dict[str, list[str]] = {}
    for path in _walk(root):
        name, _, below = relative(path, str(root)).partition("/")
        if below:
            files.setdefault(name, []).append(path)
    classes = sorted(files)
    if not classes:
        raise UserError(f"--audio-root {root}: holds no folders; a folder data set has one folder per class")
    catalog = Catalog("folder", root, [Label(id=name, name=name) for name in classes])
    for number, name in enumerate(classes):
        for path in sorted(files[name]):
            inside = relative(path, str(root))
            catalog.clips.append(Clip(clean_key(inside), path, 0.0, None, (number,), split, 0, inside))
    return catalog


def clean_key(name: str) -> str:
    """A sample key out of any name: [A-Za-z0-9_-], no dot, short; a changed name gets a hash to stay unique."""
    stem = name.rsplit(".", 1)[0] if "." in name else name
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_")[:KEY_LIMIT]
    if key == name or (key == stem and "/" not in name and len(name) - len(stem) <= 5):
        return key
    return f"{key}-{hashlib.blake2b(name.encode('utf-8', 'surrogateescape'), digest_size=5).hexdigest()}"


def _segments(path: Location) -> Iterator[tuple[int, str, float, float, list[str]]]:
    """(line, id, start, end, label ids) of an official segments csv."""
    with _open(path) as file:
        reader = csv.reader(file, skipinitialspace=True)
        for row in reader:
            if not row or row[0].startswith("#"):
                continue
            try:
                ytid, start, end, mids = row[0], float(row[1]), float(row[2]), row[3].split(",")
            except (IndexError, ValueError) as error:
                raise UserError(
                    f"{path}:{reader.line_num}: '{','.join(row)}' is not 'YTID, start, end, \"labels\"'; "
                    "give an official AudioSet segments csv"
                ) from error
            yield reader.line_num, ytid, start, end, mids


def _audioset_labels(segments: Location, class_labels: Location | None, ontology: Path | None) -> list[Label]:
    if class_labels is not None:
        return _vocabulary(class_labels)
    if ontology is None:
        raise UserError("--class-labels is missing; give AudioSet's class_labels_indices.csv")
    try:
        names = {node["id"]: node["name"] for node in json.loads(ontology.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--ontology {ontology}: {error}; give AudioSet's ontology.json") from error
    mids = {mid for row in _segments(segments) for mid in row[4]}
    return [Label(id=mid, name=names.get(mid, mid)) for mid in sorted(mids)]


def _vocabulary(path: Location) -> list[Label]:
    rows = sorted(_read_csv(path, ("index", "mid", "display_name")), key=lambda row: int(row["index"]))
    return [Label(id=row["mid"], name=row["display_name"]) for row in rows]


def _audioset_stems(ytid: str, start: float, end: float) -> Iterator[tuple[str, bool]]:
    """Names a clip's file may have, and whether the name says that it is the segment itself."""
    starts = dict.fromkeys([f"{start:g}", f"{start:.3f}", f"{start:.1f}", f"{round(start * 1000)}"])
    for name in (ytid, f"Y{ytid}"):
        for text in starts:
            yield f"{name}_{text}", True
            yield f"{name}_{text}_{end:g}", True
            yield f"{name}_{text}_{end:.3f}", True
            yield f"{name}_{text}_{round(end * 1000)}", True
        yield name, False


def _files_by_stem(paths: Iterator[str]) -> dict[str, str]:
    """Path of each stem; of several files of one stem the first in the order of the alphabet."""
    files: dict[str, str] = {}
    for path in paths:
        stem = os.path.splitext(os.path.basename(path))[0]
        if path < files.get(stem, "\U0010ffff"):
            files[stem] = path
    return files


def _listed(root: Location, listing: Location) -> Iterator[str]:
    with _open(listing) as file:
        for line in file:
            if name := line.rstrip("\r\n").removeprefix("./"):
                yield join(root, name)


def _walk(root: Location) -> Iterator[str]:
    """Paths of all files below `root` but hidden ones, each folder's in the order of the alphabet."""
    if is_remote(root):
        system, path = file_system(root)
        try:
            found: list[str] = attempt(lambda: system.find(path), str(root))
        except OSError as error:
            raise UserError(f"--audio-root {root}: {error}; give the directory that holds the audio") from error
        yield from (join(root, name[len(path) :].lstrip("/")) for name in found if "/." not in name)
        return
    try:
        os.scandir(root).close()
    except OSError as error:
        raise UserError(f"--audio-root {root}: {error.strerror}; give the directory that holds the audio") from error
    for folder_, directories, names in os.walk(root):
        directories.sort()
        yield from (os.path.join(folder_, name) for name in sorted(names) if not name.startswith("."))


def _open(path: Location) -> TextIO:
    try:
        if not is_remote(path):
            return local(path).open(encoding="utf-8-sig", newline="")
        return io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding="utf-8-sig", newline="")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the path") from error


def _read_csv(path: Location, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    with _open(path) as file:
        reader = csv.DictReader(file)
        absent = [column for column in columns if column not in (reader.fieldnames or [])]
        if absent:
            raise UserError(
                f"{path}: no column '{absent[0]}' (has {', '.join(reader.fieldnames or []) or 'none'}); "
                f"it needs {', '.join(columns)}"
            )
        yield from reader


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(";") if name.strip()]


def _number(path: Location, line: int, row: dict[str, str], name: str) -> float | None:
    text = row.get(name) or ""
    try:
        return float(text) if text else None
    except ValueError as error:
        raise UserError(f"{path}:{line}: {name} = '{text}' is not a number; correct it or leave it empty") from error
